"""Markdown from result files: results/bench/README.md and the table in the project's README."""

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

MARKERS = ("<!-- bench -->", "<!-- /bench -->")
TITLES = {
    "llama": "Llama shape (hidden 512, 8 layers, MLP 1408, vocabulary 2000), all linears",
    "roberta": "RoBERTa-base's shape, query and value",
}
PRECISIONS = {
    "fp32": "fp32",
    "bf16": "weights in bf16",
    "autocast": "fp32 weights, autocast to bf16",
}
Result = dict[str, Any]


def load_results(folder: Path) -> dict[str, Result]:
    """All result files of a folder by their run's name."""
    results = [json.loads(p.read_text()) for p in sorted(folder.glob("*.json"))]
    return {r["run"]: r for r in results}


def report(results: dict[str, Result]) -> str:
    """The whole page, Markdown."""
    parts = [
        "# Speed and memory",
        "Written by `make bench` from the JSON files beside it; how it is measured: docs/benchmarks.md. Times are ratios to "
        "PEFT's LoRA r=8, taken round by round, then their median [quartiles]. Saved: bytes kept from forward to backward, "
        "weights and A and B not counted, over those of LoRA r=8. Peak: the most that a step has beside the weights.",
    ]
    for result in (r for r in results.values() if "reference" in r):
        parts += [f"## {_title(result)}", _step_table(result), _where(result)]
    if "adapters" in results:
        result = results["adapters"]
        title = f"## Many adapters in one model: {TITLES.get(result['shape'], result['shape'])}"
        parts += [title, _adapter_table(result), _adapter_text(result), _where(result)]
    return "\n\n".join(parts) + "\n"


def summary(results: dict[str, Result]) -> str:
    """The short tables for the project's README."""
    head = ["training step, ratio to PEFT's LoRA r=8", "r", "veralib", "goal", "PEFT's VeRA", "LoRA r=1", "full"]
    head += ["saved: veralib", "saved: PEFT's VeRA"]
    lines = [_row(head), "|" + "---|" * len(head)]
    for result in (r for r in results.values() if "reference" in r):
        found = result["contestants"]
        for rank, goal in zip(result["ranks"], _goals(result), strict=True):
            ours, theirs = found.get(f"veralib-{rank}"), found.get(f"peft-vera-{rank}")
            cells = [_short(result), str(rank), _ratio(ours), goal, _ratio(theirs), _ratio(found.get("lora-1"))]
            cells += [_ratio(found.get("full")), _saved(ours), _saved(theirs)]
            lines.append(_row(cells))
    if "adapters" in results:
        lines += ["", _adapter_table(results["adapters"])]
    return "\n".join(lines)


def put_between_markers(text: str, table: str) -> str:
    """The text with the table between the bench markers, or unchanged where they are missing."""
    start, end = (text.find(marker) for marker in MARKERS)
    if start < 0 or end < start:
        return text
    return f"{text[: start + len(MARKERS[0])]}\n{table}\n{text[end:]}"


def _title(result: Result) -> str:
    shape = TITLES.get(result["shape"], result["shape"])
    return f"{shape}: {result['rows']} × {result['length']} tokens, {PRECISIONS[result['precision']]}"


def _short(result: Result) -> str:
    precision = "" if result["precision"] == "fp32" else f", {result['precision']}"
    name = {"llama": "Llama shape", "roberta": "RoBERTa-base shape"}.get(result["shape"], result["shape"])
    return f"{name}, {result['rows']} × {result['length']}{precision}"


def _row(cells: list[str]) -> str:
    return "| " + " | ".join(cells) + " |"


def _ratio(facts: Result | None) -> str:
    return "" if facts is None else f"{facts['ratio']['median']:.2f}"


def _saved(facts: Result | None) -> str:
    return "" if facts is None else f"{facts['saved_ratio']:.3f}"


def _goals(result: Result) -> list[str]:
    """The time goal of each rank: a number, or, in bf16, half of the extra cost that PEFT's VeRA has over LoRA r=8."""
    if result["goals"]["time"]:
        return [f"≤ {goal:.2f}" for goal in result["goals"]["time"]]
    out = []
    for rank in result["ranks"]:
        theirs = result["contestants"].get(f"peft-vera-{rank}")
        out.append("" if theirs is None else f"≤ {1 + max(0.0, theirs['ratio']['median'] - 1) / 2:.2f}")
    return out


def _contestant(name: str) -> str:
    method, _, rank = name.rpartition("-")
    if not rank.isdigit():
        return {"frozen": "nothing trains, gradients pass", "full": "full fine-tuning"}.get(name, name)
    return f"{ {'lora': 'PEFT LoRA', 'peft-vera': 'PEFT VeRA', 'veralib': '**veralib**'}[method] } r={rank}"


def _step_rows(result: Result) -> Iterator[str]:
    goals = dict(zip(result["ranks"], _goals(result), strict=True))
    for name, facts in result["contestants"].items():
        ours = name.startswith("veralib")
        ratio = facts["ratio"]
        yield _row(
            [
                _contestant(name),
                f"{facts['seconds']['median']:.3g}",
                f"{ratio['median']:.2f} [{ratio['low']:.2f}–{ratio['high']:.2f}]",
                goals[int(name.rpartition("-")[2])] if ours else "",
                f"{facts['saved_bytes'] / 2**20:.1f}",
                f"{facts['saved_ratio']:.3f}",
                f"≤ {result['goals']['saved']:.2f}" if ours else "",
                f"{facts['peak_bytes_of_step'] / 2**20:.1f}",
                f"{facts['parameters']:,}",
            ]
        )


def _step_table(result: Result) -> str:
    head = ["", "s a step", "time / LoRA r=8", "goal", "saved MiB", "saved / LoRA r=8", "goal", "peak MiB", "trained"]
    return "\n".join([_row(head), "|" + "---|" * len(head), *_step_rows(result)])


def _adapter_table(result: Result) -> str:
    goals = result["goals"]
    head = ["many adapters in one model", "load the 1st, ms", "the 2nd", "the last", "switch, ms"]
    head += ["memory a further adapter / its tensors", "resident memory / its tensors", "tensors, KB", "file, KB"]
    lines = [_row(head), "|" + "---|" * len(head)]
    for name, facts in result["contestants"].items():
        size = facts["adapter_bytes"]
        lines.append(
            _row(
                [
                    _contestant(name),
                    f"{facts['load_first_ms']['median']:.2f}",
                    f"{facts['load_second_ms']['median']:.2f}",
                    f"{facts['load_last_ms']['median']:.2f} (the {facts['count']:,}th)",
                    f"{facts['switch_ms']['median']:.4f}",
                    f"{facts['tensor_bytes_per_adapter'] / size:.2f}",
                    f"{facts['resident_bytes_per_adapter'] / size:.2f}",
                    f"{size / 1000:.1f}",
                    f"{facts['file_bytes'] / 1000:.1f}",
                ]
            )
        )
    goal = f"≤ {goals['load_ms']}"
    lines.append(_row(["goal for veralib", goal, goal, goal, f"≤ {goals['switch_ms']}", f"≤ {goals['memory']}", "", "", ""]))
    return "\n".join(lines)


def _adapter_text(result: Result) -> str:
    texts = []
    for name, facts in result["contestants"].items():
        if "basis_generation_ms" in facts:
            texts.append(
                f"{_contestant(name)}: A and B grow in {facts['basis_generation_ms']['median']:.0f} ms, once a seed, before the "
                f"loads above; reading the file and copying its tensors alone takes {facts['read_and_copy_ms']['median']:.2f} ms."
            )
    return " ".join(texts)


def _where(result: Result) -> str:
    e = result["environment"]
    versions = ", ".join(f"{name} {v}" for name, v in e["versions"].items())
    return (
        f"{e['processor']}, {e['cores']} cores, {e['threads']} threads ({e['clock']} time), {e['memory_bytes'] / 2**30:.0f} GiB; "
        f"Python {e['python']}, {versions}; commit {e['commit']}, {e['date']}; load average {e['load_average'][0]} before, "
        f"{e['load_average_after'][0]} after."
    )
