"""Which rows of a data set a run takes: a held-out share, a few of each class. Seeded, and in the order of the data."""

import random
from collections import defaultdict
from collections.abc import Mapping, Sequence
from typing import Any

from ..errors import DataError

Row = Mapping[str, Any]


def split_off(rows: Sequence[Row], share: float, seed: int) -> tuple[list[Row], list[Row]]:
    """(train, validation): the share of the rows that a seeded shuffle picks; both keep the file's order."""
    count = round(len(rows) * share)
    if not 0 < count < len(rows):
        raise DataError(
            f"validation is {share:g} of {len(rows)} rows, which leaves {count} to validate and {len(rows) - count} to train"
        )
    picked = set(random.Random(seed).sample(range(len(rows)), count))
    return [r for i, r in enumerate(rows) if i not in picked], [r for i, r in enumerate(rows) if i in picked]


def draw_shots(rows: Sequence[Row], label: str, shots: int, seed: int) -> list[Row]:
    """`shots` rows of each class; a class's draw depends on the seed, its name and its own rows alone.

    Errors: DataError names the class with the fewest rows where one has too few.
    """
    places: dict[str, list[int]] = defaultdict(list)
    for i, row in enumerate(rows):
        places[str(row[label])].append(i)
    fewest = min(places, key=lambda name: (len(places[name]), name))
    if len(places[fewest]) < shots:
        raise DataError(
            f'shots is {shots}, and class "{fewest}" has {len(places[fewest])} rows in the train data'
            " (without the validation share, if there is one); lower shots or add rows"
        )
    picked = {i for name, own in places.items() for i in random.Random(f"{seed} {name}").sample(own, shots)}
    return [row for i, row in enumerate(rows) if i in picked]
