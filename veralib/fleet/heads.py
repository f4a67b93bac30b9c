"""Classification heads of a fleet: each owner's own, or one from the shared start, frozen."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from ..adapter import Adapter
from ..config import VeraConfig
from ..errors import ConfigError, DataError
from ..training.data import Row, ordered
from .settings import FleetSettings


@dataclass(frozen=True)
class Heads:
    """Which modules of the base are heads, and whether each owner trains its own. Without heads, nothing here does anything."""

    names: tuple[str, ...]
    per_owner: bool

    def config(self, config: VeraConfig, start: Adapter | None = None, shared: bool = False) -> VeraConfig:
        """What a fleet trains: the heads too where they are each owner's, and in the shared start. Under a frozen head, the
        layers of `start`: "all-linear" would take in those of the head itself."""
        if self.names and not self.per_owner and not shared:
            return config if start is None else replace(config, targets=tuple(start.vectors), layers=None)
        return replace(config, train_modules=tuple(dict.fromkeys((*config.train_modules, *self.names))))

    def settle(self, model: Any, start: Adapter | None) -> Adapter | None:
        """The adapter that owners begin from. A frozen head goes into the base model, out of the adapter."""
        if start is None or self.per_owner or not self.names:
            return start
        for name in self.names:
            model.get_submodule(name).load_state_dict(dict(start.modules[name]))
        config = replace(start.config, train_modules=tuple(n for n in start.config.train_modules if n not in self.names))
        return replace(start, config=config, modules={n: m for n, m in start.modules.items() if n not in self.names})

    def whole(self, adapter: Adapter, start: Adapter | None) -> Adapter:
        """An owner's adapter with the frozen head beside it, so that it serves without the rest of the fleet."""
        if start is None or self.per_owner or not self.names:
            return adapter
        config = replace(adapter.config, train_modules=(*adapter.config.train_modules, *self.names))
        return replace(adapter, config=config, modules={**adapter.modules, **{n: start.modules[n] for n in self.names}})


def labels_of(settings: FleetSettings, owners: Mapping[str, Sequence[Row]]) -> tuple[str, ...]:
    """The labels of all owners' rows, in order; none for other tasks. DataError where there are fewer than two."""
    if settings.task != "classification":
        return ()
    found, there = set(), set()
    for name in owners:
        try:
            rows = owners[name]
        except DataError:
            continue  # a file that can't be read: its owner is left out, and named, later
        found |= {str(row[settings.label]) for row in rows if row.get(settings.label) not in (None, "")}
        there |= {str(c) for row in rows[:1] for c in row}
    if len(found) < 2:
        raise DataError(
            f'column "{settings.label}" holds {len(found)} labels, expected two or more. Columns there: '
            f"{', '.join(sorted(there))}. Name the label column with label."
        )
    return ordered(found)


def check_adapters(heads: Heads, kept: Mapping[str, Any]) -> None:
    """ConfigError where an adapter that goes on lacks the head that it needs."""
    if missing := [n for n in heads.names if n not in kept]:
        raise ConfigError(f'the adapter has no "{missing[0]}", which this task needs: train the fleet anew.')
