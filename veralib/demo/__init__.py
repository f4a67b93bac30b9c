"""vera demo: the main job on a real model and real text, and a fleet of adapters; seven minutes at most on two cores."""

import importlib.util
import platform
import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from ..errors import ConfigError, DataError, need
from .methods import METHODS

LIMIT_S = 160
"""Full fine-tuning, the last row, is left out where the first part would then take longer than this, merging aside."""
LAST = "full"


def main(output: str | Path = "demo_out", record: bool = False, names: Sequence[str] = tuple(METHODS), fleet: bool = True) -> int:
    """0 once every method is trained and the merged adapter predicts as the unmerged one; 1 where it doesn't.

    Writes the table (Markdown, PNG), result.json, the data and every run into `output`. record: also into results/demo and the
    README of the checkout that this veralib is run from. names: rows of methods.METHODS. fleet: whether the second part runs.
    Errors: MissingPackage, DataError (another model or library than expected), ConfigError (a folder that can't be written).
    """
    started = time.perf_counter()
    for package in ("rich", "transformers", "peft", "matplotlib", "fastapi"):
        if importlib.util.find_spec(package) is None:
            raise need(package, "demo", "vera demo")
    root = Path(__file__).parents[2]
    if record and not ((root / "pyproject.toml").is_file() and (root / "README.md").is_file()):
        raise ConfigError(f"--record writes into veralib's own checkout, and {root} is none: run it there, or leave it out")
    from . import report, runs, show
    from .data import load_data
    from .merged import check_merged
    from .model import find_model

    runs.warm_up()
    screen = show.Screen()
    screen.opening()
    model, data, output = find_model(), load_data(), Path(output)
    try:
        paths = data.write(output / "data")
    except OSError as e:
        raise ConfigError(f"can't write to the output folder {output}: {e.strerror or e}") from e
    screen.data(data)

    results: dict[str, Any] = {}
    skipped = []
    for name in names:
        elapsed = time.perf_counter() - started
        if name == LAST and not record and "lora-r8" in results and elapsed + 1.7 * results["lora-r8"].seconds > LIMIT_S:
            skipped.append(METHODS[name].title)
            continue
        with screen.training(METHODS[name].title) as step:
            results[name] = runs.train_apart(runs.settings_of(name, model, paths, output), step)
        screen.trained(METHODS[name].title, results[name].metrics["test_accuracy"], data.rows["test"])

    merged = None
    if "vera" in results:
        with screen.waiting("A fresh process loads the VeRA adapter, merges it into the model and predicts"):
            merged = check_merged(output / "vera", paths["test"])
    result = {
        "python": platform.python_version(),
        "data": {"hash": data.hash, "rows": data.rows, "labels": list(data.labels)},
        "rows": [_row(name, found) for name, found in results.items()],
        "skipped": skipped,
        "merged": merged,
        "seconds": round(time.perf_counter() - started, 1),
        **_place(results),
    }
    report.write(result, output)
    screen.table(result)
    good = merged is None or screen.merged(merged, result, output / "vera" / "adapter_model.safetensors")
    if record:
        screen.written(report.record(result, root))
    if fleet:
        good &= _fleet(screen, output, root if record else None)
    screen.closing(output, model, time.perf_counter() - started)
    return 0 if good else 1


def _fleet(screen: Any, output: Path, root: Path | None) -> bool:
    """The second part; left out, and said so, where the language model isn't at hand. False where its server went wrong."""
    from . import fleet_report, runs
    from .model import find_language_model

    try:
        model = find_language_model()
    except DataError as e:
        screen.fleet_missing(str(e))
        return True
    screen.fleet_opening(model.name)
    store = output / "fleet-store"
    with screen.phases() as say:
        result = runs.compare_apart(model, say, store)
    screen.fleet(result)
    fleet_report.write(result, output)
    good = _serve(screen, model, store, result)
    if root is not None:
        readme = root / "README.md"
        text = fleet_report.in_readme(readme.read_text(encoding="utf-8"), result)
        paths = fleet_report.write(result, root / "results" / "demo")
        readme.write_text(text, encoding="utf-8")
        screen.written([*paths, readme])
    return good


def _serve(screen: Any, model: Path, store: Path, result: Mapping[str, Any]) -> bool:
    """Starts a server on the fleet's store and calls it; whether each adapter said there what it had said before."""
    from . import serve
    from .fleet import ANSWER_TOKENS, PROMPT

    expected = {model.name if who == "base model" else who: text for who, text in result["greedy"].items()}
    with screen.waiting("A server starts on these adapters"), serve.running(model, store) as api:
        said = serve.ask(api, list(expected), PROMPT, ANSWER_TOKENS)
    return screen.served(serve.command(model, store), said, serve.unlike(said, expected))


def _row(name: str, found: Any) -> dict[str, Any]:
    """One row of result.json."""
    return {
        "name": name,
        "title": METHODS[name].title,
        "accuracy": found.metrics["test_accuracy"],
        "parameters": found.adapter_parameters,
        "head_parameters": found.head_parameters,
        "bytes": found.adapter_bytes,
        "seconds_per_step": round(found.seconds_per_step, 4),
        "train_seconds": round(found.train_seconds, 1),
        "peak_memory_bytes": found.peak_memory_bytes,
        "settings": {k: v for k, v in found.settings.items() if k in METHODS[name].settings},
    }


def _place(results: Mapping[str, Any]) -> dict[str, Any]:
    """Versions, commit and hardware, as the runs recorded them."""
    first = asdict(next(iter(results.values())))
    return {name: first[name] for name in ("versions", "commit", "hardware")}
