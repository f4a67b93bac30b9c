"""Flags of a command from the fields of a pydantic model, with their descriptions as help."""

import inspect
from collections.abc import Mapping, Sequence
from typing import Any, Literal, get_args, get_origin

from ..errors import ConfigError
from .shared import plain_value


def settings_argument() -> inspect.Parameter:
    """The optional YAML file that a command's settings come from."""
    import typer

    default = typer.Argument(
        None, metavar="[RUN.YAML]", help="Settings as YAML, flags win over it; for vera train also a recipe's name."
    )
    return inspect.Parameter("settings_file", inspect.Parameter.POSITIONAL_OR_KEYWORD, default=default, annotation=str | None)


def flags(settings: Any, panels: Mapping[str, str], dicts: Sequence[str]) -> list[inspect.Parameter]:
    """One option for each field but `dicts`. panels: the first field of each group of flags -> the group's title."""
    import typer

    parameters = []
    panel = next(iter(panels.values()))
    for name, field in settings.model_fields.items():
        panel = panels.get(name, panel)
        if name in dicts:
            continue
        flag, is_bool = "--" + name.replace("_", "-"), field.annotation in (bool, bool | None)
        default = field.get_default(call_default_factory=True)
        shown = (
            ""
            if field.is_required() or default is False or default in (None, ())
            else f" (default: {'yes' if default is True else default})"
        )
        option = typer.Option(
            None,
            f"{flag}/--no-{flag[2:]}" if is_bool else flag,
            help=f"{field.description}{shown}",
            rich_help_panel=panel,
            show_default=False,
            metavar=None if is_bool else _metavar(field.annotation),
        )
        annotation = bool | None if is_bool else str | None
        parameters.append(inspect.Parameter(name, inspect.Parameter.KEYWORD_ONLY, default=option, annotation=annotation))
    return parameters


def set_option(example: str) -> inspect.Parameter:
    """--set name.key=value, for the fields that are mappings."""
    import typer

    extra = typer.Option([], "--set", help=f"A key of a setting that has several, once for each: {example}", metavar="KEY=VALUE")
    return inspect.Parameter("set", inspect.Parameter.KEYWORD_ONLY, default=extra, annotation=list[str])


def pairs(sets: Sequence[str], dicts: Sequence[str]) -> dict[str, Any]:
    """The --set pairs as nested settings: training.bf16=true -> {"training": {"bf16": True}}."""
    found: dict[str, Any] = {}
    for pair in sets:
        key, equals, value = pair.partition("=")
        name, dot, inner = key.strip().partition(".")
        if not equals or not dot or name not in dicts or not inner:
            raise ConfigError(f"--set {pair!r}, expected {' or '.join(f'{d}.NAME=VALUE' for d in reversed(dicts))}")
        found.setdefault(name, {})[inner.replace("-", "_")] = plain_value(value)
    return found


def _metavar(annotation: Any) -> str:
    if get_origin(annotation) is Literal:
        return "|".join(map(str, get_args(annotation)))
    inner = {a for a in (get_args(annotation) or (annotation,)) if a is not type(None)}
    if inner <= {int}:
        return "INT"
    return "NUMBER" if inner <= {int, float} else "TEXT"
