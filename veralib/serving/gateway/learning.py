"""Learning: what the routes of files and jobs and their runner share. One for an application, at app.state.learning."""

import asyncio
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Any

from fastapi import Depends, FastAPI, Request

from ...config import VeraConfig
from ...errors import ConfigError
from ...store import Store
from .files import Uploads
from .jobs import Jobs
from .records import Records


@dataclass(frozen=True)
class LearningSettings:
    """How jobs train. ConfigError lists every fault."""

    model: str
    """The base model that trains: hub id or folder; the one that the engine serves."""
    base_name: str
    """What clients call it."""
    revision: str | None = None
    dtype: str = "float32"
    quantise: str | None = None
    rank: int = 64
    targets: str | tuple[str, ...] = "all-linear"
    basis_seed: int = 0
    options: Mapping[str, Any] = field(default_factory=dict)
    """More fields of VeraConfig, for adapters that begin anew; those that go on keep their own."""
    lr: float = 1e-2
    """Learning rate where learning_rate_multiplier is 1."""
    epochs: int = 3
    batch_size: int = 4
    """Both where a job says "auto"."""
    max_length: int = 256
    """Tokens of a chat; what is longer is cut."""
    held_out: float = 0.2
    """Share of the rows that only measures, where a job has no validation file."""
    slots: int = 256
    batch_rows: int = 64
    threads: int = 0
    """Threads of a run; 0: as many as there are cores."""
    nice: int = 10
    """How far a run stands back behind generation, 0 to 19."""
    gather_seconds: float = 2.0
    """How long a job waits for others to share its run."""
    lease_seconds: float = 60.0
    """A runner that didn't renew its lease for so long is dead, and another takes its run up."""
    progress_seconds: float = 10.0
    max_owners: int = 10_000
    """Jobs of a run."""
    attempts: int = 3
    """Starts of a run that fails, before its jobs do."""
    max_waiting: int = 100
    """Jobs of a tenant that haven't ended."""
    max_files: int = 1000
    """Files of a tenant."""
    max_rows: int = 100_000
    max_line: int = 2**20
    """Bytes."""

    def __post_init__(self) -> None:
        faults = [
            f"{name} is {getattr(self, name)!r}, expected a number above 0"
            for name in ("lr", "epochs", "batch_size", "max_length", "slots", "lease_seconds", "attempts", "max_owners")
            if not getattr(self, name) > 0
        ]
        if not 0 < self.held_out < 1:
            faults.append(f"held_out is {self.held_out!r}, expected a share between 0 and 1: no version goes live unmeasured")
        if faults:
            raise ConfigError("jobs: " + "; ".join(faults) + ".")
        self.config()

    def config(self) -> VeraConfig:
        """What an adapter that begins anew is."""
        return VeraConfig(rank=self.rank, targets=self.targets, seed=self.basis_seed, **self.options)


class Learning:
    """The records of files and jobs, the store that is served, and the settings."""

    def __init__(self, state: str | Path, store: Store, settings: LearningSettings) -> None:
        self.records, self.store, self.settings = Records(state), store, settings
        self.uploads = Uploads(self.records, settings.max_line, settings.max_rows, settings.max_files)
        self.jobs = Jobs(self.records, settings.max_waiting)


def install(app: FastAPI, learning: Learning) -> None:
    """Adds what learns to an application: the runner, from start to end, and what a deletion removes."""
    from .deletion import delete_owner
    from .runner import Runner

    runner = Runner(learning)

    async def run() -> None:
        runner.start()
        try:
            await asyncio.Event().wait()  # until the application ends
        finally:
            await asyncio.shield(asyncio.to_thread(runner.stop))

    async def forget(name: str) -> dict[str, int]:
        return await asyncio.to_thread(delete_owner, learning, name)

    app.state.learning, app.state.runner = learning, runner
    app.state.background.append(run)
    app.state.on_delete.append(forget)


def learning_of(request: Request) -> Learning:
    """A dependency."""
    return request.app.state.learning


Here = Annotated[Learning, Depends(learning_of)]
