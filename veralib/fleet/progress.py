"""While a run goes on: a line now and then that says where everybody stands, and an end that was asked for with SIGTERM."""

import contextlib
import json
import signal
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

STOPPED = 143  # 128 + SIGTERM, what a shell reports for it


class ProgressFile:
    """Called after each mixed batch; every `seconds` it adds {"time": …, "owners": {name: {steps, of, loss}}} to a file."""

    def __init__(self, path: Path, seconds: float | None) -> None:
        self.path, self.seconds, self.last = path, seconds, 0.0

    def __call__(self, trainer: Any) -> None:
        if self.seconds is None or time.monotonic() - self.last < self.seconds:
            return
        self.last = time.monotonic()
        line = json.dumps({"time": time.time(), "owners": trainer.standing()})
        with contextlib.suppress(OSError), open(self.path, "a", encoding="utf-8") as f:  # a full disk is found by what matters
            f.write(line + "\n")


class Stop:
    """Whether this process was asked to end. asked: set by the first SIGTERM; the run then saves where it stands."""

    asked = False


@contextlib.contextmanager
def on_sigterm() -> Iterator[Stop]:
    """Within, SIGTERM is noted instead of ending the process. Only the main thread can note it; elsewhere nothing changes."""
    stop = Stop()
    if threading.current_thread() is not threading.main_thread():
        yield stop
        return

    def note(*_: Any) -> None:
        stop.asked = True

    before = signal.signal(signal.SIGTERM, note)
    try:
        yield stop
    finally:
        signal.signal(signal.SIGTERM, before)
