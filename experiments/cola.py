"""CoLA with MiniLM-L6: head only, LoRA r=1 and r=8, VeRA; three learning rates and three seeds each, the same epochs for all.

    VERALIB_DATA=… python -m experiments.cola [--jobs 4] [--model FOLDER] [--epochs 3] [--render]

Of GLUE's original files a tenth of the training rows (drawn by seed 0) is held out; the learning rate with the best mean Matthews
correlation there is chosen, and the official development set, which no choice has seen, is scored once. A run is one file in
results/cola; runs that have theirs aren't repeated. The table in results/cola/README.md is rendered from these files alone.
"""

import argparse
import json
import os
import statistics
import tempfile
from collections import defaultdict
from collections.abc import Callable, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from functools import partial
from multiprocessing import get_context
from pathlib import Path
from typing import Any

RESULTS = Path(__file__).parents[1] / "results" / "cola"
SEEDS = (0, 1, 2)
# Name -> settings, and the rate that is swept with its values: steps of about three around what each method is known to take.
Grid = dict[str, tuple[dict[str, Any], str, tuple[float, ...]]]
GRID: Grid = {
    "head only": ({"method": "head"}, "lr_head", (3e-2, 1e-1, 3e-1)),
    "LoRA r=1": ({"method": "lora", "rank": 1}, "lr", (5e-4, 1.5e-3, 5e-3)),
    "LoRA r=8": ({"method": "lora", "rank": 8}, "lr", (5e-4, 1.5e-3, 5e-3)),
    "VeRA r=256": ({"method": "vera", "rank": 256}, "lr", (1e-2, 3e-2, 1e-1)),
}
COMMON: dict[str, Any] = {
    "columns": "source,label,mark,sentence",
    "text": "sentence",
    "validation": "0.1",
    "test": "dev",
    "lr_head": 1e-2,
    "batch_size": 32,
    "max_length": 64,
    "group_by_length": True,
    "evaluate_every": "never",
    "save_every": "never",
    "plot": False,
}


HEAD = [
    *("method", "trained parameters", "adapter bytes", "learning rate"),
    *("held-out Matthews", "dev Matthews", "dev accuracy", "ms a step", "seeds"),
]


def main(arguments: list[str] | None = None) -> None:
    """Runs what is missing of the grid, then renders the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    home = os.environ.get("VERALIB_DATA", "")
    parser.add_argument("--data", default=os.path.join(home, "glue", "CoLA"), help="folder with CoLA's train.tsv and dev.tsv")
    parser.add_argument("--model", default=os.path.join(home, "minilm_l6_fp16"), help="folder of the base model")
    parser.add_argument("--epochs", type=float, default=3)
    parser.add_argument("--jobs", type=int, default=1, help="runs at a time; the processor's cores are shared among them")
    parser.add_argument("--results", type=Path, default=RESULTS)
    parser.add_argument("--seeds", type=int, nargs="+", default=SEEDS)
    parser.add_argument("--render", action="store_true", help="only render the table from the result files")
    chosen = parser.parse_args(arguments)
    if not chosen.render:
        run_grid(Path(chosen.model), Path(chosen.data), chosen.epochs, chosen.jobs, chosen.results, chosen.seeds)
    (chosen.results / "README.md").write_text(render(load(chosen.results)), encoding="utf-8")


def run_grid(model: Path, data: Path, epochs: float, jobs: int, results: Path, seeds: Any = SEEDS) -> None:
    """Every run of the grid that has no result file yet, `jobs` at a time."""
    results.mkdir(parents=True, exist_ok=True)
    run_cells(GRID, seeds, results, jobs, partial(run, model, data, epochs, results))


def run_cells(grid: Grid, seeds: Sequence[int], results: Path, jobs: int, one: Callable[..., str]) -> None:
    """one(name, rate, value, seed) for every cell of the grid without a result file, in processes of their own."""
    # Seed by seed, so that an unfinished grid has every method and rate.
    cells = [(name, rate, value, seed) for seed in seeds for name, (_, rate, values) in grid.items() for value in values]
    missing = [cell for cell in cells if not file_of(results, *cell).exists()]
    print(f"{len(missing)} of {len(cells)} runs to do", flush=True)
    # Spawned, not forked: CUDA can't live on in a forked process.
    with ProcessPoolExecutor(jobs, mp_context=get_context("spawn"), initializer=share_cores, initargs=(jobs,)) as pool:
        waiting = {pool.submit(one, *cell): cell for cell in missing}
        for number, done in enumerate(as_completed(waiting), 1):
            print(f"{number}/{len(missing)} {waiting[done]}: {done.result()}", flush=True)


def file_of(results: Path, name: str, rate: str, value: float, seed: int) -> Path:
    """The result file of one run."""
    return results / f"{name.lower().replace(' ', '-').replace('=', '')}-{rate}{value:g}-seed{seed}.json"


def share_cores(jobs: int) -> None:
    """Each process its share of the cores."""
    import torch

    torch.set_num_threads(max(1, (os.cpu_count() or 1) // jobs))


def run(model: Path, data: Path, epochs: float, results: Path, name: str, rate: str, value: float, seed: int) -> str:
    """One run; writes its result file, without this machine's paths, and returns its scores as text."""
    from veralib.training import Settings, train
    from veralib.training.folder import write_json

    fields, _, _ = GRID[name]
    with tempfile.TemporaryDirectory() as scratch:
        given = {**COMMON, **fields, rate: value, "seed": seed, "basis_seed": seed, "epochs": epochs}
        result = train(Settings(model=model, data=data, output=Path(scratch) / "run", **given)).to_dict()
    report = report_of(result, model, given, name, rate, value)
    write_json(file_of(results, name, rate, value, seed), report)
    m = report["metrics"]
    return f"validation {m['eval_matthews']:.4f}, dev {m['test_matthews']:.4f}, {report['seconds']:.0f} s"


def report_of(result: dict[str, Any], model: Path, given: dict[str, Any], name: str, rate: str, value: float) -> dict[str, Any]:
    """What a run's result file holds: the cell, the settings, the base and the result, without paths of this machine."""
    from veralib.training.data import sha256_file

    weights = model / "model.safetensors"
    kept = {k: v for k, v in result.items() if k not in ("history", "output", "settings", "labels", "files", "resumed")}
    return {
        "name": name,
        "rate": rate,
        "value": value,
        "settings": given,
        "base": {"folder": model.name, "sha256": sha256_file(weights) if weights.exists() else ""},
        **kept,
    }


def load(results: Path, grid: Grid | None = None) -> list[dict[str, Any]]:
    """Every result file, in the grid's order (left out: this experiment's)."""
    found = [json.loads(p.read_text(encoding="utf-8")) for p in sorted(results.glob("*.json"))]
    names = list(grid or GRID)
    return sorted(found, key=lambda r: (names.index(r["name"]), r["value"], r["seed"]))


def mean_std(values: list[float]) -> str:
    """ "mean ± standard deviation" of scores, in hundredths."""
    spread = statistics.stdev(values) if len(values) > 1 else 0.0
    return f"{100 * statistics.mean(values):.1f} ± {100 * spread:.1f}"


def render(results: list[dict[str, Any]]) -> str:
    """The Markdown page of these runs."""
    groups: dict[str, dict[float, list[dict[str, Any]]]] = defaultdict(lambda: defaultdict(list))
    for r in results:
        groups[r["name"]][r["value"]].append(r)

    def score(runs: list[dict[str, Any]], key: str) -> float:
        return statistics.mean(r["metrics"][key] for r in runs)

    main_rows, all_rows = [], []
    for name, by_rate in groups.items():
        best = max(by_rate, key=lambda value: score(by_rate[value], "eval_matthews"))
        runs = by_rate[best]
        speeds = [r["seconds_per_step"] for r in runs]
        main_rows.append(
            [
                name,
                f"{runs[0]['adapter_parameters']:,}",
                f"{runs[0]['adapter_bytes']:,}",
                f"{runs[0]['rate']} {best:g}",
                mean_std([r["metrics"]["eval_matthews"] for r in runs]),
                f"**{mean_std([r['metrics']['test_matthews'] for r in runs])}**",
                mean_std([r["metrics"]["test_accuracy"] for r in runs]),
                f"{1000 * statistics.median(speeds):.1f}",
                str(len(runs)),
            ]
        )
        for value, those in by_rate.items():
            chosen = "chosen" if value == best else ""
            scores = [mean_std([r["metrics"][key] for r in those]) for key in ("eval_matthews", "test_matthews")]
            all_rows.append([name, f"{those[0]['rate']} {value:g}", *scores, chosen])
    first = results[0]
    hardware, versions = first["hardware"], first["versions"]
    base = f"{first['base']['folder']}, sha256 {first['base']['sha256'][:16]}…"
    where = hardware.get("gpu") or f"{hardware['processor']}, {hardware['threads']} threads"
    return "\n".join(
        [
            "# CoLA with MiniLM-L6",
            "",
            "Rendered by `python -m experiments.cola --render` from the files beside this page; nothing here is typed.",
            "",
            f"Base: all-MiniLM-L6-v2 ({base}), query and value adapted. Every method trains the classification head in full "
            f"(lr_head {COMMON['lr_head']:g} beside an adapter); it counts in the bytes, not in the parameters. "
            f"{first['settings']['epochs']:g} epochs, batch {COMMON['batch_size']}, AdamW, linear schedule with 6 % warm-up. "
            "Scores × 100, mean ± standard deviation over the seeds.",
            "",
            f"The learning rate is the one with the best mean Matthews correlation on {first['rows']['validation']} of CoLA's "
            f"training rows, held out; the other {first['rows']['train']:,} train. The official development set "
            f"({first['rows']['test']:,} rows) was scored once a run and chose nothing.",
            "",
            *table(
                HEAD,
                main_rows,
            ),
            "",
            "## Every learning rate",
            "",
            *table(["method", "learning rate", "held-out Matthews", "dev Matthews", ""], all_rows),
            "",
            f"Run on {where}; {', '.join(f'{k} {v}' for k, v in versions.items())}. Steps are timed with other runs beside them. "
            f"Data: {', '.join(f'{k} {v[:16]}…' for k, v in first['data'].items())}.",
            "",
        ]
    )


def table(head: list[str], rows: list[list[str]]) -> list[str]:
    """A Markdown table."""
    return [f"| {' | '.join(head)} |", "|" + "---|" * len(head), *(f"| {' | '.join(r)} |" for r in rows)]


if __name__ == "__main__":
    main()
