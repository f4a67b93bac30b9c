"""What the comparison of shared and own adapters found: tables, remarks and a picture, all from one result."""

import json
import re
import statistics
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from ..errors import ConfigError
from .comparison import COLUMNS
from .report import size

Result = Mapping[str, Any]
"""What Comparison.run gives, with `about` (data hash, versions, hardware) beside it."""


README_PART = re.compile(r"(<!-- fleet -->\n).*?(<!-- /fleet -->)", re.DOTALL)


class Sheet(NamedTuple):
    """One table: its title, column names and rows."""

    title: str
    columns: tuple[str, ...]
    rows: Sequence[tuple[str, ...]]


def sheets(result: Result) -> Iterator[Sheet]:
    """Losses, who gains, and what it costs."""
    owners, shares = result["owners"], result["shares"]
    rows: list[tuple[str, ...]] = []
    for key, title in COLUMNS.items():
        losses = [o[key] for o in owners.values()]
        taken = result["seconds"].get(key)
        share = shares[key][0] if key in shares else None
        better = "" if share is None else f"{share['better']} of {share['owners']} ({_percent(share)})"
        rows.append((title, f"{statistics.mean(losses):.3f}", better, "" if taken is None else f"{taken:.0f} s"))
    yield Sheet(
        "Held-out loss a token, mean over the owners",
        ("rows read with", "loss", "owners better off than with the shared one (95 %)", "trained in"),
        rows,
    )
    groups = zip(shares["own"][1:], shares["own_from_shared"][1:], strict=True)
    yield Sheet(
        "Who gains, by number of training examples: owners better off than with the shared adapter",
        ("examples", "owners", "own adapter", "mean gain", "own, from the shared start", "mean gain "),
        [
            (
                f"{own['examples'][0]} to {own['examples'][1]}",
                str(own["owners"]),
                *(text for s in (own, further) for text in (f"{s['better']} ({_percent(s)})", f"{s['mean_gain']:+.3f}")),
            )
            for own, further in groups
        ],
    )
    count = len(owners)
    ours = statistics.mean(result["rivals_losses"].values())
    rows = [
        (
            f"veralib, one run for {count}",
            f"{result['seconds']['own']:.0f} s",
            f"{result['parameters']:,}",
            f"{size(4 * result['parameters'] * count)} ({size(2 * result['parameters'] * count)} in bf16)",
            f"{ours:.3f}",
        )
    ]
    for rival in result["rivals"]:
        rows.append(
            (
                f"{rival['method']}, one after another",
                f"{rival['extrapolated_seconds']:.0f} s, extrapolated from {len(rival['owners'])}",
                f"{rival['parameters']:,}",
                size(4 * rival["parameters"] * count),
                f"{statistics.mean(rival['losses'].values()):.3f}",
            )
        )
    yield Sheet(
        f"An adapter for each of {count} owners",
        ("method", "time", "parameters an owner", "bytes for all", f"loss of the {len(result['rivals_losses'])} timed owners"),
        rows,
    )


def remarks(result: Result) -> list[str]:
    """What a reader needs beside the tables, one sentence each."""
    batch, own = result["batch"], result["shares"]["own_from_shared"][0]
    held_out = sum(o["held_out"] for o in result["owners"].values())
    won = "more than chance" if own["low"] > 0.5 else "fewer than chance" if own["high"] < 0.5 else "no more than chance allows"
    return [
        f"{sum(o['examples'] for o in result['owners'].values()):,} rows to train on and {held_out:,} that only measured.",
        f"An adapter of its own, begun from the shared one, does better than the shared one alone for {own['better']} of "
        f"{own['owners']} owners: {won}. The shared adapter saw every owner's rows {result['recipe']['shared_epochs']:g} times, "
        f"the one from its start {result['recipe']['further_epochs']:g} times more.",
        f"One batch with a row of each of {len(result['owners'])} owners takes {batch['ratio']:.2f} times as long as the base "
        f"model alone ({batch['mixed_ms']:.0f} and {batch['base_ms']:.0f} ms).",
    ]


def _percent(share: Mapping[str, Any]) -> str:
    return f"{100 * max(0.0, share['low']):.0f} to {100 * min(1.0, share['high']):.0f} %"


def markdown(result: Result) -> str:
    """Tables, remarks and the continuations."""
    lines = []
    for sheet in sheets(result):
        lines += [f"**{sheet.title}**", "", *_table(sheet), ""]
    lines += [*remarks(result), ""]
    told = result["continuations"]
    lines += [f'Going on from "{told["prompt"]}":', "", *(f"- {who}: `{text}`" for who, text in told["texts"].items()), ""]
    about = result.get("about", {})
    return "\n".join([*lines, provenance(about), ""]) if about else "\n".join(lines)


def brief(result: Result) -> str:
    """Losses and costs alone, for the README."""
    losses, _, costs = sheets(result)
    return "\n".join([*_table(losses), "", *_table(costs), ""])


def in_readme(text: str, result: Result) -> str:
    """The README's text with the part between its fleet marks replaced. ConfigError where it has no marks."""
    if not README_PART.search(text):
        raise ConfigError("README.md has no lines <!-- fleet --> and <!-- /fleet -->, between which the fleet's tables go")
    part = brief(result)
    return README_PART.sub(lambda found: found[1] + part + found[2], text)


def _table(sheet: Sheet) -> list[str]:
    rule = "|---|" + "---:|" * (len(sheet.columns) - 1)
    return ["| " + " | ".join(sheet.columns) + " |", rule, *("| " + " | ".join(row) + " |" for row in sheet.rows)]


def provenance(about: Mapping[str, Any]) -> str:
    """One line: where the numbers come from."""
    named = ("python", "veralib", "torch", "transformers", "peft")
    packages = ", ".join(f"{name} {about['versions'][name]}" for name in named)
    return f"Data {about['data'][:16]}, base model {about['model']}, {packages}; {about['hardware']['processor']}."


def draw(result: Result, path: Path) -> None:
    """Each owner's gain over the shared adapter against its number of examples."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    figure, axes = plt.subplots(figsize=(7, 4.2), constrained_layout=True)
    owners = result["owners"].values()
    for key, marker in {"own": "o", "own_from_shared": "^"}.items():
        gains = [o["shared"] - o[key] for o in owners]
        axes.scatter([o["examples"] for o in owners], gains, s=16, marker=marker, label=COLUMNS[key])
    axes.axhline(0, color="0.4", linewidth=1)
    axes.set(xscale="log", xlabel="training examples of the owner", ylabel="held-out loss a token: shared − own")
    axes.legend(frameon=False)
    figure.savefig(path, dpi=130)
    plt.close(figure)


def write(result: Result, folder: Path) -> list[Path]:
    """Writes fleet.json, fleet.md and fleet.png into the folder."""
    folder.mkdir(parents=True, exist_ok=True)
    paths = [folder / name for name in ("fleet.json", "fleet.md", "fleet.png")]
    paths[0].write_text(json.dumps(result, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")
    paths[1].write_text(markdown(result), encoding="utf-8")
    draw(result, paths[2])
    return paths
