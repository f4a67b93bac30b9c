"""FleetTrainer: any number of owners through a fleet of a few hundred slots, each with its own steps, end and held-out loss."""

import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

from torch import Tensor

from ..adapter import Adapter
from ..errors import ConfigError
from ..training.tokens import IGNORED, collator
from .batches import Example, Order, OwnerData, choose
from .fleet import Fleet
from .loss import owner_losses, total
from .measure import Score, logits_of, on_device, scores
from .optimizer import FleetAdamW


@dataclass(frozen=True)
class Plan:
    """How each owner of a fleet trains; the learning rate and its schedule are the optimiser's."""

    epochs: float = 3.0
    owner_rows: int = 4
    """Rows of one owner's step."""
    batch_rows: int = 64
    """Rows of a mixed batch, at most: it holds several owners' steps."""
    patience: int | None = None
    """An owner stops after so many of its epochs without a better held-out loss, and keeps its best."""
    seed: int = 0
    measure: bool = True
    """Whether each owner's held-out loss is taken before and after."""

    def __post_init__(self) -> None:
        for name in ("epochs", "owner_rows", "batch_rows"):
            if not getattr(self, name) > 0:
                raise ConfigError(f"{name} is {getattr(self, name)!r}, expected a number above 0.")
        if self.owner_rows > self.batch_rows:
            raise ConfigError(f"owner_rows is {self.owner_rows}, expected at most batch_rows, {self.batch_rows}.")


@dataclass
class OwnerResult:
    """What came of one owner. Losses are token means over its held-out rows, or its training rows where it has none."""

    name: str
    status: str
    """"trained"; "stopped", early, at its best; "diverged": its gradient wasn't finite, so nothing of it was kept."""
    examples: int
    steps: int
    loss_before: float
    loss_after: float
    held_out: int = 0
    """Held-out rows."""
    accuracy: float = math.nan
    """Share of the tokens, or rows, that loss_after was measured on which are predicted right; none in regression."""
    version: int | None = None
    """In the store."""
    bytes: int = 0
    tokens: int = 0
    """Of the rows that it trained on, each as often as it was read."""

    def to_dict(self) -> dict[str, Any]:
        return {k: None if v != v else v for k, v in asdict(self).items()}  # NaN is no JSON


@dataclass
class _Running:
    """One owner in a slot."""

    order: Order
    before: float = math.nan
    best: float = math.inf
    best_row: Tensor | None = None
    epochs_without: int = 0
    tokens: int = 0
    loss: Tensor | None = None
    """Of its last step's rows."""
    ghost: bool = False
    """It diverged: its rows stay in the batches, unlabelled, so that those of the others are what they would have been."""


class FleetTrainer:
    """Trains owners in a fleet. run(owners) yields each one's result as it ends, its adapter with it, and frees the slot.

    The model is in eval mode: dropout would draw on one generator for all. start: an adapter that each owner begins from, or
    a function of its name that gives its own, or None.
    """

    def __init__(
        self,
        fleet: Fleet,
        optimizer: FleetAdamW,
        plan: Plan,
        pad_id: int = 0,
        start: Adapter | Callable[[str], Adapter | None] | None = None,
    ) -> None:
        self.fleet, self.optimizer, self.plan = fleet, optimizer, plan
        self.start: Callable[[str], Adapter | None] = start if callable(start) else lambda name: start
        self.model = fleet.vera.model
        self.collate = collator(pad_id)
        self.running: dict[str, _Running] = {}
        self.steps = self.tokens = self.padding = 0
        """Mixed batches so far, and their tokens, padding counted apart."""
        self.on_step: Callable[[FleetTrainer], None] | None = None
        self.saved: dict[str, dict[str, Any]] = {}
        """States of owners that an earlier process had begun: whoever is in it, with the same rows, goes on from there."""
        self._waiting: Iterator[OwnerData] = iter(())

    def run(self, owners: Iterable[OwnerData]) -> Iterator[tuple[OwnerResult, Adapter]]:
        """Every owner's result and adapter, in the order in which they end. An owner is asked for when a slot is free for it."""
        self._waiting = iter(owners)
        was_training = self.model.training
        self.model.eval()
        try:
            while self._admit():
                yield from self._step()
        finally:
            self.model.train(was_training)
            for name in list(self.running):
                self.fleet.remove(name)
            self.running.clear()

    def _admit(self) -> bool:
        """Fills the free slots; False where nobody is left."""
        entered = []
        while self.fleet.free and (data := next(self._waiting, None)) is not None:
            if not data.train:
                raise ConfigError(f'owner "{data.name}" has no rows to train on: leave it out.')
            self.fleet.add(data.name, start=self.start(data.name))
            order = Order(data, self.plan.owner_rows, self.plan.epochs, self.plan.seed)
            self.optimizer.plan(data.name, order.total)
            self.running[data.name] = _Running(order)
            state = self.saved.pop(data.name, None)
            if state is not None and state["total"] == order.total and state["rows"] == data.fingerprint():
                self._go_on(data.name, state)
            else:
                entered.append(data.name)
        for name, score in self.held_out_scores(entered if self.plan.measure else ()).items():
            self.running[name].before = score.loss
        return bool(self.running)

    def state(self) -> dict[str, dict[str, Any]]:
        """What each owner in a slot needs to go on in another process: numbers and CPU tensors."""
        out = {}
        for name, mine in self.running.items():
            row = self.fleet.bank.row(self.fleet.slot(name)).cpu().clone()
            best = {} if mine.best_row is None else {"best_row": mine.best_row.cpu()}
            numbers = {k: getattr(mine, k) for k in ("before", "best", "epochs_without", "ghost", "tokens")}
            place = {"taken": mine.order.taken, "rows": mine.order.data.fingerprint()}
            out[name] = {**self.optimizer.state_of(name), **numbers, **best, **place, "row": row}
        return out

    def _go_on(self, name: str, state: Mapping[str, Any]) -> None:
        mine = self.running[name]
        self.fleet.bank.row(self.fleet.slot(name)).copy_(state["row"])
        self.optimizer.load_state_of(name, state)
        mine.order.taken = state["taken"]
        mine.before, mine.best, mine.epochs_without = state["before"], state["best"], state["epochs_without"]
        mine.ghost, mine.tokens = state["ghost"], state.get("tokens", 0)
        if "best_row" in state:
            mine.best_row = state["best_row"].to(self.fleet.bank.table)

    def _step(self) -> Iterator[tuple[OwnerResult, Adapter]]:
        chosen = choose([r.order for r in self.running.values()], self.plan.batch_rows)
        examples: list[Example] = []
        owners: list[str] = []
        for order in chosen:
            rows = order.rows()
            ghost = self.running[order.data.name].ghost
            examples += [{**e, "labels": _masked(e["labels"])} for e in rows] if ghost else rows
            owners += [order.data.name] * len(rows)
        batch = self._batch(examples)
        with self.fleet.vera.rows(owners):
            logits = logits_of(self.model, batch)
        losses = owner_losses(logits, batch["labels"], owners)
        total(losses, self.optimizer.loss_scales).backward()
        report = self.optimizer.step()
        self.optimizer.zero_grad()
        self.steps += 1
        for name in report.diverged:
            self.fleet.reset(name)
            self.running[name].ghost = True
        for order in chosen:
            mine = self.running[order.data.name]
            if order.data.name not in report.skipped:  # overflowed under the loss scale: the same rows again
                mine.tokens += sum(len(e["input_ids"]) for e in order.rows())
                order.taken += 1
            mine.loss = losses[order.data.name].detach()
        yield from self._ended([o for o in chosen if o.data.name not in report.skipped])
        if self.on_step is not None:
            self.on_step(self)

    def _ended(self, stepped: Sequence[Order]) -> Iterator[tuple[OwnerResult, Adapter]]:
        """Those of the owners that just stepped that are done, by their plan or by their held-out loss."""
        done = [o.data.name for o in stepped if o.done]
        if self.plan.patience is not None:
            watched = [o for o in stepped if o.taken % o.steps_per_epoch == 0 and o.data.validation]
            found = self.held_out_scores([o.data.name for o in watched if not self.running[o.data.name].ghost])
            for name, (loss, _) in found.items():
                mine = self.running[name]
                if loss < mine.best:
                    mine.best, mine.epochs_without = loss, 0
                    mine.best_row = self.fleet.bank.row(self.fleet.slot(name)).clone()
                else:
                    mine.epochs_without += 1
                    if mine.epochs_without >= self.plan.patience and name not in done:
                        done.append(name)
        for name in done:
            if (row := self.running[name].best_row) is not None:
                self.fleet.bank.row(self.fleet.slot(name)).copy_(row)
        after = self.held_out_scores([n for n in done if self.plan.measure and not self.running[n].ghost])
        for name in done:
            mine = self.running.pop(name)
            adapter = self.fleet.adapter(name)
            status = "diverged" if mine.ghost else "trained" if mine.order.done else "stopped"
            data = mine.order.data
            result = OwnerResult(
                name,
                status,
                len(data.train),
                self.optimizer.steps_of(name),
                mine.before,
                after[name].loss if name in after else math.nan,
                len(data.validation),
                after[name].accuracy if name in after else math.nan,
            )
            result.tokens = mine.tokens
            self.fleet.remove(name)
            yield result, adapter

    def standing(self) -> dict[str, dict[str, Any]]:
        """For people: each owner in a slot, its steps taken, of how many, and the loss of the last one's rows."""
        return {
            name: {"steps": r.order.taken, "of": r.order.total, "loss": None if r.loss is None else float(r.loss)}
            for name, r in self.running.items()
        }

    def held_out_scores(self, names: Sequence[str]) -> dict[str, Score]:
        """Each owner's score on its held-out rows (its training rows where it has none), in mixed batches."""
        return scores(self.fleet.vera, {n: self._held(n) for n in names}, self.collate, self.plan.batch_rows)

    def _held(self, name: str) -> Sequence[Example]:
        data = self.running[name].order.data
        return data.validation or data.train

    def _batch(self, examples: Sequence[Example]) -> dict[str, Tensor]:
        batch = self.collate(examples)  # type: ignore[arg-type]
        real = int(batch["attention_mask"].sum())
        self.tokens += real
        self.padding += batch["attention_mask"].numel() - real
        return on_device(self.fleet.vera, batch)


def _masked(labels: Any) -> Any:
    """The same labels, none of which counts."""
    if isinstance(labels, list):
        return [IGNORED] * len(labels)
    return math.nan if isinstance(labels, float) else IGNORED
