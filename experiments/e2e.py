"""E2E with a small language model: the base alone, LoRA r=1 and r=8, VeRA; several learning rates each, the same epochs.

    python -m experiments.e2e E2E.zip [--rows 2000] [--epochs 1] [--limit-test 40] [--model models/books-4m] [--render]

E2E is the official release, zip or folder; with --prepare FOLDER it is only written as the jsonl files that `vera train` reads.
`rows` training references are drawn by seed 0, a quarter as many of the development set's. The learning rate with the smallest
loss there is chosen, and its run alone writes texts for the test set (`limit-test` of its meaning representations, evenly
spread), by the published decoding. A method is one file in results/e2e, which isn't made again if it is there; the table is
rendered from these files.
"""

import argparse
import json
import random
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

RESULTS = Path(__file__).parents[1] / "results" / "e2e"
# Name -> settings, and the rates that are tried: steps of about three around what each method is known to take.
GRID: dict[str, tuple[dict[str, Any], tuple[float, ...]]] = {
    "base": ({}, ()),
    "LoRA r=1": ({"method": "lora", "rank": 1}, (3e-3, 1e-2, 3e-2, 1e-1)),
    "LoRA r=8": ({"method": "lora", "rank": 8}, (3e-3, 1e-2, 3e-2)),
    "VeRA r=256": ({"method": "vera", "rank": 256}, (3e-2, 1e-1, 3e-1, 1.0)),
}
# The VeRA paper's Table 10, but for the 500 steps of warm-up: they are a share of its 26,000 steps.
COMMON: dict[str, Any] = {
    **{"task": "prompt-completion", "batch_size": 8, "weight_decay": 0.01, "training": {"label_smoothing_factor": 0.1}},
    **{"max_length": 256, "group_by_length": True, "evaluate_every": "never", "save_every": "never", "plot": False},
}
KEPT = (
    *("method", "rows", "steps", "train_seconds", "seconds_per_step", "peak_memory_bytes"),
    *("adapter_parameters", "adapter_bytes", "data"),
)


def main(arguments: list[str] | None = None) -> None:
    """Makes the missing result files, then renders the table."""
    from veralib.training import e2e

    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("data", type=Path, help="e2e-dataset.zip, or its folder")
    parser.add_argument("--model", type=Path, default=Path("models/books-4m"), help="folder of the base model")
    parser.add_argument("--rows", type=int, default=2000, help="training references; 0: all 42,061")
    parser.add_argument("--epochs", type=float, default=1)
    parser.add_argument("--limit-test", type=int, default=40, help="meaning representations of the test set; 0: all 630")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--results", type=Path, default=RESULTS)
    parser.add_argument("--prepare", type=Path, metavar="FOLDER", help="only write train, validation and test.jsonl there")
    parser.add_argument("--render", action="store_true", help="only render the table from the result files")
    a = parser.parse_args(arguments)
    if a.prepare:
        print(", ".join(f"{rows:,} {split} rows" for split, rows in e2e.prepare(a.data, a.prepare).items()), "in", a.prepare)
        return
    a.results.mkdir(parents=True, exist_ok=True)
    asked = {"rows": a.rows, "epochs": a.epochs, "limit_test": a.limit_test, "seed": a.seed, "base": a.model.name}
    other = next((r["asked"] for r in load(a.results) if r["asked"] != asked), None)
    if other and not a.render:
        parser.error(f"{a.results} holds results of {other}, and this is {asked}: name another folder with --results")
    missing = [] if a.render else [name for name in GRID if not file_of(a.results, name).exists()]
    with tempfile.TemporaryDirectory() as scratch:
        if missing:
            e2e.prepare(a.data, scratch)
            draw(Path(scratch) / "train.jsonl", a.rows)
            draw(Path(scratch) / "validation.jsonl", a.rows and max(1, a.rows // 4))
        for name in missing:
            print(name, run(name, a.model, Path(scratch), asked, a.results), flush=True)
    (a.results / "README.md").write_text(render(load(a.results)), encoding="utf-8")


def file_of(results: Path, name: str) -> Path:
    """The result file of one method."""
    return results / f"{name.lower().replace(' ', '-').replace('=', '')}.json"


def draw(file: Path, rows: int) -> None:
    """Leaves so many lines of a file, drawn by seed 0, in their order; 0: all."""
    lines = file.read_text(encoding="utf-8").splitlines(keepends=True)
    if 0 < rows < len(lines):
        picked = set(random.Random(0).sample(range(len(lines)), rows))
        file.write_text("".join(line for i, line in enumerate(lines) if i in picked), encoding="utf-8")


def run(name: str, model: Path, data: Path, asked: dict[str, Any], results: Path) -> str:
    """Trains every rate of one method, scores the best, writes its result file; its scores as text."""
    from veralib.evaluation import evaluate, evaluate_base, read_items
    from veralib.training import Settings, train
    from veralib.training.data import sha256_file
    from veralib.training.loading import load_base

    fields, rates = GRID[name]
    given = {**COMMON, **fields, "epochs": asked["epochs"], "seed": asked["seed"], "basis_seed": asked["seed"]}
    limit = asked["limit_test"] or None
    tried, runs = [], {}
    for rate in rates:
        folder = data / f"{file_of(data, name).stem}-{rate:g}"
        done = train(Settings(**given, model=model, data=data, output=folder, lr=rate))
        tried.append({"lr": rate, "validation_loss": done.metrics["eval_loss"]})
        runs[rate] = (folder, done)
        print(f"{name}, lr {rate:g}: validation loss {done.metrics['eval_loss']:.4f}, {done.seconds:.0f} s", flush=True)
    if rates:
        best = min(tried, key=lambda t: t["validation_loss"])
        folder, done = runs[best["lr"]]
        found = evaluate(folder, data, limit=limit)
        about = {**best, "tried": tried, **{k: v for k, v in done.to_dict().items() if k in KEPT}}
    else:
        base = load_base(Settings(**given, model=model, data=data))
        items, _ = read_items(data, limit=limit)
        found = evaluate_base(base.model, base.tokenizer, items, max_length=base.max_length)
        about = {"method": "base", "adapter_parameters": 0, "adapter_bytes": 0}
    evaluated = {k: v for k, v in found.to_dict().items() if k not in ("run", "settings", "data", "method")}
    report = {
        "name": name,
        "asked": asked,
        "settings": given,
        "base": {"folder": model.name, "sha256": sha256_file(model / "model.safetensors")},
        "test_data": sha256_file(data / "test.jsonl"),
        **evaluated,
        **about,
        # E2E is CC BY-SA: its texts stay out of the result files.
        "examples": [t["prediction"] for t in found.texts[:: max(1, len(found.texts) // 3)]][:3],
    }
    file_of(results, name).write_text(json.dumps(report, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")
    return ", ".join(f"{k} {v:.2f}" for k, v in found.scores.items())


def load(results: Path) -> list[dict[str, Any]]:
    """Every result file, in the grid's order."""
    return [json.loads(f.read_text(encoding="utf-8")) for f in (file_of(results, name) for name in GRID) if f.exists()]


def at_edge(result: dict[str, Any]) -> bool:
    """Whether the chosen rate is the smallest or largest tried: a better one may lie beyond."""
    rates = [t["lr"] for t in result["tried"]]
    return result["lr"] in (min(rates), max(rates))


def render(results: Sequence[dict[str, Any]]) -> str:
    """The Markdown page of these results."""
    metrics = list(dict.fromkeys(name for r in results for name in r["scores"]))
    head = ["method", "trained parameters", "adapter bytes", "learning rate", "validation loss", *metrics]
    rows = [
        [
            r["name"],
            f"{r['adapter_parameters']:,}",
            f"{r['adapter_bytes']:,}",
            f"{r['lr']:g}{' (the edge of what was tried)' if at_edge(r) else ''}" if "lr" in r else "",
            f"{r['validation_loss']:.3f}" if "lr" in r else "",
            *(f"{r['scores'][m]:.2f}" if m in r["scores"] else "" for m in metrics),
        ]
        for r in results
    ]
    tried = [[r["name"], f"{t['lr']:g}", f"{t['validation_loss']:.3f}"] for r in results for t in r.get("tried", ())]
    first, trained = results[0], next((r for r in results if "rows" in r), None)
    hardware = first["hardware"]
    decoding = ", ".join(f"{k.replace('_', ' ')} {v:g}" for k, v in first["decoding"].items())
    lines = [
        "# E2E with a small language model",
        "",
        "Rendered by `python -m experiments.e2e E2E --render` from the files beside this page; nothing here is typed.",
        "",
        f"Base: {first['base']['folder']} (sha256 {first['base']['sha256'][:16]}…), query and value adapted. Scores of "
        f"{first['texts']:,} texts against {first['references']:,} references; BLEU, METEOR and ROUGE-L in percent. {decoding}.",
        "",
    ]
    if trained:
        s = trained["settings"]
        lines += [
            f"{trained['rows']['train']:,} training references, {s['epochs']:g} epochs, batch {s['batch_size']}, AdamW, weight "
            f"decay {s['weight_decay']:g}, label smoothing {s['training']['label_smoothing_factor']:g}, linear schedule. One run "
            f"a cell: small differences mean nothing. The learning rate is the one with the smallest loss a token (unsmoothed) "
            f"on {trained['rows']['validation']:,} references of the development set; the test set chose nothing.",
            "",
        ]
    lines += [*table(head, rows), ""]
    if tried:
        lines += ["## Every learning rate", "", *table(["method", "learning rate", "validation loss"], tried), ""]
    where = hardware.get("gpu") or f"{hardware['processor']}, {hardware['threads']} threads"
    lines += [f"Run on {where}; {', '.join(f'{k} {v}' for k, v in first['versions'].items())}.", ""]
    return "\n".join(lines)


def table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> list[str]:
    """A Markdown table."""
    return [f"| {' | '.join(head)} |", "|" + "---|" * len(head), *(f"| {' | '.join(r)} |" for r in rows)]


if __name__ == "__main__":
    main()
