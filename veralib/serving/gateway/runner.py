"""Runner: a thread of the gateway that gathers waiting jobs into runs, has each trained by a process, and settles its jobs.

Every gateway on a state folder has one. A run belongs to the runner that holds its lease; when that one dies, its lease runs out
and another takes the run up where it stands: a process that still trains is waited for, one that died is started again.
"""

import json
import logging
import os
import secrets
import socket
import subprocess
import threading
import time
from dataclasses import replace
from typing import Any

from ...errors import StoreError
from ...store import Store, open_store
from . import training
from .deletion import drop, expire
from .jobs import Job
from .learning import Learning
from .promotion import finite, settle
from .records import DamagedRecord, RecordError
from .runs import Entry, Run, Runs

LOG = logging.getLogger("veralib.gateway")
POLL_SECONDS = 0.5
BACKOFF_SECONDS = 2.0
SWEEP_SECONDS = 3600.0
FORGET_SECONDS = 60.0
"""That taking one owner out of a run may last: a process that imports torch."""
PUT_OFF_SECONDS = 30.0
"""For which a run that failed on the gateway's side lets all others go first."""


class Runner:
    """start() and stop(); between them jobs train."""

    def __init__(self, learning: Learning) -> None:
        self.learning, self.runs = learning, Runs(learning)
        self.id = f"{socket.gethostname()}-{os.getpid()}-{secrets.token_hex(4)}"
        self._ending = threading.Event()
        self._thread: threading.Thread | None = None
        self._put_off: dict[str, float] = {}

    def start(self) -> None:
        """Returns at once."""
        self._thread = threading.Thread(target=self._work, name="jobs", daemon=True)
        self._thread.start()

    def stop(self) -> None:
        """The run that trains now saves where it stands; the next runner goes on with it."""
        self._ending.set()
        if self._thread is not None:
            self._thread.join()

    def _work(self) -> None:
        swept = -SWEEP_SECONDS
        while not self._ending.is_set():
            try:
                if time.monotonic() - swept >= SWEEP_SECONDS:
                    swept = time.monotonic()
                    self.learning.records.sweep()
                    self.learning.uploads.sweep()
                    expire(self.learning)
                # Without a model of its own a gateway takes files, which it sweeps out in time, and trains nothing.
                worked = self.learning.settings.model is not None and self.step()
            except Exception:  # one bad run or a full disk must not end what trains for everybody
                LOG.exception("jobs: a run failed on the gateway's side; it is tried again")
                worked = False
                self._ending.wait(BACKOFF_SECONDS)
            if not worked:
                self._ending.wait(POLL_SECONDS)

    def step(self) -> bool:
        """Takes up one run and carries it to its end; False where there is none to take."""
        self._put_off = {run: until for run, until in self._put_off.items() if until > time.monotonic()}
        for name, why in self.runs.unreadable().items():
            if name not in self._put_off:
                self._end_unreadable(Run(name, ()), why)
        self.runs.gather()
        for run in self.runs.all():
            if run.id not in self._put_off and self._claim(run):
                try:
                    _Carrying(self, run).to_its_end()
                except Exception:
                    self._put_off[run.id] = time.monotonic() + PUT_OFF_SECONDS
                    self._count_failure(run)
                    raise
                finally:
                    self.learning.records.release(run.lease, self.id)
                return True
        return False

    def _end_unreadable(self, run: Run, why: RecordError) -> None:
        """A run whose record is damaged ends, and its jobs fail. One that can't be read now is looked at again later."""
        self._put_off[run.id] = time.monotonic() + PUT_OFF_SECONDS
        LOG.error("jobs: a run can't be read: %s", why)
        if not isinstance(why, DamagedRecord) or not self._claim(run, training.STOP_SECONDS + 10.0):
            return
        try:
            if not training.stop(self.runs.path(run)):
                return
            jobs = self.learning.jobs
            for job in jobs.waiting():
                if jobs.run_of(job) == run.id:
                    self.runs.fail(job, "The record of its run was damaged. Create the job again.", "run_damaged")
            self.runs.remove(run)
        finally:
            self.learning.records.release(run.lease, self.id)

    def _claim(self, run: Run, seconds: float = 0.0) -> bool:
        """seconds: how long it won't be renewed."""
        return self.learning.records.claim(run.lease, self.id, self.learning.settings.lease_seconds + seconds)

    def _count_failure(self, run: Run) -> None:
        now = self.runs.read(run.id)
        if now is not None and not training.is_alive(self.runs.path(run)) and self._claim(run):
            self.runs.write(replace(now, attempts=now.attempts + 1))


class _Carrying:
    """One run, from where it stands to its end, by the runner that holds its lease."""

    def __init__(self, runner: Runner, run: Run) -> None:
        self.runner, self.runs, self.learning, self.run = runner, runner.runs, runner.learning, run
        self.folder = self.runs.path(run)
        self.settled: set[str] = set()
        self.again: dict[str, tuple[int, float]] = {}
        """Jobs whose version the store didn't take: how often, and when it is asked again."""
        self.shown = len(_lines(self.folder / "fleet/progress-0.jsonl"))
        self.process: subprocess.Popen | None = None
        self.renewed = time.monotonic()
        self._staged: Store | None = None

    def to_its_end(self) -> None:
        """Returns when all its jobs have ended and its folder is gone, or when the runner is to end."""
        while not self.runner._ending.is_set():
            if not self._drop_deleted() or not self._open_jobs():
                self._stop()
                self.runs.remove(self.run)
                return
            if training.is_alive(self.folder):
                self._watch()
                continue
            self._collect()
            if self.again:
                self._renew()
                self.runner._ending.wait(min(POLL_SECONDS, BACKOFF_SECONDS))
                continue
            if (self.folder / "fleet/fleet.json").exists():
                self._finish(json.loads((self.folder / "fleet/fleet.json").read_text(encoding="utf-8"))["unusable"])
                continue
            if self.process is not None:
                LOG.warning("jobs: the training process ended with code %s:\n%s", self.process.wait(), self._log_tail())
                self.run = replace(self.run, attempts=self.run.attempts + 1)
                self.runs.write(self.run)
                self.process = None
                pause = BACKOFF_SECONDS * 2 ** min(self.run.attempts, 5)
                self._hold(pause)
                self.runner._ending.wait(pause)
            if self.run.attempts >= self.learning.settings.attempts:
                if len(self._open_jobs()) > 1:  # by halves, whoever makes the process fail is left alone and fails alone
                    self._set_apart(2)
                    self.runs.remove(self.run)
                    return
                self._finish({})
            elif not self.runner._ending.is_set():
                self.process = training.start(self.folder, self.learning.settings)
        self._stop()  # it saves where it stands; whoever takes the run up collects what had ended

    def _watch(self) -> None:
        """While the process trains: what ends is settled at once, what was deleted is dropped, the lease is renewed."""
        while training.is_alive(self.folder) and not self.runner._ending.wait(POLL_SECONDS):
            self._collect()
            self._renew()
            if self.process is not None and self.process.poll() is not None:
                return
            if self._deleted() or not self._open_jobs():
                return

    def _collect(self) -> None:
        """Shows how far the jobs are, and settles those whose adapters are in the staging store."""
        self._show_progress()
        entries = {entry.name: entry for entry in self.run.entries}
        for line in _lines(self.folder / "fleet/owners-0.jsonl"):
            entry = entries.get(line["name"])
            if entry is None or entry.job in self.settled:
                continue
            job = self.runs.job(entry)
            if job is None or self._settle(job, entry, line):
                self.settled.add(entry.job)
                self.again.pop(entry.job, None)
            self._renew()

    def _settle(self, job: Job, entry: Entry, line: dict[str, Any]) -> bool:
        """Whether the job has ended. A store that fails is asked again a few times; then this job fails, and no other."""
        tries, at = self.again.get(job.id, (0, 0.0))
        if time.monotonic() < at:
            return False
        try:
            if self._staged is None:
                self._staged = open_store(self.folder / "fleet/store")
            settle(self.learning, job, entry, line, self._staged)
            return True
        except RecordError:  # the state folder fails: the version may be live, and only its job not marked
            raise
        except StoreError as e:
            tries += 1
            LOG.warning("jobs: the version that %s made can't be put, try %d: %s", job.id, tries, e)
        if tries < self.learning.settings.attempts:
            self.again[job.id] = tries, time.monotonic() + BACKOFF_SECONDS * 2**tries
            return False
        why = "The store doesn't take its version. The gateway's log says why; create the job again."
        self.runs.fail(job, why, "not_stored")
        return True

    def _stop(self) -> bool:
        """Ends the process; False where it runs on another machine."""
        self._hold(training.STOP_SECONDS + 10.0)
        return training.stop(self.folder, self.process)

    def _renew(self) -> None:
        if time.monotonic() - self.renewed >= self.learning.settings.lease_seconds / 4:
            self._hold()

    def _hold(self, seconds: float = 0.0) -> None:
        """Renews the lease before what takes so long. RuntimeError where another has it."""
        if not self.runner._claim(self.run, seconds):
            raise RuntimeError(f"the lease of {self.run.folder} was lost: this gateway stood still for longer than it lasts")
        self.renewed = time.monotonic()

    def _show_progress(self) -> None:
        lines = _lines(self.folder / "fleet/progress-0.jsonl")
        latest: dict[str, dict[str, Any]] = {}
        for line in lines[self.shown :]:
            latest |= line["owners"]
        for entry in self.run.entries if latest else ():
            at = latest.get(entry.name)
            job = None if at is None or entry.job in self.settled else self.runs.job(entry)
            if at is not None and job is not None and not self.learning.jobs.has_ended(job):
                loss = "" if at["loss"] is None else f": training loss={at['loss']:.4f}"
                data = {"step": at["steps"], "total_steps": at["of"], "train_loss": finite(at["loss"])}
                self.learning.jobs.tell(job, f"Step {at['steps']}/{at['of']}{loss}", data=data)
        self.shown = len(lines)

    def _finish(self, unusable: dict[str, str]) -> None:
        """Ends the jobs that have no adapter, each with its own reason and nobody else's."""
        for entry, job in self._open_jobs():
            why, code = unusable.get(entry.name), "unusable_data"
            if why is None:
                why, code = "The training process failed. The gateway's log says why; create the job again.", "training_failed"
            self.runs.fail(job, why, code)

    def _set_apart(self, runs: int) -> None:
        """Its open jobs train again, in so many runs; this one is to be removed."""
        jobs = self._open_jobs()
        for number, (_, job) in enumerate(jobs):
            with self.learning.records.lock(job.name):
                if not self.learning.jobs.has_ended(job):
                    self.learning.jobs.set_apart(job, f"{self.run.id}/{runs * number // len(jobs)}")

    def _open_jobs(self) -> list[tuple[Entry, Job]]:
        found = [(entry, self.runs.job(entry)) for entry in self.run.entries]
        return [(entry, job) for entry, job in found if job is not None and not self.learning.jobs.has_ended(job)]

    def _deleted(self) -> list[Entry]:
        return [entry for entry in self.run.entries if self.runs.job(entry) is None]

    def _drop_deleted(self) -> bool:
        """Stops the process where somebody was deleted, takes out what is theirs; False where the run is to be removed."""
        if gone := self._deleted():
            if not self._stop():  # on another machine, whose gateway died
                return True
            self.process = None
            self._collect()  # others may have ended meanwhile
            self._staged = None
            for entry in gone:
                self._hold(FORGET_SECONDS)
                try:
                    self.run = drop(self.runs, self.run, [entry])
                except training.ForgetFailed as e:  # what is theirs goes with the whole run
                    LOG.error(
                        "jobs: the others of run %s begin anew, since a deleted one couldn't be taken out: %s", self.run.id, e
                    )
                    self._set_apart(1)
                    return False
            self.renewed = 0.0  # the next renewal makes it short again
        return bool(self.run.entries)

    def _log_tail(self) -> str:
        try:
            return (self.folder / "log.txt").read_text(encoding="utf-8", errors="replace")[-2000:]
        except OSError:
            return ""


def _lines(path: Any) -> list[dict[str, Any]]:
    """The whole lines of a file that the fleet writes; none where it isn't there."""
    try:
        text = path.read_text(encoding="utf-8")
    except FileNotFoundError:
        return []
    found = []
    for line in text.splitlines():
        try:
            found.append(json.loads(line))
        except ValueError:
            continue
    return found
