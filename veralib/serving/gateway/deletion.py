"""Deletion: everything of one adapter, or of one tenant, wherever it lies; jobs that ended long ago. What went is counted."""

import contextlib
import secrets
import time
from collections.abc import Callable, Sequence, Set
from dataclasses import replace

from ...errors import StoreError, UnknownName
from ...store import open_store
from . import training
from .deletions import Deletions
from .errors import LOG
from .jobs import Job
from .keys import Keys
from .learning import Learning
from .records import GATHER, DamagedRecord, tenant_folder
from .runs import Entry, Run, Runs
from .tenants import EVERYBODY, Tenant

WAIT_SECONDS = 90.0
"""For a run that trains elsewhere to take out what is deleted."""


def delete_jobs(learning: Learning, name: str) -> dict[str, int]:
    """Removes an adapter's jobs, the files that no other adapter's job uses, and its part of runs that train now.

    runs_pending: runs of another gateway that didn't take it out in time, and runs whose record can't be read; it goes with them
    when they end.
    """
    # Nobody gathers meanwhile, and whoever is about to promote sees that the job is gone.
    with learning.records.lock(GATHER), learning.records.lock(name):
        jobs, damaged, used = learning.jobs.of_owner(name)
        files = _files_of(learning, name, jobs, used)
        # Files before jobs: where this process is killed in between, the next deletion still knows whose they were.
        for file in files:
            learning.uploads.remove(file)
        for job in jobs:
            learning.jobs.forget(job)
        for folder, id in damaged:
            learning.jobs.forget_damaged(folder, id, name)
        learning.jobs.forget_entries(name)
    ids = {job.id for job in jobs} | {id for _, id in damaged}
    return {"jobs": len(ids), "files": len(files), **_take_out(learning, ids, lambda owner: owner == name)}


def delete_tenant(learning: Learning, keys: Keys, deletions: Deletions, prefix: str) -> tuple[dict[str, int], list[str]]:
    """Removes all that a prefix has: keys first, so that nobody adds to it, then files, jobs, its part of runs, adapters.

    Returns counts as delete_jobs does, with keys and versions, and the names of the adapters. Engines forget them as gateways
    look for what was deleted. What was killed midway is carried to its end by the next call.
    """
    mine = [key.id for key in keys.list() if key.prefix == prefix and not key.admin]
    for key in mine:
        keys.revoke(key)
    folder = tenant_folder(prefix)
    with learning.jobs.adding(prefix):
        pass  # whose key was good has added its job, and whoever comes now is refused
    with learning.records.lock(GATHER):
        jobs = [job for job in learning.jobs.of_folders([folder, tenant_folder("")]) if job.name.startswith(prefix)]
        used = {file for job in jobs for file in job.files}
        admins = [file for file in _files_of(learning, prefix, jobs, used) if not file.startswith(f"files/{folder}/")]
        for file in admins:
            learning.uploads.remove(file)
        files = len(admins) + learning.uploads.delete_all(prefix)
    for job in jobs:  # others gather and delete in between
        with learning.records.lock(GATHER), learning.records.lock(job.name):
            learning.jobs.forget(job)
    with learning.records.lock(GATHER):
        ids = {job.id for job in jobs} | learning.jobs.forget_rest(prefix)
    learning.records.remove(f"turns/{folder}")
    counts = {"keys": len(mine), "jobs": len(ids), "files": files}
    counts |= _take_out(learning, ids, lambda owner: owner.startswith(prefix))
    names, counts["versions"] = list(learning.store.names(prefix)), 0
    for name in names:
        with contextlib.suppress(UnknownName), learning.records.lock(name):  # somebody else was faster
            counts["versions"] += _count_versions(learning, name)
            learning.store.delete(name)
        deletions.note(name, done=False)
    counts["versions"] += learning.store.delete_unreadable(prefix)
    return counts, names


def expire(learning: Learning) -> int:
    """Forgets jobs that ended longer ago than job_days; how many. An adapter's last job with a file that is still there stays:
    by it the adapter's deletion finds the file."""
    days = learning.settings.job_days
    files = learning.uploads.ids(EVERYBODY) if days else set()
    forgotten = 0
    for folder in learning.records.names("jobs") if days else ():
        needed: set[tuple[str, str]] = set()
        for job in sorted(learning.jobs.of_folders([folder]), key=lambda job: job.id, reverse=True):
            ended = _ended_at(learning, job)
            uses = {(job.name, file) for file in job.files if file in files}
            if ended is None or time.time() - ended < 86400 * days or not uses <= needed:
                needed |= uses
                continue
            with learning.records.lock(job.name):
                learning.jobs.forget(job)
            forgotten += 1
    return forgotten


def _ended_at(learning: Learning, job: Job) -> float | None:
    """None where it goes on, and where the record of its end is damaged: others expire all the same."""
    try:
        end = learning.jobs.ending(job)
        return None if end is None else float(end["at"])
    except (DamagedRecord, KeyError, TypeError, ValueError) as e:
        LOG.error("jobs: when %s ended can't be read, and it stays: %r", job.id, e)
        return None


def _count_versions(learning: Learning, name: str) -> int:
    try:
        return len(learning.store.versions(name))
    except UnknownName:
        raise
    except StoreError:  # what is damaged can be deleted too
        return 1


def _take_out(learning: Learning, jobs: set[str], is_theirs: Callable[[str], bool]) -> dict[str, int]:
    """{"runs": in which they were, "runs_pending": that didn't let go of them in time, or can't be read}. is_theirs: of an
    adapter's name."""
    counts, runs = {"runs": 0, "runs_pending": 0}, Runs(learning)
    for run in runs.all():
        if any(entry.job in jobs for entry in run.entries):
            counts["runs" if _taken_out(runs, run, jobs) else "runs_pending"] += 1
    for run_id in runs.unreadable():  # which a runner ends and removes
        data = learning.records.names(f"runs/{run_id}/data")
        counts["runs_pending"] += any(is_theirs(file.removesuffix(".jsonl")) for file in data)
    return counts


def _files_of(learning: Learning, name: str, jobs: Sequence[Job], wanted: Set[str]) -> list[str]:
    """Of the wanted files those that no job but these uses, as files/<tenant>/<id>, the damaged ones too; not those of another
    tenant, which an admin took for a job."""
    prefix, colon, _ = name.partition(":")
    found = [
        (tenant_folder(tenant), file)
        for tenant in ("", *([prefix + colon] if colon else []))
        for file in sorted(wanted & learning.uploads.ids(Tenant("", tenant)))
    ]
    folders = sorted({tenant_folder(job.tenant) for job in jobs} | {folder for folder, _ in found} | {tenant_folder("")})
    mine = {job.id for job in jobs}
    used = {file for job in learning.jobs.of_folders(folders) if found and job.id not in mine for file in job.files}
    return [f"files/{folder}/{file}" for folder, file in found if file not in used]


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
                if now is None:
                    return True
                if training.stop(runs.path(run)):
                    drop(runs, now, [entry for entry in now.entries if entry.job in jobs])
                    return True
            except training.ForgetFailed as e:  # whoever takes the run up sees that the job is gone, and tries again
                LOG.warning("deletion: %s", e)
                return False
            finally:
                runs.records.release(run.lease, me)
        time.sleep(0.1)
    return False


def drop(runs: Runs, run: Run, gone: Sequence[Entry]) -> Run:
    """The run without these jobs, and nothing of theirs in its folder; nothing of it at all where nobody is left. Its process
    doesn't run, and the caller holds its lease. ForgetFailed, and they are in it still."""
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
