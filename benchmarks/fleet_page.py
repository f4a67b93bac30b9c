"""The page of the fleet benchmark's result files: results/fleet/README.md."""

import json
from pathlib import Path
from typing import Any

OWNERS = (1, 8, 64, 512)
GOALS = {"fleet r=64, 512 owners": "≤ 0.95"} | {f"fleet r=256, {owners} owners": "≤ 1.35" for owners in OWNERS}
RUN_GOALS = {
    ("PEFT LoRA r=8, one base", "32"): "≥ 1.3",
    ("PEFT LoRA r=8, one base", "4"): "≥ 2.5",
    ("PEFT LoRA r=8, a process each", "32"): "≥ 5",
    ("PEFT LoRA r=8, a process each", "4"): "≥ 5",
}
"""What we aim at: our step over LoRA's; and how many times as long PEFT takes, by examples an owner."""


def render(folder: Path) -> str:
    """The Markdown page of the result files in a folder."""
    lines = ["# Fleets, measured", "", "Rendered by `python -m benchmarks.fleet`; nothing here is typed.", ""]
    if (folder / "fleet-steps.json").exists():
        found = json.loads((folder / "fleet-steps.json").read_text())
        lines += [_where(found), ""]
        for t in found["tables"]:
            lines += [
                f"## A step of {t['rows']} rows × {t['length']} tokens, optimiser included",
                "",
                "| | step ÷ PEFT LoRA r=8 | goal | tokens a second | saved for backward ÷ LoRA r=8 | parameters an owner | "
                "training bytes a parameter |",
                "|---|---|---|---|---|---|---|",
                *(
                    f"| {name} | {c['ratio']['median']:.2f} | {GOALS.get(name, '')} | {c['tokens_per_second']:,.0f} | "
                    f"{c['saved_ratio']:.2f} | "
                    f"{c['parameters_per_owner']:,} | {_number(c.get('training_bytes_per_parameter'))} |"
                    for name, c in t["contestants"].items()
                ),
                "",
            ]
    if (folder / "fleet-runs.json").exists():
        found = json.loads((folder / "fleet-runs.json").read_text())
        lines += [
            f"## {found['owners']} owners end to end, one epoch of rows of {found['length']} tokens",
            "",
            "Rows marked with a number of runs were extrapolated from so many owners in each round, half of them before the "
            "fleet and half after it. Medians [quartiles] over the rounds. A process each has the system's allocator, the others "
            "one that keeps its memory.",
            "",
            _where(found),
            "",
            "| | examples an owner | seconds | ÷ the fleet | goal |",
            "|---|---|---|---|---|",
        ]
        for examples, contestants in found["examples"].items():
            for name, c in contestants.items():
                goal, ratio = RUN_GOALS.get((name.partition(" (")[0], examples), ""), c["ratio"]
                spread = f"{ratio['median']:.2f} [{ratio['low']:.2f}–{ratio['high']:.2f}]"
                lines.append(f"| {name} | {examples} | {c['seconds']['median']:.1f} | {spread} | {goal} |")
        lines.append("")
    return "\n".join(lines)


def _number(value: float | None) -> str:
    return "" if value is None else f"{value:.1f}"


def _where(found: dict[str, Any]) -> str:
    e = found["environment"]
    return f"{e['processor']}, {e['threads']} threads, torch {e['versions']['torch']}, PEFT {e['versions']['peft']}, {e['date']}."
