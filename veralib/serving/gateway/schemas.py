"""What clients may send: OpenAI's fields, and the sampling fields that vLLM and others add. Every other field is refused by name.

An allow-list, as engines take more than a client should reach: vLLM's kv_transfer_params, prompt_embeds, mm_processor_kwargs,
documents, media given by URL. IGNORED fields are OpenAI's bookkeeping, which no engine needs.
"""

from typing import Annotated, Any, Literal

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, StringConstraints, model_validator

Number = Annotated[float, Field(allow_inf_nan=False)]
Token = Annotated[int, Field(ge=0, lt=2**31)]
Text = Annotated[str, StringConstraints(strict=True)]
Tokens = Annotated[list[Token], Field(min_length=1, fail_fast=True)]
Texts = (
    Text
    | Annotated[list[Text], Field(min_length=1, fail_fast=True)]
    | Tokens
    | Annotated[list[Tokens], Field(min_length=1, fail_fast=True)]
)
Whole = Annotated[int, Field(strict=True)]

IGNORED = frozenset(
    {"user", "metadata", "store", "service_tier", "safety_identifier", "prompt_cache_key", "prompt_cache_retention", "verbosity"}
)


MAX_FIELDS, MAX_BIAS = 64, 1024
"""Of an object. Pydantic makes an error of every field too many: of a body of 4 MiB that takes seconds, and gigabytes. For the
same reason lists end at their first fault (fail_fast)."""


def _few(value: Any) -> Any:
    if isinstance(value, dict) and len(value) > MAX_FIELDS:
        raise ValueError(f"{len(value)} fields, expected at most {MAX_FIELDS}")
    return value


def _bias(value: Any) -> Any:
    if isinstance(value, dict) and len(value) > MAX_BIAS:
        raise ValueError(f"{len(value)} tokens, expected at most {MAX_BIAS}")
    return value


Few = BeforeValidator(_few)
"""Of a dict: an error for all fields too many."""


class Strict(BaseModel):
    """What every object in a body is: fields that aren't known are named, and there are few."""

    model_config = ConfigDict(extra="forbid", protected_namespaces=())

    @model_validator(mode="before")
    @classmethod
    def _has_few(cls, value: Any) -> Any:
        return _few(value)


class _Request(Strict):
    model: Text = Field(description="An adapter's name, or the base model's.")
    user: Text | None = Field(None, max_length=512)
    metadata: Annotated[dict[str, str], Few] | None = None
    cache_salt: Text | None = Field(None, max_length=256, description="Splits one's own prefix cache further.")


class StreamOptions(Strict):
    """Of a stream."""

    include_usage: bool | None = None
    include_obfuscation: bool | None = None


class _Sampling(_Request):
    n: Annotated[int, Field(ge=1, strict=True)] | None = None
    max_tokens: Annotated[int, Field(ge=1, lt=2**31, strict=True)] | None = None
    temperature: Annotated[Number, Field(ge=0, le=2)] | None = None
    top_p: Annotated[Number, Field(gt=0, le=1)] | None = None
    top_k: Annotated[int, Field(ge=-1, lt=2**31)] | None = None
    min_p: Annotated[Number, Field(ge=0, le=1)] | None = None
    frequency_penalty: Annotated[Number, Field(ge=-2, le=2)] | None = None
    presence_penalty: Annotated[Number, Field(ge=-2, le=2)] | None = None
    repetition_penalty: Annotated[Number, Field(gt=0, le=100)] | None = None
    seed: Annotated[int, Field(ge=-(2**63), lt=2**63, strict=True)] | None = None
    stop: Text | Annotated[list[Text], Field(fail_fast=True)] | None = None
    stop_token_ids: Annotated[list[Token], Field(max_length=64, fail_fast=True)] | None = None
    min_tokens: Annotated[int, Field(ge=0, lt=2**31)] | None = None
    ignore_eos: bool | None = None
    logit_bias: Annotated[dict[str, Annotated[Number, Field(ge=-100, le=100)]], BeforeValidator(_bias)] | None = None
    stream: bool | None = None
    stream_options: StreamOptions | None = None


class CompletionRequest(_Sampling):
    """POST /v1/completions."""

    prompt: Texts
    best_of: Annotated[int, Field(ge=1, strict=True)] | None = None
    echo: bool | None = None
    logprobs: Annotated[int, Field(ge=0, le=20)] | None = None


class TextPart(Strict):
    """A part of a message. Images and sound, which engines fetch from where a client says, aren't taken."""

    type: Literal["text"]
    text: Text


class Message(Strict):
    """One message of a chat."""

    role: Literal["system", "developer", "user", "assistant", "tool"]
    content: Text | Annotated[list[TextPart], Field(fail_fast=True)] | None = None
    name: Text | None = Field(None, max_length=256)
    refusal: Text | None = None
    tool_calls: Annotated[list[dict[str, Any]], Field(fail_fast=True)] | None = None
    tool_call_id: Text | None = Field(None, max_length=256)


class ChatRequest(_Sampling):
    """POST /v1/chat/completions."""

    messages: Annotated[list[Message], Field(min_length=1, fail_fast=True)]
    max_completion_tokens: Annotated[int, Field(ge=1, lt=2**31, strict=True)] | None = None
    logprobs: bool | None = None
    top_logprobs: Annotated[int, Field(ge=0, le=20)] | None = None
    tools: Annotated[list[dict[str, Any]], Field(max_length=128, fail_fast=True)] | None = None
    tool_choice: Literal["none", "auto", "required"] | dict[str, Any] | None = None
    parallel_tool_calls: bool | None = None
    response_format: dict[str, Any] | None = None
    store: bool | None = None
    service_tier: Text | None = Field(None, max_length=64)
    safety_identifier: Text | None = Field(None, max_length=512)
    prompt_cache_key: Text | None = Field(None, max_length=512)
    prompt_cache_retention: Text | None = Field(None, max_length=64)
    verbosity: Text | None = Field(None, max_length=64)


class EmbeddingRequest(_Request):
    """POST /v1/embeddings."""

    input: Texts
    encoding_format: Literal["float", "base64"] | None = None
    dimensions: Annotated[int, Field(ge=1, lt=2**20)] | None = None


class ClassifyRequest(_Request):
    """POST /classify."""

    input: Texts


class AdapterRequest(Strict):
    """POST /v1/load_lora_adapter and /v1/unload_lora_adapter, as vLLM calls them. No lora_path: the store has the file."""

    lora_name: Text = Field(description="An adapter of one's own.")


class RollbackRequest(Strict):
    """POST /v1/models/{name}/rollback."""

    version: Annotated[int, Field(ge=1, lt=10**12, strict=True)] = Field(description="The version that becomes current again.")
