"""The demo's table, as text, Markdown, picture and part of the README: all from one result."""

import json
import math
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from ..errors import ConfigError

Result = Mapping[str, Any]
"""What result.json holds: python, data, rows (one a method), skipped, merged, seconds, versions, hardware, commit."""

COLUMNS = (
    "method",
    "test accuracy",
    "trained parameters",
    "with the head",
    "adapter file",
    "seconds a step",
    "peak memory",
)
README_PART = re.compile(r"(<!-- demo -->\n).*?(<!-- /demo -->)", re.DOTALL)


def cells(result: Result) -> list[tuple[str, ...]]:
    """The table's rows as text, in the order of COLUMNS."""
    return [
        (
            row["title"],
            f"{100 * row['accuracy']:.1f} %",
            f"{row['parameters']:,}",
            f"{row['parameters'] + row['head_parameters']:,}",
            size(row["bytes"]),
            f"{row['seconds_per_step']:.2f}",
            f"{row['peak_memory_bytes'] / 2**20:,.0f} MiB",
        )
        for row in result["rows"]
    ]


def remarks(result: Result) -> list[str]:
    """What a reader needs to judge the table, one sentence each."""
    rows, data = result["rows"], result["data"]
    best = max(rows, key=lambda row: row["accuracy"])
    share = best["accuracy"]
    error = 200 * math.sqrt(share * (1 - share) / data["rows"]["test"])
    said = [
        f"{data['rows']['train']:,} training and {data['rows']['test']:,} test sentences, {len(data['labels'])} packages, one "
        f"run a method: accuracies less than {error:.0f} points apart are the same as far as this test can tell. Guessing gives "
        f"{100 / len(data['labels']):.0f} %.",
        f"Highest here: {best['title']}.",
        "The adapter file holds the classification head too. Peak memory is the whole process: Python, PyTorch, model, training.",
    ]
    if result["skipped"]:
        said.append(f"Left out, since this machine would need more than seven minutes in all: {', '.join(result['skipped'])}.")
    return said


def provenance(result: Result) -> str:
    """One line: where the numbers come from."""
    versions, machine = result["versions"], result["hardware"]
    packages = ", ".join(f"{name} {versions[name]}" for name in ("veralib", "torch", "transformers", "peft") if name in versions)
    return (
        f"Python {result['python']}, data {result['data']['hash'][:16]}, {packages}; {machine['processor']}, "
        f"{machine['threads']} threads; {result['seconds']:.0f} s in all."
    )


def markdown(result: Result) -> str:
    """The table with its remarks."""
    lines = ["| " + " | ".join(COLUMNS) + " |", "|---|" + "---:|" * (len(COLUMNS) - 1)]
    lines += ["| " + " | ".join(row) + " |" for row in cells(result)]
    return "\n".join(lines) + "\n\n" + " ".join(remarks(result)) + "\n\n" + provenance(result) + "\n"


def draw(result: Result, path: Path) -> None:
    """The table as a PNG."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    rows = cells(result)
    figure, axes = plt.subplots(figsize=(11, 1.3 + 0.4 * len(rows)), layout="constrained")
    axes.axis("off")
    axes.set_title("Which package is this sentence from? MiniLM-L6, documentation of Python's library", loc="left", fontsize=12)
    table = axes.table(rows, colLabels=COLUMNS, loc="center", cellLoc="right", edges="horizontal")
    table.auto_set_font_size(False)
    table.set_fontsize(10)
    table.scale(1, 1.5)
    for (row, column), cell in table.get_celld().items():
        cell.set_edgecolor("0.8")
        if row == 0:
            cell.set_text_props(weight="bold")
        if column == 0:
            cell.set_text_props(ha="left")
    figure.text(0.01, 0.01, provenance(result), fontsize=8, color="0.4")
    figure.savefig(path, dpi=130)
    plt.close(figure)


def write(result: Result, folder: Path) -> list[Path]:
    """Writes result.json, table.md and table.png into the folder."""
    folder.mkdir(parents=True, exist_ok=True)
    paths = [folder / name for name in ("result.json", "table.md", "table.png")]
    paths[0].write_text(json.dumps(result, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")
    paths[1].write_text(markdown(result), encoding="utf-8")
    draw(result, paths[2])
    return paths


def in_readme(text: str, result: Result) -> str:
    """The README's text with the part between its demo marks replaced. ConfigError where it has no marks."""
    if not README_PART.search(text):
        raise ConfigError("README.md has no lines <!-- demo --> and <!-- /demo -->, between which the demo's table goes")
    part = markdown(result)
    return README_PART.sub(lambda found: found[1] + part + found[2], text)


def record(result: Result, root: Path) -> list[Path]:
    """Writes results/demo and the README's part in a checkout of veralib; the files written."""
    readme = root / "README.md"
    text = in_readme(readme.read_text(encoding="utf-8"), result)
    paths = write(result, root / "results" / "demo")
    readme.write_text(text, encoding="utf-8")
    return [*paths, readme]


def size(count: int) -> str:
    """ "19 KiB", "86.7 MiB"."""
    return f"{count / 2**10:,.0f} KiB" if count < 2**20 else f"{count / 2**20:,.1f} MiB"
