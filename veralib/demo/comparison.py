"""One shared adapter, an adapter for each owner, or both: what each is worth, on rows that nobody trained on.

Every owner's held-out loss with the base model, with one adapter on everybody's rows, with its own, with its own begun from the
shared one, and with another owner's. The demo runs it on packages, experiments/authors.py on the authors of books.
"""

import copy
import math
import statistics
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from typing import Any

import torch

from .. import Adapter, VeraConfig, attach
from ..errors import StateError
from ..fleet.batches import Example, OwnerData
from ..fleet.measure import scores
from ..fleet.optimizer import FleetAdamW
from ..fleet.trainer import FleetTrainer, Plan
from ..training.tokens import collator
from .rivals import one_after_another

Say = Callable[..., None]
"""Called with a phase and, inside one, with steps taken and steps in all."""
COLUMNS = {
    "base": "base model",
    "shared": "one shared adapter",
    "own": "own adapter",
    "own_from_shared": "own, from the shared start",
    "another": "another owner's",
}


@dataclass(frozen=True)
class Recipe:
    """How the adapters train. The rates and epochs are chosen on other owners (docs/demo.md)."""

    rank: int = 64
    length: int = 56
    """Tokens of a row at most."""
    lr: float = 0.3
    epochs: float = 4.0
    shared_lr: float = 0.3
    shared_epochs: float = 2.0
    further_lr: float = 0.1
    """Of an owner's adapter begun from the shared one."""
    further_epochs: float = 2.0
    owner_rows: int = 4
    batch_rows: int = 64
    lora_lr: Mapping[int, float] = field(default_factory=lambda: {1: 3e-2, 8: 1e-2})
    """PEFT's LoRA: rank -> learning rate."""
    seed: int = 0

    def config(self) -> VeraConfig:
        """What every adapter is."""
        return VeraConfig(rank=self.rank, targets="all-linear")


def rows_of(texts: Mapping[str, Sequence[str]], tokenizer: Any, length: int) -> dict[str, list[Example]]:
    """Each text's first `length` tokens, ended where it isn't cut; texts of fewer than four are left out."""
    out: dict[str, list[Example]] = {}
    for name, mine in texts.items():
        rows = [[*tokenizer(t, truncation=True, max_length=4 * length)["input_ids"], tokenizer.eos_token_id] for t in mine]
        out[name] = [{"input_ids": r[:length], "labels": r[:length]} for r in rows if len(r) > 4]
    return out


class Comparison:
    """Trains and measures; each method is one phase. model: a causal language model in eval mode; it is attached here."""

    def __init__(self, model: Any, tokenizer: Any, train: Mapping, held_out: Mapping, recipe: Recipe, say: Say) -> None:
        self.tokenizer, self.recipe, self.say = tokenizer, recipe, say
        self.train = rows_of(train, tokenizer, recipe.length)
        self.held_out = rows_of(held_out, tokenizer, recipe.length)
        self.names = list(self.train)
        self.plain = copy.deepcopy(model)
        self.vera = attach(model.eval())
        self.collate = collator(tokenizer.pad_token_id)
        self.adapters: dict[str, dict[str, Adapter]] = {}
        self.seconds: dict[str, float] = {}
        self.tokens: dict[str, int] = {}

    def _fleet(self, key: str, phase: str, data: Sequence[OwnerData], plan: Plan, lr: float, start: Adapter | None) -> None:
        """One fleet run; its adapters by owner under `key`, its seconds and tokens."""
        began = time.perf_counter()
        fleet = self.vera.fleet(self.recipe.config(), slots=len(data))
        trainer = FleetTrainer(fleet, FleetAdamW(fleet, lr, max_norm=1.0, schedule="linear", warmup=0.1), plan, start=start)
        trainer.collate = self.collate
        steps = sum(max(1, round(plan.epochs * math.ceil(len(d.train) / plan.owner_rows))) for d in data)
        taken = lambda t: steps - sum(r.order.total - r.order.taken for r in t.running.values())  # noqa: E731
        trainer.on_step = lambda t: self.say(phase, taken(t) if len(data) > 1 else t.steps, steps)
        found = {}
        for result, adapter in trainer.run(data):
            if result.status == "diverged":
                raise StateError(f'"{result.name}" diverged: lower the learning rate, {lr:g}.')
            found[result.name] = adapter
        self.adapters[key] = found
        self.seconds[key] = time.perf_counter() - began
        self.tokens[key] = trainer.tokens

    def train_shared(self) -> None:
        """One adapter on everybody's rows."""
        r = self.recipe
        everybody = OwnerData("everybody", [e for mine in self.train.values() for e in mine])
        plan = Plan(r.shared_epochs, r.batch_rows // 2, r.batch_rows // 2, seed=r.seed, measure=False)
        self._fleet("shared", "one adapter on everybody's rows", [everybody], plan, r.shared_lr, None)

    def train_own(self, from_shared: bool) -> None:
        """An adapter for each owner, all in one run."""
        r = self.recipe
        epochs, lr = (r.further_epochs, r.further_lr) if from_shared else (r.epochs, r.lr)
        plan = Plan(epochs, r.owner_rows, r.batch_rows, seed=r.seed, measure=False)
        data = [OwnerData(n, rows) for n, rows in self.train.items()]
        start = self.adapters["shared"]["everybody"] if from_shared else None
        phase = f"{len(data)} adapters in one run" + (", from the shared one" if from_shared else "")
        self._fleet("own_from_shared" if from_shared else "own", phase, data, plan, lr, start)

    @contextmanager
    def loaded(self, key: str) -> Iterator[dict[str, str]]:
        """Owner -> its adapter's name in the model, while it is there."""
        places = {n: f"{key}/{n}" for n in self.adapters[key]}
        for n, place in places.items():
            self.vera.load(self.adapters[key][n], name=place)
        try:
            yield places
        finally:
            for place in places.values():
                self.vera.remove(place)

    def losses(self) -> dict[str, dict[str, float]]:
        """{owner: {column: held-out loss a token}}."""
        self.say("held-out losses")
        found: dict[str, dict[str, float]] = {n: {} for n in self.names}

        def column(key: str, adapters: Mapping[str, str | None]) -> None:
            for n, score in scores(self.vera, self.held_out, self.collate, self.recipe.batch_rows, adapters).items():
                found[n][key] = score.loss

        column("base", dict.fromkeys(self.names))
        with self.loaded("shared") as places:
            column("shared", dict.fromkeys(self.names, places["everybody"]))
        with self.loaded("own") as places:
            column("own", places)
            column("another", {n: places[self.names[i - 1]] for i, n in enumerate(self.names)})
        with self.loaded("own_from_shared") as places:
            column("own_from_shared", places)
        return found

    @torch.no_grad()
    def batch_ratio(self, rounds: int = 7) -> dict[str, float]:
        """Milliseconds of a forward of one row an owner: each with its adapter, and all with the base model; their ratio."""
        self.say("one batch with every owner")
        model: Any = self.vera.model
        ids = torch.randint(5, self.plain.config.vocab_size, (len(self.names), self.recipe.length))
        with self.loaded("own") as places:
            taken: dict[str, list[float]] = {"mixed": [], "base": []}
            for _ in range(rounds + 1):
                kinds: dict[str, list[str | None]] = {"mixed": list(places.values()), "base": [None] * len(places)}
                for key, rows in kinds.items():
                    began = time.perf_counter()
                    with self.vera.rows(rows):
                        model(input_ids=ids)
                    taken[key].append(time.perf_counter() - began)
        ratio = statistics.median(m / b for m, b in zip(taken["mixed"][1:], taken["base"][1:], strict=True))
        return {**{f"{k}_ms": 1e3 * statistics.median(v[1:]) for k, v in taken.items()}, "ratio": ratio}

    @torch.no_grad()
    def continuations(
        self, prompt: str, owners: Sequence[str], tokens: int = 24, no_repeat_ngram_size: int = 3
    ) -> dict[str, str]:
        """What the base model and these owners' adapters go on with, in one batch; greedy, no three tokens twice unless told."""
        key = "own_from_shared"
        ids = self.tokenizer([prompt] * (1 + len(owners)), return_tensors="pt")
        with self.loaded(key) as places, self.vera.rows([None, *(places[n] for n in owners)]):
            model: Any = self.vera.model
            out = model.generate(
                **{k: ids[k] for k in ("input_ids", "attention_mask")},
                max_new_tokens=tokens,
                do_sample=False,
                no_repeat_ngram_size=no_repeat_ngram_size,
                pad_token_id=self.tokenizer.pad_token_id,
            )
        texts = self.tokenizer.batch_decode(out, skip_special_tokens=True)
        return dict(zip(["base model", *owners], (" ".join(t.split()) for t in texts), strict=True))

    def run(self, prompt: str, timed: int = 4) -> dict[str, Any]:
        """All of it, as plain JSON types. timed: owners that PEFT's LoRA trains one after another."""
        r = self.recipe
        self.train_shared()
        self.train_own(from_shared=False)
        self.train_own(from_shared=True)
        losses = self.losses()
        by_size = sorted(self.names, key=lambda n: (len(self.train[n]), n))
        some = [by_size[(2 * k + 1) * len(by_size) // (2 * timed)] for k in range(timed)]
        rivals = []
        for rank in (1, 8):
            self.say(f"PEFT LoRA r={rank}, {timed} owners one after another")
            data = {n: self.train[n] for n in some}
            rivals.append(one_after_another(self.plain, rank, data, self.held_out, r, self.collate, len(self.names)))
        best = sorted(self.names, key=lambda n: (losses[n]["own_from_shared"] - losses[n]["base"], n))[:3]
        examples = {n: len(rows) for n, rows in self.train.items()}
        own = next(iter(self.adapters["own"].values()))
        return {
            "recipe": asdict(r),
            "owners": {n: {"examples": examples[n], "held_out": len(self.held_out[n]), **losses[n]} for n in self.names},
            "shares": {key: shares(losses, examples, key) for key in ("own", "own_from_shared")},
            "seconds": self.seconds,
            "tokens": self.tokens,
            "parameters": own.parameters,
            "bytes": {"float32": own.bytes, "bfloat16": own.bytes // 2},
            "rivals": rivals,
            "rivals_losses": {n: losses[n]["own"] for n in some},
            "batch": self.batch_ratio(),
            "continuations": {"prompt": prompt, "texts": self.continuations(prompt, best)},
        }


def shares(losses: Mapping[str, Mapping[str, float]], examples: Mapping[str, int], key: str) -> list[dict[str, Any]]:
    """How many owners do better with `key` than with the shared adapter: of all, and by thirds of their number of examples."""
    by_size = sorted(losses, key=lambda n: (examples[n], n))
    third = math.ceil(len(by_size) / 3)
    groups = [by_size, *(by_size[k : k + third] for k in range(0, len(by_size), third))]
    found = []
    for group in groups:
        better = sum(losses[n][key] < losses[n]["shared"] for n in group)
        low, high = wilson(better, len(group))
        gain = statistics.mean(losses[n]["shared"] - losses[n][key] for n in group)
        sizes = [examples[n] for n in group]
        found.append(
            {
                **{"examples": [min(sizes), max(sizes)], "owners": len(group), "better": better},
                **{"share": better / len(group), "low": low, "high": high, "mean_gain": gain},
            }
        )
    return found


def wilson(good: int, of: int, z: float = 1.96) -> tuple[float, float]:
    """The 95 % interval of a share (Wilson, 1927)."""
    p, n = good / of, of
    middle, half = p + z * z / (2 * n), z * math.sqrt(p * (1 - p) / n + z * z / (4 * n * n))
    return (middle - half) / (1 + z * z / n), (middle + half) / (1 + z * z / n)
