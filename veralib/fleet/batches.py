"""Which rows an owner's next step takes, and which owners share a batch.

What an owner sees, and in which order, follows from its name, its rows and the seed alone; who else is in the batch never
matters for it. So a fleet may mix owners as suits the machine: rows of like length together.
"""

import hashlib
import math
import random
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

Example = Mapping[str, Any]
MIXED = 8  # an epoch's rows are sorted by length within so many steps' worth, as transformers groups them


@dataclass(frozen=True)
class OwnerData:
    """One owner's rows as token ids: each example has input_ids and labels (training/tokens.py)."""

    name: str
    train: Sequence[Example]
    validation: Sequence[Example] = ()

    def fingerprint(self) -> str:
        """16 hex digits that tell these examples, and which of them are held out, from others."""
        parts = [[[e["input_ids"], e["labels"]] for e in part] for part in (self.train, self.validation)]
        return hashlib.sha256(repr(parts).encode()).hexdigest()[:16]


@dataclass
class Order:
    """One owner's steps: batch_rows rows each (the last of an epoch may have fewer), epochs passes over its rows."""

    data: OwnerData
    batch_rows: int
    epochs: float
    seed: int
    taken: int = 0
    _epoch: tuple[int, list[list[int]]] | None = field(default=None, repr=False)

    @property
    def steps_per_epoch(self) -> int:
        return math.ceil(len(self.data.train) / self.batch_rows)

    @property
    def total(self) -> int:
        """Steps in all."""
        return max(1, round(self.epochs * self.steps_per_epoch))

    @property
    def done(self) -> bool:
        return self.taken >= self.total

    def rows(self) -> list[Example]:
        """The rows of the next step."""
        epoch, step = divmod(self.taken, self.steps_per_epoch)
        if self._epoch is None or self._epoch[0] != epoch:
            self._epoch = (epoch, self._drawn(epoch))
        return [self.data.train[i] for i in self._epoch[1][step]]

    def _drawn(self, epoch: int) -> list[list[int]]:
        key = hashlib.sha256(repr((self.seed, self.data.name, epoch)).encode("utf-8", "surrogatepass")).digest()
        chooser = random.Random(int.from_bytes(key[:8], "little"))
        order = list(range(len(self.data.train)))
        chooser.shuffle(order)
        block = MIXED * self.batch_rows
        batches = []
        for k in range(0, len(order), block):
            near = sorted(order[k : k + block], key=lambda i: len(self.data.train[i]["input_ids"]))
            batches += [near[j : j + self.batch_rows] for j in range(0, len(near), self.batch_rows)]
        chooser.shuffle(batches)
        return batches


def choose(waiting: Sequence[Order], rows: int) -> list[Order]:
    """The owners whose next steps share a batch of at most `rows` rows (one owner's step is never cut): the one that is
    furthest behind, and those whose next rows are nearest to its in length."""
    behind = min(waiting, key=lambda o: (o.taken / o.total, o.data.name))
    longest = {o.data.name: max(len(e["input_ids"]) for e in o.rows()) for o in waiting}
    anchor = longest[behind.data.name]
    chosen: list[Order] = []
    count = 0

    def nearness(o: Order) -> tuple:
        return o is not behind, abs(longest[o.data.name] - anchor), o.taken / o.total, o.data.name

    for order in sorted(waiting, key=nearness):
        size = len(order.rows())
        if count + size <= rows or not chosen:
            chosen.append(order)
            count += size
    return chosen
