"""A grid's page: what `vera sweep` found, task by task, rendered from its result files alone."""

import os
import statistics
from collections import Counter
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from ..training.grid import Grid, read_grid
from ..training.sweep import load_results
from .compare import MARGIN, Line, chosen, finite, over_tasks, paired, spread, verdict
from .pages import Table, page, write

COLUMNS = ("method", "trained parameters", "adapter bytes", "rate", "held-out", "test", "seeds", "ms a step")


X_LABELS = {"bytes": "bytes stored for an adapter and its head", "parameters": "trained parameters"}
AVERAGES = {"mean": finite(statistics.mean), "median": finite(statistics.median)}


def make(
    name: str,
    grid_file: Path,
    folder: Path | None = None,
    place: Path | None = None,
    *,
    average: str = "mean",
    beside: Path | None = None,
) -> dict[str, Any]:
    """README.md and quality.png in the grid's output folder; NAME.json and NAME.md in `folder`.

    average: "mean" or "median", of the scores over the seeds; differences are paired means in either. beside: another grid's
    results, of which the methods that this one compares with are shown too.
    """
    grid = read_grid(grid_file, place)
    results = load_results(grid.output, list(dict.fromkeys(c.name for c in grid.cells)))
    own = bool(results)
    if beside is not None:
        results = [*(r for r in load_results(beside, grid.against) if r["name"] in grid.against), *results]
    by_task = {task: chosen([r for r in results if r["task"] == task], metric) for task, metric in grid.metrics.items()}
    together = over_tasks(by_task, list(dict.fromkeys(c.name for c in grid.cells)))
    tables = _over_tasks(together, by_task, grid, average)
    for task, lines in by_task.items():
        if lines:
            tables.append((f"{task}: {grid.metrics[task]} × 100", COLUMNS, [_line(line, average) for line in lines]))
            tables += _differences(task, lines, grid)
    picture, missing = "", grid.missing()
    grid.output.mkdir(parents=True, exist_ok=True)
    remarks = [
        *([grid.about] if grid.about else []),
        "The rate is the one with the best mean on held-out training rows; the test set is scored once a run. "
        f"{average.capitalize()} ± standard deviation over seeds. The head trains in full in every method; it counts in the "
        f"bytes, not in the parameters. On par: the whole interval within ± {MARGIN:g} points, a margin of our choice. The "
        "interval is of the seeds alone: it says nothing of other test rows than these, and isn't widened for the number of "
        "comparisons. Steps are timed with other runs beside them.",
        *(
            ["The mean of the tasks adds different metrics up, as the last column of the paper's Table 2 does."]
            if together
            else []
        ),
        *([f"{' and '.join(grid.against)}: runs of another grid with the same settings, in {beside}."] if beside else []),
        *_machine(results),
        f"{len(missing)} of {len(grid.cells)} runs are missing" + (f": `vera sweep {grid_file}`" if missing else "") + ".",
        *_by_task(missing),
    ]
    if own and any(by_task.values()):
        _plot(by_task, grid, grid.output / "quality.png", average)
        picture = Path(os.path.relpath(grid.output / "quality.png", folder or grid.output)).as_posix()
        remarks.insert(0, f"![quality over {grid.over}]({picture})")
    found = {
        "title": grid.title,
        "tasks": {
            task: [{**vars(line), average: AVERAGES[average](line.scores.values())} for line in lines]
            for task, lines in by_task.items()
        },
        "mean of the tasks": [{**vars(line), average: AVERAGES[average](line.scores.values())} for line in together],
        "missing": len(missing),
    }
    text = page(grid.title, name, tables, remarks)
    if folder is not None:
        write(folder, name, found, text)
    write(grid.output, "README", found, text.replace(f"({picture})", "(quality.png)") if picture else text)
    (grid.output / "README.json").unlink()
    return found


def average_std(values: Any, average: str = "mean") -> str:
    """ "mean ± standard deviation" of scores, or the median."""
    values = list(values)
    return f"{AVERAGES[average](values):.1f}" + (f" ± {spread(values):.1f}" if len(values) > 1 else "")


def _line(line: Line, average: str) -> tuple[str, ...]:
    test = average_std(line.scores.values(), average)
    rate = f"{line.rate} {line.value:g}" + (f" (the {line.edge} tried)" if line.edge else "")
    return (
        *(line.name, f"{line.parameters:,}", f"{line.bytes:,}", rate),
        *(average_std(line.held_out.values(), average), f"**{test}**", str(len(line.scores))),
        f"{1000 * line.seconds_per_step:.0f}",
    )


def _over_tasks(together: list[Line], by_task: Mapping[str, list[Line]], grid: Grid, average: str) -> list[Table]:
    """The methods on the tasks that all of them ran, beside each other, and the differences of their means over these tasks."""
    if not together:
        return []
    tasks = together[0].task.split(", ")
    scores = {(task, line.name): average_std(line.scores.values(), average) for task in tasks for line in by_task[task]}
    columns = ("method", "trained parameters", *(f"{task}, {grid.metrics[task]}" for task in tasks), "mean of the tasks")
    rows = [
        (
            *(line.name, f"{line.parameters:,}", *(scores[task, line.name] for task in tasks)),
            f"**{average_std(line.scores.values(), average)}**",
        )
        for line in together
    ]
    return [("Test scores × 100", columns, rows), *_differences("mean of the tasks", together, grid)]


def _differences(what: str, lines: list[Line], grid: Grid) -> list[Table]:
    tables: list[Table] = []
    for against in grid.against:
        if reference := next((line for line in lines if line.name == against), None):
            rows = [_difference(line, reference) for line in lines if line is not reference]
            tables.append((f"{what}: minus {against}, paired by seed", ("method", "difference", "95 % interval", "says"), rows))
    return tables


def _difference(line: Line, reference: Line) -> tuple[str, ...]:
    middle, ends, _ = paired(line, reference)
    shown = "–" if ends is None else f"{ends[0]:+.1f} to {ends[1]:+.1f}"
    return line.name, f"{middle:+.1f}", shown, verdict(ends, lower=line.lower)


def _machine(results: list[dict[str, Any]]) -> list[str]:
    if not results:
        return []
    last = results[-1]
    places = Counter(_place(r["hardware"]) for r in results).most_common()
    where = places[0][0] if len(places) == 1 else "; ".join(f"{place} ({n} runs)" for place, n in places)
    return [f"Base: {last['base']['name']}. Run on {where}; {', '.join(f'{k} {v}' for k, v in last['versions'].items())}."]


def _place(hardware: Mapping[str, Any]) -> str:
    threads = hardware["threads"]
    return hardware.get("gpu") or f"{hardware['processor']}, {threads} thread{'s' * (threads > 1)} a run"


def _by_task(missing: list[Any]) -> list[str]:
    counts: dict[tuple[str, str], int] = {}
    for cell in missing:
        counts[cell.task, cell.name] = counts.get((cell.task, cell.name), 0) + 1
    return ["\n".join(f"- {task}, {name}: {count}" for (task, name), count in counts.items())] if counts else []


def _plot(by_task: Mapping[str, list[Line]], grid: Grid, path: Path, average: str) -> None:
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    shown = {task: lines for task, lines in by_task.items() if lines}
    names = list(dict.fromkeys(line.name for lines in shown.values() for line in lines))
    look = {name: {"color": f"C{i % 10}", "marker": "osD^v"[i // 10 % 5]} for i, name in enumerate(names)}
    figure, axes = plt.subplots(1, len(shown), figsize=(5 * len(shown), 4), squeeze=False)
    points = {}
    for axis, (task, lines) in zip(axes[0], shown.items(), strict=True):
        for line in lines:
            scores = list(line.scores.values())
            y = AVERAGES[average](scores)
            x = line.bytes if grid.over == "bytes" else max(line.parameters, 1)
            bar = spread(scores) if len(scores) > 1 else 0
            points[line.name] = axis.errorbar(x, y, yerr=bar, linestyle="", **look[line.name])
        axis.set(xscale="log", xlabel=X_LABELS[grid.over], ylabel=f"{grid.metrics[task]} × 100", title=task)
        axis.margins(x=0.1)
    figure.tight_layout()
    # One list of names for all panels: labels at the points would lie over each other.
    figure.legend([points[n] for n in names], names, loc="center left", bbox_to_anchor=(1, 0.5), fontsize=8, frameon=False)
    figure.savefig(path, dpi=110, bbox_inches="tight")
    plt.close(figure)
