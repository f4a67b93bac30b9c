"""Where the owners in a slot stand, written down now and then: an interrupted run goes on from there."""

import hashlib
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from . import folder as files
from .fleet import Fleet
from .progress import STOPPED, Stop
from .trainer import FleetTrainer

STANDING_SECONDS = 60.0


class Standing:
    """Writes where the owners in a slot stand, every STANDING_SECONDS and before a stop; whose: a process's rank, or "shared".

    also: called after each batch.
    """

    def __init__(
        self,
        output: Path,
        whose: int | str,
        fleet: Fleet,
        stop: Stop | None = None,
        also: Callable[[FleetTrainer], None] = lambda trainer: None,
    ) -> None:
        self.output, self.whose, self.last, self.stop, self.also = output, whose, time.monotonic(), stop or Stop(), also
        hashes = fleet.vera.inside.hashes_of(fleet.bank.layout.by_layer)
        self.base = hashlib.sha256(repr(sorted(hashes.items())).encode()).hexdigest()[:16]

    def __call__(self, trainer: FleetTrainer) -> None:
        self.also(trainer)
        if self.stop.asked or time.monotonic() - self.last >= STANDING_SECONDS:
            state = {name: {**mine, "base": self.base} for name, mine in trainer.state().items()}
            files.save_standing(files.standing_file(self.output, self.whose), state)
            self.last = time.monotonic()
        if self.stop.asked:
            raise SystemExit(STOPPED)

    def saved(self) -> dict[str, dict[str, Any]]:
        """What an interrupted run left, on these base weights."""
        found = files.standing(self.output, shared=self.whose == "shared")
        return {name: state for name, state in found.items() if state["base"] == self.base}
