"""/v1/completions, /v1/chat/completions, /v1/embeddings, /classify: checked here, answered by a Relay."""

from typing import Any

from fastapi import APIRouter
from pydantic import BaseModel
from starlette.responses import Response

from .auth import Caller
from .errors import ApiError
from .lengths import estimate, prompts
from .relay import Relay
from .schemas import IGNORED, ChatRequest, ClassifyRequest, CompletionRequest, EmbeddingRequest
from .settings import GatewaySettings
from .state import Gateway, Here

router = APIRouter(tags=["generate"])
ERRORS: dict[int | str, dict[str, Any]] = {
    400: {"description": "The request is wrong; the message says where."},
    401: {"description": "No valid API key."},
    404: {"description": "No such model of one's own."},
    413: {"description": "The body is too long."},
    422: {"description": "The adapter is damaged, or doesn't fit the base model."},
    429: {"description": "A limit of the key; Retry-After says when."},
    503: {"description": "No engine, or a full queue; Retry-After says when."},
}


@router.post("/v1/completions", responses=ERRORS)
async def completions(body: CompletionRequest, tenant: Caller, here: Here) -> Response:
    """A text's continuation, whole or as a stream of server-sent events."""
    return _relay(here, tenant, "/v1/completions", body)


@router.post("/v1/chat/completions", responses=ERRORS)
async def chat(body: ChatRequest, tenant: Caller, here: Here) -> Response:
    """The next message of a chat, whole or as a stream of server-sent events."""
    return _relay(here, tenant, "/v1/chat/completions", body)


@router.post("/v1/embeddings", responses=ERRORS)
async def embeddings(body: EmbeddingRequest, tenant: Caller, here: Here) -> Response:
    """A vector for each text, where the base model is an encoder."""
    return _relay(here, tenant, "/v1/embeddings", body)


@router.post("/classify", responses=ERRORS)
async def classify(body: ClassifyRequest, tenant: Caller, here: Here) -> Response:
    """The probabilities of the classes for each text, by the adapter's own head, where the base model is an encoder."""
    return _relay(here, tenant, "/classify", body)


def _relay(here: Gateway, tenant: Caller, path: str, request: BaseModel) -> Relay:
    try:
        body = request.model_dump(mode="json", exclude_none=True, exclude=set(IGNORED))
    except (ValueError, RecursionError):  # nested deeper than anybody writes
        raise ApiError(400, "The body is nested too deeply.", code="invalid_request") from None
    called = body.pop("model")
    body["cache_salt"] = tenant.salt(body.get("cache_salt"))
    if "max_completion_tokens" in body:
        body["max_tokens"] = body.pop("max_completion_tokens")
    check(body, here.settings)
    asks_usage = bool((body.pop("stream_options", None) or {}).get("include_usage"))
    if body.get("stream"):
        body["stream_options"] = {"include_usage": True}  # the gateway counts tokens, whoever else wants to know
    answer = (body.get("max_tokens") or 256) * choices(body) if "input" not in body else 0
    return Relay(
        tenant, path, called, body,
        tokens=estimate(body) + answer, usage=asks_usage, max_tokens=here.settings.max_tokens,
        taking_seconds=here.settings.taking_seconds,
        names=here.names, client=here.client, limits=here.limits, metrics=here.metrics, base_name=here.settings.base_name,
    )  # fmt: skip


def choices(body: dict[str, Any]) -> int:
    """How many answers are computed."""
    return len(prompts(body)) * max(body.get("n") or 1, body.get("best_of") or 1)


def check(body: dict[str, Any], settings: GatewaySettings) -> None:
    """ApiError 400 for a request beyond the gateway's limits."""
    stop = body.get("stop", [])
    several = [stop] if isinstance(stop, str) else stop
    bounds = [
        ("max_tokens", body.get("max_tokens") or 0, settings.max_tokens, "tokens"),
        ("stop", len(several), settings.max_stop, "stop sequences"),
        ("stop", max(map(len, several), default=0), 256, "characters in a stop sequence"),
    ]
    if "input" in body:
        bounds.append(("input", len(prompts(body)), settings.max_inputs, "texts"))
    else:
        bounds.append(("n", choices(body), settings.max_choices, "answers (prompts × n or best_of)"))
    for field, found, most, what in bounds:
        if found > most:
            raise ApiError(400, f"{field}: {found} {what}, the limit is {most}.", code="limit_exceeded", param=field)
    if any(s == "" for s in several):
        raise ApiError(400, "stop: a stop sequence is empty.", code="invalid_request", param="stop")
    if (body.get("best_of") or 10**9) < (body.get("n") or 1):
        raise ApiError(400, "best_of is less than n.", code="invalid_request", param="best_of")
    if body.get("stream_options") and not body.get("stream"):
        raise ApiError(400, "stream_options without stream.", code="invalid_request", param="stream_options")
    if bad := [t for t in body.get("logit_bias") or {} if not (t.isascii() and t.isdigit() and len(t) < 10)]:
        raise ApiError(400, f'logit_bias: "{bad[0][:20]}" is no token id.', code="invalid_request", param="logit_bias")
