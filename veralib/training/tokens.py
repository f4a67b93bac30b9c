"""Rows to token ids: what the model reads, and which tokens the loss counts (-100: not counted)."""

import warnings
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ..errors import DataError, VeraWarning
from .chats import ALPACA_TEMPLATE, conversations, is_alpaca
from .data import Row, column_values, label_ids, numbers
from .settings import Settings

Example = dict[str, Any]
IGNORED = -100


def encode(
    rows: Sequence[Row], tokenizer: Any, settings: Settings, labels: Sequence[str], max_length: int, where: str
) -> list[Example]:
    """One example a row (causal-lm: a row longer than max_length becomes several): input_ids, labels, token_type_ids if any.

    Errors: DataError where a column is missing or no row keeps a token to learn from.
    """
    if settings.task in ("classification", "regression"):
        return _encode_labelled(rows, tokenizer, settings, labels, max_length, where)
    examples = _ENCODERS[settings.task](rows, tokenizer, settings, max_length, where)
    kept = [e for e in examples if any(t != IGNORED for t in e["labels"][1:])]
    if not kept:
        raise DataError(f"no row of {where} keeps a token to learn from within max_length={max_length}; raise max_length")
    if len(kept) < len(examples):
        warnings.warn(
            f"{len(examples) - len(kept)} of {len(examples)} rows of {where} keep no token to learn from within "
            f"max_length={max_length} and are left out",
            VeraWarning,
        )
    return kept


def collator(pad_id: int) -> Callable[[Sequence[Example]], dict[str, Tensor]]:
    """A function that pads examples on the right to the longest of the batch and adds attention_mask."""

    def collate(examples: Sequence[Example]) -> dict[str, Tensor]:
        width = max(len(e["input_ids"]) for e in examples)

        def padded(name: str, fill: int) -> Tensor:
            return torch.tensor([e[name] + [fill] * (width - len(e[name])) for e in examples])

        lengths = torch.tensor([len(e["input_ids"]) for e in examples])
        batch = {
            "input_ids": padded("input_ids", pad_id),
            "attention_mask": (torch.arange(width)[None, :] < lengths[:, None]).long(),
        }
        if "token_type_ids" in examples[0]:
            batch["token_type_ids"] = padded("token_type_ids", 0)
        if "labels" in examples[0]:
            whole = isinstance(examples[0]["labels"], list)
            batch["labels"] = padded("labels", IGNORED) if whole else torch.tensor([e["labels"] for e in examples])
        return batch

    return collate


def chat_template(settings: Settings, tokenizer: Any, rows: Sequence[Row] = ()) -> Settings:
    """The settings with the chat template that the tokenizer now has; DataError where a chat has none.

    rows: the data. Where the tokenizer has no template and they are Alpaca's, it is "alpaca", the built-in one.
    """
    alpaca = settings.task == "chat" and is_alpaca(rows[0] if rows else {}, settings.text)
    if alpaca and not settings.chat_template and not tokenizer.chat_template:
        settings = settings.replace(chat_template="alpaca")
    if settings.chat_template == "alpaca":
        tokenizer.chat_template = ALPACA_TEMPLATE
    elif settings.chat_template:
        try:
            tokenizer.chat_template = Path(settings.chat_template).read_text(encoding="utf-8")
        except (OSError, UnicodeDecodeError) as e:
            raise DataError(f"can't read the chat template {settings.chat_template}: {getattr(e, 'strerror', None) or e}") from e
    if settings.task == "chat" and not tokenizer.chat_template:
        raise DataError(
            f"the tokenizer of {settings.model} has no chat template: name a Jinja file with chat_template, or alpaca for the "
            "built-in one"
        )
    return settings


def inputs(rows: Sequence[Row], tokenizer: Any, columns: Sequence[str], max_length: int, where: str) -> list[Example]:
    """The examples of one or two text columns, without labels."""
    texts = [[str(v) for v in column_values(rows, column, where)] for column in columns]
    encoded = tokenizer(*texts, truncation=True, max_length=max_length, return_attention_mask=False)
    names = [n for n in ("input_ids", "token_type_ids") if n in encoded]
    return [{n: encoded[n][i] for n in names} for i in range(len(rows))]


def _encode_labelled(rows, tokenizer, settings: Settings, labels, max_length: int, where: str) -> list[Example]:
    examples = inputs(rows, tokenizer, settings.text_columns, max_length, where)
    values = column_values(rows, settings.label, where)
    targets = label_ids(values, labels, where) if settings.task == "classification" else numbers(values, where)
    return [{**e, "labels": t} for e, t in zip(examples, targets, strict=True)]


def _encode_text(rows, tokenizer, settings: Settings, max_length: int, where: str) -> list[Example]:
    examples: list[Example] = []
    for text in column_values(rows, settings.text_columns[0], where):
        ids = [t for piece in _pieces(str(text)) for t in tokenizer(piece, add_special_tokens=False)["input_ids"]]
        begin = [tokenizer.bos_token_id] if tokenizer.bos_token_id is not None else []
        end = [tokenizer.eos_token_id] if tokenizer.eos_token_id is not None else []
        ids = begin + ids + end
        examples += [
            {"input_ids": part, "labels": list(part)} for i in range(0, len(ids), max_length) if (part := ids[i : i + max_length])
        ]
    return examples


def _pieces(text: str, size: int = 100_000) -> list[str]:
    """The text in pieces of about `size` characters, cut after a line end: tokenizers slow down on megabytes at once."""
    lines, pieces, start, length = text.splitlines(keepends=True), [], 0, 0
    for i, line in enumerate(lines):
        length += len(line)
        if length >= size:
            pieces.append("".join(lines[start : i + 1]))
            start, length = i + 1, 0
    return pieces + (["".join(lines[start:])] if start < len(lines) else [])


def prompt_ids(tokenizer: Any, prompt: str) -> list[int]:
    """A prompt's tokens with the tokenizer's own beginning, and without an end that some tokenizers add."""
    ids = list(tokenizer(prompt)["input_ids"])
    return ids[:-1] if ids and ids[-1] == tokenizer.eos_token_id and prompt else ids


def _encode_answers(rows, tokenizer, settings: Settings, max_length: int, where: str) -> list[Example]:
    prompt_column, completion_column = settings.text_columns
    prompts = column_values(rows, prompt_column, where)
    completions = column_values(rows, completion_column, where)
    end = [tokenizer.eos_token_id] if tokenizer.eos_token_id is not None else []
    examples = []
    for prompt, completion in zip(map(str, prompts), map(str, completions), strict=True):
        head, whole = prompt_ids(tokenizer, prompt), prompt_ids(tokenizer, prompt + completion)
        # Where a token would span the border, the two are tokenised apart: the prompt looks as it does at inference.
        if whole[: len(head)] != head:
            whole = head + tokenizer(completion, add_special_tokens=False)["input_ids"]
        ids = (whole + end)[:max_length]
        examples.append({"input_ids": ids, "labels": ([IGNORED] * len(head) + ids[len(head) :])[: len(ids)]})
    return examples


def _encode_chat(rows, tokenizer, settings: Settings, max_length: int, where: str) -> list[Example]:
    """The loss counts what the assistant says: each of its turns, from after the template's own opening to its end."""
    examples = []
    for number, messages in enumerate(conversations(rows, settings.text, where), 1):
        at = f"row {number} of {where}"
        text = _rendered(tokenizer, messages, at)
        turns = [
            (i + 1, _rendered(tokenizer, messages[:i], at, True) if i else "", _rendered(tokenizer, messages[: i + 1], at))
            for i, message in enumerate(messages)
            if message["role"] == "assistant"
        ]
        ids, labels = _whole(tokenizer, text, turns) or _apart(tokenizer, text, turns, at)
        examples.append({"input_ids": ids[:max_length], "labels": labels[:max_length]})
    return examples


def _whole(tokenizer: Any, text: str, turns: Sequence[tuple[int, str, str]]) -> tuple[list[int], list[int]] | None:
    """(ids, labels) of a chat tokenised at once; None where a token would span the border of an answer."""
    ids = _ids(tokenizer, text)
    labels = [IGNORED] * len(ids)
    for _, before, after in turns:
        head, answer = _ids(tokenizer, before), _ids(tokenizer, after)
        if ids[: len(answer)] != answer or answer[: len(head)] != head:
            return None
        labels[len(head) : len(answer)] = answer[len(head) :]
    return ids, labels


def _apart(tokenizer: Any, text: str, turns: Sequence[tuple[int, str, str]], at: str) -> tuple[list[int], list[int]]:
    """(ids, labels) of a chat whose answers are tokenised apart from what stands around them."""
    ids: list[int] = []
    labels: list[int] = []
    done = 0
    for number, before, after in turns:
        if not text.startswith(after) or not after.startswith(before):
            raise DataError(
                f"{at}: the chat template renders turn {number} differently when more turns follow, so the answer's tokens "
                "can't be told apart; give a template without that with chat_template, or split the row before that turn"
            )
        asked, said = _ids(tokenizer, text[done : len(before)]), _ids(tokenizer, after[len(before) :])
        ids += asked + said
        labels += [IGNORED] * len(asked) + said
        done = len(after)
    rest = _ids(tokenizer, text[done:])
    return ids + rest, labels + [IGNORED] * len(rest)


def render(tokenizer: Any, messages: Sequence[Any], at: str, add_generation_prompt: bool = False) -> list[int]:
    """The tokens of messages under the tokenizer's chat template; DataError where the template refuses them."""
    return _ids(tokenizer, _rendered(tokenizer, messages, at, add_generation_prompt))


def _rendered(tokenizer: Any, messages: Sequence[Any], at: str, add_generation_prompt: bool = False) -> str:
    try:
        return tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=add_generation_prompt)
    except Exception as e:  # jinja2's errors, and what a template raises itself
        raise DataError(f"{at}: the chat template refuses these messages: {e}") from e


def _ids(tokenizer: Any, text: str) -> list[int]:
    return list(tokenizer(text, add_special_tokens=False)["input_ids"]) if text else []


_ENCODERS = {"causal-lm": _encode_text, "prompt-completion": _encode_answers, "chat": _encode_chat}
