"""Published hyperparameters as rows: `vera train glue-rte-base --method lora` runs any cell."""

import os
from pathlib import Path
from typing import Any

from ..errors import ConfigError, unknown_name
from ..training import Settings
from ..training.settings import merge
from . import glue, images, language
from .rows import Fields, Protocol, Recipe, Source

__all__ = ["RECIPES", "Protocol", "Recipe", "Source", "find_recipe", "remarks", "settings_of"]

RECIPES: dict[str, Recipe] = {r.name: r for r in (*glue.RECIPES, *language.RECIPES, *images.RECIPES)}
PROTOCOLS = ("published", "honest")


def find_recipe(name: str) -> Recipe:
    """The recipe of that name; UnknownName with the nearest."""
    if name not in RECIPES:
        raise unknown_name("recipe", name, RECIPES)
    return RECIPES[name]


def settings_of(name: str, method: str = "vera", protocol: Protocol = "published", **changes: Any) -> Settings:
    """A recipe's settings for one method, every published value in its place; changes win.

    protocol, where there is a development set: "published" keeps the epoch that is best on it, as the paper did, so its score is
    a choice too; "honest" chooses on a tenth of the training rows and scores the development set once.
    Data: changes["data"], else the recipe's folder below VERALIB_DATA if it is there, else the hub. A method without a published
    row has the recipe's common settings and our own rates.
    """
    recipe = find_recipe(name)
    if protocol not in PROTOCOLS:
        raise ConfigError(f"protocol is {protocol!r}, expected {' or '.join(PROTOCOLS)}")
    where, local = _data(recipe, changes.get("data"))
    common = dict(recipe.common)
    row = dict(recipe.row(method))
    if "accumulation" not in changes:
        common["accumulation"] = _accumulation(recipe, {**common, **row, **changes})
    row.pop("processes", None)
    given: dict[str, Any] = {"model": recipe.model, "method": method, **where, **common, **row}
    given |= {"recipe": name, "output": f"{name}-{method}"}
    if recipe.data.dev and common.get("evaluate_every") != "never":
        dev = recipe.data.dev[local]
        given |= {"validation": dev} if protocol == "published" else {"validation": "0.1", "test": dev}
        given |= {"best": True, "recipe": f"{name}, {protocol}"}
    elif protocol == "honest":
        raise ConfigError(f'recipe "{name}" keeps its last weights and chooses nothing: there is no protocol to set')
    if "method" in changes and changes["method"] != method:
        raise ConfigError("give the method once")
    return Settings(**merge(given, changes))


def _accumulation(recipe: Recipe, given: Fields) -> int:
    """Batches a step that keep the published batch on the processes at hand; ConfigError where none does."""
    processes = int(os.environ.get("WORLD_SIZE", "1"))
    published = int(given.get("processes", recipe.processes)) * int(recipe.common.get("accumulation", 1))
    if published % processes:
        batch = published * int(given["batch_size"])
        raise ConfigError(
            f'recipe "{recipe.name}" has batches of {batch}, which {processes} processes of {given["batch_size"]} can\'t make: '
            "start "
            f"{published} or fewer, a divisor of it, or set batch_size and accumulation yourself."
        )
    return published // processes


def remarks(name: str, method: str, protocol: Protocol = "published") -> list[str]:
    """What a reader of the recipe's result must know."""
    recipe = find_recipe(name)
    found = [f"Source: {recipe.source}.", *recipe.notes]
    there = ", ".join(recipe.methods)
    if method not in recipe.methods and recipe.row(method):
        found.append(f'No row for method "{method}" is known here: it takes that of {recipe.like[method]}, which is our choice.')
    elif method not in recipe.methods:
        found.append(f'No row for method "{method}" is known here (there are: {there}): the common settings with our own rates.')
    if recipe.data.dev:
        found.append(
            "Protocol: published, the best epoch on the development set, which so chooses and scores."
            if protocol == "published"
            else "Protocol: honest, the best epoch on a tenth of the training rows; the development set is scored once."
        )
    return found


def _data(recipe: Recipe, given: Any) -> tuple[Fields, bool]:
    """The settings that read the data, and whether it is their local form."""
    if given is not None:
        paths = str(given).split(",") if isinstance(given, (str, Path)) else tuple(given)
        local = all(Path(p).expanduser().exists() for p in paths)
        return {**(recipe.data.local if local else recipe.data.hub), "data": given}, local
    home = os.environ.get("VERALIB_DATA")
    if home and recipe.data.folder and (folder := Path(home) / recipe.data.folder).exists():
        return {**recipe.data.local, "data": str(folder)}, True
    return recipe.data.hub, False
