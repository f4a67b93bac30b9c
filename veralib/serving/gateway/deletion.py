"""Deletion: everything of one adapter, wherever it lies. What went is counted in the answer."""

import contextlib
import secrets
import time
from collections.abc import Sequence
from dataclasses import replace

from ...errors import StoreError, UnknownName
from ...store import open_store
from . import training
from .errors import ApiError
from .files import Upload
from .jobs import Job
from .learning import Learning
from .records import GATHER, tenant_folder
from .runs import Entry, Run, Runs

WAIT_SECONDS = 90.0
"""For a run that trains elsewhere to take out what is deleted."""


def delete_owner(learning: Learning, name: str) -> dict[str, int]:
    """Removes an adapter: its versions in the store, and all that delete_jobs removes."""
    counts = delete_jobs(learning, name)  # first: a job that still ran would put a new version
    try:
        versions = len(learning.store.versions(name))
    except UnknownName:
        return {"versions": 0, **counts}
    except StoreError:  # what is damaged can be deleted too
        versions = 1
    learning.store.delete(name)
    return {"versions": versions, **counts}


def delete_jobs(learning: Learning, name: str) -> dict[str, int]:
    """Removes an adapter's jobs, the files that no other adapter's job uses, and its part of runs that train now.

    runs_pending: runs of another gateway that didn't take it out in time; it goes with them when they end.
    """
    counts = dict.fromkeys(("jobs", "files", "runs", "runs_pending"), 0)
    # Nobody gathers meanwhile, and whoever is about to promote sees that the job is gone.
    with learning.records.lock(GATHER), learning.records.lock(name):
        jobs = learning.jobs.of_owner(name)
        ids = {job.id for job in jobs}
        # Files before jobs: where this process is killed in between, the next deletion still knows whose they were.
        for upload in _files_of(learning, name, jobs):
            learning.uploads.delete(upload)
            counts["files"] += 1
        for job in jobs:
            learning.jobs.forget(job)
            counts["jobs"] += 1
    runs = Runs(learning)
    for run in runs.all():
        if any(entry.job in ids for entry in run.entries):
            counts["runs" if _taken_out(runs, run, ids) else "runs_pending"] += 1
    return counts


def _files_of(learning: Learning, name: str, jobs: Sequence[Job]) -> list[Upload]:
    """The files that these jobs alone use; not those of another tenant, which an admin took for a job."""
    tenant_of_file = {file: job.tenant for job in jobs for file in _used(job)}
    found = []
    for file, tenant in tenant_of_file.items():
        with contextlib.suppress(ApiError):  # deleted before
            upload = learning.uploads.of_job(file, tenant)
            if name.startswith(upload.tenant):
                found.append(upload)
    folders = sorted({tenant_folder(t) for t in (*tenant_of_file.values(), *(upload.tenant for upload in found))})
    mine = {job.id for job in jobs}
    used = {file for job in learning.jobs.of_folders(folders) if found and job.id not in mine for file in _used(job)}
    return [upload for upload in found if upload.id not in used]


def _used(job: Job) -> list[str]:
    return [file for file in (job.training_file, job.validation_file) if file is not None]


def _taken_out(runs: Runs, run: Run, jobs: set[str]) -> bool:
    """Whether the jobs are out of a run: by the runner that has it, or by us where none does."""
    me, deadline = f"deletion-{secrets.token_hex(8)}", time.monotonic() + WAIT_SECONDS
    while time.monotonic() < deadline:
        now = runs.read(run.id)
        gone = [] if now is None else [entry for entry in now.entries if entry.job in jobs]
        if now is None or not gone:
            return True
        if runs.records.claim(run.lease, me, WAIT_SECONDS):
            try:
                now = runs.read(run.id)
                if now is not None and training.stop(runs.path(run)):
                    drop(runs, now, [entry for entry in now.entries if entry.job in jobs])
                return True
            finally:
                runs.records.release(run.lease, me)
        time.sleep(0.1)
    return False


def drop(runs: Runs, run: Run, gone: Sequence[Entry]) -> Run:
    """The run without these jobs, and nothing of theirs in its folder; nothing of it at all where nobody is left. Its process
    doesn't run, and the caller holds its lease."""
    left = replace(run, entries=tuple(entry for entry in run.entries if entry not in gone))
    if not left.entries:
        runs.remove(run)
        return left
    for entry in gone:
        runs.records.remove(f"{run.folder}/data/{entry.name}.jsonl")
        starts = open_store(runs.path(run, "start"))
        if entry.name in starts:
            starts.delete(entry.name)
        training.forget(runs.path(run), entry.name)
    runs.records.remove(f"{run.folder}/log.txt")
    runs.write(left)
    return left
