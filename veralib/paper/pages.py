"""How a result of vera reproduce is written: NAME.json and NAME.md."""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

Table = tuple[str, Sequence[str], Sequence[Sequence[str]]]
"""Heading, column names, rows."""


def page(title: str, name: str, tables: Sequence[Table], remarks: Sequence[str] = ()) -> str:
    """The Markdown page of one table or figure."""
    lines = [f"# {title}", "", f"Rendered by `vera reproduce {name}`; nothing here is typed but what the paper prints.", ""]
    for heading, columns, rows in tables:
        lines += [f"## {heading}", ""] if heading else []
        lines += ["| " + " | ".join(columns) + " |", "|" + "---|" * len(columns)]
        lines += ["| " + " | ".join(row) + " |" for row in rows]
        lines.append("")
    return "\n".join([*lines, *(f"{r}\n" for r in remarks)])


def write(folder: Path, name: str, result: dict[str, Any], text: str) -> dict[str, Any]:
    """Writes both files; the result comes back as it was."""
    (folder / f"{name}.json").write_text(json.dumps(result, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")
    (folder / f"{name}.md").write_text(text.rstrip("\n") + "\n", encoding="utf-8")
    return result
