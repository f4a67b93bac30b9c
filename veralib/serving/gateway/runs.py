"""Runs: jobs of many users that train together, each in a folder of its own until the last of its jobs has ended.

runs/<id>/run.json        the jobs; written last, so a folder without it is nobody's
          settings.yaml   of `vera fleet train`
          data/           a file of chats for each adapter
          start/          a store: what each goes on from
          fleet/          the fleet's output; fleet/store is where new versions wait to be promoted
          lease.json      whose run it is now
          process.lock    held by the process that trains, as long as it lives
turns/<tenant>            when a job of the tenant's was last gathered
"""

import contextlib
import json
import time
from collections import Counter
from collections.abc import Iterator
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from ...adapter import Adapter
from ...config import VeraConfig
from ...errors import StoreError, UnknownName
from ...store import open_store
from .errors import LOG, ApiError
from .jobs import Job
from .learning import Learning, LearningSettings
from .paging import new_id, seconds_since
from .records import GATHER, DamagedRecord, RecordError, tenant_folder

HELD_OUT = "held_out"
HOLD_SECONDS = 5.0
"""For which a run is gathered; who isn't in it by then is in a later one. Deletions wait meanwhile."""


@dataclass(frozen=True)
class Entry:
    """One job of a run. folder: its tenant's. served, version, milliseconds: the stamp, number and time of the version that it
    goes on from and is compared with, or None."""

    job: str
    folder: str
    name: str
    served: str | None
    version: int | None
    milliseconds: int | None = None


@dataclass(frozen=True)
class Run:
    """Some jobs of like settings, at most one for an adapter."""

    id: str
    entries: tuple[Entry, ...]
    attempts: int = 0
    """How often its process was started and failed."""

    @property
    def folder(self) -> str:
        return f"runs/{self.id}"

    @property
    def lease(self) -> str:
        return f"{self.folder}/lease.json"


class Runs:
    """The runs of a state folder."""

    def __init__(self, learning: Learning) -> None:
        self.learning, self.records, self.jobs = learning, learning.records, learning.jobs

    def all(self) -> list[Run]:
        """The oldest first, without those that can't be read."""
        return self._look()[0]

    def unreadable(self) -> dict[str, RecordError]:
        """Why, by the id."""
        return self._look()[1]

    def _look(self) -> tuple[list[Run], dict[str, RecordError]]:
        found: list[Run] = []
        unreadable: dict[str, RecordError] = {}
        for name in sorted(self.records.names("runs")):
            try:
                found += [run] if (run := self.read(name)) is not None else []
            except RecordError as e:
                unreadable[name] = e
        return found, unreadable

    def read(self, run: str) -> Run | None:
        """None where it has ended. DamagedRecord."""
        record = self.records.read(f"runs/{run}/run.json")
        if record is None:
            return None
        try:
            return Run(run, tuple(Entry(**e) for e in record["entries"]), record["attempts"])
        except (KeyError, TypeError) as e:
            raise DamagedRecord(f"runs/{run}/run.json is no run's record: {e!r}.") from e

    def write(self, run: Run) -> None:
        """What changed of it."""
        self.records.write(f"{run.folder}/run.json", asdict(run))

    def path(self, run: Run, part: str = "") -> Path:
        """Where a part of its folder lies."""
        return self.records.path(f"{run.folder}/{part}").absolute()

    def remove(self, run: Run) -> None:
        """With all that was copied for it. Its jobs have ended."""
        self.records.remove(run.folder)

    # Gathered

    def gather(self) -> Run | None:
        """Makes a run of a job of the tenant whose turn it is and of those that may share its run; None where nobody waits.

        An adapter's jobs train one after another: the later goes on from what the earlier made.
        """
        with self.records.lock(GATHER):
            live, unreadable = self._look()
            for name in set(self.records.names("runs")) - {run.id for run in live} - set(unreadable):
                self.records.remove(f"runs/{name}")  # its maker died, or it has just ended
            jobs = {entry.job for run in live for entry in run.entries}
            names = {entry.name for run in live for entry in run.entries}
            waiting = [job for job in self.jobs.waiting() if job.id not in jobs]
            if unreadable:
                waiting = [job for job in waiting if self.jobs.run_of(job) not in unreadable]
            free: dict[str, Job] = {}
            for job in waiting:
                if job.name not in names:
                    free.setdefault(job.name, job)
            ready = list(free.values())
            if not ready or seconds_since(ready[0].id) < self.learning.settings.gather_seconds:
                return None
            return self._make(self._in_turn(ready))

    def _in_turn(self, ready: list[Job]) -> list[Job]:
        """The first job of each tenant, then the second ones, and so on; each time that tenant first whose last turn is longest
        ago."""
        last = {tenant: self._last_turn(tenant) for tenant in {job.tenant for job in ready}}
        count: Counter[str] = Counter()
        places = []
        for job in ready:
            places.append((count[job.tenant], last[job.tenant], job))
            count[job.tenant] += 1
        return [job for *_, job in sorted(places, key=lambda place: place[:2])]

    def _last_turn(self, tenant: str) -> float:
        with contextlib.suppress(DamagedRecord, KeyError, TypeError):
            return float((self.records.read(f"turns/{tenant_folder(tenant)}") or {"at": 0.0})["at"])
        return 0.0

    def _make(self, ready: list[Job]) -> Run | None:
        run = Run(new_id("run"), ())
        starts = open_store(self.path(run, "start"))
        entries: list[Entry] = []
        group: tuple | None = None
        config = self.learning.settings.config()
        example, until = ready[0], time.monotonic() + HOLD_SECONDS
        for job in ready:
            try:
                start, served = self._start(job)
                mine = self.learning.settings.config() if start is None else start.config
                asks = (*_group(job, mine), self.jobs.part_of(job))
                if (group or asks) != asks:
                    continue  # the next run's
                self.records.write_chunks(f"{run.folder}/data/{job.name}.jsonl", self._rows(job))
            except _Unfit as e:
                self.fail(job, str(e), e.code)
                continue
            if start is not None:
                starts.put(job.name, start)
            group, config, example = asks, mine, job
            entries.append(Entry(job.id, job.folder.split("/")[1], job.name, *served))
            if len(entries) == self.learning.settings.max_owners or time.monotonic() > until:
                break
        if not entries:
            self.remove(run)
            return None
        run = replace(run, entries=tuple(entries))
        settings = fleet_settings(self.learning.settings, config, example)
        settings |= {"data": [str(self.path(run, "data"))], "output": str(self.path(run, "fleet"))}
        if len(starts):
            settings["start_from"] = str(self.path(run, "start"))
        self.records.write(f"{run.folder}/settings.yaml", settings)  # JSON is YAML
        self.write(run)
        for folder in {entry.folder for entry in entries}:
            self.records.write(f"turns/{folder}", {"at": time.time()})
        for entry in entries:
            if (taken := self.job(entry)) is not None:
                self.jobs.take(taken, run.id)
                self.jobs.tell(taken, "Training started.")
        return run

    def _start(self, job: Job) -> tuple[Adapter | None, tuple[str | None, int | None, int | None]]:
        """(what the job goes on from, (the served version's stamp, number, time)). _Unfit where that can't be."""
        store = self.learning.store
        served: str | None = None
        version: int | None = None
        milliseconds: int | None = None
        try:
            stamp, latest = repr(store.stamp(job.name)), store.latest(job.name)
            served, version, milliseconds = stamp, latest.number, latest.milliseconds
        except UnknownName:
            pass
        except StoreError as e:
            raise _damaged(job, job.name, e) from None
        if job.start is not None and served is not None:  # it came after the job was created
            why = f'There is a "{job.name}" by now, and this job doesn\'t go on from it. Give it as model, or delete it first.'
            raise _Unfit(why, "name_taken")
        source = job.start or (job.name if served is not None else None)
        if source is None:
            if job.model != self.learning.settings.base_name:
                raise _Unfit(f'There is no model "{job.model}" any more.', "model_not_found")
            return None, (None, None, None)
        try:
            start = store.get(source)
        except UnknownName:
            raise _Unfit(f'There is no model "{source}" any more.', "model_not_found") from None
        except StoreError as e:
            raise _damaged(job, source, e) from None
        if start.biases or start.modules:
            raise _Unfit(f'"{source}" has layers trained in full, or biases; jobs train d and b alone.', "adapter_unfit")
        return start, (served, version, milliseconds)

    def _rows(self, job: Job) -> Iterator[bytes]:
        parts = [(job.training_file, False)] + [(job.validation_file, True)] * (job.validation_file is not None)
        for file, measures in parts:
            assert file is not None
            try:
                for messages in self.learning.uploads.rows(self.learning.uploads.of_job(file, job.tenant)):
                    mark = {HELD_OUT: measures} if job.validation_file is not None else {}
                    yield json.dumps({"messages": messages, **mark}).encode() + b"\n"
            except (FileNotFoundError, ApiError):
                raise _Unfit("Its file was deleted before the job began.", "file_deleted") from None
            except (StoreError, OSError, ValueError) as e:
                LOG.warning("jobs: %s can't read its file %s: %s", job.id, file, e)
                raise _Unfit("Its file can't be read. Upload it again.", "file_damaged") from None

    def fail(self, job: Job, message: str, code: str) -> None:
        """Ends a job, unless it has ended."""
        with self.records.lock(job.name):
            if not self.jobs.has_ended(job):
                self.jobs.end(job, "failed", message, code)

    def job(self, entry: Entry) -> Job | None:
        """None where it was deleted."""
        return self.jobs.find(entry.folder, entry.job)


class _Unfit(Exception):
    """A job that can't begin. code: what the client reads."""

    def __init__(self, message: str, code: str) -> None:
        super().__init__(message)
        self.code = code


def _damaged(job: Job, name: str, e: StoreError) -> _Unfit:
    LOG.warning("jobs: %s can't go on from %s: %s", job.id, name, e)  # the paths in it are no client's business
    return _Unfit(f'"{name}" can\'t be read from the store.', "adapter_damaged")


def _group(job: Job, config: VeraConfig) -> tuple:
    """What jobs of one run have in common."""
    return job.epochs, job.batch_size, job.lr_multiplier, job.seed, json.dumps(config.to_dict(), sort_keys=True)


def fleet_settings(settings: LearningSettings, config: VeraConfig, job: Job) -> dict[str, Any]:
    """What `vera fleet train` is told for this group of jobs, data and output aside."""
    mine = config.to_dict()
    options = {name: value for name, value in mine.items() if name not in ("rank", "targets", "seed", "train_modules", "dropout")}
    return {
        "model": settings.model,
        "revision": settings.revision,
        "dtype": settings.dtype,
        "quantise": settings.quantise,
        "task": "chat",
        "max_length": settings.max_length,
        "held_out": settings.held_out,
        "held_out_column": HELD_OUT,
        "rank": config.rank if isinstance(config.rank, int) else dict(config.rank),
        "targets": mine["targets"],
        "basis_seed": config.seed,
        "options": {name: value for name, value in options.items() if value != VeraConfig().to_dict()[name]},
        "seed": job.seed,
        "epochs": job.epochs,
        "owner_rows": job.batch_size,
        "batch_rows": max(settings.batch_rows, job.batch_size),
        "slots": settings.slots,
        "lr": settings.lr * job.lr_multiplier,
        "keep_data": False,
        "plot": False,
        "progress_seconds": settings.progress_seconds,
    }
