"""Running a grid: `vera sweep grid.yaml`. A run that has its file isn't repeated, nor one that another grid has made."""

import json
import os
import tempfile
import threading
from collections.abc import Callable, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from functools import cache
from multiprocessing import get_context, parent_process
from pathlib import Path
from typing import Any

from ..errors import TrainingDiverged, VeraError
from .data import sha256_file
from .folder import write_json
from .grid import Cell, Grid, settings_of

LEFT_OUT = ("history", "output", "settings", "labels", "files", "resumed", "plot")


def run_grid(
    grid: Grid, jobs: int = 1, shard: tuple[int, int] = (1, 1), only: str = "", log: Callable[[str], None] = print
) -> list[str]:
    """Every missing run of this shard, `jobs` at a time, each on a GPU of its own where there are some; what failed, in words.

    only, shard: as in Grid.missing; shards are for the job arrays of a cluster's own scheduler.
    """
    missing = grid.missing(only, shard)
    for folder in grid.also:
        if missing and not any(folder.glob("*/*.json")):
            log(f"also: {folder.as_posix()} holds no runs yet, so none are taken over from there")
    if taken := _take_over(grid, missing):
        log(f"{taken} runs taken over from {', '.join(p.as_posix() for p in grid.also)}")
        missing = grid.missing(only, shard)
    log(f"{len(missing)} of {len(grid.cells)} runs to do")
    failed: list[str] = []
    if not missing:
        return failed
    # Spawned, not forked: CUDA can't live on in a forked process.
    context = get_context("spawn")
    numbers, gpus = context.Queue(), _gpus()
    for number in range(jobs):
        numbers.put(gpus[number % len(gpus)] if gpus else None)
    pool = ProcessPoolExecutor(jobs, mp_context=context, initializer=_share, initargs=(numbers, jobs))
    try:
        waiting = {pool.submit(run_cell, cell, grid.output): cell for cell in missing}
        for number, done in enumerate(as_completed(waiting), 1):
            cell = waiting[done]
            what = f"{cell.task} {cell.name} {cell.rate}={cell.value:g} seed {cell.seed}"
            try:
                log(f"{number}/{len(missing)} {what}: {done.result()}")
            except Exception as e:  # out of memory, a full disk, a model that can't be read: that run's own
                said = str(e) if isinstance(e, VeraError) else f"{type(e).__name__}: {e}"
                failed.append(f"{what}: {said}")
                log(f"{number}/{len(missing)} {what} failed: {said}")
    finally:
        pool.shutdown(cancel_futures=True)
    return failed


def _take_over(grid: Grid, cells: Sequence[Cell]) -> int:
    """Copies what the grids of `also` have of these runs, by equal settings and the same base; how many. Each says its source."""
    files = [path for folder in grid.also for path in sorted(folder.glob("*/*.json"))]
    read = [(path, json.loads(path.read_text(encoding="utf-8"))) for path in files]
    there = [(path, found) for path, found in read if isinstance(found, dict) and {"settings", "base"} <= set(found)]
    taken = 0
    for cell in cells:
        for path, found in there:
            if cell.same(found["settings"]) and found["base"] == _base(settings_of(cell, "unused").model):
                own = {"task": cell.task, "name": cell.name, "rate": cell.rate, "value": cell.value, "from": path.as_posix()}
                _write(cell.file(grid.output), {**found, **own})
                taken += 1
                break
    return taken


def _gpus() -> list[str]:
    """The GPUs that this process may use, by the names that CUDA_VISIBLE_DEVICES takes."""
    import torch

    given = os.environ.get("CUDA_VISIBLE_DEVICES")
    return given.split(",") if given else [str(i) for i in range(torch.cuda.device_count())]


def _leave_with_parent() -> None:
    """Ends a worker whose parent is gone, killed by a scheduler, say: it would hold its GPU and wait for work for ever."""
    parent = parent_process()
    if parent is not None:
        parent.join()
        os._exit(1)


def _cores() -> int:
    """The cores that this process may use: those of a cluster's job, where it has a part of the machine's."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def _share(numbers: Any, jobs: int) -> None:
    """A worker's share of the machine: one GPU, the only one that it and the Trainer see, or its part of the cores."""
    threading.Thread(target=_leave_with_parent, daemon=True).start()
    gpu = numbers.get()
    if gpu is not None:
        os.environ["CUDA_VISIBLE_DEVICES"] = gpu
    import torch

    if gpu is None and "OMP_NUM_THREADS" not in os.environ:
        torch.set_num_threads(max(1, _cores() // jobs))


def run_cell(cell: Cell, output: Path) -> str:
    """One run; writes its result file, without this machine's paths, and gives its scores as text: NaN where it diverged."""
    from .run import train

    with tempfile.TemporaryDirectory() as scratch:
        settings = settings_of(cell, Path(scratch) / "run")
        try:
            result = train(settings).to_dict()
        except TrainingDiverged as e:  # a score of this rate too, and it would come again
            result = e.result.to_dict()
    report = {
        **{"task": cell.task, "name": cell.name, "rate": cell.rate, "value": cell.value, "base": _base(settings.model)},
        "settings": cell.settings,
        **{k: v for k, v in result.items() if k not in LEFT_OUT},
    }
    _write(cell.file(output), report)
    shown = {k: v for k, v in report["metrics"].items() if k.endswith(settings.resolved_metric)}
    return ", ".join(f"{k} {v:.4f}" for k, v in shown.items()) + f", {report['seconds']:.0f} s"


def _write(path: Path, report: dict[str, Any]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    write_json(path, report)


@cache
def _base(model: str) -> dict[str, str]:
    """A base model, as result files name it."""
    weights = Path(model) / "model.safetensors"
    return {"name": Path(model).name, "sha256": sha256_file(weights) if weights.exists() else ""}


def load_results(output: str | Path, names: Sequence[str] = ()) -> list[dict[str, Any]]:
    """Every result file below a grid's output folder, in the order of `names`, then by rate and seed."""
    found = [json.loads(p.read_text(encoding="utf-8")) for p in sorted(Path(output).glob("*/*.json"))]
    place = {name: i for i, name in enumerate(names)}
    return sorted(found, key=lambda r: (r["task"], place.get(r["name"], len(place)), r["value"], r["seed"]))
