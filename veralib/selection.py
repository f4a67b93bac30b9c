"""Which adapter each row uses: selections, and the runtime that knows the one in force.

A layer asks its runtime for the current selection in every forward. Inside a backward pass (recomputation under gradient
checkpointing) the answer is the selection of the root forward whose gradient is flowing, since the user's `with` has ended.
"""

import operator
import threading
from collections.abc import Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any, Literal

import torch
from torch import Tensor
from torch.nn import functional as F

from .autograd import UnitSpec
from .bank import Bank, Found, Layout, Member
from .core import Plan
from .errors import ConfigError, StateError
from .products import apply_frozen

CPU = torch.device("cpu")


@dataclass(frozen=True, eq=False)
class Group:
    """The rows of a batch whose adapters share one layout, and one fleet or none. members: distinct; index: for each row, its
    member's place."""

    layout: Layout
    members: tuple[Member, ...]
    positions: Tensor
    index: Tensor
    found: Found | None  # where the resident members' rows lie in their bank
    slots: Tensor | None = None  # in a fleet: the members' rows of its table


@dataclass(frozen=True, eq=False)
class Bucket:
    """The rows at one unit of one layer that share a basis: one A x, two gathers, one product with B."""

    units: tuple[UnitSpec, ...]  # one for each group
    groups: tuple[Group, ...]
    positions: Tensor
    index: Tensor  # row -> place in the stacked vectors of all groups
    everyone: bool  # positions are 0 … size - 1
    own: bool  # index is 0 … len(index) - 1: each row its own adapter, nothing to gather

    @cached_property
    def trains(self) -> bool:
        """Whether a backward changes any of its adapters."""
        return any(g.slots is not None or any(m.trainable for m in g.members) for g in self.groups)

    @cached_property
    def recompute(self) -> bool:
        """Whether a backward computes B u anew rather than find it saved."""
        return all(g.slots is None or g.members[0].bank.recompute for g in self.groups)  # type: ignore[union-attr]

    @property
    def widest(self) -> UnitSpec:
        return max(self.units, key=lambda u: u.r)


@dataclass(frozen=True, eq=False)
class Selection:
    """base: no adapter. one: `member` for all rows. rows, tokens: an adapter for each row or token of the batch."""

    kind: Literal["base", "one", "rows", "tokens"]
    member: Member | None = None
    names: tuple[str | None, ...] = ()
    members: tuple[Member | None, ...] = ()
    device: torch.device = CPU
    _cache: dict = field(default_factory=dict)

    @property
    def size(self) -> int:
        return len(self.members)

    @property
    def distinct(self) -> tuple[Member, ...]:
        if self.kind == "one":
            return (self.member,) if self.member else ()
        return tuple(dict.fromkeys(m for m in self.members if m is not None))

    def repeated(self, times: int) -> "Selection":
        """Each row `times` times in a row: what generate does to a batch for beams and several return sequences."""
        key = ("repeated", times)
        if key not in self._cache:
            names = tuple(n for n in self.names for _ in range(times))
            members = tuple(m for m in self.members for _ in range(times))
            self._cache[key] = Selection(self.kind, self.member, names, members, self.device)
        return self._cache[key]

    def groups(self) -> tuple[Group, ...]:
        if "groups" not in self._cache:
            by_layout: dict[tuple[Layout, Bank | None], list[int]] = {}
            for i, member in enumerate(self.members):
                if member is not None:
                    by_layout.setdefault((member.layout, member.fleet), []).append(i)
            self._cache["groups"] = tuple(self._group(*key, rows) for key, rows in by_layout.items())
        return self._cache["groups"]

    @torch.inference_mode(False)  # autograd couldn't save an index made inside it
    def _group(self, layout: Layout, fleet: Bank | None, rows: list[int]) -> Group:
        # Resident members first: their vectors come from the bank in one gather, the trainable ones' are stacked behind.
        distinct = sorted(dict.fromkeys(self.members[i] for i in rows), key=lambda m: m.trainable)  # type: ignore[union-attr]
        place = {member: k for k, member in enumerate(distinct)}
        slots = None if fleet is None else torch.tensor([m.slot for m in distinct if m], device=self.device)
        resident = [m for m in distinct if m and m.bank is not None and fleet is None]
        return Group(
            layout,
            tuple(m for m in distinct if m),
            torch.tensor(rows, device=self.device),
            torch.tensor([place[self.members[i]] for i in rows], device=self.device),
            resident[0].bank.find([m.slot for m in resident]) if resident else None,  # type: ignore[union-attr]
            slots,
        )

    def buckets(self, layer: str) -> tuple[Bucket, ...]:
        """Everything that touches this layer, by basis and part."""
        key = ("buckets", layer)
        if key not in self._cache:
            parts: dict[Any, list[tuple[UnitSpec, Group]]] = {}
            for group in self.groups():
                for unit in group.layout.by_layer.get(layer, ()):
                    parts.setdefault((unit.basis, unit.unit), []).append((unit, group))
            self._cache[key] = tuple(self._bucket(pairs) for pairs in parts.values())
        return self._cache[key]

    @torch.inference_mode(False)
    def _bucket(self, pairs: list[tuple[UnitSpec, Group]]) -> Bucket:
        groups = tuple(g for _, g in pairs)
        key = ("rows", *map(id, groups))
        if key not in self._cache:  # one tensor for all layers: the memo of A x knows it by identity
            positions = torch.cat([g.positions for g in groups])
            starts = torch.tensor([0, *[len(g.members) for g in groups]]).cumsum(0).tolist()
            index = torch.cat([g.index + start for g, start in zip(groups, starts, strict=False)])
            everyone = len(positions) == self.size
            if everyone:
                order = positions.argsort()
                positions, index = positions[order], index[order]
            own = index.tolist() == list(range(len(index)))
            self._cache[key] = (positions, index, everyone, own)
        return Bucket(tuple(u for u, _ in pairs), groups, *self._cache[key])


BASE = Selection("base")


def row_names(kind: str, names: Any) -> tuple[str | None, ...]:
    """What rows() or tokens() was given, checked: a name or None for each row."""
    if isinstance(names, str):
        raise ConfigError(f'{kind}() got the string "{names}", expected a list with a name or None for each row.')
    try:
        names = tuple(names)
    except TypeError as e:
        raise ConfigError(f"{kind}() got {names!r}, expected a list with a name or None for each row.") from e
    if wrong := [n for n in names if n is not None and not isinstance(n, str)]:
        raise ConfigError(f"{kind}() got {wrong[0]!r} as an adapter's name, expected a string or None.")
    return names


def token_names(index: Any, names: Sequence[str | None] | None) -> Any:
    """The adapter of each token: index holds names, or, with `names`, whole numbers, the place in names or -1 for the base."""
    if names is None:
        if isinstance(index, Tensor):
            raise ConfigError("tokens(index) got a tensor without names=: give names=[…], the adapters that its numbers mean.")
        return index
    if isinstance(index, Tensor):
        if index.is_floating_point() or index.is_complex() or index.dtype == torch.bool:
            raise ConfigError(f"tokens(index) got a tensor of {index.dtype}, expected whole numbers: places in names.")
        index = index.flatten().tolist()
    try:
        places = [operator.index(i) for i in index]
    except TypeError as e:
        raise ConfigError("tokens(index, names) expects a whole number for each token: its place in names, or -1.") from e
    if wrong := [i for i in places if not -1 <= i < len(names)]:
        raise ConfigError(f"tokens(index) holds {wrong[0]}, expected -1 to {len(names) - 1}: there are {len(names)} names.")
    return [None if i < 0 else names[i] for i in places]


class Runtime:
    """What all layers of one model ask: the selection in force, and the last A x of this thread."""

    def __init__(self) -> None:
        self.active = BASE
        self.merged: str | None = None
        self.plan: Plan | None = None
        self._local = threading.local()
        self._record: tuple[int, set[Selection]] | None = None
        self._last_seen: Selection | None = None
        self._written = 0
        self.lock = threading.RLock()
        """Held while an adapter comes or goes."""
        self._in_force: list[Selection] = []
        self.overrides = 0
        """How many rows(), tokens() and using() haven't ended, over all threads."""

    def __getstate__(self) -> dict:
        return {"active": self.active, "merged": self.merged, "plan": self.plan}

    def __setstate__(self, state: dict) -> None:
        self.__init__()  # type: ignore[misc]
        self.__dict__.update(state)

    def current(self) -> Selection:
        """The selection that a layer must follow now."""
        if self.merged is not None:
            return BASE
        if torch._C._current_graph_task_id() >= 0:
            return self._in_backward()
        stack = getattr(self._local, "stack", None)
        selection = stack[-1] if stack else self.active
        if torch.is_grad_enabled():
            self._last_seen = selection
        return selection

    def _in_backward(self) -> Selection:
        if self._record is None:
            return self._last_seen or self.active
        selections = self._record[1]
        if len(selections) > 1:
            raise StateError(
                "gradient checkpointing recomputes a layer while the gradients of several forwards with different rows() or "
                "use() flow in one backward: which adapter it ran with can't be known. Call backward once for each forward, "
                "or give checkpoint a context_fn that enters the same vera.rows(...) for the recomputation."
            )
        return next(iter(selections))

    def forget_record(self) -> None:
        if torch._C._current_graph_task_id() < 0:
            self._record = None

    def note_backward(self, selection: Selection) -> None:
        """Called by the root output's gradient hook: from here on this selection's layers may be recomputed."""
        task = torch._C._current_graph_task_id()
        if self._record is None or self._record[0] != task:
            record: tuple[int, set[Selection]] = (task, set())
            self._record = record

            def end() -> None:
                if self._record is record:
                    self._record = None

            torch.autograd.Variable._execution_engine.queue_callback(end)  # type: ignore[attr-defined]
        self._record[1].add(selection)

    @contextmanager
    def override(self, selection: Selection):
        """The selection of this thread inside the `with`."""
        stack = self._stack()
        depth = len(stack)
        with self.lock:
            self._in_force.append(selection)
            self.overrides = len(self._in_force)
        stack.append(selection)
        try:
            yield
        finally:
            del stack[depth:]
            with self.lock:
                self._in_force.remove(selection)
                self.overrides = len(self._in_force)

    def in_use(self, member: Member) -> bool:
        """Whether a rows(), tokens() or using() that hasn't ended names the adapter."""
        with self.lock:
            return any(member in s.distinct for s in self._in_force)

    def _stack(self) -> list[Selection]:
        if not hasattr(self._local, "stack"):
            self._local.stack = []
        return self._local.stack

    def overridden(self) -> Selection | None:
        stack = getattr(self._local, "stack", None)
        return stack[-1] if stack else None

    # The memo: layers that read the same x (q, k, v; gate, up) share A x, and in low precision the cast of x.

    def rank_space(self, x: Tensor, flat: Tensor, unit: UnitSpec, rows: Tensor | None = None) -> Tensor:
        """u = A x, (…, r), once for all layers that read the very same x. flat: what is multiplied; rows: which rows of it."""
        key = (unit.basis, unit.r, flat.dtype, flat.dim(), None if rows is None else id(rows), torch.is_grad_enabled())
        memo = self._memo(x)
        if key not in memo:
            memo[key] = apply_frozen(flat if rows is None else flat.index_select(0, rows), unit.A(flat))
        return memo[key]

    def cast(self, x: Tensor, flat: Tensor, dtype: torch.dtype) -> Tensor:
        """flat in the matmuls' dtype, once for all layers that read the same x."""
        if flat.dtype == dtype:
            return flat
        memo, key = self._memo(x), ("cast", dtype, torch.is_grad_enabled())
        if key not in memo:
            memo[key] = flat.to(dtype)
        return memo[key]

    def _memo(self, x: Tensor) -> dict:
        local = self._local
        if x.is_inference():  # no version counter: a change in place couldn't be seen
            return {}
        if getattr(local, "x", None) is not x or local.version != x._version:
            local.x, local.version, local.memo = x, x._version, {}
            if torch._C._current_graph_task_id() >= 0:  # a checkpoint's recomputation: no forward of the root clears it
                mine = local.__dict__  # this thread's: on a GPU the callback runs in another
                end = lambda: mine.update(x=None, memo=None)  # noqa: E731
                torch.autograd.Variable._execution_engine.queue_callback(end)  # type: ignore[attr-defined]
        return local.memo

    # What the last mixed selection without gradients multiplies by: a decode loop asks for the same hundreds of times.

    def row_vectors(self, layer: str, bucket: Bucket, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
        """d (R, 1, r) and b (R, 1, m) of each row of a bucket, in dtype. Without gradients only.

        The K adapters' vectors are kept for the selection used last, where all of them are resident and so can't change.
        """
        if bucket.trains:
            d, b = (v.to(dtype) for v in stacked_vectors(bucket))
        else:
            local, selection = self._local, self.current()
            if getattr(local, "kept_for", None) is not selection or local.kept_at != self._written:
                local.kept_for, local.kept_at, local.kept = selection, self._written, {}
            key = (layer, bucket.units[0].unit, bucket.units[0].basis, dtype)
            if key not in local.kept:
                local.kept[key] = tuple(v.to(dtype) for v in stacked_vectors(bucket))
            d, b = local.kept[key]
        if not bucket.own:
            d, b = d.index_select(0, bucket.index), b.index_select(0, bucket.index)
        return d[:, None], b[:, None]

    def forget_vectors(self) -> None:
        """Resident vectors were written: what any thread kept of them is stale."""
        self._written += 1

    def clear_memo(self) -> None:
        self._local.x, self._local.memo = None, {}


def stacked_vectors(bucket: Bucket, dtype: torch.dtype = torch.float32) -> tuple[Tensor, Tensor]:
    """d (K, r), the scale in it and zero beyond an adapter's own rank, and b (K, m) of all K adapters of a bucket."""
    r, ds, bs = bucket.widest.r, [], []
    for unit, group in zip(bucket.units, bucket.groups, strict=True):
        parts_d, parts_b = [], []
        if group.slots is not None:
            fleet: Any = group.members[0].bank
            vectors = fleet.take(tuple(m.slot for m in group.members), group.slots, *group.layout.offsets[unit.unit])
            parts_d.append(vectors[0])
            parts_b.append(vectors[1])
        elif group.found is not None:
            bank = group.members[0].bank
            start, middle, end = group.layout.offsets[unit.unit]
            assert bank is not None
            flat = bank.gather(group.found, start, end)
            parts_d.append(flat[:, : middle - start])
            parts_b.append(flat[:, middle - start :])
        trained = [m.vectors(unit.unit) for m in group.members if m.trainable]
        if trained:
            parts_d.append(torch.stack([d for d, _ in trained]))
            parts_b.append(torch.stack([b for _, b in trained]))
        d, b = _cat(parts_d) * unit.scale, _cat(parts_b)
        ds.append(F.pad(d, (0, r - unit.r)) if unit.r < r else d)
        bs.append(b)
    return _cat(ds), _cat(bs)


def _cat(tensors: Sequence[Tensor]) -> Tensor:
    return tensors[0] if len(tensors) == 1 else torch.cat(tuple(tensors))
