"""The shapes of answers: OpenAI's objects, whole and in chunks."""

import secrets
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from .request import Piece
from .sampling import Logprob


@dataclass
class Shape:
    """How one request's answer looks. chat: chat.completion instead of text_completion."""

    chat: bool
    model: str
    tokenizer: Any
    with_logprobs: bool = False
    id: str = ""
    created: int = field(default_factory=lambda: int(time.time()))
    _offsets: dict[int, int] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self.id = ("chatcmpl-" if self.chat else "cmpl-") + secrets.token_hex(12)

    def whole(self, pieces: Sequence[Sequence[Piece]], usage: dict[str, Any]) -> dict[str, Any]:
        """The answer in one; pieces: of each choice."""
        choices = []
        for i, parts in enumerate(pieces):
            text = "".join(p.text for p in parts)
            logprobs = self._logprobs(i, [x for p in parts for x in p.logprobs], text)
            said: dict[str, Any] = {"message": {"role": "assistant", "content": text}} if self.chat else {"text": text}
            choices.append({"index": i, **said, "logprobs": logprobs, "finish_reason": parts[-1].finish})
        return self._object("chat.completion" if self.chat else "text_completion", choices, usage)

    def first(self, count: int) -> list[dict[str, Any]]:
        """The chunks that come before any text: in a chat, who speaks."""
        if not self.chat:
            return []
        delta = {"role": "assistant", "content": ""}
        return [self._chunk({"index": i, "delta": delta, "logprobs": None, "finish_reason": None}) for i in range(count)]

    def chunk(self, i: int, piece: Piece) -> dict[str, Any] | None:
        """One piece of choice i; None where there is nothing to say yet."""
        if not piece.text and not piece.finish and not (self.with_logprobs and piece.logprobs):
            return None
        said: dict[str, Any] = {"text": piece.text}
        if self.chat:
            said = {"delta": {"content": piece.text} if piece.text or not piece.finish else {}}
        logprobs = self._logprobs(i, list(piece.logprobs), piece.text)
        return self._chunk({"index": i, **said, "logprobs": logprobs, "finish_reason": piece.finish or None})

    def usage_chunk(self, usage: dict[str, Any]) -> dict[str, Any]:
        """The chunk after the last, with stream_options.include_usage."""
        return {**self._chunk(None), "usage": usage}

    def _chunk(self, choice: dict[str, Any] | None) -> dict[str, Any]:
        name = "chat.completion.chunk" if self.chat else "text_completion"
        return self._object(name, [] if choice is None else [choice], None)

    def _object(self, name: str, choices: list[dict[str, Any]], usage: dict[str, Any] | None) -> dict[str, Any]:
        said = {"id": self.id, "object": name, "created": self.created, "model": self.model, "choices": choices}
        return said if usage is None else {**said, "usage": usage}

    def _logprobs(self, i: int, logprobs: list[Logprob], text: str) -> dict[str, Any] | None:
        if not self.with_logprobs or not logprobs:
            return None
        show = lambda token: self.tokenizer.decode([token])  # noqa: E731
        if self.chat:
            said = lambda token, p: {"token": show(token), "logprob": p, "bytes": list(show(token).encode())}  # noqa: E731
            entries = [{**said(x.token, x.logprob), "top_logprobs": [said(*t) for t in x.top]} for x in logprobs]
            return {"content": entries, "refusal": None}
        offsets = []
        at = self._offsets.get(i, 0)
        for x in logprobs:
            offsets.append(at)
            at += len(show(x.token))
        self._offsets[i] = at
        return {
            "tokens": [show(x.token) for x in logprobs],
            "token_logprobs": [x.logprob for x in logprobs],
            "top_logprobs": [{show(t): p for t, p in x.top} for x in logprobs],
            "text_offset": offsets,
        }


def usage_of(prompt: int, generated: int) -> dict[str, int]:
    """The usage object."""
    return {"prompt_tokens": prompt, "completion_tokens": generated, "total_tokens": prompt + generated}
