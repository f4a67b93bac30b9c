"""The tables of quality: printed | ours | difference, from the runs' result files; a missing cell has its command."""

import json
import statistics
from pathlib import Path
from typing import Any

from ..recipes import settings_of
from .compare import finite, spread
from .pages import page, write
from .published import TABLES, Printed, Row

JUDGE = "gpt-4-0613"
"""The commands' judge; the paper names no version of GPT-4."""
RUNS = Path("results/runs")
"""Where `vera reproduce` looks for the runs of published recipes: RECIPE/METHOD-seedN/result.json."""

E2E_DATA = "e2e-dataset.zip"


def slug(row: Row) -> str:
    """A row's name in a path: the method and its flags."""
    flags = row.flags.replace("--set options.", "").replace("--", "").replace("=", "").split()
    return "-".join([row.method or "base", *flags])


def command(table: Printed, row: Row, recipe: str, seed: int = 0, trained: bool = False) -> str:
    """What makes one run of a cell. trained: the run is there, and its score alone is missing."""
    flags = f"{row.flags} " if row.flags else ""
    protocol = table.protocol if recipe.startswith("glue") else ""
    place = RUNS / recipe / f"{slug(row)}-seed{seed}"
    texts = recipe.startswith("e2e")
    data = f" --data {E2E_DATA}" if texts else ""  # the release for both halves: its prompts aren't those of the hub's rows
    steps = [f"vera train {recipe} --method {row.method} {protocol}{flags}--seed {seed} --output {place}{data}"]
    if trained or row.method is None:
        steps = []
    if texts:
        steps.append(f"vera evaluate {place} --data {E2E_DATA} --output {place}/scores.json")
    if table.questions:
        steps += _judged(table.questions, row, recipe, place)
    return " && ".join(steps)


def _judged(questions: str, row: Row, recipe: str, place: Path) -> list[str]:
    """The commands of `vera chat-eval` from a run, or from the base itself, to scores.json."""
    model = f"--adapter {place}"
    if row.method is None:
        settings = settings_of(recipe)
        model = f"--model {settings.model} --quantise {settings.quantise} --dtype {settings.dtype} --chat-template alpaca"
    asked = f"--questions {questions}/question.jsonl"
    return [
        f"vera chat-eval answer {model} {asked} --output {place}/answers.jsonl",
        f"vera chat-eval judge {place}/answers.jsonl {asked} --references {questions}/reference_answer --judge {JUDGE} "
        f"--output {place}/reviews.jsonl",
        f"vera chat-eval show {place}/reviews.jsonl --scores {place}/scores.json",
    ]


def scores(row: Row, recipe: str, key: str, runs: Path) -> dict[str, list[float]]:
    """The scores of a cell's finished runs, one for each seed, by their name; those of `vera evaluate` and `vera chat-eval show`
    lie beside, in scores.json. A name is the key, or the key with what makes it another metric: "METEOR (exact+stem)"."""
    found: dict[str, list[float]] = {}
    for folder in sorted((runs / recipe).glob(f"{slug(row)}-seed*")):
        for file in ("result.json", "scores.json"):
            path = folder / file
            read = json.loads(path.read_text(encoding="utf-8")) if path.exists() else {}
            metrics = read.get("metrics") or read.get("scores") or {}
            if name := next((n for n in metrics if n == key or n.startswith(f"{key} (")), None):
                found.setdefault(name, []).append(float(metrics[name]))
                break
    return found


def table(name: str, runs: Path = RUNS) -> dict[str, Any]:
    """Every cell: printed and its spread, ours, its spread and the number of seeds, the difference, or the command that fills it.

    beside: a score of another metric, by its name, where ours isn't there.
    """
    printed, cells = TABLES[name], []
    average = finite(statistics.median if printed.average == "median" else statistics.mean)
    for row in printed.rows:
        for at, column in enumerate(printed.columns):
            recipe, key = row.recipes[at], printed.keys[at]
            found = {n: [printed.factor * s for s in of] for n, of in scores(row, recipe, key, runs).items()}
            ours = found.pop(key, [])
            cell: dict[str, Any] = {"block": row.block, "method": row.label, "parameters": row.parameters, "column": column}
            cell |= {"printed": row.values[at], "printed_spread": row.spread[at] if row.spread else None}
            cell |= {"ours": average(ours) if ours else None, "seeds": len(ours)}
            cell["spread"] = spread(ours) if len(ours) > 1 else None
            cell["difference"] = cell["ours"] - cell["printed"] if ours else None
            cell["beside"] = {n: average(of) for n, of in found.items()}
            trained = (runs / recipe / f"{slug(row)}-seed0" / "result.json").exists()
            cell["command"] = None if ours else command(printed, row, recipe, trained=trained)
            cells.append(cell)
        if row.mean is not None:
            cells.append(_mean(row, cells[-len(printed.columns) :]))
    return {"table": name, "title": printed.title, "average": printed.average, "cells": cells}


def _mean(row: Row, cells: list[dict[str, Any]]) -> dict[str, Any]:
    """The average column: ours where every column has a run."""
    ours = [c["ours"] for c in cells]
    whole = statistics.mean(ours) if None not in ours else None
    cell = {
        **cells[0],
        "column": "Avg.",
        "printed": row.mean,
        "printed_spread": None,
        "spread": None,
        "beside": {},
        "command": None,
    }
    seeds = min(c["seeds"] for c in cells)
    return {**cell, "ours": whole, "seeds": seeds, "difference": whole - row.mean if whole is not None else None}


def make(name: str, folder: Path, runs: Path = RUNS) -> dict[str, Any]:
    """NAME.json and NAME.md in the folder."""
    found, printed = table(name, runs), TABLES[name]
    lines, missing = [], []
    columns = [*printed.columns, *(["Avg."] if printed.rows[0].mean is not None else [])]
    per_row = len(columns)
    for start in range(0, len(found["cells"]), per_row):
        cells = found["cells"][start : start + per_row]
        lines.append((cells[0]["block"], cells[0]["method"], cells[0]["parameters"], *map(_cell, cells)))
        missing += [f"    {c['command']}" for c in cells if c["command"]]
    head = ("model", "method", "trained", *(f"{c}: printed · ours" for c in columns))
    remarks = [
        f"Ours: {printed.average} ± standard deviation over the seeds there are, and the difference. A dash: no run's result is "
        "here.",
        *printed.remarks,
    ]
    if any(c["beside"] for c in found["cells"]):
        remarks.append("A score in brackets is another metric's, which doesn't compare with the printed one.")
    if missing:
        remarks += [
            f"{len(missing)} cells have no run. Each by its command, and again with other seeds:",
            "\n".join(dict.fromkeys(missing)),
        ]
    return write(folder, name, found, page(printed.title, name, [("", head, lines)], remarks))


def _cell(cell: dict[str, Any]) -> str:
    if cell["ours"] is None:
        beside = "".join(f" [{name}: {value:.2f}]" for name, value in cell["beside"].items())
        return f"{cell['printed']:g}{_plus_minus(cell['printed_spread'], 'g')} · –{beside}"
    seeds = f"{cell['seeds']} seed{'s' if cell['seeds'] > 1 else ''}"
    ours = f"**{cell['ours']:.2f}**{_plus_minus(cell['spread'], '.2f')} ({cell['difference']:+.2f}, {seeds})"
    return f"{cell['printed']:g}{_plus_minus(cell['printed_spread'], 'g')} · {ours}"


def _plus_minus(spread: float | None, form: str) -> str:
    return "" if spread is None else f" ± {spread:{form}}"
