"""Figures 3 and 5, table 12 and intruder dimensions on a small scale, drawn from what `python -m experiments.weights` found."""

import json
import re
import statistics
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from .pages import Table, page, write

FOUND = Path("results/weights/weights.json")
COMMAND = "python -m experiments.weights"
PAPERS_RANK = 256


def load(path: Path) -> dict[str, Any] | None:
    """The experiment's result; None where it wasn't run."""
    return json.loads(path.read_text(encoding="utf-8")) if path.exists() else None


def _missing(folder: Path, name: str, title: str, printed: Sequence[Table] = (), remarks: Sequence[str] = ()) -> dict[str, Any]:
    """The page of a figure that no run fills: what the paper prints, and the command."""
    how = f"Ours is missing: `{COMMAND}`, in a clone of the repository, with VERALIB_DATA set, makes {FOUND.as_posix()}."
    return write(folder, name, {"missing": 1}, page(title, name, printed, [*remarks, how]))


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
    found, title = load(source), "Figure 3: how far d moves, by layer"
    printed = (
        f"The paper: RTE, RoBERTa-large, rank {PAPERS_RANK}, so ‖d‖₂ starts at 0.1 · √{PAPERS_RANK} = "
        f"{0.1 * PAPERS_RANK**0.5:.1f}; query moves more than value, later layers more than earlier ones. "
        "Its points are printed as a picture alone."
    )
    if found is None:
        return _missing(folder, "fig3", title, remarks=[printed])
    series: dict[str, dict[int, float]] = {"query": {}, "value": {}}
    for layer, norm in found["d_norms"].items():
        series[layer.rsplit(".", 1)[-1]][_block(layer)] = norm
    start = 0.1 * found["rank"] ** 0.5
    _lines(series, folder / "fig3.png", "block", "‖d‖₂", start)
    blocks = sorted(series["query"])
    rows = [(str(b), f"{series['query'][b]:.3f}", f"{series['value'][b]:.3f}") for b in blocks]
    remarks = ["![figure 3](fig3.png)", f"d starts at 0.1 · √{found['rank']} = {start:.1f} (dashed).", printed, _where(found)]
    text = page(title, "fig3", [("", ("block", "query ‖d‖₂", "value ‖d‖₂"), rows)], remarks)
    return write(folder, "fig3", {"norms": found["d_norms"], "start": start}, text)


def fig5(folder: Path, source: Path = FOUND) -> dict[str, Any]:
    """Cosine of the flattened ΔW of query layers with LoRA's."""
    found, title = load(source), "Figure 5: is VeRA's ΔW like LoRA's?"
    printed = "The paper: 2e-3 on average between LoRA and VeRA, -8e-5 between LoRA and random matrices."
    if found is None:
        return _missing(folder, "fig5", title, remarks=[printed])
    series = {name: {_block(k): v for k, v in of.items()} for name, of in found["cosines"].items()}
    _lines(series, folder / "fig5.png", "block", "cosine with LoRA r=64's ΔW", None)
    blocks = sorted(series["random"])
    rows = [(name, *(f"{of[b]:+.4f}" for b in blocks), f"{statistics.mean(of.values()):+.4f}") for name, of in series.items()]
    head = ("ΔW of", *(f"block {b}" for b in blocks), "mean")
    text = page(title, "fig5", [("", head, rows)], ["![figure 5](fig5.png)", printed, _where(found)])
    return write(folder, "fig5", {"cosines": found["cosines"]}, text)


def intruders(folder: Path, source: Path = FOUND) -> dict[str, Any]:
    """New leading singular vectors, and the size of ΔW, by method."""
    found = load(source)
    if found is None:
        return _missing(folder, "intruders", "Intruder dimensions")
    rows = []
    for name, of in found["intruders"].items():
        change = statistics.mean(found["change"][name].values())
        run = found["runs"][name]
        rows.append(
            (
                name,
                f"{run['lr']:g}",
                f"{100 * run['score']:.1f}",
                f"{sum(of.values())} of {found['top'] * len(of)}",
                f"{100 * change:.1f} %",
            )
        )
    says = (
        f"Of the {found['top']} leading left singular vectors of W0 + ΔW of each query and value layer, those whose largest "
        f"|cosine| with any singular vector of W0 is below {found['near']:g} (Shuttleworth et al. 2024). Size: ‖ΔW‖ ÷ ‖W0‖, mean "
        "of the layers. One seed: the score says whether a method learned, not which is the best."
    )
    head = ("method", "rate", f"{found['metric']} × 100", "intruder dimensions", "size of ΔW")
    text = page("Intruder dimensions", "intruders", [("", head, rows)], [says, _where(found)])
    return write(folder, "intruders", {"intruders": found["intruders"], "change": found["change"]}, text)


def table12(folder: Path, source: Path = FOUND) -> dict[str, Any]:
    """Time and memory of training, LoRA and VeRA at rank 64."""
    found, title = load(source), "Table 12: time and memory"
    columns, values = ("method", "minutes", "÷ LoRA", "GPU memory, GB"), (("LoRA", 568, 23.42), ("VeRA", 578, 21.69))
    printed = [(name, str(minutes), f"{minutes / 568:.2f}", f"{memory:g}") for name, minutes, memory in values]
    paper = ("The paper: Llama 7B, rank 64, one GPU", columns, printed)
    if found is None:
        return _missing(folder, "table12", title, [paper])
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
    says = (
        "`make bench` has the interleaved measurement; here the runs followed one another, each in a process of its own. Rank 64 "
        "says nothing about r = 1024, whose adapter costs sixteen times as much."
    )
    text = page(title, "table12", [paper, ("Ours", head, rows)], [says, _where(found)])
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
