"""Result: what a run leaves in result.json, with everything needed to believe and to repeat it; and its plot."""

import contextlib
import dataclasses
import json
import os
import platform
import subprocess
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path
from typing import Any

from ..errors import DataError
from .metrics import LOWER_IS_BETTER

PACKAGES = ("veralib", "torch", "transformers", "peft", "accelerate", "tokenizers", "bitsandbytes", "numpy")


@dataclass(frozen=True)
class Result:
    """One finished run. Bytes are of files on disk, seconds of wall clock."""

    method: str
    settings: Mapping[str, Any]
    seed: int
    metrics: Mapping[str, float]
    """Of the kept weights, on the validation rows (eval_…) and the test rows (test_…)."""
    labels: Sequence[str]
    rows: Mapping[str, int]
    steps: int
    seconds: float
    """From the call to the saved adapter: loading, training, evaluation; over all parts of an interrupted run but loading."""
    train_seconds: float
    """Training alone, without evaluations and checkpoints."""
    seconds_per_step: float
    peak_memory_bytes: int
    """The process's resident memory at its highest during the run, or on a GPU what torch allocated there at most."""
    trainable_parameters: int
    adapter_parameters: int
    """Trained numbers without the head: what the paper counts."""
    head_parameters: int
    adapter_bytes: int
    """The saved files that belong to the adapter, head included."""
    files: Sequence[str]
    data: Mapping[str, str]
    """Split and file -> SHA-256."""
    versions: Mapping[str, str]
    commit: str | None
    hardware: Mapping[str, Any]
    history: Sequence[Mapping[str, float]]
    """Trainer's log: loss and learning rate by step, and every evaluation."""
    resumed: int = 0
    """How often the run was interrupted and went on."""
    output: str = ""

    def to_dict(self) -> dict[str, Any]:
        """Plain JSON types."""
        return dataclasses.asdict(self)


def load_result(folder: str | Path) -> Result:
    """The Result of a finished run's folder; DataError where there is none."""
    path = Path(folder) / "result.json"
    try:
        return Result(**json.loads(path.read_text(encoding="utf-8")))
    except (OSError, ValueError, TypeError) as e:
        raise DataError(f"{path} holds no finished run's result: {e}") from e


def versions(more: Sequence[str] = ()) -> dict[str, str]:
    """Python's version and those of the packages that a run stands on, and of `more`, as far as they are installed."""
    found = {"python": platform.python_version()}
    for name in (*PACKAGES, *more):
        try:
            found[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            continue
    if "torch" in found:
        import torch

        found["torch"] = str(torch.__version__)  # with the build, +cpu or +cu132, which not every package's name has
    return found


def commit() -> str | None:
    """The git commit of veralib's own checkout, "+changes" where files differ from it; None for an installed package."""
    root = Path(__file__).parents[2]
    if not (root / ".git").exists():
        return None
    try:
        git = ["git", "-C", str(root)]
        head = subprocess.run([*git, "rev-parse", "HEAD"], capture_output=True, text=True, timeout=10, check=True)
        changes = subprocess.run(
            [*git, "status", "--porcelain", "-uno", "veralib"], capture_output=True, text=True, timeout=10, check=True
        )
    except (OSError, subprocess.SubprocessError):
        return None
    return head.stdout.strip() + ("+changes" if changes.stdout.strip() else "")


def hardware() -> dict[str, Any]:
    """Processor, cores, torch's threads and the GPU, if there is one."""
    import torch

    found = {
        "platform": f"{platform.system()} {platform.machine()}",
        "processor": _processor(),
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "processes": int(os.environ.get("WORLD_SIZE", 1)),
    }
    if torch.cuda.is_available():
        found["gpu"] = torch.cuda.get_device_name()
    return found


def _processor() -> str:
    try:
        for line in Path("/proc/cpuinfo").read_text().splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    except OSError:
        pass
    return platform.processor() or platform.machine()


def reset_peak_memory() -> None:
    """Starts the measurement of peak_memory() anew, where the system can (Linux, CUDA)."""
    import torch

    if torch.cuda.is_available():
        torch.cuda.reset_peak_memory_stats()
    with contextlib.suppress(OSError):
        Path("/proc/self/clear_refs").write_text("5")  # 5: resets VmHWM, the resident set's high-water mark


def peak_memory() -> int:
    """Bytes: what torch allocated on the GPU at most, else the process's resident memory at its highest."""
    import torch

    if torch.cuda.is_available() and torch.cuda.max_memory_allocated():
        return torch.cuda.max_memory_allocated()
    try:
        for line in Path("/proc/self/status").read_text().splitlines():
            if line.startswith("VmHWM"):
                return int(line.split()[1]) * 1024
    except OSError:
        pass
    try:
        import psutil
    except ImportError:
        return 0
    info = psutil.Process().memory_info()
    return int(getattr(info, "peak_wset", info.rss))


def draw_plot(result: Result, path: Path, metric: str) -> None:
    """plot.png: the training loss and the watched metric over the steps."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    loss = [(h["step"], h["loss"]) for h in result.history if "loss" in h]
    scores = [(h["step"], h[f"eval_{metric}"]) for h in result.history if f"eval_{metric}" in h]
    figure, left = plt.subplots(figsize=(7, 4), layout="constrained")
    if loss:
        left.plot(*zip(*loss, strict=True), color="tab:gray", linewidth=1.2, label="training loss")
    left.set_xlabel("step")
    left.set_ylabel("training loss")
    if scores:
        right = left.twinx()
        right.plot(*zip(*scores, strict=True), color="tab:blue", marker="o", label=f"validation {metric}")
        right.set_ylabel(f"validation {metric}" + (" (lower is better)" if metric in LOWER_IS_BETTER else ""))
    left.set_title(f"{result.method}: {result.adapter_parameters:,} trained parameters, {result.adapter_bytes:,} bytes")
    figure.savefig(path, dpi=120)
    plt.close(figure)
