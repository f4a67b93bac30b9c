"""Ids that sort by time, and lists in pages as the OpenAI API gives them."""

import re
import secrets
import time
from collections.abc import Callable, Iterable
from itertools import islice
from typing import Any, Literal, TypeVar

Item = TypeVar("Item")


def new_id(kind: str) -> str:
    """kind-, when it was made, and 96 random bits, so that nobody guesses it."""
    return f"{kind}-{time.time_ns():016x}{secrets.token_hex(12)}"


def seconds_since(made: str) -> float:
    """How long ago new_id made this."""
    return (time.time_ns() - int(made.rpartition("-")[2][:16], 16)) / 1e9


def is_id(kind: str, text: str) -> bool:
    """Whether new_id(kind) may have made this."""
    return re.fullmatch(rf"{kind}-[0-9a-f]{{40}}", text) is not None


def page(
    items: Iterable[Item],
    id_of: Callable[[Item], str],
    to_openai: Callable[[Item], dict[str, Any] | None],
    after: str | None,
    limit: int,
    order: Literal["asc", "desc"] = "desc",
) -> dict[str, Any]:
    """At most `limit` of the items in the order of their ids, from behind `after`, which may have been deleted meanwhile.

    to_openai is asked for those of the page alone; None: it was deleted meanwhile, or never was whole.
    """
    down = order == "desc"
    left = sorted(items, key=id_of, reverse=down)
    if after is not None:
        left = [item for item in left if (id_of(item) < after if down else id_of(item) > after)]
    found = (content for item in left if (content := to_openai(item)) is not None)
    data = list(islice(found, limit))
    return {
        "object": "list",
        "data": data,
        "first_id": data[0]["id"] if data else None,
        "last_id": data[-1]["id"] if data else None,
        "has_more": next(found, None) is not None,
    }
