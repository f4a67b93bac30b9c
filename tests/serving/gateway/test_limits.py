"""Each limit has its HTTP code, and what was taken is given back whichever way a request ends."""

import asyncio
import contextlib
import json
import socket
import threading
import time
from types import SimpleNamespace

import httpx2
import pytest

from tests.serving.gateway.fake import asking, wait_until
from veralib.serving.gateway.client import About
from veralib.serving.gateway.errors import ApiError
from veralib.serving.gateway.lengths import estimate
from veralib.serving.gateway.limits import IDLE_KEYS, Bucket, Limits
from veralib.serving.gateway.metrics import Metrics
from veralib.serving.gateway.relay import Relay
from veralib.serving.gateway.settings import GatewaySettings
from veralib.serving.gateway.tenants import EVERYBODY, Tenant

TEXT = {"model": "acme:ann", "prompt": "x"}


def code(answer):
    return answer.status_code, answer.json()["error"]["code"]


@pytest.mark.parametrize("stated", [True, False])
def test_a_body_that_is_too_long(world, stated):
    http = world.http(world.gateway(max_body_bytes=1000))
    body = json.dumps({**TEXT, "prompt": "x" * 2000}).encode()
    answer = http.post("/v1/completions", content=body if stated else iter([body[:900], body[900:]]))
    assert answer.status_code == 413 and "1,000 bytes" in answer.json()["error"]["message"]
    assert http.post("/v1/completions", json=TEXT).status_code == 200


def test_a_body_that_never_ends(world):
    http = world.http(world.gateway(body_seconds=0.3))

    def slow():
        for _ in range(100):
            yield b" "
            time.sleep(0.1)

    began = time.monotonic()
    with contextlib.suppress(httpx2.HTTPError):  # closed while it was still sent
        assert http.post("/v1/completions", content=slow()).status_code == 408
    assert time.monotonic() - began < 8


def test_lengths(world):
    """The fake's length is 64 and its tokens are words."""
    http = world.http(world.gateway(max_tokens=40))
    for path, body in (
        ("/v1/completions", {"prompt": "word " * 60, "max_tokens": 5}),
        ("/v1/completions", {"prompt": [1] * 60, "max_tokens": 5}),
        ("/v1/completions", {"prompt": ["a", "word " * 60], "max_tokens": 5}),
        ("/v1/chat/completions", {"messages": [{"role": "user", "content": "word " * 60}], "max_tokens": 5}),
        ("/v1/chat/completions", {"messages": [{"role": "user", "content": "word " * 70}]}),
        ("/v1/embeddings", {"input": "word " * 70}),
        ("/classify", {"input": "word " * 70}),
        ("/v1/completions", {"prompt": "x" * 100_000}),
    ):
        answer = http.post(path, json={"model": "acme:ann", **body})
        assert code(answer) == (400, "context_length_exceeded"), answer.text
    assert http.post("/v1/completions", json={**TEXT, "prompt": "word " * 59, "max_tokens": 5}).status_code == 200
    assert code(http.post("/v1/completions", json={**TEXT, "max_tokens": 41})) == (400, "limit_exceeded")
    assert code(http.post("/v1/completions", json={**TEXT, "n": 17})) == (400, "limit_exceeded")
    assert http.post("/v1/chat/completions", json={"model": "acme:ann", "messages": [{"role": "user", "content": "w " * 50}]})
    asked = world.fake.asked[-1][1]
    assert asked["max_tokens"] == 14 and world.fake.asked[-2][0] == "/tokenize"  # what 64 leaves beside 50
    http.post("/v1/completions", json=TEXT)
    assert world.fake.asked[-1][1]["max_tokens"] == 16 and world.fake.asked[-2][0] != "/tokenize"


def test_a_keys_concurrency(world):
    url = world.gateway(key_concurrency=2)
    results = []

    def ask(who):
        body = {"model": f"{who}:ann", "prompt": "pause"}
        results.append((who, world.http(url, who).post("/v1/completions", json=body)))

    threads = [threading.Thread(target=ask, args=(who,)) for who in ["acme"] * 4 + ["globex"]]
    for t in threads:
        t.start()
    for t in threads:
        t.join()
    refused = [a for who, a in results if a.status_code != 200]
    assert len(refused) == 2 and all(code(a) == (429, "rate_limit_exceeded") and a.headers["retry-after"] == "1" for a in refused)
    assert [a.status_code for who, a in results if who == "globex"] == [200]
    assert world.http(url).post("/v1/completions", json=TEXT).status_code == 200


def test_the_queue(world):
    url = world.gateway(running=1, queue=2)
    results = []
    threads = [
        threading.Thread(target=lambda: results.append(world.http(url).post("/v1/completions", json={**TEXT, "prompt": "pause"})))
        for _ in range(6)
    ]
    for t in threads:
        t.start()
    for t in threads:
        t.join()
    refused = [a for a in results if a.status_code != 200]
    assert 1 <= len(refused) <= 3 and all(code(a) == (503, "overloaded") and a.headers["retry-after"] for a in refused)
    assert world.fake.most == 1


def test_a_turn_that_never_comes(world):
    url = world.gateway(running=1, queue_seconds=0.2)
    with world.http(url).stream("POST", "/v1/completions", json={**TEXT, "prompt": "long", "stream": True}) as first:
        pieces = first.iter_raw()  # held: the connection closes with it
        next(pieces)
        answer = world.http(url).post("/v1/completions", json=TEXT)
        assert code(answer) == (503, "overloaded") and "No turn" in answer.text
    assert wait_until(lambda: world.http(url).post("/v1/completions", json=TEXT).status_code == 200)


def test_a_keys_rate(world):
    url = world.gateway(key_requests_per_minute=5)
    answers = [world.http(url).post("/v1/completions", json=TEXT) for _ in range(6)]
    assert [a.status_code for a in answers] == [200] * 5 + [429]
    assert 1 <= int(answers[-1].headers["retry-after"]) <= 12
    assert code(world.http(url).get("/v1/models")) == (429, "rate_limit_exceeded")
    assert world.http(url, "globex").post("/v1/completions", json={**TEXT, "model": "globex:ann"}).status_code == 200


def test_uploads_and_jobs_count_too(world):
    http = world.http(world.gateway(key_requests_per_minute=3))
    answers = [http.get(path) for path in ("/v1/files", "/v1/fine_tuning/jobs", "/v1/nothing", "/v1/files")]
    assert [a.status_code for a in answers] == [200, 200, 404, 429] and code(answers[-1]) == (429, "rate_limit_exceeded")
    assert [http.get(path).status_code for path in ("/health", "/ready", "/openapi.json")] == [200] * 3


@pytest.mark.parametrize("path", ["/v1/files", "/v1/completions", "/v1/fine_tuning/jobs"])
def test_a_body_that_is_still_being_sent_counts(world, path):
    url = world.gateway(key_concurrency=1)
    host, port = url.removeprefix("http://").split(":")
    head = f"POST {path} HTTP/1.1\r\nHost: x\r\nAuthorization: Bearer {world.keys['acme']}\r\nContent-Length: 100\r\n"
    kind = "multipart/form-data; boundary=x" if path == "/v1/files" else "application/json"
    running = lambda: sum(key.running for key in world.apps[0].state.gateway.limits._keys.values())  # noqa: E731
    with socket.create_connection((host, int(port))) as slow:
        slow.sendall(f"{head}Content-Type: {kind}\r\n\r\n--x".encode())
        assert wait_until(lambda: running() == 1)
        assert code(world.http(url).get("/v1/models")) == (429, "rate_limit_exceeded")
        assert world.http(url, "globex").get("/v1/models").status_code == 200
    assert wait_until(lambda: running() == 0)
    assert [world.http(url).get("/v1/models").status_code for _ in range(20)] == [200] * 20  # none follows too closely


def test_a_client_that_reads_nothing_lets_go_of_the_engine():
    """It keeps its connection, so nothing else tells that it has gone."""
    settings = GatewaySettings(store="s", engine_url="http://x", running=1)
    metrics, ended = Metrics(), []
    limits = Limits(settings, metrics)

    class Client:
        async def about(self):
            return About("tiny", None, 0)

        @contextlib.asynccontextmanager
        async def stream(self, path, body):
            async def pieces():
                while True:
                    yield b'data: {"choices": []}\n\n'

            try:
                yield SimpleNamespace(status_code=200, headers={"content-type": "text/event-stream"}, aiter_bytes=pieces)
            finally:
                ended.append(body["model"])

    async def check():
        taken = []

        async def send(message):
            taken.append(message)
            if len(taken) > 3:
                await asyncio.Event().wait()

        relay = Relay(
            EVERYBODY, "/v1/completions", "tiny", {"prompt": "x"}, tokens=1, usage=False, max_tokens=8, taking_seconds=0.2,
            names=None, client=Client(), limits=limits, metrics=metrics, base_name=None,
        )  # fmt: skip
        await asyncio.wait_for(relay({}, asyncio.Event().wait, send), 5)
        async with limits.slot():
            return len(taken)

    assert asyncio.run(check()) == 4 and ended == ["tiny"]
    assert metrics.disconnects._value.get() == 1


def test_a_keys_tokens(world):
    """What the engine counted is what counts: 12 a request, not the 256 that were possible."""
    url = world.gateway(key_tokens_per_minute=40)
    http = world.http(url)
    codes = [http.post("/v1/completions", json={**TEXT, "max_tokens": 30}).status_code for _ in range(5)]
    assert codes == [200] * 4 + [429]


def test_keys_that_are_idle_are_forgotten_and_others_are_not():
    now = [0.0]
    settings = GatewaySettings(store="s", engine_url="http://x", key_requests_per_minute=2)
    limits = Limits(settings, Metrics(), lambda: now[0])
    running, spent = Tenant("running", "a:"), Tenant("spent", "a:")
    leave = limits.admit(running)
    for n in range(4 * IDLE_KEYS):
        now[0] += 0.1
        limits.admit(Tenant(f"k{n}", "a:"))()
    assert len(limits._keys) <= IDLE_KEYS and limits._keys["running"].running == 1
    for _ in range(2):
        limits.admit(spent)()
    for n in range(IDLE_KEYS):
        limits.admit(Tenant(f"n{n}", "a:"))()
    with pytest.raises(ApiError, match="requests a minute"):
        limits.admit(spent)
    leave()
    assert limits._keys["running"].running == 0


def test_tokens_are_estimated_over_all_prompts():
    """What is charged until the engine has counted, and stays where a client leaves."""
    assert estimate({"prompt": "x" * 40}) == 10 == estimate({"input": ["x" * 20, "é" * 10]})
    assert estimate({"prompt": [1] * 40}) == 40 and estimate({"prompt": [[1] * 40, [2] * 3]}) == 43
    assert 25 < estimate({"messages": [{"role": "user", "content": "x" * 100}]}) < 50


def test_a_stream_that_is_left_costs_all_its_prompts(world):
    http = world.http(world.gateway(key_tokens_per_minute=1000))
    asked = {**TEXT, "prompt": ["slow long " + "x" * 400] * 16, "max_tokens": 1, "stream": True}
    with http.stream("POST", "/v1/completions", json=asked) as answer:
        pieces = answer.iter_raw()
        next(pieces)
    assert wait_until(lambda: world.fake.cancelled)
    assert code(http.post("/v1/completions", json=TEXT)) == (429, "rate_limit_exceeded")


def test_a_bucket_refills():
    now = [0.0]
    bucket = Bucket(60, clock=lambda: now[0])
    bucket.take(60)
    assert bucket.wait_seconds(1) == pytest.approx(1) and bucket.wait_seconds() > 0
    now[0] = 1.5
    assert bucket.wait_seconds(1) == 0 == bucket.wait_seconds()
    bucket.take(100)
    assert bucket.wait_seconds() == pytest.approx(99.5)
    now[0] = 1000
    assert bucket.wait_seconds(60) == 0 and bucket.wait_seconds(61) > 0
    bucket.take(-500)
    assert bucket.level == 60


@pytest.mark.parametrize("how", ["stream", "whole", "queued"])
def test_a_client_that_leaves_takes_its_request_along(world, how):
    url = world.gateway(running=1, key_concurrency=2)
    http = world.http(url)
    if how == "stream":
        with http.stream("POST", "/v1/completions", json={**TEXT, "prompt": "long", "stream": True}) as answer:
            pieces = answer.iter_raw()
            next(pieces)
    else:
        with asking(url, world.keys["acme"], "/v1/completions", {**TEXT, "prompt": "silent"}):
            assert wait_until(lambda: world.fake.asked)
    assert wait_until(lambda: len(world.fake.cancelled) == 1)
    limits = world.apps[0].state.gateway.limits
    assert wait_until(lambda: all(k.running == 0 for k in limits._keys.values()) and not limits._slots.locked())
    if how == "queued":
        with http.stream("POST", "/v1/completions", json={**TEXT, "prompt": "long", "stream": True}) as answer:
            pieces = answer.iter_raw()
            next(pieces)
            with asking(url, world.keys["acme"], "/v1/completions", TEXT):
                assert wait_until(lambda: limits._waiting == 1)
            assert wait_until(lambda: limits._waiting == 0)
            asked = len(world.fake.asked)
        time.sleep(0.2)
        assert len(world.fake.asked) == asked, "a request whose client left in the queue was sent to the engine"
    assert http.post("/v1/completions", json=TEXT).status_code == 200


def test_a_fast_stream_lets_others_have_their_turn():
    event = b'data: {"model": "a@1", "choices": [{"index": 0, "text": "x"}]}\n\n'

    async def chunks():
        for _ in range(20):
            yield event * 50
        yield b"data: [DONE]\n\n"

    async def run():
        sent, turns, done = [], 0, False

        async def send(message):
            sent.append(message)

        async def other():
            nonlocal turns
            while not done:
                turns += 1
                await asyncio.sleep(0)

        relay = Relay(
            None, "", "a", {}, tokens=1, usage=False, max_tokens=1, taking_seconds=1.0, names=None, client=None, limits=None,
            metrics=Metrics(), base_name=None,
        )  # fmt: skip
        beside = asyncio.ensure_future(other())
        await relay._pass_on(SimpleNamespace(aiter_bytes=chunks), "a@1", SimpleNamespace(used=None), 0.0, send)
        done = True
        await beside
        return turns, sent

    turns, sent = asyncio.run(run())
    assert len(sent) == 1003 and b'"model":"a"' in sent[500]["body"]
    assert turns >= 1000
