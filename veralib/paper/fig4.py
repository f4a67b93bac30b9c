"""Figure 4 on a small scale: accuracy beside the head alone's, for each thousand trained parameters, from results/glue."""

import statistics
from pathlib import Path
from typing import Any

from ..errors import DataError
from ..training.sweep import load_results
from .compare import chosen
from .pages import Table, page, write

RESULTS = Path("results/glue")
BASELINE = "head only"


def make(folder: Path, results: Path = RESULTS) -> dict[str, Any]:
    """The paper's formula, 100 · (accuracy ÷ the head's accuracy) ÷ thousands of parameters, and the gain its caption names."""
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
        for name, line in scores.items():
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
    if not lines:
        raise DataError(f"there is no result of the head alone in {results}: run `vera sweep experiments/glue.yaml` first.")
    remarks = [
        "The paper's formula divides accuracies, so a method that gains nothing scores as many points a parameter as one that "
        "gains all; it rewards few parameters alone. The column beside it is what the caption says. The rate is chosen by "
        "accuracy on held-out rows. Base: MiniLM-L6."
    ]
    return write(
        folder, "fig4", {"lines": lines}, page("Figure 4: accuracy for each thousand parameters", "fig4", tables, remarks)
    )
