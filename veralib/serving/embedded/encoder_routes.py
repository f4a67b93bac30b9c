"""The routes of an encoder: /v1/embeddings and /classify."""

import asyncio
import base64
import secrets
import time
from typing import Any

from fastapi import FastAPI

from .encoder import Encoded, EncoderEngine
from .errors import BadRequest
from .metrics import Metrics
from .protocol import ClassifyBody, EmbeddingBody, several
from .web import aside


def add_encoder_routes(app: FastAPI, engine: EncoderEngine, metrics: Metrics) -> None:
    """Adds them to the application."""

    async def encode(given: Any, model: str) -> tuple[list[Encoded], dict[str, int]]:
        inputs = several(given, "input")
        texts = await aside(sum(map(len, inputs)), lambda: [t if isinstance(t, list) else engine.encode(t) for t in inputs])
        if len(texts) > engine.max_requests:
            raise BadRequest(f"{len(texts)} texts are more than this engine takes: {engine.max_requests}.", "input")
        here = asyncio.get_running_loop()
        answers = await here.run_in_executor(engine.readers, engine.submit, texts, model)
        metrics.prompt_tokens.inc(sum(map(len, texts)))
        encoded = await asyncio.gather(*map(asyncio.wrap_future, answers))
        tokens = sum(e.tokens for e in encoded)
        return list(encoded), {"prompt_tokens": tokens, "total_tokens": tokens, "completion_tokens": 0}

    @app.post("/v1/embeddings")
    async def embeddings(body: EmbeddingBody) -> dict[str, Any]:
        """OpenAI's embeddings."""
        body.refuse_the_rest()
        if body.dimensions is not None and body.dimensions != engine.model.config.hidden_size:
            raise BadRequest(f"dimensions is {body.dimensions}; this model has {engine.model.config.hidden_size}.", "dimensions")
        encoded, usage = await encode(body.input, body.model)
        show = _base64 if body.encoding_format == "base64" else _floats
        data = [{"object": "embedding", "index": i, "embedding": show(e)} for i, e in enumerate(encoded)]
        return {"id": "embd-" + secrets.token_hex(12), "object": "list", "data": data, "model": body.model, "usage": usage}

    @app.post("/classify")
    async def classify(body: ClassifyBody) -> dict[str, Any]:
        """The probabilities of the classes, by the adapter's own head; vLLM's form."""
        body.refuse_the_rest()
        engine.check_head(body.model)
        encoded, usage = await encode(body.input, body.model)
        data = []
        for i, e in enumerate(encoded):
            assert e.logits is not None
            best = int(e.logits.argmax())
            probabilities = e.logits.softmax(-1).tolist()
            label = engine.labels.get(best, str(best))
            data.append({"index": i, "label": label, "probs": probabilities, "num_classes": len(probabilities)})
        name = "classify-" + secrets.token_hex(12)
        return {"id": name, "object": "list", "created": int(time.time()), "model": body.model, "data": data, "usage": usage}


def _floats(encoded: Encoded) -> list[float]:
    return encoded.embedding.tolist()


def _base64(encoded: Encoded) -> str:
    return base64.b64encode(encoded.embedding.numpy().astype("<f4").tobytes()).decode()
