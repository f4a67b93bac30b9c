"""The tables of quality: printed | ours | difference, from the runs' result files; a missing cell has its command."""

import json
import statistics
from pathlib import Path
from typing import Any

from .pages import page, write
from .published import TABLES, Printed, Row

RUNS = Path("results/runs")
"""Where `vera reproduce` looks for the runs of published recipes: RECIPE/METHOD-seedN/result.json."""


def slug(row: Row) -> str:
    """A row's name in a path: the method and its flags."""
    flags = row.flags.replace("--set options.", "").replace("--", "").replace("=", "").split()
    return "-".join([row.method or "base", *flags])


def command(table: Printed, row: Row, recipe: str, seed: int = 0) -> str:
    """What makes one run of a cell."""
    flags = f"{row.flags} " if row.flags else ""
    protocol = table.protocol if recipe.startswith("glue") else ""
    place = RUNS / recipe / f"{slug(row)}-seed{seed}"
    train = f"vera train {recipe} --method {row.method} {protocol}{flags}--seed {seed} --output {place}"
    return (
        f"{train} && vera evaluate {place} --data e2e-dataset.zip --output {place}/scores.json"
        if recipe.startswith("e2e")
        else train
    )


def scores(row: Row, recipe: str, key: str, runs: Path) -> list[float]:
    """The scores of a cell's finished runs, one for each seed; those of `vera evaluate` lie beside, in scores.json."""
    found = []
    for folder in sorted((runs / recipe).glob(f"{slug(row)}-seed*")):
        for name in ("result.json", "scores.json"):
            path = folder / name
            read = json.loads(path.read_text(encoding="utf-8")) if path.exists() else {}
            metrics = read.get("metrics") or read.get("scores") or {}
            if key in metrics:
                found.append(float(metrics[key]))
                break
    return found


def table(name: str, runs: Path = RUNS) -> dict[str, Any]:
    """Every cell: printed, its spread, ours with the number of seeds, the difference, or the command that fills it."""
    printed, cells = TABLES[name], []
    average = statistics.median if printed.average == "median" else statistics.mean
    for row in printed.rows:
        for at, column in enumerate(printed.columns):
            recipe = row.recipes[at]
            ours = [printed.factor * s for s in scores(row, recipe, printed.keys[at], runs)]
            cell: dict[str, Any] = {"block": row.block, "method": row.label, "parameters": row.parameters, "column": column}
            cell |= {"printed": row.values[at], "printed_spread": row.spread[at] if row.spread else None}
            cell |= {"ours": average(ours) if ours else None, "seeds": len(ours)}
            cell["difference"] = cell["ours"] - cell["printed"] if ours else None
            cell["command"] = None if ours or row.method is None else command(printed, row, recipe)
            cells.append(cell)
        if row.mean is not None:
            cells.append(_mean(row, cells[-len(printed.columns) :]))
    return {"table": name, "title": printed.title, "average": printed.average, "cells": cells}


def _mean(row: Row, cells: list[dict[str, Any]]) -> dict[str, Any]:
    """The average column: ours where every column has a run."""
    ours = [c["ours"] for c in cells]
    whole = statistics.mean(ours) if None not in ours else None
    cell = {**cells[0], "column": "Avg.", "printed": row.mean, "printed_spread": None, "command": None}
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
    remarks = [f"Ours: {printed.average} over the seeds there are, and the difference. A dash: no run's result is here."]
    if missing:
        remarks += [
            f"{len(missing)} cells have no run. Each by its command, and again with other seeds:",
            "\n".join(dict.fromkeys(missing)),
        ]
    return write(folder, name, found, page(printed.title, name, [("", head, lines)], remarks))


def _cell(cell: dict[str, Any]) -> str:
    spread = f" ± {cell['printed_spread']:g}" if cell["printed_spread"] is not None else ""
    ours = "–" if cell["ours"] is None else f"**{cell['ours']:.2f}** ({cell['difference']:+.2f}, {cell['seeds']} seeds)"
    return f"{cell['printed']:g}{spread} · {ours}"
