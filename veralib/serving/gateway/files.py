"""Uploaded training files: a record and the bytes as they came, in STATE/files/<tenant>."""

import time
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from typing import IO, Any

from . import chats
from .auth import check_key
from .errors import LOG, ApiError, shown
from .keys import Keys
from .paging import is_id, new_id
from .records import DamagedRecord, Records, tenant_folder
from .tenants import EVERYBODY, Tenant

PURPOSE = "fine-tune"
PIECE = 2**18
"""Bytes of a file that are in memory while it is sent."""


@dataclass(frozen=True)
class Upload:
    """What is known of one file. tenant: the prefix of those who may see it."""

    id: str
    tenant: str
    filename: str
    bytes: int
    rows: int
    created_at: int
    purpose: str = PURPOSE

    @property
    def folder(self) -> str:
        return f"files/{tenant_folder(self.tenant)}"

    def to_openai(self) -> dict[str, Any]:
        """OpenAI's File object."""
        return {
            "id": self.id,
            "object": "file",
            "bytes": self.bytes,
            "created_at": self.created_at,
            "expires_at": None,
            "filename": self.filename,
            "purpose": self.purpose,
            "status": "processed",
            "status_details": None,
        }


class Uploads:
    """The files of all tenants. Whoever asks for another's gets what one gets for a file that never was."""

    def __init__(
        self, records: Records, max_line: int, max_lines: int, max_files: int, max_bytes: int, keys: Keys | None = None
    ) -> None:
        self.records, self.max_line, self.max_lines = records, max_line, max_lines
        self.max_files, self.max_bytes, self.keys = max_files, max_bytes, keys

    def create(self, tenant: Tenant, file: IO[bytes], filename: str, purpose: str) -> Upload:
        """Checks a file line by line and keeps it. ApiError 400 names the lines that are wrong; 401 where the key was revoked
        while the file came."""
        if purpose != PURPOSE:
            raise ApiError(
                400, f'purpose is "{shown(purpose, 60)}", expected "{PURPOSE}".', code="invalid_purpose", param="purpose"
            )
        self._check_room(tenant, 0)  # before the work; what counts is the look under the lock
        upload = Upload(new_id("file"), tenant.prefix, shown(filename, 255), 0, 0, int(time.time()))
        rows = 0

        def counted() -> Iterator[bytes]:
            nonlocal rows
            for number, line in enumerate(chats.chunks(file, self.max_line, self.max_lines), 1):
                rows += bool(chats.content(line, number))
                yield line

        try:
            size = self.records.write_chunks(f"{upload.folder}/{upload.id}.jsonl", counted())
        except chats.BadFile as e:
            raise ApiError(400, f"{e}.", code="invalid_training_file", param="file") from None
        upload = Upload(**{**asdict(upload), "bytes": size, "rows": rows})
        try:
            with self.records.lock(f"files of {upload.folder}"):  # two that come at once are both counted
                check_key(self.keys, tenant)
                self._check_room(tenant, size)
                self.records.write(f"{upload.folder}/{upload.id}.json", asdict(upload))  # from here on it is there
        except ApiError:
            self.records.remove(f"{upload.folder}/{upload.id}.jsonl")
            self.records.remove_empty(upload.folder)
            raise
        return upload

    def _check_room(self, tenant: Tenant, size: int) -> None:
        """ApiError 429 where the tenant has no room for one more file of so many bytes."""
        folder = f"files/{tenant_folder(tenant.prefix)}"
        there = [name for name in self.records.names(folder) if name.endswith(".json")]
        if len(there) >= self.max_files:
            raise ApiError(429, f"There are {self.max_files:,} files already: delete some.", code="too_many_files")
        held = sum(self.records.size(f"{folder}/{name}l") for name in there)
        if held + size > self.max_bytes:
            raise ApiError(
                429,
                f"The files that are there have {held:,} bytes and this one {size:,}, expected at most {self.max_bytes:,}: "
                "delete some.",
                code="too_many_bytes",
            )

    def get(self, tenant: Tenant, file: str, param: str | None = None) -> Upload:
        """ApiError 404 where there is none of this tenant's."""
        for folder in self._folders(tenant) if is_id("file", file) else ():
            if (found := self._read(folder, file)) is not None:
                return found
        raise ApiError(404, f'There is no file "{shown(file, 60)}".', code="file_not_found", param=param)

    def of_job(self, file: str, prefix: str) -> Upload:
        """A file by its id, looked for first where this prefix has its own: an admin's job may use anybody's. ApiError 404."""
        try:
            return self.get(Tenant("", prefix), file)
        except ApiError:
            return self.get(EVERYBODY, file)

    def of_tenant(self, tenant: Tenant) -> list[Upload]:
        """In no order, without those whose records are damaged."""
        found = []
        for folder, file in self._ids(tenant):
            try:
                found += [upload] if (upload := self._read(folder, file)) is not None else []
            except DamagedRecord as e:
                LOG.error("files: %s is passed over: %s", file, e)
        return found

    def ids(self, tenant: Tenant) -> set[str]:
        """Of all of them, the damaged ones too: no record is read."""
        return {file for _, file in self._ids(tenant)}

    def content(self, upload: Upload) -> Iterator[bytes]:
        """The bytes as they came, piece by piece. ApiError 404 at once where the file was deleted meanwhile."""
        try:
            file = open(self.records.path(f"{upload.folder}/{upload.id}.jsonl"), "rb")  # noqa: SIM115
        except FileNotFoundError:
            raise ApiError(404, f'There is no file "{upload.id}".', code="file_not_found") from None

        def pieces() -> Iterator[bytes]:
            with file:
                while piece := file.read(PIECE):
                    yield piece

        return pieces()

    def rows(self, upload: Upload) -> Iterator[list[dict[str, str]]]:
        """The chats in it. FileNotFoundError where the file was deleted meanwhile."""
        with open(self.records.path(f"{upload.folder}/{upload.id}.jsonl"), "rb") as f:
            yield from chats.read(f)

    def delete(self, upload: Upload) -> None:
        """Gone when it returns; jobs that wait for it fail."""
        self.remove(f"{upload.folder}/{upload.id}")

    def remove(self, path: str) -> None:
        """A file, whether or not its record can be read. path: files/<tenant>/<id>."""
        self.records.remove(f"{path}.json")
        self.records.remove(f"{path}.jsonl")

    def delete_all(self, prefix: str) -> int:
        """Removes all that a prefix has, and returns how many files those were. Its keys are revoked: who sends one now waits
        here, and is then refused."""
        folder = f"files/{tenant_folder(prefix)}"
        with self.records.lock(f"files of {folder}"):
            count = sum(name.endswith(".json") for name in self.records.names(folder))
            self.records.remove(folder)
        return count

    def sweep(self) -> None:
        """Removes bytes whose record was never written."""
        for folder in self.records.names("files"):
            there = set(self.records.names(f"files/{folder}"))
            for name in there:
                path = self.records.path(f"files/{folder}/{name}")
                if name.endswith(".jsonl") and name.removesuffix("l") not in there and _is_old(path):
                    self.records.remove(f"files/{folder}/{name}")

    def _read(self, folder: str, file: str) -> Upload | None:
        record = self.records.read(f"files/{folder}/{file}.json")
        try:
            return None if record is None else Upload(**record)
        except TypeError as e:
            raise DamagedRecord(f"files/{folder}/{file}.json is no file's record: {e}.") from e

    def _ids(self, tenant: Tenant) -> Iterator[tuple[str, str]]:
        """(folder, id) of each."""
        for folder in self._folders(tenant):
            for name in self.records.names(f"files/{folder}"):
                if name.endswith(".json"):
                    yield folder, name.removesuffix(".json")

    def _folders(self, tenant: Tenant) -> list[str]:
        return self.records.names("files") if tenant.admin else [tenant_folder(tenant.prefix)]


def _is_old(path: Any) -> bool:
    try:
        return time.time() - path.stat().st_mtime > 3600
    except OSError:
        return False
