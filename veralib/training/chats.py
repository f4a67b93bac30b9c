"""Rows of a chat as messages, from three published forms: OpenAI's messages, ShareGPT's conversations, Alpaca's columns.

{"messages": [{"role": "user", "content": "…"}, {"role": "assistant", "content": "…"}]}
{"conversations": [{"from": "human", "value": "…"}, {"from": "gpt", "value": "…"}]}
{"instruction": "…", "input": "…", "output": "…"}             input may be empty or missing
"""

from collections.abc import Mapping, Sequence
from typing import Any

from ..errors import DataError, unknown_text

ROLES = ("system", "developer", "user", "assistant", "tool", "function", "ipython")
SPEAKERS = {
    "human": "user",
    "gpt": "assistant",
    "system": "system",
    "user": "user",
    "assistant": "assistant",
    "chatgpt": "assistant",
}
ALPACA_COLUMNS = ("instruction", "input", "output")

# Alpaca's sections for a tokenizer without a template of its own. bos and eos are the tokenizer's: an answer must learn to end.
ALPACA_TEMPLATE = (
    "{{ bos_token or '' }}"
    "{% for m in messages %}"
    "{% if m.role not in ['system', 'user', 'assistant'] or m.content is not string %}"
    "{{ raise_exception('the built-in Alpaca prompt knows texts of system, user and assistant alone') }}{% endif %}"
    "{% if m.role == 'system' %}{{ m.content | trim + '\n\n' }}{% endif %}"
    "{% if m.role == 'user' %}"
    "{% if loop.first %}{{ 'Here is an instruction' + (', with the input it is about' if m.input else '') + "
    "'. Write a response that does what it asks.\n\n' }}"
    "{% elif loop.previtem.role != 'system' %}{{ '\n\n' }}{% endif %}"
    "{{ '### Instruction:\n' + (m.instruction or m.content) | trim + '\n\n' }}"
    "{% if m.input %}{{ '### Input:\n' + m.input | trim + '\n\n' }}{% endif %}"
    "{% endif %}"
    "{% if m.role == 'assistant' %}{{ '### Response:\n' + m.content | trim + (eos_token or '') }}{% endif %}"
    "{% endfor %}"
    "{% if add_generation_prompt %}{{ '### Response:\n' }}{% endif %}"
)


def is_alpaca(row: Mapping[str, Any], text: Sequence[str]) -> bool:
    """Whether a row is read by Alpaca's columns: text names two or three, or it names none and the row has them."""
    return len(text) > 1 or (not text and "instruction" in row and not {"messages", "conversations"} & row.keys())


def chat_columns(row: Mapping[str, Any], text: Sequence[str], where: str, answered: bool = True) -> dict[str, str]:
    """The columns a chat is read from, {"messages": column} or Alpaca's parts: those of text, or of the form that the row has.

    DataError where a named column isn't there (the answer's may be missing unless answered), or nothing looks like a chat.
    """
    there = ", ".join(map(str, row))
    if text:
        names = dict(zip({1: ("messages",), 2: ("instruction", "output")}.get(len(text), ALPACA_COLUMNS), text, strict=True))
        if missing := next(
            (c for part, c in names.items() if c not in row and part != "input" and (answered or part != "output")), None
        ):
            raise DataError(f'{where} has no column "{missing}". Columns there: {there}. Name yours with text.')
        return names
    for column in ("messages", "conversations"):
        if column in row:
            return {"messages": column}
    if is_alpaca(row, text):
        return {c: c for c in ALPACA_COLUMNS}  # a row without input has an empty one
    raise DataError(
        f'{where} has no column "messages" (OpenAI), "conversations" (ShareGPT) or "instruction" (Alpaca). Columns there: '
        f"{there}. Name yours with text: one column of messages, or instruction,input,output."
    )


def conversations(
    rows: Sequence[Mapping[str, Any]], text: Sequence[str], where: str, answered: bool = True
) -> list[list[dict[str, Any]]]:
    """Each row as messages of role and content. text: the columns, where they aren't the published ones.

    answered: each row must have an answer to learn from. DataError names the row, what it holds and what was expected.
    """
    columns = chat_columns(rows[0], text, where, answered)
    if "messages" not in columns:
        return [_from_alpaca(row, columns, f"row {i} of {where}", answered) for i, row in enumerate(rows, 1)]
    made = []
    for number, row in enumerate(rows, 1):
        at = f"row {number} of {where}"
        messages = [_message(m, at, i) for i, m in enumerate(_list(row.get(columns["messages"]), at), 1)]
        if answered and not any(m["role"] == "assistant" and _said(m["content"]) for m in messages):
            raise DataError(f"{at}: no message is the assistant's, or all of its are empty, so there is nothing to learn")
        made.append(messages)
    return made


def _list(value: Any, at: str) -> Sequence[Any]:
    if not isinstance(value, (list, tuple)) or not value or not all(isinstance(m, Mapping) for m in value):
        raise DataError(
            f'{at}: expected a list of {{"role": …, "content": …}} or {{"from": …, "value": …}}, found {str(value)[:80]!r}'
        )
    return value


def _message(m: Mapping[str, Any], at: str, turn: int) -> dict[str, Any]:
    if "from" in m and "role" not in m:
        if str(m["from"]) not in SPEAKERS:
            raise DataError(f"{at}, turn {turn}: " + unknown_text('speaker ("from")', str(m["from"]), SPEAKERS))
        if not isinstance(m.get("value"), str):
            raise DataError(f'{at}, turn {turn}: expected a text as "value", found {str(m.get("value"))[:80]!r}')
        return {"role": SPEAKERS[str(m["from"])], "content": m["value"]}
    if not isinstance(m.get("role"), str) or not isinstance(m.get("content"), (str, list)):
        raise DataError(f'{at}, turn {turn}: expected a list of {{"role": …, "content": …}}, found {str(dict(m))[:80]!r}')
    if m["role"] not in ROLES:
        raise DataError(f"{at}, turn {turn}: " + unknown_text("role", m["role"], ROLES))
    return dict(m)


def _from_alpaca(row: Mapping[str, Any], columns: Mapping[str, str], at: str, answered: bool) -> list[dict[str, Any]]:
    given = {part: "" if row.get(column) is None else str(row[column]).strip() for part, column in columns.items()}
    if not given["instruction"]:
        raise DataError(f'{at} has nothing in "{columns["instruction"]}": expected the text of the instruction')
    answer = given.get("output", "")
    if answered and not answer:
        raise DataError(
            f'{at} has no answer in "{columns.get("output", "output")}": expected a text to learn; fill it or remove the row'
        )
    # instruction and input stay beside the content: the built-in template sets them under headers of their own.
    asked = {part: given.get(part, "") for part in ("instruction", "input")}
    content = "\n\n".join(filter(None, asked.values()))
    messages: list[dict[str, Any]] = [{"role": "user", "content": content, **asked}]
    return [*messages, {"role": "assistant", "content": answer}] if answer else messages


def _said(content: Any) -> bool:
    return bool(content.strip() if isinstance(content, str) else content)
