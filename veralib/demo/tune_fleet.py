"""How the fleet's rates were found: python -m veralib.demo.tune_fleet

On 16 packages that the demo doesn't use, the next ones by its rule. Each rate of a grid trains; the one with the smallest
held-out loss, mean over these owners, is the demo's. The epochs are what the demo has time for. An owner's adapter from the
shared start is tuned last, from the best shared one. Writes results/demo/fleet-tuning.json.
"""

import copy
import functools
import json
import statistics
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from ..fleet.measure import scores
from .comparison import Comparison, Recipe
from .model import find_language_model
from .owners import OWNERS, load_texts
from .rivals import one_after_another

FILE = Path(__file__).parents[2] / "results" / "demo" / "fleet-tuning.json"
TUNED_ON = 16
VERA = (1e-1, 3e-1, 1.0)
LORA = (3e-3, 1e-2, 3e-2)


def main() -> None:
    """Runs every trial, prints it, writes the file."""
    from transformers import AutoModelForCausalLM, AutoTokenizer

    place = find_language_model()
    texts = load_texts(owners=TUNED_ON, skip=OWNERS)
    tokenizer = AutoTokenizer.from_pretrained(place)
    tokenizer.model_max_length = 10**9  # texts are cut later
    base = AutoModelForCausalLM.from_pretrained(place, dtype="float32").eval()
    recipe, trials = tune(base, tokenizer, texts.train, texts.held_out)
    result = {"model": place.name, "data": texts.hash, "owners": list(texts.train), "trials": trials, "recipe": recipe.__dict__}
    FILE.write_text(json.dumps(result, indent=1) + "\n")
    print(recipe)


def tune(
    base: Any,
    tokenizer: Any,
    train: Mapping[str, Sequence[str]],
    held_out: Mapping[str, Sequence[str]],
    vera: Sequence[float] = VERA,
    lora: Sequence[float] = LORA,
    timed: int = TUNED_ON,
) -> tuple[Recipe, dict[str, list[dict[str, float]]]]:
    """(the recipe with the rates of the best mean held-out loss over these owners, every trial). timed: owners of LoRA's."""
    make = lambda recipe: _comparison(base, tokenizer, train, held_out, recipe)  # noqa: E731
    recipe, trials = Recipe(), {}

    def best(name: str, rates: Sequence[float], run: Callable[[float], float]) -> float:
        found = []
        for rate in rates:
            found.append({"lr": rate, "loss": round(run(rate), 4)})
            print(name, found[-1], flush=True)
        trials[name] = found
        return min(found, key=lambda t: t["loss"])["lr"]

    def shared(rate: float) -> float:
        c = make(replace(recipe, shared_lr=rate))
        c.train_shared()
        return _loss(c, "shared")

    def own(rate: float) -> float:
        c = make(replace(recipe, lr=rate))
        c.train_own(from_shared=False)
        return _loss(c, "own")

    recipe = replace(recipe, shared_lr=best("shared", vera, shared))
    recipe = replace(recipe, lr=best("own", vera, own))
    start = make(recipe)
    start.train_shared()

    def further(rate: float) -> float:
        c = make(replace(recipe, further_lr=rate))
        c.adapters["shared"] = start.adapters["shared"]
        c.train_own(from_shared=True)
        return _loss(c, "own_from_shared")

    recipe = replace(recipe, further_lr=best("own, from the shared start", vera, further))

    def rival(rank: int, rate: float) -> float:
        tried = replace(recipe, lora_lr={rank: rate})
        found = one_after_another(base, rank, start.train, start.held_out, tried, start.collate, timed)
        return statistics.mean(found["losses"].values())

    rates = {rank: best(f"PEFT LoRA r={rank}", lora, functools.partial(rival, rank)) for rank in recipe.lora_lr}
    return replace(recipe, lora_lr=rates), trials


def _comparison(base: Any, tokenizer: Any, train: Any, held_out: Any, recipe: Recipe) -> Comparison:
    return Comparison(copy.deepcopy(base), tokenizer, train, held_out, recipe, lambda *what: None)


def _loss(comparison: Comparison, key: str) -> float:
    """Mean over the owners."""
    with comparison.loaded(key) as places:
        adapters = {n: places.get(n, places.get("everybody")) for n in comparison.names}
        found = scores(comparison.vera, comparison.held_out, comparison.collate, 64, adapters)
    return statistics.mean(s.loss for s in found.values())


if __name__ == "__main__":
    main()
