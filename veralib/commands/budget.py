"""vera budget: ranks by layer from a total."""

import inspect
from collections.abc import Callable
from pathlib import Path
from typing import Any

from ..errors import ConfigError
from .flags import flags, set_option, settings_argument
from .shared import table
from .train import DICTS, PANELS, resolve

HELP = """Share a total of ranks among the layers: a short warm-up, then more for the layers that move more.

Takes the flags of vera train; prints the ranks, and writes them as settings for it.

Example:

    vera budget run.yaml --total 3072 --ranks ranks.yaml
"""


def make_budget() -> Callable[..., None]:
    """The command, with the flags of Settings."""
    import typer

    from ..training.settings import Settings

    def budget(**given: Any) -> None:
        own = {name: given.pop(name) for name in ("total", "by", "steps", "least", "ranks")}
        file, sets = given.pop("settings_file"), given.pop("set")
        chosen, _ = resolve(file, sets, None, {k: v for k, v in given.items() if v is not None})
        _budget(chosen, **own)

    def option(name: str, annotation: Any, default: Any, text: str) -> inspect.Parameter:
        chosen = typer.Option(default, help=text, rich_help_panel="Budget")
        return inspect.Parameter(name, inspect.Parameter.KEYWORD_ONLY, default=chosen, annotation=annotation)

    parameters = [
        settings_argument(),
        option("total", int, ..., "Ranks in all."),
        option("by", str, "change", "change: how far d moved; gradient: what the loss would lose with it."),
        option("steps", int, 50, "Steps of the warm-up."),
        option("least", int, 4, "Ranks that every layer has."),
        option("ranks", str, "ranks.yaml", "Where the ranks go: settings for vera train."),
        *flags(Settings, PANELS, DICTS),
        set_option("training.bf16=true"),
    ]
    budget.__signature__ = inspect.Signature(parameters)  # type: ignore[attr-defined]
    budget.__annotations__ = {p.name: p.annotation for p in parameters}
    budget.__doc__ = HELP
    return budget


def _budget(settings: Any, total: int, by: Any, steps: int, least: int, ranks: str) -> None:
    import yaml

    from ..training.layer_budget import ranks_of

    found = ranks_of(settings, total, by, steps, least)
    table(
        f"{total} ranks by {by} after {steps} steps", ("layer", "rank"), [(k, str(v)) for k, v in found.items()], right=("rank",)
    )
    given = {k: v for k, v in settings.to_dict().items() if k in settings.model_fields_set}
    try:
        Path(ranks).write_text(yaml.safe_dump({**given, "rank": found}, sort_keys=False), encoding="utf-8")
    except OSError as e:
        raise ConfigError(f"can't write {ranks}: {e.strerror or e}; the ranks are in the table above") from e
    print(f"Next: vera train {ranks}")
