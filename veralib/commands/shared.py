"""What the commands share: how errors look, tables, numbers for people."""

import functools
import re
import warnings
from collections.abc import Callable, Iterable, Sequence
from typing import Any

from ..errors import VeraError


def fails_clearly(command: Callable[..., Any]) -> Callable[..., Any]:
    """The command, with veralib's errors as one red "Error: …" on stderr and exit code 1, its warnings as yellow lines."""

    @functools.wraps(command)
    def wrapped(*args: Any, **kwargs: Any) -> Any:
        import typer

        def show(message: Warning | str, *_: Any, **__: Any) -> None:
            typer.secho(f"Warning: {message}", fg="yellow", err=True)

        before, warnings.showwarning = warnings.showwarning, show
        try:
            return command(*args, **kwargs)
        except VeraError as e:
            typer.secho(f"Error: {e}", fg="red", err=True)
            raise typer.Exit(1) from e
        finally:
            warnings.showwarning = before

    return wrapped


def table(title: str, columns: Sequence[str], rows: Iterable[Sequence[str]], right: Sequence[str] = ()) -> None:
    """Prints a table; `right` names the columns of numbers."""
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    out = Table(title=Text(title), title_justify="left")
    for column in columns:
        out.add_column(column, justify="right" if column in right else "left", overflow="fold")
    for row in rows:
        out.add_row(*(Text(cell) for cell in row))
    console = Console()
    # Into a file or a pipe, rich would fold at 80 columns, in the middle of names that people grep for.
    console.print(out) if console.is_terminal else Console(width=250).print(out)


def human_bytes(count: int) -> str:
    """ "96.0 KiB" and the like; 1024 is the step."""
    size = float(count)
    for unit in ("bytes", "KiB", "MiB", "GiB"):
        if size < 1024 or unit == "GiB":
            return f"{count} bytes" if unit == "bytes" else f"{size:.1f} {unit}"
        size /= 1024
    raise AssertionError


def plain_value(text: str) -> Any:
    """A value as YAML reads it: "0.1" is a number, "[a, b]" a list, "yes" true; and "1e-7" is a number, which YAML 1.1 denies."""
    import yaml

    if re.fullmatch(r"[+-]?\d+(\.\d*)?[eE][+-]?\d+", text):
        return float(text)
    try:
        return yaml.safe_load(text)
    except yaml.YAMLError:
        return text
