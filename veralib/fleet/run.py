"""train_fleet: one adapter for every owner of a data set, in a store; what `vera fleet train` runs."""

import contextlib
import hashlib
import json
import os
import random
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from ..adapter import Adapter
from ..attaching import attach
from ..errors import ConfigError, DataError, StateError
from ..format import load_adapter, save_adapter
from ..store import Store, open_store, open_there
from ..store.packed import PackedStore
from ..training.folder import write_json
from ..training.loading import Base, load_base
from ..training.result import hardware, versions
from ..training.tokens import chat_template
from . import folder as files
from .batches import OwnerData
from .data import OwnerRows, keep_rows, prepare, read_owners
from .heads import Heads, check_adapters, labels_of
from .optimizer import FleetAdamW
from .processes import join, together, total, wait
from .progress import ProgressFile, Stop, on_sigterm
from .settings import FleetSettings
from .standing import Standing
from .starts import Starts
from .trainer import FleetTrainer, OwnerResult, Plan

LOSS_SCALE = 2.0**16  # torch.amp.GradScaler's
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
        # A loss that overflowed is written as None.
        held = [o for o in trained if o["held_out"] and o["loss_before"] is not None and o["loss_after"] is not None]
        mean = lambda key: sum(o[key] for o in held) / len(held) if held else None  # noqa: E731
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
    don't come from settings.data. SIGTERM saves where everyone stands and ends the process with code 143.
    """
    with on_sigterm() as stop:
        return _train(settings, rows, progress, stop)


def _train(settings: FleetSettings, rows: OwnerRows | None, progress: Progress, stop: Stop) -> FleetResult:
    begun = time.perf_counter()
    rank, world = join()
    output = Path(settings.output)
    owners = read_owners(settings) if rows is None else rows
    labels = files.read_labels(output) or labels_of(settings, owners.rows)
    files.check_folder(settings, output)
    begin_from = open_there(settings.start_from) if settings.start_from else None
    base = _load(settings, labels)  # before anything is written: a mistyped model leaves no folder that is bound to it
    if rank == 0:
        files.open_folder(settings, output, labels)
        (output / "fleet.json").unlink(missing_ok=True)  # it says that a run has finished
    wait(world)
    store = _open_store(settings, output)
    done = files.ended(output)
    wait(world)  # before anybody ends one more
    heads = Heads(base.head, settings.head_per_owner)
    vera = attach(base.model)
    unusable = dict(owners.unusable)
    shared = _shared_start(settings, owners, base, vera, output, rank, world, progress, labels, stop)
    start = heads.settle(base.model, shared)
    names = [n for n in owners.rows if n not in done]
    mine = [n for i, n in enumerate(owners.rows) if i % world == rank and n not in done]
    fleet = vera.fleet(heads.config(settings.vera_config(), shared), min(settings.slots, max(1, len(mine))))
    optimizer = _optimizer(settings, fleet, settings.lr)
    starts = Starts(begin_from, start)
    trainer = FleetTrainer(fleet, optimizer, _plan(settings), base.tokenizer.pad_token_id or 0, starts)
    also = ProgressFile(output / f"progress-{rank}.jsonl", settings.progress_seconds)
    trainer.on_step = standing = Standing(output, rank, fleet, stop, also)
    trainer.saved = standing.saved()
    for name in mine if settings.keep_data else ():
        with contextlib.suppress(DataError):  # can't be read: prepare() notes why
            keep_rows(output, name, owners.rows[name])
    # Those that stood in a slot first, so that what they had is used.
    mine.sort(key=lambda n: n not in trainer.saved)
    source = prepare(owners, mine, base.tokenizer, settings, base.max_length, unusable, labels)
    for count, (one, adapter) in enumerate(trainer.run(starts.fitting(source, fleet, unusable)), 1):
        _enter(one, heads.whole(adapter, shared), store, output, rank, owners)
        if count % max(1, len(mine) // 20) == 0 or count == len(mine):
            progress(
                f"{count} of {len(mine)} owners done, {trainer.steps} steps, "
                f"{trainer.tokens / max(1e-9, time.perf_counter() - begun):,.0f} tokens/s"
            )
    tokens, padding, steps = total(world, [trainer.tokens, trainer.padding, trainer.steps])
    unusable = together(world, unusable)
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
    wait(world)
    return result


def _load(settings: FleetSettings, labels: Sequence[str]) -> Base:
    single = settings.row_settings()
    torch.manual_seed(settings.seed)  # a new head starts the same in every process and every run
    base = load_base(single, labels)
    if torch.cuda.is_available() and not settings.quantise:
        base.model.to(f"cuda:{int(os.environ.get('LOCAL_RANK', 0)) % torch.cuda.device_count()}")
    chat_template(single, base.tokenizer)
    return base


def _plan(settings: FleetSettings) -> Plan:
    return Plan(settings.epochs, settings.owner_rows, settings.batch_rows, settings.patience, settings.seed)


def _optimizer(settings: FleetSettings, fleet: Any, lr: float) -> FleetAdamW:
    fields = {name: getattr(settings, name) for name in ("weight_decay", "max_norm", "schedule", "warmup")}
    scale = LOSS_SCALE if fleet.vera.model.dtype == torch.float16 else None
    return FleetAdamW(fleet, lr, lr_head=settings.lr_head or lr / 10, loss_scale=scale, **fields)


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
    stop: Stop,
) -> Adapter | None:
    """One adapter on everybody's rows, trained as a fleet of one owner; kept in the output folder."""
    if not settings.shared_epochs:
        return None
    path = output / "shared.safetensors"
    if rank == 0 and not path.exists():
        everybody, count = _everybody(settings, owners, base, labels)
        fleet = vera.fleet(Heads(base.head, False).config(settings.vera_config(), shared=True), 1)
        optimizer = _optimizer(settings, fleet, settings.shared_lr or settings.lr)
        plan = Plan(settings.shared_epochs, settings.batch_rows, settings.batch_rows, None, settings.seed)
        trainer = FleetTrainer(fleet, optimizer, plan, base.tokenizer.pad_token_id or 0)
        trainer.on_step = standing = Standing(output, "shared", fleet, stop)
        trainer.saved = standing.saved()
        progress(f"shared start: {len(everybody.train)} rows of {count} owners")
        ((result, adapter),) = trainer.run([everybody])
        if result.status == "diverged":
            raise StateError("the shared start diverged: lower shared_lr, or train without it (shared_epochs=0).")
        save_adapter(adapter, path)
        progress(f"shared start: held-out loss {result.loss_before:.4f} -> {result.loss_after:.4f}")
    wait(world)
    return load_adapter(path)


def _everybody(settings: FleetSettings, owners: OwnerRows, base: Base, labels: Sequence[str]) -> tuple[OwnerData, int]:
    """Examples of all owners as one owner's, and of how many; at most shared_examples of them, the same share of each."""
    chooser = random.Random(settings.seed)
    kept: list[tuple[float, bool, Any]] = []
    limit, count = 1.0, 0
    for part in prepare(owners, list(owners.rows), base.tokenizer, settings, base.max_length, {}, labels):
        count += 1
        for held_out, examples in ((False, part.train), (True, part.validation)):
            kept += [(place, held_out, e) for e in examples if (place := chooser.random()) < limit]
        if len(kept) > 2 * settings.shared_examples:  # the lowest places of all so far: an even draw in bounded memory
            limit = sorted(place for place, *_ in kept)[settings.shared_examples]
            kept = [k for k in kept if k[0] < limit]
    if len(kept) > settings.shared_examples:
        limit = sorted(place for place, *_ in kept)[settings.shared_examples]
        kept = [k for k in kept if k[0] < limit]
    train, validation = ([e for _, h, e in kept if h == which] for which in (False, True))
    return OwnerData("shared", train, validation), count


def _open_store(settings: FleetSettings, output: Path) -> Store:
    """The run's store; a new one of the kind and precision asked for. ConfigError for a packed one on several machines."""
    given = {name: getattr(settings, name) for name in ("store_kind", "precision") if name in settings.model_fields_set}
    store = open_store(settings.store or output / "store", given.get("store_kind"), given.get("precision"))
    if isinstance(store, PackedStore) and int(os.environ.get("WORLD_SIZE", 1)) > int(os.environ.get("LOCAL_WORLD_SIZE", 1)):
        raise ConfigError(
            "a packed store is for one machine: its index can't lie on a network file system. On several machines give "
            "store_kind=folder, or an fsspec URL with store."
        )
    return store


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


def _check_owner(settings: FleetSettings, owner: str, rows: Sequence[Mapping[str, Any]]) -> None:
    """ConfigError where a row names somebody else in the column by which the fleet's rows were told apart."""
    by_files = len(settings.data) == 1 and Path(settings.data[0]).expanduser().is_dir()
    for number, row in enumerate(rows if not by_files else (), 1):
        named = row.get(settings.owner)
        if named not in (None, "") and str(named) != owner:
            raise ConfigError(
                f'row {number} is of "{named}" (column "{settings.owner}"), and "{owner}" was to be updated: give the rows of '
                f'"{owner}" alone.'
            )


def update_owner(folder: str | Path, owner: str, rows: Sequence[Mapping[str, Any]], progress: Progress = print) -> OwnerResult:
    """Goes on training one owner of a fleet, from its adapter in the store, on its kept rows and the new ones.

    UnknownName where the store has no such owner; the new adapter is the store's next version.
    """
    from .data import kept_rows

    output = Path(folder)
    settings = FleetSettings(**files.read_settings(output))
    store = open_store(settings.store or output / "store")
    before = store.get(owner)
    _check_owner(settings, owner, rows)
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
    if result.status == "diverged":
        progress(f'"{owner}" diverged: its gradient wasn\'t finite. What is in the store stays. Lower the learning rate.')
        return result
    _enter(result, heads.whole(adapter, before), store, output, 0, mine)
    if settings.keep_data:
        keep_rows(output, owner, together)
    progress(f'"{owner}": {result.examples} examples, loss {result.loss_before:.4f} -> {result.loss_after:.4f}, {result.status}')
    return result
