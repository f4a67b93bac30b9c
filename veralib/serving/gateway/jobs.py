"""Fine-tuning jobs as records. What a job is never changes after its first record; what becomes of it is added beside it.

jobs/<tenant>/<id>/job.json       what was asked; from here on the job is acknowledged
                   taken.json     the run that trains it now
                   apart.json     after a run that failed: whom it may share the next one with
                   events.jsonl   what list_events shows
                   end.json       how it ended, written once, under the lock of its adapter's name
waiting/<id>                      jobs that haven't ended, for the runner
owners/<shard>/<name>/<id>        jobs of one adapter and their files, for whoever deletes it
"""

import contextlib
import time
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass, field
from typing import Any

from ...store.files import STALE_SECONDS
from ...store.names import key_of, shard_of
from .auth import check_key
from .errors import LOG, ApiError, shown
from .keys import Keys
from .paging import is_id, new_id, seconds_since
from .records import DamagedRecord, Records, tenant_folder
from .tenants import Tenant


@dataclass(frozen=True)
class Job:
    """What was asked. tenant: the prefix of those who may see it. name: the adapter that it makes a version of.

    start: the adapter that it goes on from, or None: from the served one of its name, else anew.
    """

    id: str
    tenant: str
    name: str
    model: str
    start: str | None
    training_file: str
    validation_file: str | None
    epochs: int
    batch_size: int
    lr_multiplier: float
    seed: int
    created_at: int
    metadata: Mapping[str, str] = field(default_factory=dict)

    @property
    def folder(self) -> str:
        return f"jobs/{tenant_folder(self.tenant)}/{self.id}"

    @property
    def owner_folder(self) -> str:
        return owner_folder(self.name)

    @property
    def files(self) -> list[str]:
        return [file for file in (self.training_file, self.validation_file) if file is not None]


def owner_folder(name: str) -> str:
    """Where the jobs of one adapter are listed."""
    return f"owners/{shard_of(name)}/{key_of(name)}"


class Jobs:
    """The jobs of all tenants."""

    def __init__(self, records: Records, max_waiting: int, keys: Keys | None = None) -> None:
        self.records, self.max_waiting, self.keys = records, max_waiting, keys

    def adding(self, prefix: str) -> contextlib.AbstractContextManager[None]:
        """The lock under which a tenant's jobs are added."""
        return self.records.lock(f"waiting of {tenant_folder(prefix)}")

    def add(self, job: Job, tenant: Tenant | None = None) -> None:
        """Acknowledged and durable when it returns. ApiError 429 where the tenant has too many that haven't ended; 401 where
        the key of who asks, tenant, was revoked meanwhile."""
        mine = tenant_folder(job.tenant)
        with self.adding(job.tenant):  # two that come at once are both counted
            if tenant is not None:
                check_key(self.keys, tenant)
            if sum(record["tenant"] == mine for record in self._waiting()) >= self.max_waiting:
                raise ApiError(
                    429, f"{self.max_waiting:,} jobs haven't ended: wait for one, or cancel it.", code="too_many_jobs",
                    headers={"Retry-After": "30"},
                )  # fmt: skip
            self.records.write(f"{job.owner_folder}/{job.id}", {"tenant": mine, "files": job.files})
            self.records.write(f"waiting/{job.id}", {"tenant": mine})
            self.records.write(f"{job.folder}/job.json", asdict(job))
        self.tell(job, "Created fine-tuning job; the training file was checked when it came.")

    def get(self, tenant: Tenant, job: str) -> Job:
        """ApiError 404 where there is none of this tenant's."""
        folders = self.records.names("jobs") if tenant.admin else [tenant_folder(tenant.prefix)]
        for folder in folders if is_id("ftjob", job) else ():
            if (found := self._read(folder, job)) is not None:
                return found
        raise ApiError(404, f'There is no fine-tuning job "{shown(job, 60)}".', code="job_not_found")

    def of_tenant(self, tenant: Tenant) -> list[tuple[str, str]]:
        """(tenant's folder, id) of each, in no order, unread: jobs are kept, so there may be very many."""
        folders = self.records.names("jobs") if tenant.admin else [tenant_folder(tenant.prefix)]
        return [(folder, name) for folder in folders for name in self.records.names(f"jobs/{folder}") if is_id("ftjob", name)]

    def of_folders(self, folders: list[str]) -> Iterator[Job]:
        """All jobs in these tenants' folders, without those whose records are damaged."""
        for folder in folders:
            for name in self.records.names(f"jobs/{folder}"):
                if (found := self.find(folder, name)) is not None:
                    yield found

    def of_owner(self, name: str) -> tuple[list[Job], list[tuple[str, str]], set[str]]:
        """(all jobs of one adapter, (tenant's folder, id) of those whose records are damaged, the files of all)."""
        found: list[Job] = []
        damaged: list[tuple[str, str]] = []
        files: set[str] = set()
        for job in self.records.names(owner_folder(name)):
            folders, named = self._listed(f"{owner_folder(name)}/{job}")
            for folder in folders:
                try:
                    if (read := self._read(folder, job)) is not None:
                        found.append(read)
                        files.update(read.files)
                except DamagedRecord:
                    damaged.append((folder, job))
                    files.update(named)
        return found, damaged, files

    def _listed(self, entry: str) -> tuple[list[str], list[str]]:
        """(where a job may lie that an adapter's list names, its files): all folders and no file where the entry is damaged."""
        try:
            record = self.records.read(entry, "tenant")
            return ([], []) if record is None else ([record["tenant"]], list(record.get("files", ())))
        except (DamagedRecord, TypeError):
            return self.records.names("jobs"), []

    def waiting(self) -> list[Job]:
        """Jobs that haven't ended, the oldest first. Entries that a crash left behind are removed: they count as waiting."""
        found = []
        for name in sorted(self.records.names("waiting")):
            try:
                entry = self.records.read(f"waiting/{name}", "tenant")
                job = None if entry is None else self._read(entry["tenant"], name)
            except DamagedRecord as e:
                LOG.error("jobs: %s waits no longer, as its record is damaged: %s", name, e)
                self.records.remove(f"waiting/{name}")
                continue
            if job is not None and not self.has_ended(job):
                found.append(job)
            elif job is not None or seconds_since(name) > STALE_SECONDS:  # a young one's job may just be written
                self.records.remove(f"waiting/{name}")
        return found

    def find(self, folder: str, job: str) -> Job | None:
        """A job by its tenant's folder and id; None where it was deleted, or its record is damaged."""
        try:
            return self._read(folder, job)
        except DamagedRecord as e:
            LOG.error("jobs: %s is passed over: %s", job, e)
            return None

    def _waiting(self) -> Iterator[dict[str, Any]]:
        for name in self.records.names("waiting"):
            with contextlib.suppress(DamagedRecord):  # waiting() removes it
                if (entry := self.records.read(f"waiting/{name}", "tenant")) is not None:
                    yield entry

    def _read(self, folder: str, job: str) -> Job | None:
        record = self.records.read(f"jobs/{folder}/{job}/job.json")
        try:
            return None if record is None else Job(**record)
        except TypeError as e:
            raise DamagedRecord(f"jobs/{folder}/{job}/job.json is no job's record: {e}.") from e

    # What becomes of a job

    def tell(self, job: Job, message: str, level: str = "info", data: Mapping[str, Any] | None = None) -> None:
        """One more event. data: makes it one of metrics."""
        event = {
            "object": "fine_tuning.job.event",
            "id": new_id("ftevent"),
            "created_at": int(time.time()),
            "level": level,
            "message": message,
            "type": "message" if data is None else "metrics",
            "data": dict(data or {}),
        }
        self.records.add_line(f"{job.folder}/events.jsonl", event, sync=data is None)

    def events(self, job: Job) -> list[dict[str, Any]]:
        """All of them."""
        return self.records.lines(f"{job.folder}/events.jsonl")

    def take(self, job: Job, run: str) -> None:
        """The run that trains it."""
        self.records.write(f"{job.folder}/taken.json", {"run": run, "at": int(time.time())})

    def run_of(self, job: Job) -> str | None:
        """The run that trains it, or None."""
        return self._word(job, "taken", "run")

    def set_apart(self, job: Job, part: str) -> None:
        """It waits again, for a run with those alone that have the same part; the caller holds the lock of its name."""
        self.records.write(f"{job.folder}/apart.json", {"part": part})
        self.records.remove(f"{job.folder}/taken.json")
        self.tell(job, "The run failed. Its jobs are trained again in smaller runs.", "warn")

    def part_of(self, job: Job) -> str | None:
        """What set_apart said last."""
        return self._word(job, "apart", "part")

    def _word(self, job: Job, record: str, field: str) -> str | None:
        with contextlib.suppress(DamagedRecord, KeyError, TypeError):  # a job's own, and no hindrance to others
            return (self.records.read(f"{job.folder}/{record}.json") or {field: None})[field]
        return None

    def end(self, job: Job, status: str, message: str, code: str | None = None, **more: Any) -> None:
        """How it ended; the caller holds the lock of its name and has seen that it hadn't. Its last event says the same."""
        error = None if status != "failed" else {"code": code, "message": message, "param": more.pop("param", None)}
        record = {"status": status, "at": int(time.time()), "error": error, **more}
        self.tell(job, message, "error" if status == "failed" else "info", more.get("metrics"))
        self.records.write(f"{job.folder}/end.json", record)
        self.records.remove(f"waiting/{job.id}")

    def ending(self, job: Job) -> dict[str, Any] | None:
        """How it ended, or None."""
        return self.records.read(f"{job.folder}/end.json", "status", "at")

    def has_ended(self, job: Job) -> bool:
        """Or was deleted."""
        folder = self.records.names(job.folder)
        return "end.json" in folder or "job.json" not in folder

    def forget(self, job: Job) -> None:
        """Removes all that is known of it."""
        self._forget(job.folder, job.id, job.owner_folder)

    def forget_entries(self, name: str) -> None:
        """What an adapter's list names still, where a deletion was killed after the job was gone; a young one's may just come."""
        for job in self.records.names(owner_folder(name)):
            if (
                is_id("ftjob", job)
                and seconds_since(job) > STALE_SECONDS
                and not any(
                    self.records.names(f"jobs/{folder}/{job}") for folder in self._listed(f"{owner_folder(name)}/{job}")[0]
                )
            ):
                self._forget(f"jobs/_none/{job}", job, owner_folder(name))

    def forget_damaged(self, folder: str, job: str, name: str) -> None:
        """The same, by what of_owner found."""
        self._forget(f"jobs/{folder}/{job}", job, owner_folder(name))

    def forget_rest(self, prefix: str) -> set[str]:
        """Removes a tenant's jobs whose records are damaged, when the others are forgotten; their ids."""
        mine = tenant_folder(prefix)
        damaged = {name for name in self.records.names(f"jobs/{mine}") if is_id("ftjob", name)}
        gone = set(damaged)
        for shard in self.records.names("owners"):
            for name in self.records.names(f"owners/{shard}"):
                owner, is_mine = f"owners/{shard}/{name}", name.startswith(key_of(prefix))  # a long name's key is cut
                for job in self.records.names(owner) if is_mine or damaged else ():
                    if is_mine or job in damaged:
                        folder = mine if job in damaged else tenant_folder("")  # an admin's job for it
                        gone |= {job} if self.records.names(f"jobs/{folder}/{job}") else set()
                        self._forget(f"jobs/{folder}/{job}", job, owner)
        for job in damaged:  # which no adapter lists
            self.records.remove(f"waiting/{job}")
        self.records.remove(f"jobs/{mine}")
        return gone

    def _forget(self, folder: str, job: str, owner: str) -> None:
        for path in (folder, f"waiting/{job}", f"{owner}/{job}"):
            self.records.remove(path)
        if not self.records.names(owner):
            self.records.remove(owner)

    def to_openai(self, job: Job) -> dict[str, Any]:
        """OpenAI's FineTuningJob object."""
        end = self.ending(job)
        taken = end is None and self.run_of(job) is not None
        status = end["status"] if end is not None else "running" if taken else "queued"
        hyperparameters = {
            "n_epochs": job.epochs,
            "batch_size": job.batch_size,
            "learning_rate_multiplier": job.lr_multiplier,
        }
        return {
            "object": "fine_tuning.job",
            "id": job.id,
            "created_at": job.created_at,
            "finished_at": None if end is None else end["at"],
            "model": job.model,
            "fine_tuned_model": job.name if status == "succeeded" else None,
            "organization_id": job.tenant,
            "status": status,
            "error": None if end is None else end["error"],
            "hyperparameters": hyperparameters,
            "method": {"type": "supervised", "supervised": {"hyperparameters": hyperparameters}},
            "training_file": job.training_file,
            "validation_file": job.validation_file,
            "result_files": [],
            "trained_tokens": None if end is None else end.get("trained_tokens"),
            "seed": job.seed,
            "estimated_finish": None,
            "integrations": [],
            "metadata": dict(job.metadata),
        }
