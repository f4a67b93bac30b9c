"""What was deleted, told to every gateway on a state folder: each takes it out of its own engine's memory.

    STATE/deleted/<first 32 hex digits of SHA-256(name)>    empty, an hour at most

The name itself isn't kept: the owner asked for it to be gone.
"""

import asyncio
import contextlib
import hashlib
import os
import time
from pathlib import Path

from .client import EngineClient
from .errors import LOG, ApiError

LOOK_SECONDS = 1.0
KEPT_SECONDS = 3600.0


class Deletions:
    """note: this gateway deleted a name. follow: forgets in the engine what any gateway noted, until cancelled."""

    def __init__(self, state: str | os.PathLike[str]) -> None:
        self.folder = Path(state) / "deleted"
        self.folder.mkdir(parents=True, exist_ok=True, mode=0o700)
        self._done: dict[str, int] = {}  # what was deleted while this gateway was away is looked at too

    def note(self, name: str, done: bool = True) -> None:
        """For the other gateways; and for this one where its own engine isn't done with it."""
        path = self.folder / mark(name)
        path.touch()
        if done:
            self._done[path.name] = path.stat().st_mtime_ns

    async def follow(self, client: EngineClient) -> None:
        """Looks every second."""
        while True:
            await asyncio.sleep(LOOK_SECONDS)
            try:
                await self.look(client)
            except (ApiError, OSError) as e:  # the engine is away: what it held is gone, or asked for again
                LOG.debug("deletions: %s", e)

    async def look(self, client: EngineClient) -> int:
        """Forgets what is new in the folder; returns how many versions that were. ApiError leaves it for the next look."""
        found, new = {}, set()
        with os.scandir(self.folder) as entries:
            for entry in entries:
                with contextlib.suppress(FileNotFoundError):  # another gateway tidied up
                    changed = entry.stat().st_mtime_ns
                    if time.time() - changed / 1e9 > KEPT_SECONDS:
                        os.unlink(entry.path)
                        continue
                    found[entry.name] = changed
                    if self._done.get(entry.name) != changed:
                        new.add(entry.name)
        gone = 0
        if new:
            names = {n.rpartition("@")[0] for n in await client.resident()}
            for name in names:
                if mark(name) in new:
                    gone += await client.forget(name)
        self._done = found
        return gone


def mark(name: str) -> str:
    """A name's file."""
    return hashlib.sha256(name.encode("utf-8", "surrogatepass")).hexdigest()[:32]
