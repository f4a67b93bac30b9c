"""The bodies of requests, in the OpenAI API's and vLLM's words. What isn't supported is refused in words, never ignored."""

from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, Field

from .errors import BadRequest
from .sampling import Sampling

MOST_CHOICES = 16
# Fields that the API knows and that can't change an answer here.
_HARMLESS = {"user", "metadata", "service_tier", "store", "safety_identifier", "prompt_cache_key", "request_id", "priority"}
# Fields that may be sent with the value that means: not asked for.
_UNASKED: dict[str, tuple[Any, ...]] = {
    "echo": (False,),
    "suffix": ("",),
    "best_of": (1,),
    "logit_bias": ({},),
    "use_beam_search": (False,),
    "length_penalty": (1, 1.0),
    "repetition_penalty": (1, 1.0),
    "min_tokens": (0,),
    "skip_special_tokens": (True,),
    "spaces_between_special_tokens": (True,),
    "include_stop_str_in_output": (False,),
    "tools": ([],),
    "tool_choice": ("none", "auto"),
    "parallel_tool_calls": (True, False),
    "response_format": ({"type": "text"},),
    "modalities": (["text"],),
    "add_generation_prompt": (True,),
    "continue_final_message": (False,),
    "truncate_prompt_tokens": (),
}


class Body(BaseModel):
    """A request's body: strict types; other fields are kept for refuse_the_rest()."""

    model_config = ConfigDict(strict=True, extra="allow", protected_namespaces=())
    cache_salt: str | None = None
    """Requests never share cached blocks here, so every salt is kept apart by itself."""

    def refuse_the_rest(self) -> None:
        """BadRequest for a field that asks for something that isn't done here."""
        for name, value in (self.model_extra or {}).items():
            if value is None or name in _HARMLESS or value in _UNASKED.get(name, ()):
                continue
            what = "isn't supported by the embedded engine" if name in _UNASKED else "isn't a field of this request"
            raise BadRequest(f"{name[:100]} {what}: leave it out.", name[:100])


class StreamOptions(BaseModel):
    """stream_options."""

    model_config = ConfigDict(strict=True, extra="ignore")
    include_usage: bool | None = None


class Generation(Body):
    """What completions and chat completions have in common."""

    model: str = Field(min_length=1)
    max_tokens: int | None = None
    temperature: float | None = None
    top_p: float | None = None
    top_k: int | None = None
    min_p: float | None = None
    n: int | None = None
    stream: bool | None = None
    stream_options: StreamOptions | None = None
    stop: str | list[str] | None = None
    stop_token_ids: list[int] | None = None
    ignore_eos: bool | None = None
    presence_penalty: float | None = None
    frequency_penalty: float | None = None
    seed: int | None = None

    def choices(self) -> int:
        """n, checked."""
        n = 1 if self.n is None else self.n
        if not 1 <= n <= MOST_CHOICES:
            raise BadRequest(f"n is {n}, expected 1 to {MOST_CHOICES}.", "n")
        if self.stream_options is not None and not self.stream:
            raise BadRequest("stream_options are given and stream isn't true: set stream, or leave them out.", "stream_options")
        self.refuse_the_rest()
        return n

    def sampling(self, choice: int, max_tokens: int | None, logprobs: int | None) -> Sampling:
        """One choice's settings; the API's defaults where nothing is said."""
        given = lambda value, default: default if value is None else value  # noqa: E731
        stop = (self.stop,) if isinstance(self.stop, str) else tuple(self.stop or ())
        return Sampling(
            max_tokens=max_tokens,
            temperature=float(given(self.temperature, 1.0)),
            top_p=float(given(self.top_p, 1.0)),
            top_k=given(self.top_k, 0),
            min_p=float(given(self.min_p, 0.0)),
            presence_penalty=float(given(self.presence_penalty, 0.0)),
            frequency_penalty=float(given(self.frequency_penalty, 0.0)),
            seed=None if self.seed is None else self.seed + choice,
            stop=stop,
            stop_token_ids=tuple(self.stop_token_ids or ()),
            ignore_eos=bool(self.ignore_eos),
            logprobs=logprobs,
        )


class CompletionBody(Generation):
    """POST /v1/completions."""

    prompt: str | list[str] | list[int] | list[list[int]]
    logprobs: int | None = None
    add_special_tokens: bool | None = None

    def prompts(self) -> list[str | list[int]]:
        """Each prompt, as text or tokens."""
        return several(self.prompt, "prompt")


class Part(BaseModel):
    """A part of a message's content. Text alone."""

    model_config = ConfigDict(strict=True, extra="ignore")
    type: Literal["text"]
    text: str


class Message(BaseModel):
    """One turn of a chat."""

    model_config = ConfigDict(strict=True, extra="ignore")
    role: Literal["system", "developer", "user", "assistant"]
    content: str | list[Part]
    name: str | None = None

    def plain(self) -> dict[str, str]:
        """As chat templates take it."""
        text = self.content if isinstance(self.content, str) else "".join(p.text for p in self.content)
        return {"role": "system" if self.role == "developer" else self.role, "content": text}


class ChatBody(Generation):
    """POST /v1/chat/completions."""

    messages: list[Message] = Field(min_length=1)
    max_completion_tokens: int | None = None
    logprobs: bool | None = None
    top_logprobs: int | None = None

    def wanted_logprobs(self) -> int | None:
        """How many of the likeliest tokens to name; None: no log-probabilities at all."""
        if self.top_logprobs and not self.logprobs:
            raise BadRequest("top_logprobs is given and logprobs isn't true: set it, or leave top_logprobs out.", "top_logprobs")
        return (self.top_logprobs or 0) if self.logprobs else None


class EmbeddingBody(Body):
    """POST /v1/embeddings."""

    model: str = Field(min_length=1)
    input: str | list[str] | list[int] | list[list[int]]
    encoding_format: Literal["float", "base64"] | None = None
    dimensions: int | None = None


class ClassifyBody(Body):
    """POST /classify."""

    model: str = Field(min_length=1)
    input: str | list[str] | list[int] | list[list[int]]


class TokenizeBody(Body):
    """POST /tokenize: a prompt, or messages."""

    model: str | None = None
    prompt: str | None = None
    messages: list[Message] | None = None
    add_special_tokens: bool | None = None


class AdapterBody(Body):
    """POST /v1/load_lora_adapter and /v1/unload_lora_adapter. Adapters come from the store, by name."""

    lora_name: str = Field(min_length=1)
    lora_path: str | None = None
    lora_int_id: int | None = None
    load_inplace: bool | None = None


def several(given: str | list[str] | list[int] | list[list[int]], field: str) -> list[str | list[int]]:
    """One text, several, one list of tokens or several, as a list. BadRequest where it is empty."""
    if isinstance(given, str):
        return [given]
    if not given:
        raise BadRequest(f"{field} is empty, expected at least one text.", field)
    return [given] if isinstance(given[0], int) else list(given)  # type: ignore[list-item]
