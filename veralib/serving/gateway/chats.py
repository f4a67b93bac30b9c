"""Training files: chats in OpenAI's form, one JSON object a line, each checked; an error names the line.

{"messages": [{"role": "user", "content": "…"}, {"role": "assistant", "content": "…"}]}
"""

import json
from collections.abc import Iterable, Iterator
from typing import IO, Any

ROLES = ("system", "developer", "user", "assistant")
SHOWN = 5  # faults that an error lists
BOM = b"\xef\xbb\xbf"


class BadFile(ValueError):
    """A training file that can't be used; the message says which lines, and why."""


def parse(line: bytes) -> list[dict[str, str]]:
    """The messages of one line. ValueError says what is wrong with it, never repeating much of it."""
    try:
        row = json.loads(line.decode("utf-8"))
    except UnicodeDecodeError as e:
        raise ValueError(f"isn't UTF-8 at byte {e.start}") from None
    except json.JSONDecodeError as e:
        raise ValueError(f"is no JSON: {e.msg} at character {e.pos}") from None
    except (ValueError, RecursionError):  # a number of 5,000 digits; brackets 100,000 deep
        raise ValueError("is no JSON that can be read: a number too long, or nested too deep") from None
    if not isinstance(row, dict) or "messages" not in row:
        raise ValueError('expected {"messages": [{"role": …, "content": …}, …]}' + _found(row))
    if others := sorted(set(row) - {"messages"}):
        raise ValueError(f'has "{others[0][:40]}", and nothing but "messages" is learned from here')
    messages = row["messages"]
    if not isinstance(messages, list) or not messages:
        raise ValueError('"messages" is empty or no list, expected [{"role": …, "content": …}, …]')
    made = [_message(message, number) for number, message in enumerate(messages, 1)]
    if not any(m["role"] == "assistant" and m["content"].strip() for m in made):
        raise ValueError("no message is the assistant's, or all of its are empty: there is nothing to learn")
    return made


def _found(row: Any) -> str:
    return f", found the fields {', '.join(sorted(row))[:80]}" if isinstance(row, dict) else f", found a {type(row).__name__}"


def _message(message: Any, number: int) -> dict[str, str]:
    if not isinstance(message, dict):
        raise ValueError(f'message {number} is a {type(message).__name__}, expected {{"role": …, "content": …}}')
    role, content = message.get("role"), message.get("content")
    if role not in ROLES:
        raise ValueError(f"message {number} has the role {str(role)[:40]!r}, expected one of {', '.join(ROLES)}")
    if not isinstance(content, str):
        raise ValueError(f"message {number} has a {type(content).__name__} as content, expected a text")
    if message.get("weight", 1) != 1:
        raise ValueError(f"message {number} has a weight other than 1: every answer counts here; leave the row out instead")
    if others := sorted(set(message) - {"role", "content", "weight"}):
        raise ValueError(f'message {number} has "{others[0][:40]}", expected role and content alone')
    try:
        content.encode("utf-8")
    except UnicodeEncodeError:
        raise ValueError(f"message {number} holds half of a surrogate pair, which is no text") from None
    return {"role": role, "content": content}


def chunks(file: IO[bytes], max_line: int, max_lines: int) -> Iterator[bytes]:
    """The lines of an uploaded file as they are, each checked on its way. BadFile at its end, or at the first line too many."""
    faults: list[str] = []
    rows = more = number = 0
    while line := file.readline(max_line + 1):
        number += 1
        if len(line) > max_line:
            raise BadFile(f"line {number} is longer than {max_line:,} bytes")
        yield line
        if content(line, number):
            rows += 1
            try:
                parse(content(line, number))
            except ValueError as e:
                more += len(faults) == SHOWN
                faults += [f"line {number} {e}"][: SHOWN - len(faults)]
        if rows > max_lines:
            raise BadFile(f"the file has more than {max_lines:,} rows")
    if faults:
        raise BadFile("; ".join(faults) + f"; and {more} more lines" * bool(more))
    if not rows:
        raise BadFile("the file is empty: expected one chat a line")


def content(line: bytes, number: int) -> bytes:
    """A line without its end, and the first one without a byte order mark; empty for a blank one, which is passed over."""
    return (line.removeprefix(BOM) if number == 1 else line).strip()


def read(lines: Iterable[bytes]) -> Iterator[list[dict[str, str]]]:
    """The chats of a file that was checked when it came."""
    for number, line in enumerate(lines, 1):
        if content(line, number):
            yield parse(content(line, number))
