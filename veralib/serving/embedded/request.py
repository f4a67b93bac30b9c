"""A request in the engine, and what comes of it."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

from ...errors import VeraError
from .sampling import Chooser, Logprob, Sampling
from .text import TextStream


@dataclass(frozen=True)
class Piece:
    """What came of a request since the last piece. finish: "" until the last one, then "stop" or "length"."""

    text: str
    tokens: tuple[int, ...]
    finish: str = ""
    logprobs: tuple[Logprob, ...] = ()


@dataclass(frozen=True)
class Completion:
    """A whole answer."""

    text: str
    tokens: tuple[int, ...]
    finish: str
    prompt_tokens: int
    logprobs: tuple[Logprob, ...] = ()


@dataclass(eq=False)
class Running:
    """A request in the engine. `notify` is called in the loop's thread when something came; take() gives what it is."""

    id: str
    adapter: str | None
    prompt: tuple[int, ...]
    sampling: Sampling
    stops: frozenset[int]
    notify: Callable[[], None]
    chooser: Chooser
    text: TextStream
    tokens: list[int] = field(default_factory=list)
    done: bool = False
    error: VeraError | None = None
    _shown: int = 0

    def take(self) -> Piece | None:
        """What came since the last take(); None: nothing. BadAdapter or EngineError where the request failed."""
        done = self.done  # before the tokens: the last ones come first
        if self.error:
            raise self.error
        end = len(self.tokens)  # looked at once: the loop's thread appends meanwhile
        new = self.tokens[self._shown : end]
        if not new and not done:
            return None
        # The token that ends the text isn't part of it, and comes before `done`.
        hidden = end > 0 and self.tokens[end - 1] in self.stops
        text = self.text.feed(new[:-1] if hidden and new else new, last=done or hidden)
        logprobs = tuple(self.chooser.logprobs[self._shown : self._shown + len(new)])
        self._shown += len(new)
        finish = "stop" if self.text.stopped or hidden else "length" if done else ""
        return Piece(text, tuple(new), finish, logprobs)


def whole(pieces: Sequence[Piece], running: Running) -> Completion:
    """The pieces of a request as one."""
    tokens = tuple(t for p in pieces for t in p.tokens)
    logprobs = tuple(x for p in pieces for x in p.logprobs)
    return Completion("".join(p.text for p in pieces), tokens, pieces[-1].finish, len(running.prompt), logprobs)
