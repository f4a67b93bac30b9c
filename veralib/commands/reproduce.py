"""vera reproduce: the paper's tables and figures."""

from pathlib import Path
from typing import Any

from typer import Argument, Option

from ..errors import VeraError


def reproduce(
    name: str = Argument("list", help='A table or figure, "all", or "list".'),
    out: str = Option("results/paper", help="Folder for NAME.json, NAME.md and pictures."),
) -> None:
    """Make a table or figure of the paper, our numbers beside the printed ones.

    Example:

        vera reproduce table1
    """
    from ..paper import ALIASES, ITEMS, make, page_name
    from .shared import table

    if name == "list":
        other = {n: ", ".join(a for a, of in ALIASES.items() if of == n) for n in ITEMS}
        table("Tables and figures", ("name", "or", "what"), [(n, other[n], item.title) for n, item in ITEMS.items()])
        return
    if name != "all":
        make(name, Path(out))
        print((Path(out) / f"{page_name(name)}.md").read_text(encoding="utf-8"))
        return
    rows = []
    for each, item in ITEMS.items():
        try:
            found = make(each, Path(out))
        except VeraError as e:
            rows.append((each, item.title, f"not made: {e}"))
            continue
        rows.append((each, item.title, _whole(found)))
    table(f"written to {out}", ("name", "what", ""), rows)


def _whole(found: dict[str, Any]) -> str:
    """How much of a table or figure its result files fill."""
    cells = found.get("cells", [])
    cells = [c for c in cells if c["ours"] is not None or c.get("command", True)]  # an average over columns has none of its own
    missing = sum(1 for c in cells if c["ours"] is None)
    if missing:
        return f"{missing} of {len(cells)} cells have no run; their commands are in the file"
    runs = found.get("missing", 0)
    return "whole" if not runs else f"{runs} run{'s are' if runs > 1 else ' is'} missing"
