"""jsonl files that grow by whole lines, so that an interrupted command goes on where it stopped."""

import hashlib
import json
import threading
from collections.abc import Callable, Iterable
from concurrent.futures import ThreadPoolExecutor, wait
from pathlib import Path
from typing import IO, Any, TypeVar

from ..errors import ConfigError, DataError

Job = TypeVar("Job")
Found = TypeVar("Found")
Record = dict[str, Any]


def digest(value: Any) -> str:
    """Sixteen hexadecimal digits that stand for a value of plain JSON types."""
    return hashlib.sha256(json.dumps(value, sort_keys=True, ensure_ascii=False).encode("utf-8", "surrogatepass")).hexdigest()[:16]


def plain_id(key: str) -> int | str:
    """A question's id as FastChat writes it: a number where it is one."""
    return int(key) if key.isdecimal() and str(int(key)) == key else key


def read_log(path: str | Path) -> tuple[list[Record], int]:
    """(records, bytes that hold them); no records where there is no file. A last line that was cut in the middle is left out.

    Errors: DataError where any other line is no JSON object.
    """
    path = Path(path)
    try:
        raw = path.read_bytes() if path.exists() else b""
    except OSError as e:
        raise ConfigError(f"can't read {path}: {e.strerror or e}") from e
    records: list[Record] = []
    good = 0
    lines = raw.split(b"\n")
    for number, line in enumerate(lines, 1):
        last = number == len(lines)
        try:
            value = json.loads(line) if line.strip() else None
        except ValueError as e:
            if last:
                break
            raise DataError(f"{path}, line {number} is no JSON: mend or remove that line") from e
        if value is not None and not isinstance(value, dict):
            raise DataError(
                f"{path}, line {number} is a {type(value).__name__}, expected an object: is it a file of this command's?"
            )
        records += [value] if value is not None else []
        good += len(line) + (0 if last else 1)
    return records, good


class Log:
    """Appends records to a file, each as one whole line. A context manager."""

    def __init__(self, path: str | Path) -> None:
        self.path = Path(path)
        self.file: IO[bytes] | None = None

    def __enter__(self) -> "Log":
        _, good = read_log(self.path)
        try:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            self.file = open(self.path, "ab")
            self.file.truncate(good)
            if good and self.path.read_bytes()[-1:] != b"\n":
                self.file.write(b"\n")
        except OSError as e:
            raise ConfigError(f"can't write {self.path}: {e.strerror or e}") from e
        return self

    def __exit__(self, *error: Any) -> None:
        if self.file is not None:
            self.file.close()

    def write(self, record: Record) -> None:
        """Appends one record; it is in the file when this returns."""
        assert self.file is not None
        try:
            self.file.write(json.dumps(record, ensure_ascii=False).encode("utf-8", "surrogatepass") + b"\n")
            self.file.flush()
        except OSError as e:
            raise ConfigError(f"can't write {self.path}: {e.strerror or e}") from e


def pending(path: str | Path, jobs: Iterable[tuple[Any, str]], key: Callable[[Record], Any], what: str) -> set[Any]:
    """The keys of the jobs whose record isn't in the file. jobs: (key, digest of what is asked) each.

    ConfigError where the file holds a record of the same key for something else: another judge, other answers, other settings.
    """
    wanted = dict(jobs)
    missing = dict(wanted)
    for record in read_log(path)[0]:
        name = key(record)
        if name in wanted and record.get("request") != wanted[name]:
            shown = ", ".join(str(part) for part in (name if isinstance(name, tuple) else (name,)))
            raise ConfigError(
                f"{path} already holds {what} that were made otherwise (question {shown}): other answers, another model or "
                "judge, or other settings. Name another output file."
            )
        missing.pop(name, None)
    return set(missing)


def in_parallel(
    jobs: Iterable[Job], work: Callable[[Job], Found], keep: Callable[[Found], None], count: int, stop: Callable[[], None]
) -> None:
    """Calls work on every job in `count` threads and keep on what each finds as it comes, one at a time.

    At the first error, or Ctrl-C, nothing new is begun, `stop` tells the waiting threads, what is under way is still kept, and
    that error is raised. keep runs in the threads too: Ctrl-C, which Python raises in the main one, can't come into it.
    """
    errors: list[BaseException] = []
    over, keeping = threading.Event(), threading.Lock()

    def guarded(job: Job) -> None:
        if over.is_set():
            return
        try:
            record = work(job)
            with keeping:
                keep(record)
        except BaseException as e:
            errors.append(e)
            over.set()
            stop()

    pool = ThreadPoolExecutor(count)
    try:
        wait([pool.submit(guarded, job) for job in jobs])
    except BaseException:
        over.set()
        stop()
        raise
    finally:
        pool.shutdown()
    if errors:
        raise errors[0]
