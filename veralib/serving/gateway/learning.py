"""Learning: what the routes of files and jobs and their runner share. One for an application, at app.state.learning."""

import asyncio
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Annotated, Any

from fastapi import Depends, FastAPI, Request

from ...config import VeraConfig
from ...errors import ConfigError
from ...store import Store
from .files import Uploads
from .jobs import Jobs
from .keys import Keys
from .records import Records


@dataclass(frozen=True)
class LearningSettings:
    """How jobs train. ConfigError lists every fault."""

    model: str | None
    """The base model that trains: hub id or folder; the one that the engine serves. None: no job is taken."""
    base_name: str
    """What clients call it."""
    revision: str | None = None
    dtype: str = "float32"
    quantise: str | None = None
    rank: int | Mapping[str, int] = 64
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
    max_examples: int = 1_000_000
    """Rows that a job may learn, each as often as there are epochs."""
    max_files: int = 1000
    max_file_bytes: int = 10 * 2**30
    """Of all files of a tenant."""
    job_days: float = 90.0
    """How long a job is remembered after its end; 0: for ever."""
    max_rows: int = 100_000
    max_line: int = 2**20
    """Bytes."""

    def __post_init__(self) -> None:
        faults = [
            f"{name} is {getattr(self, name)!r}, expected a number above 0"
            for name in (
                *("lr", "epochs", "batch_size", "max_length", "slots", "lease_seconds", "attempts", "max_owners"),
                *("max_examples", "max_files", "max_file_bytes"),
            )
            if not _is_positive(getattr(self, name))
        ]
        if not _is_positive(self.held_out) or self.held_out >= 1:
            faults.append(f"held_out is {self.held_out!r}, expected a share between 0 and 1: no version goes live unmeasured")
        if faults:
            raise ConfigError("jobs: " + "; ".join(faults) + ".")
        self.config()

    def config(self) -> VeraConfig:
        """What an adapter that begins anew is."""
        return VeraConfig(rank=self.rank, targets=self.targets, seed=self.basis_seed, **self.options)


def _is_positive(value: Any) -> bool:
    return isinstance(value, (int, float)) and value > 0


class Learning:
    """The records of files and jobs, the store that is served, and the settings."""

    def __init__(self, state: str | Path, store: Store, settings: LearningSettings, keys: Keys | None = None) -> None:
        """keys: None where they are off."""
        self.records, self.store, self.settings = Records(state), store, settings
        bounds = settings.max_line, settings.max_rows, settings.max_files, settings.max_file_bytes
        self.uploads = Uploads(self.records, *bounds, keys=keys)
        self.jobs = Jobs(self.records, settings.max_waiting, keys)


def install(app: FastAPI, learning: Learning) -> None:
    """Adds what learns to an application: the runner, from start to end, and what a deletion removes."""
    from .deletion import delete_jobs
    from .runner import Runner

    runner = Runner(learning)

    async def run() -> None:
        runner.start()
        try:
            await asyncio.Event().wait()  # until the application ends
        finally:
            await asyncio.shield(asyncio.to_thread(runner.stop))

    # Threads of their own: a deletion may wait for a run, and asyncio's few threads also look up the engine's host name.
    deleting = ThreadPoolExecutor(8, "deletions")

    async def forget(name: str) -> dict[str, int]:
        counts = await asyncio.get_running_loop().run_in_executor(deleting, delete_jobs, learning, name)
        return {what: count for what, count in counts.items() if count}

    app.state.learning = learning
    app.state.background.append(run)
    app.state.on_delete.append(forget)


def read_settings(path: str | Path | None, model: str | None, base_name: str) -> LearningSettings:
    """The settings of a YAML file, `name: value` lines; none, the defaults. ConfigError lists the fields that aren't known."""
    values: Any = {}
    if path is not None:
        import yaml

        try:
            values = yaml.safe_load(Path(path).read_text(encoding="utf-8")) or {}
        except (OSError, yaml.YAMLError, UnicodeDecodeError) as e:
            raise ConfigError(f"can't read the settings of jobs in {path}: {e}") from e
        known = {f.name for f in fields(LearningSettings)} - {"model", "base_name"}
        if not isinstance(values, dict) or not values.keys() <= known:
            wrong = ", ".join(map(str, set(values) - known)) if isinstance(values, dict) else type(values).__name__
            raise ConfigError(f"{path} holds {wrong}, expected `name: value` lines with {', '.join(sorted(known))}.")
    return LearningSettings(model, base_name, **values)


def learning_of(request: Request) -> Learning:
    """A dependency."""
    return request.app.state.learning


Here = Annotated[Learning, Depends(learning_of)]
