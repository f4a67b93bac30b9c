"""Clocks, byte counts and the description of the machine, used by every benchmark."""

import contextlib
import ctypes
import fcntl
import gc
import multiprocessing
import os
import platform
import statistics
import subprocess
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from importlib import metadata
from pathlib import Path
from typing import Any, TypeVar

import torch
from torch import Tensor

T = TypeVar("T")
LOCK = Path(tempfile.gettempdir()) / "veralib-bench.lock"
ROOT = Path(__file__).resolve().parent.parent


@contextlib.contextmanager
def alone() -> Iterator[None]:
    """Holds the machine's benchmark lock; waits while another benchmark has it."""
    with open(LOCK, "w") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            print(f"another benchmark holds {LOCK}; waiting for it", flush=True)
            fcntl.flock(file, fcntl.LOCK_EX)
        yield


def spread(values: Sequence[float]) -> dict[str, float]:
    """{"median", "low", "high", "n"}: low and high are the quartiles."""
    if len(values) < 2:
        return {"median": values[0], "low": values[0], "high": values[0], "n": 1}
    low, middle, high = statistics.quantiles(values, n=4, method="inclusive")
    return {"median": middle, "low": low, "high": high, "n": len(values)}


def clock() -> float:
    """Seconds: of the wall, or, with one thread, of the processor, which other programs on the machine hardly disturb."""
    return time.process_time() if torch.get_num_threads() == 1 else time.perf_counter()


def interleave(steps: dict[str, Callable[[], Any]], rounds: int, warmup: int) -> dict[str, list[float]]:
    """Seconds, by clock(), of every step in every round. A round runs each step once; the order moves on by one from round
    to round, so that a disturbance or a warm cache doesn't always meet the same step."""
    names = list(steps)
    seconds: dict[str, list[float]] = {name: [] for name in names}
    gc.collect()
    gc.disable()
    try:
        for r in range(warmup + rounds):
            for k in range(len(names)):
                name = names[(r + k) % len(names)]
                start = clock()
                steps[name]()
                taken = clock() - start
                if r >= warmup:
                    seconds[name].append(taken)
            gc.collect()
    finally:
        gc.enable()
    return seconds


def saved_bytes(forward: Callable[[], Tensor], frozen: Sequence[Tensor]) -> int:
    """Bytes that autograd keeps from forward to backward: unique storages, those of `frozen` left out."""
    skip = {t.untyped_storage().data_ptr() for t in frozen}
    storages: dict[int, torch.UntypedStorage] = {}  # holds each, or its address could be given out anew

    def pack(t: Tensor) -> Tensor:
        storage = t.untyped_storage()
        if storage.data_ptr() not in skip:
            storages[storage.data_ptr()] = storage
        return t

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
        loss = forward()
    del loss
    return sum(s.nbytes() for s in storages.values())


def allocations(run: Callable[[], Any]) -> tuple[int, int]:
    """(net, peak) bytes that the CPU allocator gave out during run(); its result is still alive when net is read.

    The check on saved_bytes: what an autograd function hides from the hooks, in attributes of its context, counts here.
    """
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True) as profiler:
        kept = run()
        with torch.profiler.record_function("benchmark_end"):
            pass
    del kept
    events = profiler.profiler.kineto_results.events()  # type: ignore[union-attr]
    end = next(e.start_ns() for e in events if e.name() == "benchmark_end")
    now = peak = 0
    for event in sorted((e for e in events if e.name() == "[memory]"), key=lambda e: e.start_ns()):
        if event.start_ns() <= end:
            now += event.nbytes()
            peak = max(peak, now)
    return now, peak


def in_own_process(function: Callable[..., T], *arguments: Any) -> T:
    """function(…) of a new process: what another measurement has left in the allocator's lists says nothing there."""
    with ProcessPoolExecutor(1, mp_context=multiprocessing.get_context("spawn")) as pool:
        return pool.submit(function, *arguments).result()


def keep_memory() -> None:
    """glibc keeps what this process frees from now on. By default it gives large blocks back, and the next step, of whichever
    contestant comes next, pays for them page by page: a quarter of a step's time here, laid on one by chance."""
    with contextlib.suppress(OSError, AttributeError):
        libc = ctypes.CDLL("libc.so.6")
        libc.mallopt(-1, -1)  # M_TRIM_THRESHOLD: never
        libc.mallopt(-4, 0)  # M_MMAP_MAX: no block of its own


def trim() -> None:
    """Gives freed memory back: glibc keeps the holes that a step leaves, a gigabyte a contestant, until there is none left."""
    gc.collect()
    with contextlib.suppress(OSError, AttributeError):
        ctypes.CDLL("libc.so.6").malloc_trim(0)


def environment() -> dict[str, Any]:
    """Hardware, versions, commit and load, for a result file."""
    import psutil

    def version(package: str) -> str:
        try:
            return metadata.version(package)
        except metadata.PackageNotFoundError:
            return "absent"

    return {
        "processor": _processor(),
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "clock": "processor" if torch.get_num_threads() == 1 else "wall",
        "memory_bytes": psutil.virtual_memory().total,
        "system": f"{platform.system()} {platform.machine()}",
        "python": platform.python_version(),
        "versions": {p: version(p) for p in ("veralib", "torch", "transformers", "peft", "safetensors", "numpy")}
        | {"torch": str(torch.__version__)},  # with the build, +cpu or +cu132
        "commit": _commit(),
        "load_average": [round(x, 2) for x in os.getloadavg()],
        "date": time.strftime("%Y-%m-%d", time.gmtime()),
    }


def _processor() -> str:
    with contextlib.suppress(OSError):
        for line in Path("/proc/cpuinfo").read_text().splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    return platform.processor() or "unknown"


def _commit() -> str:
    """The commit, with "+changes" where veralib or the benchmarks differ from it."""

    def git(*words: str) -> str:
        return subprocess.run(["git", *words], cwd=ROOT, capture_output=True, text=True, check=True).stdout.strip()

    try:
        changed = git("status", "--porcelain", "--", "veralib", "benchmarks")
        return git("rev-parse", "--short=12", "HEAD") + ("+changes" if changed else "")
    except (OSError, subprocess.CalledProcessError):
        return "unknown"
