"""How the demo's rates and epochs were found: five rates a method, of equal steps; then the best one with two epochs, not three.

    python -m veralib.demo.tune [METHOD ...]    the trials that are missing, of these methods or of all, then the result file

A trial trains on the training split; the best is the one with the highest accuracy on the validation split, of equal ones that
with the smallest loss. The test split isn't read. Three epochs is what the demo has time for. VeRA and LoRA r=8 were first tried
with query and value alone, five rates each: all linears were better for both, so all methods get all linears. Those trials are
in the result file too, and one of LoRA r=8 with another rate of the head.
"""

import json
import platform
import sys
from pathlib import Path
from typing import Any

from .data import Data, load_data
from .methods import COMMON, METHODS
from .model import find_model

Trial = dict[str, Any]

FILE = Path(__file__).parents[2] / "results" / "demo" / "tuning.json"
WORK = Path("demo_tuning")
"""Each method's trials so far, one JSON object a line: a second call goes on where the first was stopped."""
EPOCHS, LR_HEAD = 3, 1e-2
TARGETS: list[dict[str, Any]] = [{"targets": "all-linear"}]

# Equal steps, a factor of about three, for vectors, LoRA's matrices and all weights, around the rates that each is known to take.
GRIDS: dict[str, tuple[str, list[float], list[dict[str, Any]]]] = {
    "head": ("lr_head", [1e-2, 3e-2, 1e-1, 3e-1, 1.0], [{}]),
    "vera": ("lr", [3e-3, 1e-2, 3e-2, 1e-1, 3e-1], TARGETS),
    "lora-r1": ("lr", [1e-4, 3e-4, 1e-3, 3e-3, 1e-2], TARGETS),
    "lora-r8": ("lr", [1e-4, 3e-4, 1e-3, 3e-3, 1e-2], TARGETS),
    "full": ("lr", [1e-5, 3e-5, 1e-4, 3e-4, 1e-3], [{}]),
}


def tune(name: str, paths: dict[str, Path]) -> list[Trial]:
    """The trials of one method, the best first."""
    rate, rates, variants = GRIDS[name]
    for variant in variants:
        for value in rates:
            run(name, paths, {"lr_head": LR_HEAD, **variant, rate: value, "epochs": EPOCHS})
    run(name, paths, {**trials_of(name)[0]["settings"], "epochs": EPOCHS - 1})
    return trials_of(name)


def run(name: str, paths: dict[str, Path], settings: dict[str, Any]) -> None:
    """One trial, unless the method's file has it."""
    from ..training import Settings, train

    if any(t["settings"] == settings for t in trials_of(name)):
        return
    fixed = {k: v for k, v in METHODS[name].settings.items() if k in ("method", "rank")}
    places = {"model": str(find_model()), "data": str(paths["train"]), "validation": str(paths["validation"])}
    result = train(Settings(**COMMON, **fixed, **settings, **places, output=str(WORK / name), resume=False))
    trial = {"settings": settings, **{k: round(result.metrics[f"eval_{k}"], 4) for k in ("accuracy", "loss")}}
    with (WORK / f"{name}.jsonl").open("a") as file:
        file.write(json.dumps(trial) + "\n")
    print(name, trial, f"{result.seconds_per_step:.2f} s a step", flush=True)


def trials_of(name: str) -> list[Trial]:
    """A method's trials so far, the best first."""
    file = WORK / f"{name}.jsonl"
    trials = [json.loads(line) for line in file.read_text().splitlines()] if file.exists() else []
    return sorted(trials, key=lambda t: (-t["accuracy"], t["loss"]))


def main(names: list[str]) -> None:
    """Tunes the named methods, or all, and writes the result file once every method has trials."""
    data = load_data()
    paths = data.write(WORK / "data")
    for name in names or GRIDS:
        tune(name, paths)
    if all(trials_of(name) for name in GRIDS):
        write(data)


def write(data: Data) -> None:
    """The result file, one trial a line, so that a diff of it shows trials."""
    head = {"python": platform.python_version(), "data": data.hash, "rows": data.rows, "common": COMMON}
    lines = {name: ",\n".join(f"   {json.dumps(t)}" for t in trials_of(name)) for name in GRIDS}
    trials = ",\n".join(f'  "{name}": [\n{text}\n  ]' for name, text in lines.items())
    FILE.parent.mkdir(parents=True, exist_ok=True)
    FILE.write_text(json.dumps(head, indent=1).removesuffix("\n}") + f',\n "trials": {{\n{trials}\n }}\n}}\n')


if __name__ == "__main__":
    main(sys.argv[1:])
