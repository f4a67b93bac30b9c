"""Which scale lets LoRA's learning rates work: the demo's task, VeRA r=256, all linears, scored on its validation split.

    python -m experiments.scale [--render]

Each trial is the demo's run with another rate and scale. Results go to results/scale.json, the table between the markers of
docs/choosing.md is rendered from that file. A LoRA r=1 row stands beside.
"""

import argparse
import json
import re
import tempfile
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[1]
FILE, PAGE = ROOT / "results" / "scale.json", ROOT / "docs" / "choosing.md"
TRIALS: list[dict[str, Any]] = [
    {"method": "vera", "rank": 256, "lr": 3e-2, "options": {"scale": 1.0}},
    {"method": "vera", "rank": 256, "lr": 3e-4, "options": {"scale": 1.0}},
    {"method": "vera", "rank": 256, "lr": 3e-4, "options": {"scale": 30.0}},
    {"method": "vera", "rank": 256, "lr": 3e-4, "options": {"scale": 100.0}},
    {"method": "vera", "rank": 256, "lr": 1e-4, "options": {"scale": 100.0}},
    {"method": "lora", "rank": 1, "lr": 3e-4},
]
COMMON = {"lr_head": 1e-2, "epochs": 3, "targets": "all-linear"}


def run() -> list[dict[str, Any]]:
    """All trials, one after another."""
    from veralib.demo.data import load_data
    from veralib.demo.methods import COMMON as DEMO
    from veralib.demo.model import find_model
    from veralib.training import Settings, train

    data, done = load_data(), []
    with tempfile.TemporaryDirectory() as scratch:
        paths = data.write(Path(scratch) / "data")
        places = {"model": str(find_model()), "data": str(paths["train"]), "validation": str(paths["validation"])}
        for k, trial in enumerate(TRIALS):
            result = train(Settings(**DEMO, **COMMON, **trial, **places, output=str(Path(scratch) / str(k))))
            done.append(
                {**trial, "accuracy": round(result.metrics["eval_accuracy"], 4), "loss": round(result.metrics["eval_loss"], 4)}
            )
            print(done[-1], flush=True)
    return [{"data": data.hash, "common": COMMON}, *done]


def table(found: list[dict[str, Any]]) -> str:
    """The Markdown table of the trials."""
    lines = ["| method | scale | learning rate | validation accuracy | loss |", "|---|---|---|---|---|"]
    for trial in found[1:]:
        scale = trial.get("options", {}).get("scale")
        name = "VeRA r=256" if trial["method"] == "vera" else f"LoRA r={trial['rank']}"
        cells = [
            name,
            f"{scale:g}" if scale else "",
            f"{trial['lr']:g}",
            f"{100 * trial['accuracy']:.1f} %",
            f"{trial['loss']:.3f}",
        ]
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


def main() -> None:
    """Runs the trials unless --render, then renders the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--render", action="store_true", help="only render the table from the result file")
    if not parser.parse_args().render:
        FILE.write_text(json.dumps(run(), indent=1) + "\n")
    block = f"<!-- scale -->\n{table(json.loads(FILE.read_text()))}\n<!-- /scale -->"
    PAGE.write_text(re.sub(r"<!-- scale -->.*?<!-- /scale -->", lambda _: block, PAGE.read_text(), flags=re.S))


if __name__ == "__main__":
    main()
