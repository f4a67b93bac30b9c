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


def _hyperparameters(name: str) -> Callable[[Path], dict[str, Any]]:
    def make(folder: Path) -> dict[str, Any]:
        from . import hyperparameters

        return hyperparameters.make(name, folder)

    return make


def _weights(name: str) -> Callable[[Path], dict[str, Any]]:
    def make(folder: Path) -> dict[str, Any]:
        from . import weights

        return weights.MAKES[name](folder)

    return make


def _grid(name: str, average: str = "mean", beside: str | None = None) -> Callable[[Path], dict[str, Any]]:
    def make(folder: Path) -> dict[str, Any]:
        from . import grid

        place = Path("experiments") / f"{name}.yaml"
        return grid.make(name, place, folder, average=average, beside=Path(beside) if beside else None)

    return make


ITEMS: dict[str, Item] = {
    "table1": Item("Table 1: parameters and bytes of LoRA and VeRA", _own("table1")),
    "table2": Item("Table 2: GLUE", _cells("table2")),
    "table3": Item("Table 3: E2E", _cells("table3")),
    "table4": Item("Table 4: MT-Bench", _cells("table4")),
    "table5": Item("Table 5: images", _cells("table5")),
    "table6": Item("Table 6: ablations", _cells("table6")),
    "table7": Item("Table 7: shared and unique matrices", _cells("table7")),
    "table8": Item("Table 8: hyperparameters on GLUE", _hyperparameters("table8")),
    "table9": Item("Table 9: hyperparameters of instruction tuning", _hyperparameters("table9")),
    "table10": Item("Table 10: hyperparameters on E2E", _hyperparameters("table10")),
    "table11": Item("Table 11: hyperparameters on images", _hyperparameters("table11")),
    "table12": Item("Table 12: training time and memory, on a small scale", _weights("table12")),
    "table13": Item("Table 13: Vicuna Eval", _cells("table13")),
    "fig3": Item("Figure 3: how far d moves in each layer, on a small scale", _weights("fig3")),
    "fig4": Item("Figure 4: accuracy for each thousand parameters, on a small scale", _own("fig4")),
    "fig5": Item("Figure 5: is VeRA's change of the weights like LoRA's? On a small scale", _weights("fig5")),
    "fig6": Item("Figure 6: fitting random 10 × 10 matrices", _own("fig6")),
    "ranks": Item("Figure 2 on a small scale, in a clone of the repository", _grid("ranks", average="median")),
    "ablations": Item("Tables 6 and 7 on a small scale, in a clone of the repository", _grid("ablations")),
    "glue": Item("GLUE's small tasks with MiniLM-L6: the first methods, in a clone of the repository", _grid("glue")),
    "glue_more": Item("The same: the other methods, in a clone of the repository", _grid("glue_more", beside="results/glue")),
    "images": Item("Ten images a class with a small ViT of our own, in a clone of the repository", _grid("images")),
    "intruders": Item("Intruder dimensions of full, LoRA and VeRA", _weights("intruders")),
    "counts": Item("Every count of trained parameters that the paper prints", _own("counts")),
}
ALIASES = {"figure2": "ranks", "figure3": "fig3", "figure4": "fig4", "figure5": "fig5", "figure6": "fig6", "fig2": "ranks"}
"""Other names of the same pages."""


def page_name(name: str) -> str:
    """What a table's or figure's files are called. UnknownName."""
    name = ALIASES.get(name, name)
    if name not in ITEMS:
        raise unknown_name("table or figure", name, [*ITEMS, *ALIASES])
    return name


def make(name: str, folder: Path) -> dict[str, Any]:
    """One table or figure, written into the folder. UnknownName."""
    name = page_name(name)
    folder.mkdir(parents=True, exist_ok=True)
    return ITEMS[name].make(folder)
