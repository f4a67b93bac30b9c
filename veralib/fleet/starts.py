"""What each owner of a run begins from: its adapter in another store, else the shared start, else anew."""

from collections.abc import Iterable, Iterator
from dataclasses import dataclass

from .. import matching
from ..adapter import Adapter
from ..errors import AdapterMismatch, UnknownName, VeraError
from ..store import Store
from .batches import OwnerData
from .fleet import Fleet


@dataclass(frozen=True)
class Starts:
    """Called with an owner's name, it gives the adapter that the owner begins from, or None: anew."""

    store: Store | None
    shared: Adapter | None

    def __call__(self, name: str) -> Adapter | None:
        if self.store is None:
            return self.shared
        try:
            return self.store.get(name)
        except UnknownName:
            return self.shared

    def fitting(self, source: Iterable[OwnerData], fleet: Fleet, unusable: dict[str, str]) -> Iterator[OwnerData]:
        """The owners whose start fits the fleet and its base model; who has another is noted in `unusable`."""
        for data in source:
            if self.store is not None:
                try:
                    self._check(data.name, fleet)
                except VeraError as e:
                    unusable[data.name] = f"it can't begin from its adapter in start_from: {e}"
                    continue
            yield data

    def _check(self, name: str, fleet: Fleet) -> None:
        start = self(name)
        if start is None or start is self.shared:
            return
        if start.biases:
            raise AdapterMismatch(
                f'"{name}" replaces the bias of {len(start.biases)} layers (PEFT\'s bias="vera_only"), which no fleet trains.'
            )
        matching.check(fleet.vera.inside, start, name, allow_other_base=False)
        fleet.row_of(start)
