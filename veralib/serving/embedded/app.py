"""make_app(engine): the engine behind HTTP, in vLLM's dialect of the OpenAI API."""

import asyncio
import json
import os
import time
from collections.abc import AsyncIterator
from typing import Any

from fastapi import FastAPI, Request
from fastapi.responses import PlainTextResponse, Response, StreamingResponse

from ...errors import VeraError
from ..gateway.errors import ApiError, json_response
from .answers import Shape, usage_of
from .encoder import EncoderEngine
from .encoder_routes import add_encoder_routes
from .engine import EmbeddedEngine
from .errors import BadRequest
from .metrics import Metrics
from .protocol import AdapterBody, ChatBody, CompletionBody, Generation, Message, TokenizeBody
from .request import Piece
from .sampling import Sampling
from .streams import Streams
from .web import KEY_VARIABLE, ClientGone, Counted, Keyed, add_error_handlers, api_error, aside, until_gone


def make_app(engine: EmbeddedEngine | EncoderEngine) -> FastAPI:
    """The FastAPI application of one engine, which the caller closes. Where VLLM_API_KEY is set, clients need that key."""
    app = FastAPI(title="veralib embedded engine", docs_url=None, redoc_url=None)
    metrics = Metrics(engine)
    app.state.metrics = metrics
    add_error_handlers(app)
    if key := os.environ.get(KEY_VARIABLE):
        app.add_middleware(Keyed, key=key)
    app.add_middleware(Counted, metrics=metrics)
    _add_common_routes(app, engine, metrics)
    if isinstance(engine, EncoderEngine):
        add_encoder_routes(app, engine, metrics)
    else:
        _add_text_routes(app, engine, metrics)
    return app


def _add_common_routes(app: FastAPI, engine: EmbeddedEngine | EncoderEngine, metrics: Metrics) -> None:
    started = int(time.time())

    @app.get("/health")
    async def health() -> Response:
        """200 while the model's thread runs."""
        return Response(status_code=200 if engine.alive else 503)

    @app.get("/v1/models")
    async def models() -> dict[str, Any]:
        """The base model and the adapters that are in memory."""
        base = {"id": engine.name, "object": "model", "created": started, "owned_by": "veralib", "root": engine.name}
        base |= {"parent": None, "max_model_len": engine.max_model_len}
        rest = [{**base, "id": n, "root": n, "parent": engine.name, "max_model_len": None} for n in engine.residents.names]
        return {"object": "list", "data": [base, *rest]}

    @app.get("/metrics")
    async def metric_text() -> Response:
        """Prometheus' text format."""
        return Response(metrics.text(), media_type="text/plain; version=0.0.4; charset=utf-8")

    @app.post("/tokenize")
    async def tokenize(body: TokenizeBody) -> dict[str, Any]:
        """The tokens of a prompt, or of messages in the model's chat template."""
        body.refuse_the_rest()
        if (body.prompt is None) == (body.messages is None):
            raise BadRequest("expected either a prompt or messages.", "prompt")
        if body.messages is not None:
            messages = body.messages
            tokens = await aside(size_of(messages), lambda: chat_tokens(engine.tokenizer, messages))
        else:
            text, special = body.prompt or "", body.add_special_tokens is not False
            tokens = await aside(len(text), lambda: engine.encode(text, special))
        return {"count": len(tokens), "max_model_len": engine.max_model_len, "tokens": tokens, "token_strs": None}

    @app.post("/v1/load_lora_adapter")
    async def load(body: AdapterBody) -> Response:
        """Reads an adapter of the store into memory before it is asked for."""
        body.refuse_the_rest()
        if body.lora_path not in (None, "", body.lora_name):
            raise BadRequest("adapters come from the store, by name: leave lora_path out.", "lora_path")

        def read() -> None:
            engine.residents.release(engine.residents.pin(body.lora_name))

        await asyncio.get_running_loop().run_in_executor(engine.readers, read)
        return PlainTextResponse(f"Success: LoRA adapter '{body.lora_name}' added successfully.")

    @app.post("/v1/unload_lora_adapter")
    async def unload(body: AdapterBody) -> Response:
        """Takes an adapter out of memory, at once or after the requests that use it."""
        body.refuse_the_rest()
        if not engine.residents.forget(body.lora_name):
            raise ApiError(404, f'"{body.lora_name[:200]}" isn\'t in memory.', code="model_not_found", param="lora_name")
        return PlainTextResponse(f"Success: LoRA adapter '{body.lora_name}' removed successfully.")


def size_of(messages: list[Message]) -> int:
    """Characters of a chat."""
    return sum(len(m.plain()["content"]) for m in messages)


def chat_tokens(tokenizer: Any, messages: list[Message]) -> list[int]:
    """The prompt of a chat. BadRequest where the model has no chat template or it refuses the messages."""
    if not getattr(tokenizer, "chat_template", None):
        raise BadRequest("this model's tokenizer has no chat template: use /v1/completions.", "messages")
    try:
        return list(
            tokenizer.apply_chat_template(
                [m.plain() for m in messages], add_generation_prompt=True, tokenize=True, return_dict=False
            )
        )
    except Exception as e:  # a template raises what it likes: jinja2's errors, KeyError, TypeError
        raise BadRequest(f"the model's chat template refuses these messages: {e}", "messages") from e


def _add_text_routes(app: FastAPI, engine: EmbeddedEngine, metrics: Metrics) -> None:
    @app.post("/v1/completions")
    async def completions(body: CompletionBody, request: Request) -> Response:
        """OpenAI's completions."""
        n = body.choices()
        special = body.add_special_tokens is not False
        given = body.prompts()
        encode = lambda: [p if isinstance(p, list) else engine.encode(p, special) for p in given]  # noqa: E731
        prompts = await aside(sum(map(len, given)), encode)
        if len(prompts) * n > engine.max_requests:
            raise BadRequest(
                f"{len(prompts)} prompts with n={n} are more than this engine takes: {engine.max_requests}.", "prompt"
            )
        limit = 16 if body.max_tokens is None else body.max_tokens
        asked = [(p, body.sampling(c, limit, body.logprobs)) for p in prompts for c in range(n)]
        shape = Shape(False, body.model, engine.tokenizer, body.logprobs is not None)
        return await _run(asked, sum(map(len, prompts)), body, shape, request)

    @app.post("/v1/chat/completions")
    async def chat(body: ChatBody, request: Request) -> Response:
        """OpenAI's chat completions."""
        n, logprobs = body.choices(), body.wanted_logprobs()
        prompt = await aside(size_of(body.messages), lambda: chat_tokens(engine.tokenizer, body.messages))
        limit = body.max_tokens if body.max_completion_tokens is None else body.max_completion_tokens
        asked = [(prompt, body.sampling(c, limit, logprobs)) for c in range(n)]
        shape = Shape(True, body.model, engine.tokenizer, logprobs is not None)
        return await _run(asked, len(prompt), body, shape, request)

    @app.post("/v1/embeddings")
    async def embeddings(request: Request) -> Response:
        """Not of this model."""
        raise ApiError(400, "this model generates text and gives no embeddings: serve an encoder for them.", param="model")

    @app.post("/classify")
    async def classify(request: Request) -> Response:
        """Not of this model."""
        raise ApiError(400, "this model generates text and has no classes: serve an encoder for them.", param="model")

    async def _run(
        asked: list[tuple[list[int], Sampling]], prompt_tokens: int, body: Generation, shape: Shape, request: Request
    ) -> Response:
        start = time.perf_counter()
        streams = Streams(engine)
        try:
            await until_gone(request, streams.open(asked, body.model))
            metrics.prompt_tokens.inc(prompt_tokens)
            if body.stream:
                usage = bool(body.stream_options and body.stream_options.include_usage)
                return Events(_events(streams, shape, prompt_tokens, usage, metrics, start), streams, metrics)
            pieces: list[list[Piece]] = [[] for _ in asked]

            async def collect() -> None:
                async for i, piece in streams:
                    pieces[i].append(piece)

            await until_gone(request, collect())
        except ClientGone:
            metrics.cancelled.inc()
            streams.close()
            return Response(status_code=499)  # nobody reads it
        except BaseException:
            streams.close()
            raise
        generated = sum(len(p.tokens) for parts in pieces for p in parts)
        metrics.generated_tokens.inc(generated)
        return json_response(shape.whole(pieces, usage_of(prompt_tokens, generated)))


async def _events(
    streams: Streams, shape: Shape, prompt_tokens: int, with_usage: bool, metrics: Metrics, start: float
) -> AsyncIterator[str]:
    """Server-sent events: the chunks, then [DONE]."""
    generated = 0
    extra: dict[str, Any] = {"usage": None} if with_usage else {}
    for chunk in shape.first(len(streams.running)):
        yield _event({**chunk, **extra})
    try:
        async for i, piece in streams:
            if not generated:
                metrics.first.observe(time.perf_counter() - start)
            generated += len(piece.tokens)
            metrics.generated_tokens.inc(len(piece.tokens))
            said = shape.chunk(i, piece)
            if said is not None:
                yield _event({**said, **extra})
        if with_usage:
            yield _event(shape.usage_chunk(usage_of(prompt_tokens, generated)))
    except VeraError as e:
        yield _event(api_error(e).body())
    yield "data: [DONE]\n\n"


def _event(data: dict[str, Any]) -> str:
    return f"data: {json.dumps(data)}\n\n"


class Events(StreamingResponse):
    """A stream whose requests end with it, also where the client left before the first event."""

    def __init__(self, events: AsyncIterator[str], streams: Streams, metrics: Metrics) -> None:
        super().__init__(events, media_type="text/event-stream", headers={"Cache-Control": "no-cache"})
        self.streams, self.metrics = streams, metrics

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        try:
            await super().__call__(scope, receive, send)
        finally:
            if not all(r.done for r in self.streams.running):
                self.metrics.cancelled.inc()
            self.streams.close()
