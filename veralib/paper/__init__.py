"""The paper's tables and figures, each made by `vera reproduce NAME`. ITEMS lists them; make(name, folder) makes one."""

import importlib
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

from ..errors import unknown_name


class Item(NamedTuple):
    """title: what the paper shows; make(folder) writes NAME.json, NAME.md and pictures there and gives the JSON."""

    title: str
    make: Callable[[Path], dict[str, Any]]


def _own(module: str) -> Callable[[Path], dict[str, Any]]:
    """The make of a module of this package, imported when it is called."""
    return lambda folder: importlib.import_module(f".{module}", __name__).make(folder)


def _cells(name: str) -> Callable[[Path], dict[str, Any]]:
    def make(folder: Path) -> dict[str, Any]:
        from . import cells

        return cells.make(name, folder)

    return make


def _weights(name: str) -> Callable[[Path], dict[str, Any]]:
    def make(folder: Path) -> dict[str, Any]:
        from . import weights

        return weights.MAKES[name](folder)

    return make


def _grid(name: str) -> Callable[[Path], dict[str, Any]]:
    def make(folder: Path) -> dict[str, Any]:
        from . import grid

        return grid.make(name, Path("experiments") / f"{name}.yaml", folder)

    return make


ITEMS: dict[str, Item] = {
    "table1": Item("Table 1: parameters and bytes of LoRA and VeRA", _own("table1")),
    "table2": Item("Table 2: GLUE", _cells("table2")),
    "table3": Item("Table 3: E2E", _cells("table3")),
    "table4": Item("Table 4: MT-Bench", _cells("table4")),
    "table5": Item("Table 5: images", _cells("table5")),
    "table6": Item("Table 6: ablations", _cells("table6")),
    "table7": Item("Table 7: shared and unique matrices", _cells("table7")),
    "table13": Item("Table 13: Vicuna Eval", _cells("table13")),
    "table12": Item("Table 12: training time and memory, on a small scale", _weights("table12")),
    "fig3": Item("Figure 3: how far d moves in each layer, on a small scale", _weights("fig3")),
    "fig4": Item("Figure 4: accuracy for each thousand parameters, on a small scale", _own("fig4")),
    "fig5": Item("Figure 5: is VeRA's change of the weights like LoRA's? On a small scale", _weights("fig5")),
    "intruders": Item("Intruder dimensions of full, LoRA and VeRA", _weights("intruders")),
    "glue": Item("GLUE's small tasks with MiniLM-L6: every method, in a clone of the repository", _grid("glue")),
    "ablations": Item("Tables 6 and 7 on a small scale, in a clone of the repository", _grid("ablations")),
    "ranks": Item("Figure 2 on a small scale, in a clone of the repository", _grid("ranks")),
    "images": Item("Ten images a class with a small ViT of our own, in a clone of the repository", _grid("images")),
    "counts": Item("Every count of trained parameters that the paper prints", _own("counts")),
    "fig6": Item("Figure 6: fitting random 10 × 10 matrices", _own("fig6")),
}


def make(name: str, folder: Path) -> dict[str, Any]:
    """One table or figure, written into the folder. UnknownName."""
    if name not in ITEMS:
        raise unknown_name("table or figure", name, ITEMS)
    folder.mkdir(parents=True, exist_ok=True)
    return ITEMS[name].make(folder)
