"""Figures 3 and 5, table 12 and intruder dimensions on a small scale, drawn from what `python -m experiments.weights` found."""

import json
import re
import statistics
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from ..errors import DataError
from .pages import page, write

FOUND = Path("results/weights/weights.json")
COMMAND = "python -m experiments.weights"


def load(path: Path) -> dict[str, Any]:
    """The experiment's result. DataError names the command that makes it."""
    if not path.exists():
        raise DataError(f"there is no {path}: run `{COMMAND}` first, in a clone of the repository, with VERALIB_DATA set.")
    return json.loads(path.read_text(encoding="utf-8"))


def _where(found: Mapping[str, Any]) -> str:
    hardware = found["hardware"]
    return (
        f"On {found['model']} ({found['blocks']} blocks, hidden {found['hidden']}) and {found['task']}, {found['epochs']:g} "
        f"epochs, one seed: not the paper's RoBERTa-large. Run on {hardware.get('gpu') or hardware['processor']} by `{COMMAND}`."
    )


def _block(layer: str) -> int:
    return int(re.findall(r"\d+", layer)[0])


def fig3(folder: Path, source: Path = FOUND) -> dict[str, Any]:
    """‖d‖₂ by layer, query and value."""
    found = load(source)
    series: dict[str, dict[int, float]] = {"query": {}, "value": {}}
    for layer, norm in found["d_norms"].items():
        series[layer.rsplit(".", 1)[-1]][_block(layer)] = norm
    start = 0.1 * found["rank"] ** 0.5
    _lines(series, folder / "fig3.png", "block", "‖d‖₂", start)
    blocks = sorted(series["query"])
    rows = [(str(b), f"{series['query'][b]:.3f}", f"{series['value'][b]:.3f}") for b in blocks]
    remarks = ["![figure 3](fig3.png)", f"d starts at 0.1 · √{found['rank']} = {start:.1f} (dashed).", _where(found)]
    text = page("Figure 3: how far d moves, by layer", "fig3", [("", ("block", "query ‖d‖₂", "value ‖d‖₂"), rows)], remarks)
    return write(folder, "fig3", {"norms": found["d_norms"], "start": start}, text)


def fig5(folder: Path, source: Path = FOUND) -> dict[str, Any]:
    """Cosine of the flattened ΔW of query layers with LoRA's."""
    found = load(source)
    series = {name: {_block(k): v for k, v in of.items()} for name, of in found["cosines"].items()}
    _lines(series, folder / "fig5.png", "block", "cosine with LoRA r=64's ΔW", None)
    blocks = sorted(series["random"])
    rows = [(name, *(f"{of[b]:+.4f}" for b in blocks), f"{statistics.mean(of.values()):+.4f}") for name, of in series.items()]
    head = ("ΔW of", *(f"block {b}" for b in blocks), "mean")
    printed = "The paper: 2e-3 on average between LoRA and VeRA, -8e-5 between LoRA and random matrices."
    text = page(
        "Figure 5: is VeRA's ΔW like LoRA's?", "fig5", [("", head, rows)], ["![figure 5](fig5.png)", printed, _where(found)]
    )
    return write(folder, "fig5", {"cosines": found["cosines"]}, text)


def intruders(folder: Path, source: Path = FOUND) -> dict[str, Any]:
    """New leading singular vectors, and the size of ΔW, by method."""
    found = load(source)
    rows = []
    for name, of in found["intruders"].items():
        change = statistics.mean(found["change"][name].values())
        rows.append((name, f"{sum(of.values())} of {found['top'] * len(of)}", f"{100 * change:.1f} %"))
    says = (
        f"Of the {found['top']} leading left singular vectors of W0 + ΔW of each query and value layer, those whose largest "
        f"|cosine| with any singular vector of W0 is below {found['near']:g} (Shuttleworth et al. 2024). Size: ‖ΔW‖ ÷ ‖W0‖, mean "
        "of the layers."
    )
    head = ("method", "intruder dimensions", "size of ΔW")
    text = page("Intruder dimensions", "intruders", [("", head, rows)], [says, _where(found)])
    return write(folder, "intruders", {"intruders": found["intruders"], "change": found["change"]}, text)


def table12(folder: Path, source: Path = FOUND) -> dict[str, Any]:
    """Time and memory of training, LoRA and VeRA at rank 64."""
    found = load(source)
    rows = []
    reference = found["runs"]["LoRA r=64"]
    for name, run in found["runs"].items():
        rows.append(
            (
                *(name, f"{run['adapter_parameters']:,}", f"{1000 * run['seconds_per_step']:.0f}"),
                *(f"{run['seconds_per_step'] / reference['seconds_per_step']:.2f}", f"{run['peak_memory_bytes'] / 2**20:,.0f}"),
            )
        )
    head = ("method", "trained parameters", "ms a step", "÷ LoRA r=64", "process's peak memory, MiB")
    printed = (
        "The paper, Llama 7B at rank 64 on a GPU: LoRA 568 min and 23.42 GB, VeRA 578 min (1.02 ×) and 21.69 GB. `make bench` "
        "has the interleaved measurement; here the runs followed one another, each in a process of its own."
    )
    text = page("Table 12: time and memory", "table12", [("", head, rows)], [printed, _where(found)])
    return write(folder, "table12", {"runs": found["runs"]}, text)


def _lines(series: Mapping[str, Mapping[int, float]], path: Path, x: str, y: str, start: float | None) -> None:
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, axis = plt.subplots(figsize=(5.5, 3.5))
    for name, points in series.items():
        blocks = sorted(points)
        axis.plot(blocks, [points[b] for b in blocks], marker="o", label=name)
    if start is not None:
        axis.axhline(start, linestyle="--", color="grey")
    axis.set(xlabel=x, ylabel=y)
    axis.legend(frameon=False)
    figure.tight_layout()
    figure.savefig(path, dpi=110)
    plt.close(figure)


MAKES: dict[str, Callable[..., dict[str, Any]]] = {"fig3": fig3, "fig5": fig5, "intruders": intruders, "table12": table12}
