"""Figure 4: accuracy beside the head alone's, for each thousand trained parameters: the paper's bars, and ours."""

import statistics
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from ..training.grid import read_grid
from ..training.sweep import load_results
from .compare import chosen
from .pages import Table, page, write
from .published import TABLES

RESULTS = Path("results/glue")
GRID = Path("experiments/glue.yaml")
BASELINE = "head only"
# As printed above the bars: RTE, RoBERTa large.
PRINTED = {
    ("Adpt^P", "3M"): 0.05,
    ("Adpt^P", "0.8M"): 0.17,
    ("Adpt^H", "6M"): 0.02,
    ("Adpt^H", "0.8M"): 0.15,
    ("LoRA", "0.8M"): 0.18,
    ("VeRA", "0.061M"): 2.64,
}


def make(folder: Path, results: Path = RESULTS, grid: Path = GRID) -> dict[str, Any]:
    """The paper's formula, 100 · (accuracy ÷ the head's accuracy) ÷ thousands of parameters, and the gain its caption names.

    Without results the page has the printed bars, and the command that makes ours.
    """
    bars, (tables, lines) = published(), _ours(results)
    missing = _missing(grid, results) if grid.exists() else 0 if lines else 1
    rows = [
        (b["method"], b["parameters"], f"{b['accuracy']:g}", f"{b['printed']:g}", "{:.1f} to {:.1f}".format(*b["baseline"]))
        for b in bars
    ]
    columns = ("method", "parameters", "accuracy (Table 2)", "bar", "the head's accuracy that the formula needs")
    tables = [("The paper's bars: RTE, RoBERTa large", columns, rows), *tables]
    remarks = [
        "![figure 4](fig4.png)",
        "The paper's formula divides accuracies, so a method that gains nothing scores as many points a parameter as one that "
        "gains all; it rewards few parameters alone. The column beside it is what the caption says. The head's accuracy isn't "
        "printed; with Table 2's numbers no single one gives both LoRA's bar and VeRA's, whatever the rounding.",
        *(["Ours: the rate is chosen by accuracy on held-out rows. Base: MiniLM-L6, not RoBERTa."] if lines else []),
        *([f"Ours lacks runs ({missing}): `vera sweep {GRID.as_posix()}`."] if missing else []),
    ]
    _draw(bars, lines, folder / "fig4.png")
    found = {"published": bars, "lines": lines, "missing": missing}
    return write(folder, "fig4", found, page("Figure 4: accuracy for each thousand parameters", "fig4", tables, remarks))


def published() -> list[dict[str, Any]]:
    """The printed bars with Table 2's accuracy on RTE, and between what the formula's baseline then lay: a bar is rounded."""
    found = []
    for row in TABLES["table2"].rows:
        printed = PRINTED.get((row.label, row.parameters)) if row.block == "RoBERTa large" else None
        if printed is None:
            continue
        accuracy, thousands = row.values[4], 1000 * float(row.parameters.rstrip("M"))
        assert accuracy is not None
        about = {"method": row.label, "parameters": row.parameters, "accuracy": accuracy, "printed": printed}
        ends = [100 * accuracy / ((printed + half) * thousands) for half in (0.005, -0.005)]
        found.append({**about, "baseline": ends})
    return found


def _missing(grid: Path, results: Path) -> int:
    """The grid's runs that the figure would use and that aren't there."""
    return sum(cell.settings.get("task") != "regression" for cell in read_grid(grid, results).missing())


def _ours(results: Path) -> tuple[list[Table], list[dict[str, Any]]]:
    found = load_results(results)
    tables: list[Table] = []
    lines: list[dict[str, Any]] = []
    for task in dict.fromkeys(r["task"] for r in found):
        ran = [r for r in found if r["task"] == task and {"eval_accuracy", "test_accuracy"} <= r["metrics"].keys()]
        scores = {line.name: line for line in chosen(ran, "accuracy")}
        if BASELINE not in scores:
            continue
        head = statistics.mean(scores[BASELINE].scores.values())
        rows = []
        for name, line in sorted(scores.items(), key=lambda s: s[1].parameters):
            if name == BASELINE or not line.parameters:
                continue
            accuracy, thousands = statistics.mean(line.scores.values()), line.parameters / 1000
            printed, gain = 100 * accuracy / head / thousands, (accuracy - head) / thousands
            lines.append({"task": task, "method": name, "accuracy": accuracy, "head": head, "formula": printed, "gain": gain})
            rows.append(
                (name, f"{line.parameters:,}", f"{accuracy:.1f}", f"{printed:.2f}", f"{gain:+.3f}", str(len(line.scores)))
            )
        columns = ("method", "parameters", "accuracy", "the paper's formula", "points gained per 1K parameters", "seeds")
        tables.append((f"{task}: the head alone has {head:.1f}", columns, rows))
    return tables, lines


def _draw(bars: Sequence[dict[str, Any]], lines: Sequence[dict[str, Any]], path: Path) -> None:
    """The paper's bars, and where there are results ours by the formula, a panel for each task."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    panels = [("the paper: RTE, RoBERTa large", [(f"{b['method']} {b['parameters']}", b["printed"]) for b in bars])]
    for task in dict.fromkeys(line["task"] for line in lines):
        panels.append((f"ours: {task}, MiniLM-L6", [(x["method"], x["formula"]) for x in lines if x["task"] == task]))
    figure, axes = plt.subplots(1, len(panels), figsize=(5.5 * len(panels), 3.5), squeeze=False)
    for axis, (title, values) in zip(axes[0], panels, strict=True):
        drawn = axis.barh([name for name, _ in values], [value for _, value in values])
        axis.bar_label(drawn, fmt="%.2f", padding=3)
        axis.set(title=title, xlabel="100 · accuracy ÷ the head's ÷ thousands of parameters")
        axis.margins(x=0.15)
        axis.invert_yaxis()
    figure.tight_layout()
    figure.savefig(path, dpi=110)
    plt.close(figure)
