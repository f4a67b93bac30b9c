"""Streams: several requests of one client on one event loop."""

import asyncio
import contextlib
from collections.abc import AsyncIterator, Sequence
from typing import Any

from .engine import EmbeddedEngine
from .request import Piece, Running
from .sampling import Sampling


class Streams:
    """Several requests of one client, whose pieces come as they are made: (which, piece). Leaving the `with` cancels the rest."""

    def __init__(self, engine: EmbeddedEngine) -> None:
        self.engine = engine
        self.running: list[Running] = []
        self._came: asyncio.Queue[int] = asyncio.Queue()

    async def open(self, asked: Sequence[tuple[Sequence[int], Sampling]], model: str | None) -> None:
        """Starts them. Raises what submit() raises, and then none of them runs."""
        here = asyncio.get_running_loop()

        def tell(i: int) -> None:
            with contextlib.suppress(RuntimeError):  # the event loop was closed: nobody listens any more
                here.call_soon_threadsafe(self._came.put_nowait, i)

        def start() -> None:
            for i, (prompt, sampling) in enumerate(asked):
                self.running.append(self.engine.submit(prompt, sampling, model, lambda i=i: tell(i)))  # type: ignore[misc]

        starting = here.run_in_executor(self.engine.readers, start)
        try:
            await asyncio.shield(starting)
        except asyncio.CancelledError:  # the client left while its adapter was read
            starting.add_done_callback(self._left)
            raise

    def _left(self, starting: Any) -> None:
        if not starting.cancelled():
            starting.exception()  # looked at, so that nobody warns of it
        self.close()

    async def __aiter__(self) -> AsyncIterator[tuple[int, Piece]]:
        still = set(range(len(self.running)))
        while still:
            i = await self._came.get()
            piece = self.running[i].take() if i in still else None
            if piece is None:
                continue
            if piece.finish:
                still.discard(i)
                self.engine.cancel(self.running[i])
            yield i, piece

    def close(self) -> None:
        """Cancels what still runs."""
        for running in self.running:
            self.engine.cancel(running)

    async def __aenter__(self) -> "Streams":
        return self

    async def __aexit__(self, *_: Any) -> None:
        self.close()
