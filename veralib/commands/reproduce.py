"""vera reproduce: the paper's tables and figures."""

from pathlib import Path

from typer import Argument, Option


def reproduce(
    name: str = Argument("list", help='A table or figure, "all", or "list".'),
    out: str = Option("results/paper", help="Folder for NAME.json, NAME.md and pictures."),
) -> None:
    """Make a table or figure of the paper, our numbers beside the printed ones.

    Example:

        vera reproduce table1
    """
    from ..paper import ITEMS, make
    from .shared import table

    if name == "list":
        table("Tables and figures", ("name", "what"), [(n, item.title) for n, item in ITEMS.items()])
        return
    for each in ITEMS if name == "all" else [name]:
        make(each, Path(out))
        print((Path(out) / f"{each}.md").read_text(encoding="utf-8"))
