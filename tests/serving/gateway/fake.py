"""An engine of the tests' own that speaks vLLM's dialect: it answers with the name it was asked for, and fails when told to.

A prompt may hold orders: "slow" streams a piece each 0.05 s, "fail:STATUS" answers with that status, "type:NAME" with that
type of error, "says:TEXT" with that text at its end, "faint" makes /health 503 from then on, "die" breaks the stream off,
"silent" never answers. Run as a program it is an engine that a gateway starts:
python -m tests.serving.gateway.fake --port …
"""

import argparse
import asyncio
import json
import os
import re
import shlex
import signal
import socket
import sys
import threading
import time
from contextlib import contextmanager
from pathlib import Path

import uvicorn
from fastapi import FastAPI, Request
from fastapi.responses import JSONResponse, PlainTextResponse, StreamingResponse

LENGTH = 64


class Fake:
    """app, and what came: asked (path, body), cancelled (models whose client left), loaded (engine names), known (those that
    aren't 404; None: all), failing (the status of loading, None: it succeeds)."""

    def __init__(self, base="tiny-base"):
        self.base, self.asked, self.cancelled, self.loaded, self.known = base, [], [], set(), None
        self.headers, self.failing = [], None
        self.running = self.most = 0
        self.fainted = False
        self.app = app = FastAPI()

        @app.post("/v1/completions")
        async def completions(request: Request):
            return await self.generate(request, "prompt")

        @app.post("/v1/chat/completions")
        async def chat(request: Request):
            return await self.generate(request, "messages")

        @app.post("/v1/embeddings")
        async def embeddings(request: Request):
            body = await self.read(request)
            texts = body["input"] if isinstance(body["input"], list) else [body["input"]]
            data = [{"object": "embedding", "index": k, "embedding": [float(len(str(t))), 1.0]} for k, t in enumerate(texts)]
            return {"object": "list", "model": body["model"], "data": data, "usage": {"prompt_tokens": 3, "total_tokens": 3}}

        @app.post("/classify")
        async def classify(request: Request):
            body = await self.read(request)
            usage = {"prompt_tokens": 3, "total_tokens": 3, "completion_tokens": 0}
            data = [{"index": 0, "label": "LABEL_1", "probs": [0.25, 0.75], "num_classes": 2}]
            return {"id": "classify-1", "object": "list", "created": 1, "model": body["model"], "data": data, "usage": usage}

        @app.get("/health")
        async def health():
            return PlainTextResponse("", 503 if self.fainted else 200)

        @app.get("/v1/models")
        async def models():
            cards = [{"id": self.base, "object": "model", "created": int(time.time()), "max_model_len": LENGTH, "parent": None}]
            cards += [{"id": n, "object": "model", "created": 1, "parent": self.base} for n in sorted(self.loaded)]
            return {"object": "list", "data": cards}

        @app.post("/tokenize")
        async def tokenize(request: Request):
            body = await self.read(request)
            text = body["prompt"] if "prompt" in body else " ".join(str(m.get("content")) for m in body["messages"])
            return {"count": len(text.split()), "max_model_len": LENGTH, "tokens": []}

        @app.post("/v1/load_lora_adapter")
        async def load(request: Request):
            body = await self.read(request)
            if self.known is not None and body["lora_name"] not in self.known:
                return self.unknown(body["lora_name"])
            if self.failing == 404:
                return JSONResponse({"detail": "Not Found"}, 404)
            if self.failing:
                error = {"message": f"{body['lora_name']} can't be loaded", "type": "BadRequestError", "code": self.failing}
                return JSONResponse({"error": error}, self.failing)
            self.loaded.add(body["lora_name"])
            return PlainTextResponse("loaded")

        @app.post("/v1/unload_lora_adapter")
        async def unload(request: Request):
            body = await self.read(request)
            self.loaded.discard(body["lora_name"])
            return PlainTextResponse("unloaded")

        @app.get("/metrics")
        async def metrics():
            names = ",".join(sorted(self.loaded))
            return PlainTextResponse(
                f'# TYPE vllm:lora_requests_info gauge\nvllm:lora_requests_info{{names="{names}"}} 1\n'
                "# TYPE vllm:prefix_cache_hits_total counter\n"
                'vllm:prefix_cache_hits_total{engine="0"} 5\nvllm:prefix_cache_hits_total{engine="1"} 2\n'
                f"# TYPE vera:resident_adapters gauge\nvera:resident_adapters {len(self.loaded)}\n"  # the plugin's
            )

    async def read(self, request):
        body = await request.json()
        self.asked.append((request.url.path, body))
        self.headers.append(dict(request.headers))
        return body

    def unknown(self, model):
        return JSONResponse({"error": {"message": f"The model `{model}` does not exist.", "code": "model_not_found"}}, 404)

    async def generate(self, request, field):
        body = await self.read(request)
        model, text = body["model"], json.dumps(body[field])
        if self.known is not None and model != self.base and model not in self.known:
            return self.unknown(model)
        if model != self.base:
            self.loaded.add(model)
        if found := re.search(r"fail:(\d+)", text):
            said = re.search(r"says:([^\s\"]+)", text)
            words = f"{model} and globex:secret@3-0123456789ab failed" + (f" at {said[1]}" if said else "")
            kind = re.search(r"type:(\w+)", text)
            error = {"error": {"message": words, "code": int(found[1]), **({"type": kind[1]} if kind else {})}}
            return JSONResponse(error, int(found[1]))
        self.fainted |= "faint" in text
        if "silent" in text:
            await self.wait_for_end(request, model)
        self.running += 1
        self.most = max(self.most, self.running)
        try:
            if "pause" in text:
                await asyncio.sleep(0.2)
        finally:
            self.running -= 1
        answer = f"{model} says hello to {len(text)}"
        usage = {"prompt_tokens": 7, "completion_tokens": 5, "total_tokens": 12}
        if not body.get("stream"):
            choice = {"index": 0, "finish_reason": "stop"}
            choice |= {"text": answer} if field == "prompt" else {"message": {"role": "assistant", "content": answer}}
            kind = "text_completion" if field == "prompt" else "chat.completion"
            return {"id": "x-1", "object": kind, "created": 1, "model": model, "choices": [choice], "usage": usage}
        return StreamingResponse(self.pieces(model, answer, field, text, usage, body), media_type="text/event-stream")

    async def pieces(self, model, answer, field, text, usage, body):
        ended = False
        try:
            kind = "text_completion" if field == "prompt" else "chat.completion.chunk"
            head = {"id": "x-1", "object": kind, "created": 1, "model": model}
            for k, word in enumerate(answer.split(" ")):
                word = word if k == 0 else " " + word
                choice = {"index": 0, "finish_reason": None}
                choice |= {"text": word} if field == "prompt" else {"delta": {"content": word}}
                yield f"data: {json.dumps({**head, 'choices': [choice]})}\n\n"
                if "slow" in text:
                    await asyncio.sleep(0.05)
                if "long" in text:
                    await asyncio.sleep(0.5)
                if "die" in text and k == 1:
                    raise RuntimeError("this stream dies, as it was told to")
            if (body.get("stream_options") or {}).get("include_usage"):
                yield f"data: {json.dumps({**head, 'choices': [], 'usage': usage})}\n\n"
            yield "data: [DONE]\n\n"
            ended = True
        finally:
            if not ended:
                self.cancelled.append(model)

    async def wait_for_end(self, request, model):
        while not await request.is_disconnected():
            await asyncio.sleep(0.02)
        self.cancelled.append(model)


@contextmanager
def serving(app, **options):
    """url of an application that runs in a thread on a free port."""
    server = uvicorn.Server(uvicorn.Config(app, host="127.0.0.1", port=0, log_level="error", **options))
    thread = threading.Thread(target=server.run, daemon=True)
    thread.start()
    deadline = time.monotonic() + 60
    while not server.started and time.monotonic() < deadline:
        time.sleep(0.01)
    assert server.started
    try:
        yield f"http://127.0.0.1:{server.servers[0].sockets[0].getsockname()[1]}"
    finally:
        server.should_exit = True
        thread.join(60)
        assert not thread.is_alive()


def wait_until(true, seconds=60.0):
    """Whether it became true in time."""
    deadline = time.monotonic() + seconds
    while time.monotonic() < deadline:
        if true():
            return True
        time.sleep(0.02)
    return False


@contextmanager
def asking(url, key, path, body):
    """A request whose client leaves, without an answer, at the end of the block."""
    host, port = url.removeprefix("http://").split(":")
    raw = json.dumps(body).encode()
    head = f"POST {path} HTTP/1.1\r\nHost: x\r\nAuthorization: Bearer {key}\r\nContent-Type: application/json\r\n"
    with socket.create_connection((host, int(port))) as connection:
        connection.sendall(f"{head}Content-Length: {len(raw)}\r\n\r\n".encode() + raw)
        yield


def fake_python(folder):
    """A program that a gateway takes for Python, and that runs the fake whatever module it is asked for."""
    path = folder / "python"
    root = Path(__file__).parents[3]
    line = f'shift 2; cd {shlex.quote(str(root))}; exec {shlex.quote(sys.executable)} -m tests.serving.gateway.fake "$@"'
    path.write_text(f"#!/bin/sh\n{line}\n")
    path.chmod(0o755)
    return str(path)


def main():
    parser = argparse.ArgumentParser()
    for name in ("--host", "--model", "--served-model-name", "--store"):
        parser.add_argument(name)
    parser.add_argument("--port", type=int)
    parser.add_argument("--die-at-start", action="store_true")
    parser.add_argument("--start-seconds", type=float, default=0.0)
    given, _ = parser.parse_known_args()
    time.sleep(given.start_seconds)
    if given.die_at_start:
        raise SystemExit(3)
    fake = Fake(given.served_model_name)

    @fake.app.get("/die")
    async def die():
        os.kill(os.getpid(), signal.SIGKILL)

    @fake.app.get("/asked")
    async def asked():
        return [body.get("prompt") for _, body in fake.asked]

    uvicorn.run(fake.app, host=given.host, port=given.port, log_level="error")


if __name__ == "__main__":
    main()
