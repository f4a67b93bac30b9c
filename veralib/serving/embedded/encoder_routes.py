"""The routes of an encoder: /v1/embeddings and /classify."""

import asyncio
import base64
import secrets
import time
from concurrent.futures import Future
from typing import Any

from fastapi import FastAPI, Request, Response

from .encoder import Encoded, EncoderEngine
from .errors import BadRequest
from .metrics import Metrics
from .protocol import ClassifyBody, EmbeddingBody, several
from .web import ClientGone, aside, until_gone


def add_encoder_routes(app: FastAPI, engine: EncoderEngine, metrics: Metrics) -> None:
    """Adds them to the application."""

    @app.exception_handler(ClientGone)
    async def gone(request: Request, e: ClientGone) -> Response:
        metrics.cancelled.inc()
        return Response(status_code=499)  # nobody reads it

    async def encode(given: Any, model: str, request: Request, classes: bool = False) -> tuple[list[Encoded], dict[str, int]]:
        inputs = several(given, "input")
        texts = await aside(sum(map(len, inputs)), lambda: [t if isinstance(t, list) else engine.encode(t) for t in inputs])
        if len(texts) > engine.max_requests:
            raise BadRequest(f"{len(texts)} texts are more than this engine takes: {engine.max_requests}.", "input")
        encoded = await until_gone(request, _answers(engine, texts, model, classes))
        tokens = sum(e.tokens for e in encoded)
        metrics.prompt_tokens.inc(tokens)
        return encoded, {"prompt_tokens": tokens, "total_tokens": tokens, "completion_tokens": 0}

    @app.post("/v1/embeddings")
    async def embeddings(body: EmbeddingBody, request: Request) -> dict[str, Any]:
        """OpenAI's embeddings."""
        body.refuse_the_rest()
        if body.dimensions is not None and body.dimensions != engine.model.config.hidden_size:
            raise BadRequest(f"dimensions is {body.dimensions}; this model has {engine.model.config.hidden_size}.", "dimensions")
        encoded, usage = await encode(body.input, body.model, request)
        show = _base64 if body.encoding_format == "base64" else _floats
        data = [{"object": "embedding", "index": i, "embedding": show(e)} for i, e in enumerate(encoded)]
        return {"id": "embd-" + secrets.token_hex(12), "object": "list", "data": data, "model": body.model, "usage": usage}

    @app.post("/classify")
    async def classify(body: ClassifyBody, request: Request) -> dict[str, Any]:
        """The probabilities of the classes, by the adapter's own head; vLLM's form."""
        body.refuse_the_rest()
        engine.check_head(body.model)
        encoded, usage = await encode(body.input, body.model, request, classes=True)
        data = []
        for i, e in enumerate(encoded):
            assert e.logits is not None
            best = int(e.logits.argmax())
            probabilities = e.logits.softmax(-1).tolist()
            label = engine.labels.get(best, str(best))
            data.append({"index": i, "label": label, "probs": probabilities, "num_classes": len(probabilities)})
        name = "classify-" + secrets.token_hex(12)
        return {"id": name, "object": "list", "created": int(time.time()), "model": body.model, "data": data, "usage": usage}


async def _answers(engine: EncoderEngine, texts: list[list[int]], model: str, classes: bool) -> list[Encoded]:
    """What the engine says. Cancelled, it takes out what hasn't begun."""
    submitted = asyncio.get_running_loop().run_in_executor(engine.readers, engine.submit, texts, model, classes)
    try:
        answers = await asyncio.shield(submitted)
    except asyncio.CancelledError:  # the client left while its adapter was read
        submitted.add_done_callback(_forget)
        raise
    return list(await asyncio.gather(*map(asyncio.wrap_future, answers)))


def _forget(submitted: "asyncio.Future[list[Future[Encoded]]]") -> None:
    if not submitted.cancelled() and submitted.exception() is None:
        for answer in submitted.result():
            answer.cancel()


def _floats(encoded: Encoded) -> list[float]:
    return encoded.embedding.tolist()


def _base64(encoded: Encoded) -> str:
    return base64.b64encode(encoded.embedding.numpy().astype("<f4").tobytes()).decode()
