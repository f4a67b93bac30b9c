"""Text from tokens as they come: whole characters only, and nothing beyond a stop string."""

from typing import Any

REPLACEMENT = "\ufffd"


class Detokenizer:
    """feed(tokens) gives the text that they add. The pieces together are the tokens' text; none ends inside a character.

    A token's text may depend on the ones before it (a space, a character of several bytes), so the tokens since the last
    whole piece are decoded with those of the piece before, as text-generation-inference and vLLM do.
    """

    def __init__(self, tokenizer: Any) -> None:
        self.tokenizer = tokenizer
        self.tokens: list[int] = []
        self._before = self._shown = 0

    def feed(self, tokens: list[int], last: bool = False) -> str:
        """The new text; `last`: no more tokens come, so a character that is still broken is shown as one."""
        self.tokens += tokens
        old = self._decode(self.tokens[self._before : self._shown])
        new = self._decode(self.tokens[self._before :])
        if len(new) <= len(old) or (new.endswith(REPLACEMENT) and not last):
            return ""
        self._before, self._shown = self._shown, len(self.tokens)
        return new[len(old) :]

    def _decode(self, tokens: list[int]) -> str:
        return self.tokenizer.decode(tokens, skip_special_tokens=True, clean_up_tokenization_spaces=False) if tokens else ""


class TextStream:
    """A Detokenizer that ends before the first stop string and holds back what may become one."""

    def __init__(self, tokenizer: Any, stop: tuple[str, ...] = ()) -> None:
        self.detokenizer = Detokenizer(tokenizer)
        self.stop = stop
        self.stopped = False
        self._held = ""

    def feed(self, tokens: list[int], last: bool = False) -> str:
        """The text to show now. `stopped` is True from where a stop string came."""
        if self.stopped:
            return ""
        text = self._held + self.detokenizer.feed(tokens, last)
        found = [at for s in self.stop if (at := text.find(s)) >= 0]
        if found:
            self.stopped, self._held = True, ""
            return text[: min(found)]
        keep = 0 if last else max((_overlap(text, s) for s in self.stop), default=0)
        self._held = text[len(text) - keep :]
        return text[: len(text) - keep]


def _overlap(text: str, stop: str) -> int:
    """How many characters at the end of the text are the beginning of the stop string."""
    return next((n for n in range(min(len(stop) - 1, len(text)), 0, -1) if text.endswith(stop[:n])), 0)
