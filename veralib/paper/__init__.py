"""The paper's tables and figures, each made by `vera reproduce NAME`. ITEMS lists them; make(name, folder) makes one."""

from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

from ..errors import unknown_name


class Item(NamedTuple):
    """title: what the paper shows; make(folder) writes NAME.json, NAME.md and pictures there and gives the JSON."""

    title: str
    make: Callable[[Path], dict[str, Any]]


def _table1(folder: Path) -> dict[str, Any]:
    from . import table1

    return table1.make(folder)


def _counts(folder: Path) -> dict[str, Any]:
    from . import counts

    return counts.make(folder)


def _fig6(folder: Path) -> dict[str, Any]:
    from . import fig6

    return fig6.make(folder)


ITEMS: dict[str, Item] = {
    "table1": Item("Table 1: parameters and bytes of LoRA and VeRA", _table1),
    "counts": Item("Every count of trained parameters that the paper prints", _counts),
    "fig6": Item("Figure 6: fitting random 10 × 10 matrices", _fig6),
}


def make(name: str, folder: Path) -> dict[str, Any]:
    """One table or figure, written into the folder. UnknownName."""
    if name not in ITEMS:
        raise unknown_name("table or figure", name, ITEMS)
    folder.mkdir(parents=True, exist_ok=True)
    return ITEMS[name].make(folder)
