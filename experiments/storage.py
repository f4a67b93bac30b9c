"""What rounding an adapter for storage does to predictions: bf16, and int8 with a scale for each vector.

    python -m experiments.storage [--model models/books-4m] [--owners 64] [--results results/storage]

Trains an adapter for each of the demo's 64 packages, puts them into stores of each precision, reads them back and compares logits
on each owner's held-out rows with those of the float32 adapters.
"""

import argparse
import json
import tempfile
from pathlib import Path
from typing import Any

import torch

from veralib.demo.comparison import Comparison, Recipe
from veralib.demo.model import LANGUAGE_MODEL
from veralib.demo.owners import load_texts
from veralib.fleet.measure import logits_of, scores
from veralib.store import open_store
from veralib.training.result import hardware, versions

ROOT = Path(__file__).parents[1]
PRECISIONS = ("float32", "bfloat16", "int8")


def stored(comparison: Comparison, precision: Any, folder: Path) -> int:
    """The owners' adapters through a store and back, as comparison.adapters[precision]; bytes of one as it is stored."""
    with open_store(folder, kind="packed", precision=precision) as store:
        store.put_many(comparison.adapters["own"].items())
        comparison.adapters[precision] = {n: store.get(n) for n in comparison.names}
        total = sum(version.bytes for n in comparison.names for version in store.versions(n))
    return total // len(comparison.names)


@torch.no_grad()
def differences(comparison: Comparison, precision: str) -> dict[str, float]:
    """Over all held-out tokens of all owners: the logits' change, and how often the likeliest token stays the same."""
    largest, squares, entries, same, tokens, divergence = 0.0, 0.0, 0, 0, 0, 0.0
    with comparison.loaded("own") as exact, comparison.loaded(precision) as rounded:
        for name in comparison.names:
            batch = comparison.collate(comparison.held_out[name])
            known = batch["labels"] != -100
            logits = []
            for places in (exact, rounded):
                with comparison.vera.rows([places[name]] * len(known)):
                    logits.append(logits_of(comparison.vera.model, batch)[known].double())
            change = logits[1] - logits[0]
            largest = max(largest, float(change.abs().max()))
            squares, entries = squares + float(change.square().sum()), entries + change.numel()
            same += int((logits[0].argmax(-1) == logits[1].argmax(-1)).sum())
            tokens += len(change)
            p, q = (x.log_softmax(-1) for x in logits)
            divergence += float((p.exp() * (p - q)).sum())
    return {
        "largest": largest,
        "rms": (squares / entries) ** 0.5,
        "same_token": same / tokens,
        "kl": divergence / tokens,
        "tokens": tokens,
    }


def render(result: dict[str, Any]) -> str:
    """The Markdown page."""
    lines = [
        "# What storage precision does to predictions",
        "",
        "Rendered by `python -m experiments.storage`; nothing here is typed.",
        "",
        f"{result['owners']} adapters of rank {result['rank']} on {result['model']}, each trained on one package's documentation "
        f"and read back from a store; {result['precisions']['bfloat16']['tokens']:,} held-out tokens. Logits spread by "
        f"{result['spread']:.2f} (standard deviation).",
        "",
        "| stored in | bytes an adapter | held-out loss | change of a logit, root mean square | largest | likeliest token "
        "the same | KL, nats a token |",
        "|" + "---|" * 7,
    ]
    for precision, found in result["precisions"].items():
        lines.append(
            f"| {precision} | {found['bytes']:,} | {found['loss']:.5f} | {found['rms']:.2g} | {found['largest']:.2g} | "
            f"{100 * found['same_token']:.2f} % | {found['kl']:.1e} |"
        )
    return "\n".join([*lines, "", f"{result['hardware']['processor']}, torch {result['versions']['torch']}.", ""])


def main(arguments: list[str] | None = None) -> dict[str, Any]:
    """Trains, stores, compares; writes storage.json and README.md."""
    from transformers import AutoModelForCausalLM, AutoTokenizer

    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", type=Path, default=ROOT / "models" / LANGUAGE_MODEL)
    parser.add_argument("--owners", type=int, default=64)
    parser.add_argument("--results", type=Path, default=ROOT / "results" / "storage")
    a = parser.parse_args(arguments)
    texts = load_texts(owners=a.owners)
    tokenizer = AutoTokenizer.from_pretrained(a.model)
    tokenizer.model_max_length = 10**9  # texts are cut later
    model = AutoModelForCausalLM.from_pretrained(a.model, dtype="float32")
    comparison = Comparison(model, tokenizer, texts.train, texts.held_out, Recipe(length=64), lambda *what: None)
    comparison.train_own(from_shared=False)
    found: dict[str, dict[str, Any]] = {}
    for precision in PRECISIONS:
        with tempfile.TemporaryDirectory() as folder:
            size = stored(comparison, precision, Path(folder) / "store")
        with comparison.loaded(precision) as places:
            each = scores(comparison.vera, comparison.held_out, comparison.collate, 64, places)
        loss = sum(s.loss for s in each.values()) / len(each)
        found[precision] = {"bytes": size, "loss": loss, **differences(comparison, precision)}
        print(precision, found[precision], flush=True)
    with torch.no_grad():
        batch = comparison.collate(comparison.held_out[comparison.names[0]])
        spread = float(comparison.plain(input_ids=batch["input_ids"]).logits.std())
    result = {
        **{"owners": a.owners, "rank": comparison.recipe.rank, "model": a.model.name, "spread": spread, "precisions": found},
        **{"versions": versions(), "hardware": hardware()},
    }
    a.results.mkdir(parents=True, exist_ok=True)
    (a.results / "storage.json").write_text(json.dumps(result, indent=1) + "\n")
    (a.results / "README.md").write_text(render(result))
    return result


if __name__ == "__main__":
    main()
