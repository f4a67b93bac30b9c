"""train_fleet: one adapter for every owner of a data set, in a store; what `vera fleet train` runs."""

import hashlib
import json
import math
import os
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch

from ..adapter import Adapter
from ..errors import ConfigError, StateError
from ..format import load_adapter, save_adapter
from ..model import attach
from ..store import Store, open_store
from ..training.folder import write_json
from ..training.loading import Base, load_base
from ..training.result import hardware, versions
from ..training.tokens import chat_template
from . import folder as files
from .batches import OwnerData
from .data import OwnerRows, keep_rows, prepare, read_owners
from .heads import Heads, check_adapters, labels_of
from .optimizer import FleetAdamW
from .settings import FleetSettings
from .trainer import FleetTrainer, OwnerResult, Plan

STANDING_SECONDS = 60.0
Progress = Callable[[str], None]


@dataclass(frozen=True)
class FleetResult:
    """What a run gave. owners: every owner of the folder, earlier runs' too, by name; unusable: owner -> why not."""

    owners: Mapping[str, Mapping[str, Any]]
    unusable: Mapping[str, str]
    skipped: int
    """Owners that an earlier run had finished."""
    seconds: float
    tokens: int
    padding: int
    steps: int
    parameters_per_owner: int
    store: str
    about: Mapping[str, Any] = field(default_factory=dict)

    def summary(self) -> dict[str, Any]:
        """Counts and means, for people."""
        trained = [o for o in self.owners.values() if o["status"] != "diverged"]
        held = [o for o in trained if o["held_out"]]
        mean = lambda key: sum(o[key] for o in held) / len(held) if held else math.nan  # noqa: E731
        return {
            "owners": len(self.owners),
            "diverged": sorted(n for n, o in self.owners.items() if o["status"] == "diverged"),
            "unusable": len(self.unusable),
            "skipped": self.skipped,
            "loss_before": mean("loss_before"),
            "loss_after": mean("loss_after"),
            "improved": sum(o["loss_after"] < o["loss_before"] for o in held),
            "bytes": sum(o["bytes"] for o in self.owners.values()),
        }


def train_fleet(settings: FleetSettings, rows: OwnerRows | None = None, progress: Progress = lambda line: None) -> FleetResult:
    """Trains every owner that isn't done yet, puts each into the store as it ends, writes fleet.json.

    Started again it goes on: finished owners stay as they are, those in a slot go on where they stood a minute before, new ones
    join. Under torchrun each process takes its share of the owners; no gradient is exchanged. rows: the owners' rows where they
    don't come from settings.data.
    """
    begun = time.perf_counter()
    rank, world = _join()
    output = Path(settings.output)
    owners = read_owners(settings) if rows is None else rows
    labels = files.read_labels(output) or labels_of(settings, owners.rows.values())
    if rank == 0:
        files.open_folder(settings, output, labels)
    _wait(world)
    base = _load(settings, labels)
    heads = Heads(base.head, settings.head_per_owner)
    if settings.store is None:
        store = open_store(output / "store", settings.store_kind, settings.precision)
    else:
        store = open_store(settings.store)
    done = files.ended(output)
    vera = attach(base.model)
    unusable = dict(owners.unusable)
    shared = _shared_start(settings, owners, base, vera, output, rank, world, progress, labels)
    start = heads.settle(base.model, shared)
    names = [n for n in owners.rows if n not in done]
    mine = names[rank::world]
    fleet = vera.fleet(heads.config(settings.vera_config()), min(settings.slots, max(1, len(mine))))
    optimizer = _optimizer(settings, fleet, settings.lr)
    trainer = FleetTrainer(fleet, optimizer, _plan(settings), base.tokenizer.pad_token_id or 0, start)
    trainer.saved = files.standing(output)
    trainer.on_step = _Standing(output, rank)
    for name in mine if settings.keep_data else ():
        keep_rows(output, name, owners.rows[name])
    # Those that stood in a slot first, so that what they had is used.
    mine.sort(key=lambda n: n not in trainer.saved)
    source = prepare(owners, mine, base.tokenizer, settings, base.max_length, unusable, labels)
    for count, (one, adapter) in enumerate(trainer.run(source), 1):
        _enter(one, heads.whole(adapter, shared), store, output, rank, owners)
        if count % max(1, len(mine) // 20) == 0 or count == len(mine):
            progress(
                f"{count} of {len(mine)} owners done, {trainer.steps} steps, "
                f"{trainer.tokens / max(1e-9, time.perf_counter() - begun):,.0f} tokens/s"
            )
    tokens, padding, steps = _sum(world, [trainer.tokens, trainer.padding, trainer.steps])
    _wait(world)
    result = FleetResult(
        owners=files.ended(output),
        unusable=unusable,
        skipped=len(owners.rows) - len(names),
        seconds=time.perf_counter() - begun,
        tokens=tokens,
        padding=padding,
        steps=steps,
        parameters_per_owner=fleet.parameters_per_owner,
        store=str(settings.store or output / "store"),
        about={"versions": versions(), "hardware": hardware(), "processes": world},
    )
    if rank == 0:
        files.forget_standing(output)
        write_json(output / "fleet.json", {**result.__dict__, "summary": result.summary(), "settings": settings.to_dict()})
    _wait(world)
    return result


def _load(settings: FleetSettings, labels: Sequence[str]) -> Base:
    single = settings.row_settings()
    torch.manual_seed(settings.seed)  # a new head starts the same in every process and every run
    base = load_base(single, labels)
    chat_template(single, base.tokenizer)
    return base


def _plan(settings: FleetSettings) -> Plan:
    return Plan(settings.epochs, settings.owner_rows, settings.batch_rows, settings.patience, settings.seed)


def _optimizer(settings: FleetSettings, fleet: Any, lr: float) -> FleetAdamW:
    fields = {name: getattr(settings, name) for name in ("weight_decay", "max_norm", "schedule", "warmup")}
    return FleetAdamW(fleet, lr, lr_head=settings.lr_head or lr / 10, **fields)


def _shared_start(
    settings: FleetSettings,
    owners: OwnerRows,
    base: Base,
    vera: Any,
    output: Path,
    rank: int,
    world: int,
    progress: Progress,
    labels: Sequence[str],
) -> Adapter | None:
    """One adapter on everybody's rows, trained as a fleet of one owner; kept in the output folder."""
    if not settings.shared_epochs:
        return None
    path = output / "shared.safetensors"
    if rank == 0 and not path.exists():
        parts = list(prepare(owners, list(owners.rows), base.tokenizer, settings, base.max_length, {}, labels))
        everybody = OwnerData("shared", [e for p in parts for e in p.train], [e for p in parts for e in p.validation])
        fleet = vera.fleet(Heads(base.head, False).config(settings.vera_config(), shared=True), 1)
        optimizer = _optimizer(settings, fleet, settings.shared_lr or settings.lr)
        plan = Plan(settings.shared_epochs, settings.batch_rows, settings.batch_rows, None, settings.seed)
        trainer = FleetTrainer(fleet, optimizer, plan, base.tokenizer.pad_token_id or 0)
        progress(f"shared start: {len(everybody.train)} rows of {len(parts)} owners")
        ((result, adapter),) = trainer.run([everybody])
        if result.status == "diverged":
            raise StateError("the shared start diverged: lower shared_lr, or train without it (shared_epochs=0).")
        save_adapter(adapter, path)
        progress(f"shared start: held-out loss {result.loss_before:.4f} -> {result.loss_after:.4f}")
    _wait(world)
    return load_adapter(path)


def _enter(result: OwnerResult, adapter: Adapter, store: Store, output: Path, rank: int, owners: OwnerRows) -> None:
    """The adapter into the store, then the line that says so: between the two a crash costs work, not an adapter."""
    if result.status != "diverged":
        notes = {"loss_before": f"{result.loss_before:.6g}", "loss_after": f"{result.loss_after:.6g}", "status": result.status}
        result.version = store.put(result.name, adapter, notes)
        result.bytes = adapter.bytes
    line = {**result.to_dict(), "ended": time.time(), "rows": rows_hash(owners.rows[result.name])}
    files.add_ended(output, rank, line)


def rows_hash(rows: Sequence[Mapping[str, Any]]) -> str:
    """A hash of an owner's rows, to see whether they changed."""
    text = json.dumps([dict(r) for r in rows], sort_keys=True, default=str)
    return hashlib.sha256(text.encode("utf-8", "surrogatepass")).hexdigest()[:16]


class _Standing:
    """Writes where the owners in a slot stand, every STANDING_SECONDS."""

    def __init__(self, output: Path, rank: int) -> None:
        self.output, self.rank, self.last = output, rank, time.monotonic()

    def __call__(self, trainer: FleetTrainer) -> None:
        if time.monotonic() - self.last >= STANDING_SECONDS:
            files.save_standing(self.output, self.rank, trainer.state())
            self.last = time.monotonic()


def update_owner(folder: str | Path, owner: str, rows: Sequence[Mapping[str, Any]], progress: Progress = print) -> OwnerResult:
    """Goes on training one owner of a fleet, from its adapter in the store, on its kept rows and the new ones.

    UnknownName where the store has no such owner; the new adapter is the store's next version.
    """
    from .data import kept_rows

    output = Path(folder)
    settings = FleetSettings(**files.read_settings(output))
    store = open_store(settings.store or output / "store")
    before = store.get(owner)
    together = [*kept_rows(output, owner), *rows]
    if not together:
        raise ConfigError(f'there are no rows for owner "{owner}": give new ones; the fleet kept none.')
    labels = files.read_labels(output)
    base = _load(settings, labels)
    heads = Heads(base.head, settings.head_per_owner)
    check_adapters(heads, before.modules)
    vera = attach(base.model)
    start = heads.settle(base.model, before)
    assert start is not None
    fleet = vera.fleet(start.config, 1)
    optimizer = _optimizer(settings, fleet, settings.lr)
    trainer = FleetTrainer(fleet, optimizer, _plan(settings), base.tokenizer.pad_token_id or 0, start)
    unusable: dict[str, str] = {}
    mine = OwnerRows({owner: together})
    data = list(prepare(mine, [owner], base.tokenizer, settings, base.max_length, unusable, labels))
    if not data:
        raise ConfigError(f'owner "{owner}" can\'t train: {unusable[owner]}')
    ((result, adapter),) = trainer.run(data)
    _enter(result, heads.whole(adapter, before), store, output, 0, mine)
    if result.status != "diverged" and settings.keep_data:
        keep_rows(output, owner, together)
    progress(f'"{owner}": {result.examples} examples, loss {result.loss_before:.4f} -> {result.loss_after:.4f}, {result.status}')
    return result


# Processes


def _join() -> tuple[int, int]:
    """(rank, how many) under torchrun; (0, 1) alone."""
    world = int(os.environ.get("WORLD_SIZE", 1))
    if world > 1 and not torch.distributed.is_initialized():
        # Owners differ in size, so one process may wait for another for hours.
        torch.distributed.init_process_group("gloo", timeout=timedelta(days=30))
    return int(os.environ.get("RANK", 0)), world


def _wait(world: int) -> None:
    if world > 1:
        torch.distributed.barrier()


def _sum(world: int, numbers: Sequence[int]) -> list[int]:
    total = torch.tensor(numbers, dtype=torch.int64)
    if world > 1:
        torch.distributed.all_reduce(total)
    return total.tolist()
