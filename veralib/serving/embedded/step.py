"""Which adapter each token of a step uses.

From one step to the next the tokens change and the adapters hardly do. So the vectors of a pool of adapters are gathered once,
and a step brings two small tensors for all layers: which tokens have an adapter, and whose each is.
"""

from collections import OrderedDict
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch

from ...bank import Layout, Member
from ...model import Vera
from ...selection import BASE, Bucket, Group, Selection

MOST_POOLED = 64
POOLS = 4


@dataclass(frozen=True, eq=False)
class Pool(Selection):
    """The selection of many steps: of the adapters in `pooled`, all of some layouts. set() says what a step's tokens use."""

    pooled: tuple[Member, ...] = ()

    def __post_init__(self) -> None:
        groups: dict[Layout, list[Member]] = {}
        for member in self.pooled:
            groups.setdefault(member.layout, []).append(member)
        nobody = torch.empty(0, dtype=torch.long, device=self.device)
        self._cache["groups"] = tuple(
            Group(layout, tuple(members), nobody, nobody, members[0].bank.find([m.slot for m in members]))  # type: ignore[union-attr]
            for layout, members in groups.items()
        )
        self._cache["place"] = {m: (g, k) for g, group in enumerate(self._cache["groups"]) for k, m in enumerate(group.members)}
        self._cache["parts"] = {}
        self._cache["rows"] = {}

    def set(self, members: tuple[Member | None, ...]) -> "Pool":
        """This, for a step whose token i uses members[i], all of them pooled."""
        if members != self.members:
            object.__setattr__(self, "members", members)
            self._cache["rows"].clear()
            for key in [k for k in self._cache if isinstance(k, tuple)]:
                del self._cache[key]
        return self

    def buckets(self, layer: str) -> tuple[Bucket, ...]:
        """As Selection's, from what the steps have in common and this step's rows."""
        key = ("buckets", layer)
        if key not in self._cache:
            self._cache[key] = tuple(
                Bucket(units, groups, *self._rows(numbers)) for units, groups, numbers in self._parts_of(layer)
            )
        return self._cache[key]

    def _parts_of(self, layer: str) -> Any:
        parts = self._cache["parts"].get(layer)
        if parts is None:
            found: dict[Any, list[tuple[Any, Group, int]]] = {}
            for number, group in enumerate(self._cache["groups"]):
                for unit in group.layout.by_layer.get(layer, ()):
                    found.setdefault((unit.basis, unit.unit), []).append((unit, group, number))
            parts = self._cache["parts"][layer] = tuple(tuple(zip(*three, strict=True)) for three in found.values())
        return parts

    @torch.inference_mode(False)
    def _rows(self, numbers: tuple[int, ...]) -> tuple[torch.Tensor, torch.Tensor, bool, bool, dict]:
        rows = self._cache["rows"].get(numbers)
        if rows is None:
            place, groups = self._cache["place"], self._cache["groups"]
            starts, start = {}, 0
            for number in numbers:
                starts[number] = start
                start += len(groups[number].members)
            found = [(i, *place[m]) for i, m in enumerate(self.members) if m is not None]
            chosen = [(i, starts[g] + k) for i, g, k in found if g in starts]
            positions = torch.tensor([i for i, _ in chosen], dtype=torch.long, device=self.device)
            index = [k for _, k in chosen]
            rows = (
                positions,
                torch.tensor(index, dtype=torch.long, device=self.device),
                len(chosen) == len(self.members),
                index == list(range(start)),
                {},
            )
            self._cache["rows"][numbers] = rows
        return rows


class StepSelections:
    """The selections of a loop's steps."""

    def __init__(self, vera: Vera) -> None:
        self.vera = vera
        self._pools: OrderedDict[frozenset[Layout], Pool] = OrderedDict()

    def of(self, members: Sequence[Member | None], lengths: Sequence[int]) -> Selection:
        """The selection of a step. members: the adapter of each request, None: the base; lengths: its tokens in this step.

        All base: no adapter's work at all. One adapter for all: its own plan (core.choose_plan), without an index.
        """
        here = dict.fromkeys(members)
        if len(here) == 1:
            member = members[0]
            return BASE if member is None else Selection("one", member, device=self.vera.inside.device)
        tokens = tuple(m for m, n in zip(members, lengths, strict=True) for _ in range(n))
        adapters = [m for m in here if m is not None]
        return self._pool(adapters).set(tokens)

    def _pool(self, adapters: list[Member]) -> Pool:
        """One that holds these adapters, of their layouts alone: a layout more would cost every step a product."""
        layouts = frozenset(m.layout for m in adapters)
        pool = self._pools.pop(layouts, None)
        known = set(pool.pooled) if pool is not None else set()
        if pool is None or not known.issuperset(adapters):
            alive = self.vera.members
            kept = [m for m in (pool.pooled if pool else ()) if m not in adapters and alive.get(m.name) is m]
            room = max(0, MOST_POOLED - len(adapters))
            pool = Pool("tokens", device=self.vera.inside.device, pooled=(*(kept[-room:] if room else ()), *adapters))
        self._pools[layouts] = pool
        while len(self._pools) > POOLS:
            self._pools.popitem(last=False)
        return pool
