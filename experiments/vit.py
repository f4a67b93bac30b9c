"""Ten images a class with a small ViT of our own on tiny-ImageNet: head only, full, LoRA r=1 and r=8, VeRA r=64 and r=256.

    VERALIB_DATA=… python -m experiments.vit pretrain --output FOLDER [--epochs 30] [--minutes 60]
    VERALIB_DATA=… python -m experiments.vit grid --model FOLDER [--jobs 2] [--seeds 0 1 2] [--methods "head only"] [--render]

pretrain trains the ViT from nothing on the 100 classes of even index, 32 × 32 pixels; stopped by --minutes or killed, it goes on
when started again and ends with the same weights. They come from data for research alone and don't belong in the repository.

grid adapts it to the other 100 classes. A twenty-fifth of their training images is held out and chooses the learning rate; of the
rest, 10 a class train; the 5,000 validation images, which no choice has seen, are the test set. A run is one file in
results/images; runs that have theirs aren't repeated. The table in results/images/README.md is rendered from these files alone.
"""

import argparse
import json
import os
import statistics
import tempfile
from collections import defaultdict
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from .cola import Grid, file_of, load, mean_std, report_of, run_cells, table
from .vit_pretrain import classes, pretrain

RESULTS = Path(__file__).parents[1] / "results" / "images"
SEEDS = (0, 1, 2)
LORA_RATES, VERA_RATES = (5e-4, 1.5e-3, 5e-3, 1.5e-2), (1e-2, 3e-2, 1e-1)
GRID: Grid = {
    "head only": ({"method": "head"}, "lr_head", (1e-3, 3e-3, 1e-2, 3e-2)),
    "full": ({"method": "full"}, "lr", (3e-5, 1e-4, 3e-4, 1e-3)),
    "LoRA r=1": ({"method": "lora", "rank": 1}, "lr", LORA_RATES),
    "LoRA r=8": ({"method": "lora", "rank": 8}, "lr", LORA_RATES),
    "VeRA r=64": ({"method": "vera", "rank": 64}, "lr", VERA_RATES),
    "VeRA r=256": ({"method": "vera", "rank": 256}, "lr", VERA_RATES),
}
COMMON: dict[str, Any] = {
    "task": "images",
    "shots": 10,
    "validation": "0.04",
    "test": "val",
    "lr_head": 5e-3,
    "batch_size": 32,
    "weight_decay": 0.01,
    "evaluate_every": "never",
    "save_every": "never",
    "plot": False,
}
HEAD = [
    *("method", "trained parameters", "adapter bytes", "learning rate"),
    *("held-out accuracy", "test accuracy", "ms a step", "seeds"),
]


def main(arguments: list[str] | None = None) -> None:
    """pretrain, or what is missing of the grid and its table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    home = Path(os.environ.get("VERALIB_DATA", ""))
    parser.add_argument("--data", type=Path, default=home / "tiny_imagenet32" / "tiny_imagenet32.npz", help="the .npz file")
    commands = parser.add_subparsers(dest="command", required=True)
    one = commands.add_parser("pretrain")
    one.add_argument("--output", type=Path, required=True, help="folder for the model; checkpoints lie beside it")
    one.add_argument("--epochs", type=int, default=30)
    one.add_argument("--minutes", type=float, default=float("inf"), help="pause after so many")
    one.add_argument("--seed", type=int, default=0)
    two = commands.add_parser("grid")
    two.add_argument("--model", type=Path, help="pretrain's output")
    two.add_argument("--epochs", type=float, default=10)
    two.add_argument("--jobs", type=int, default=1, help="runs at a time; the processor's cores are shared among them")
    two.add_argument("--results", type=Path, default=RESULTS)
    two.add_argument("--seeds", type=int, nargs="+", default=SEEDS)
    two.add_argument("--methods", nargs="+", choices=list(GRID), default=list(GRID))
    two.add_argument("--render", action="store_true", help="only render the table from the result files")
    chosen = parser.parse_args(arguments)
    if chosen.command == "pretrain":
        pretrain(chosen.data, chosen.output, chosen.epochs, chosen.minutes, chosen.seed)
        return
    if not chosen.render:
        if chosen.model is None:
            parser.error("grid needs --model, the folder that pretrain wrote")
        grid = {name: GRID[name] for name in chosen.methods}
        run_grid(chosen.model, chosen.data, chosen.epochs, chosen.jobs, chosen.results, chosen.seeds, grid)
    (chosen.results / "README.md").write_text(render(load(chosen.results, GRID)), encoding="utf-8")


def run_grid(model: Path, data: Path, epochs: float, jobs: int, results: Path, seeds: Any = SEEDS, grid: Grid = GRID) -> None:
    """Every run of the grid that has no result file yet, `jobs` at a time."""
    results.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory() as scratch:
        np.savez(others := Path(scratch) / "odd.npz", **classes(data, odd=True))
        run_cells(grid, seeds, results, jobs, partial(run, model, others, epochs, results))


def run(model: Path, data: Path, epochs: float, results: Path, name: str, rate: str, value: float, seed: int) -> str:
    """One run; writes its result file and returns its scores as text. The seed draws the ten images of each class, too."""
    from veralib.training import Settings, train
    from veralib.training.folder import write_json

    seeds = {"seed": seed, "basis_seed": seed, "split_seed": seed}
    given = {**COMMON, **GRID[name][0], rate: value, **seeds, "epochs": epochs}
    with tempfile.TemporaryDirectory() as scratch:
        result = train(Settings(model=model, data=data, output=Path(scratch) / "run", **given)).to_dict()
    report = report_of(result, model, given, name, rate, value)
    facts = json.loads((model / "training.json").read_text())
    report["base"] |= {k: facts[k] for k in ("parameters", "classes", "images", "epochs", "accuracy")}
    write_json(file_of(results, name, rate, value, seed), report)
    m = report["metrics"]
    return f"held out {m['eval_accuracy']:.4f}, test {m['test_accuracy']:.4f}, {report['seconds']:.0f} s"


def render(results: list[dict[str, Any]]) -> str:
    """The Markdown page of these runs."""
    groups: dict[str, dict[float, list[dict[str, Any]]]] = defaultdict(lambda: defaultdict(list))
    for r in results:
        groups[r["name"]][r["value"]].append(r)

    def scores(runs: list[dict[str, Any]], key: str) -> list[float]:
        return [r["metrics"][key] for r in runs]

    main_rows, all_rows = [], []
    for name, by_rate in groups.items():
        best = max(by_rate, key=lambda value: statistics.mean(scores(by_rate[value], "eval_accuracy")))
        runs = by_rate[best]
        main_rows.append(
            [
                *(name, f"{runs[0]['adapter_parameters']:,}", f"{runs[0]['adapter_bytes']:,}", f"{runs[0]['rate']} {best:g}"),
                mean_std(scores(runs, "eval_accuracy")),
                f"**{mean_std(scores(runs, 'test_accuracy'))}**",
                f"{1000 * statistics.median(r['seconds_per_step'] for r in runs):.1f}",
                str(len(runs)),
            ]
        )
        for value, those in by_rate.items():
            both = [mean_std(scores(those, key)) for key in ("eval_accuracy", "test_accuracy")]
            all_rows.append([name, f"{those[0]['rate']} {value:g}", *both, "chosen" if value == best else ""])
    first = results[0]
    base, given, rows, hardware = first["base"], first["settings"], first["rows"], first["hardware"]
    where = hardware.get("gpu") or f"{hardware['processor']}, {hardware['threads']} threads"
    return "\n".join(
        [
            "# Ten images a class: a small ViT of our own on tiny-ImageNet",
            "",
            "Rendered by `python -m experiments.vit grid --render` from the files beside this page; nothing here is typed.",
            "",
            f"Base: a ViT of {base['parameters']:,} parameters, trained by us for {base['epochs']} epochs on {base['images']:,} "
            f"images of {base['classes']} classes of tiny-ImageNet at 32 × 32 (the classes of even index; accuracy there "
            f"{100 * base['accuracy']:.1f} %; sha256 {base['sha256'][:16]}…). The runs learn the other classes, query and value "
            "adapted. This is no ViT-B and no data set of the paper's Table 5: it compares methods, not numbers with that table.",
            "",
            f"{given['shots']} images a class train ({rows['train']:,}, other ones for each seed), {given['epochs']:g} epochs, "
            f"batch {given['batch_size']}, AdamW, weight decay {given['weight_decay']:g}, linear schedule with 6 % warm-up. "
            f"Every method trains the head in full (lr_head {COMMON['lr_head']:g} beside an adapter or all weights); it "
            "counts in the bytes, not in the parameters. The learning rate is the one with the best mean accuracy on "
            f"{rows['validation']:,} further training images, held out. The test set is the whole validation set of these "
            f"classes, {rows['test']:,} images, scored once a run; it chose nothing. Accuracies in %, mean ± standard "
            "deviation over the seeds.",
            "",
            *table(HEAD, main_rows),
            "",
            "## Every learning rate",
            "",
            *table(["method", "learning rate", "held-out accuracy", "test accuracy", ""], all_rows),
            "",
            f"Run on {where}; {', '.join(f'{k} {v}' for k, v in first['versions'].items())}.",
            "",
        ]
    )


if __name__ == "__main__":
    main()
