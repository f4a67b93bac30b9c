"""Which adapter each row uses: selections, and what they come to at one layer. runtime.py knows the one in force."""

import operator
from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any, Literal

import torch
from torch import Tensor
from torch.nn import functional as F

from .autograd import UnitSpec
from .bank import Bank, Found, Layout, Member
from .errors import ConfigError

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
    shared: dict = field(default_factory=dict)  # what is worked out once for all layers whose buckets have these rows

    def places(self, size: int) -> Tensor:
        """index for every one of the batch's `size` rows, -1 where a row isn't of this bucket."""
        if self.everyone:
            return self.index
        if "places" not in self.shared:
            nobody = torch.full((size,), -1, device=self.index.device)
            self.shared["places"] = nobody.index_copy_(0, self.positions, self.index)
        return self.shared["places"]

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

    def same(self, other: "Selection") -> bool:
        """Whether each row has the same adapter in both."""
        return self is other or (self.kind, self.member, self.members) == (other.kind, other.member, other.members)

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
            self._cache[key] = (positions, index, everyone, own, {})
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
