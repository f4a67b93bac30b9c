"""The engine as a child process that dies, hangs or never starts; an engine elsewhere that goes; streams that break."""

import asyncio
import json
import os
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path
from types import SimpleNamespace

import httpx2
import openai
import psutil
import pytest

from tests.serving.gateway.fake import Fake, fake_python, serving, wait_until
from veralib.errors import ConfigError
from veralib.serving.gateway import engine
from veralib.serving.gateway.app import make_app
from veralib.serving.gateway.client import ABSENT, COUNTS, SILENT, EngineClient
from veralib.serving.gateway.errors import ApiError
from veralib.serving.gateway.settings import GatewaySettings

TEXT = {"model": "acme:ann", "prompt": "x"}


def test_a_child_is_started_again_and_ends_with_the_gateway(world, tmp_path):
    python = fake_python(tmp_path)
    url = world.gateway(
        ready=False, engine_url=None, engine_python=python, model="m", model_name="child-base", engine_args="--start-seconds 3"
    )
    http = world.http(url)
    early = http.post("/v1/completions", json=TEXT)
    assert early.status_code == 503 and early.headers["retry-after"] == "2" and http.get("/health").status_code == 200
    assert http.get("/ready").status_code == 503
    assert wait_until(lambda: http.get("/ready").status_code == 200)
    assert http.post("/v1/completions", json=TEXT).status_code == 200
    looked_after = world.apps[0].state.gateway.engine
    first = looked_after.process.pid
    results = []
    waiting = threading.Thread(
        target=lambda: results.append(world.http(url).post("/v1/completions", json={**TEXT, "prompt": "silent"}))
    )
    waiting.start()
    with http.stream("POST", "/v1/completions", json={**TEXT, "prompt": "long", "stream": True}) as stream:
        pieces = stream.iter_lines()
        next(pieces)
        assert wait_until(lambda: {"silent", "long"} <= set(httpx2.get(f"{looked_after.url}/asked").json()))
        os.kill(first, signal.SIGKILL)
        rest = [line for line in pieces if line]
    waiting.join()
    assert wait_until(lambda: looked_after.process is None or looked_after.process.pid != first)
    assert json.loads(rest[-1].removeprefix("data: "))["error"]["code"] == "engine_unavailable"
    assert results[0].status_code == 503 and results[0].headers["retry-after"] and "engine_unavailable" in results[0].text
    assert wait_until(lambda: http.get("/ready").status_code == 200)
    assert http.post("/v1/completions", json=TEXT).status_code == 200 and looked_after.process.pid != first
    assert looked_after.log.is_file() and Path(world.state) in looked_after.log.parents
    second = looked_after.process.pid
    world.stack.close()
    assert wait_until(lambda: not Path(f"/proc/{second}").exists())


def test_a_child_whose_health_says_that_it_is_dead_is_started_again(world, tmp_path):
    """vLLM's server goes on without the process that computes: each request would fail until it is taken for hung."""
    url = world.gateway(ready=False, engine_url=None, engine_python=fake_python(tmp_path), model="m", model_name="child-base")
    http, engine_of = world.http(url), world.apps[0].state.gateway.engine
    assert wait_until(lambda: engine_of.up)  # it has seen the engine well itself: /ready looks for itself
    first = engine_of.process.pid
    assert http.post("/v1/completions", json={**TEXT, "prompt": "faint"}).status_code == 200
    assert wait_until(lambda: engine_of.process is not None and engine_of.process.pid != first)
    assert wait_until(lambda: http.get("/ready").status_code == 200)
    assert http.post("/v1/completions", json=TEXT).status_code == 200


def test_a_child_that_listens_no_more_is_started_again(world, tmp_path, caplog):
    """A server that ends waits for its open answers, and one of these never ends."""
    url = world.gateway(ready=False, engine_url=None, engine_python=fake_python(tmp_path), model="m", model_name="child-base")
    http, engine_of = world.http(url), world.apps[0].state.gateway.engine
    assert wait_until(lambda: engine_of.up)
    first, results = engine_of.process.pid, []
    silent = {**TEXT, "prompt": "silent"}
    waiting = threading.Thread(target=lambda: results.append(world.http(url).post("/v1/completions", json=silent)))
    waiting.start()
    assert wait_until(lambda: "silent" in httpx2.get(f"{engine_of.url}/asked").json())
    os.kill(first, signal.SIGTERM)
    assert wait_until(lambda: engine_of.process is not None and engine_of.process.pid != first)
    waiting.join()
    assert "the engine listens no more" in caplog.text  # it didn't end by itself
    assert results[0].status_code == 503 and "engine_unavailable" in results[0].text
    assert wait_until(lambda: http.get("/ready").status_code == 200)
    assert http.post("/v1/completions", json=TEXT).status_code == 200


def test_a_child_that_never_starts_is_tried_with_pauses(world, tmp_path):
    python = fake_python(tmp_path)
    url = world.gateway(ready=False, engine_url=None, engine_python=python, model="m", engine_args="--die-at-start")
    engine_of = world.apps[0].state.gateway.engine
    assert wait_until(lambda: engine_of.run >= 3)
    assert httpx2.get(f"{url}/ready").status_code == 503 and httpx2.get(f"{url}/health").status_code == 200
    assert world.http(url).post("/v1/completions", json=TEXT).status_code == 503


def test_a_python_that_is_not_there(world, caplog):
    url = world.gateway(ready=False, engine_url=None, model="m", engine_python="/nonexistent/python")
    assert world.http(url).post("/v1/completions", json=TEXT).status_code == 503
    assert httpx2.get(f"{url}/health").status_code == 200
    assert wait_until(lambda: '"/nonexistent/python" is no program' in caplog.text)


def has_ended(pid: int) -> bool:
    try:
        return psutil.Process(pid).status() == psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return True


@pytest.mark.skipif(sys.platform != "linux", reason="only Linux tells a process that its parent died")
def test_a_child_dies_with_the_process_that_started_it():
    """Killed, not ended: nothing of that process's own could still run."""
    code = (
        "import subprocess, sys; from veralib.serving.gateway.engine import bound_to_us\n"
        "child = subprocess.Popen(bound_to_us(['sleep', '600'])); print(child.pid, flush=True); child.wait()"
    )
    with subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, text=True) as parent:
        child = int(parent.stdout.readline())
        assert wait_until(lambda: Path(f"/proc/{child}/comm").read_text() == "sleep\n")
        parent.kill()
    assert wait_until(lambda: has_ended(child))


def test_commands():
    given = {"store": "s", "model": "org/name", "engine_args": "--max-model-len 128 --x 'a b'"}
    embedded = engine.command(GatewaySettings(**given), 7)
    assert embedded[:3] == [sys.executable, "-m", "veralib.serving.embedded"] and embedded[-4:] == [
        "--max-model-len",
        "128",
        "--x",
        "a b",
    ]
    assert embedded[embedded.index("--store") + 1] == os.path.abspath("s") and embedded[embedded.index("--port") + 1] == "7"
    vllm = engine.command(GatewaySettings(**given, engine="vllm", engine_python="/v/python", model_name="base"), 7)
    assert vllm[:3] == ["/v/python", "-m", "vllm.entrypoints.openai.api_server"] and "--enable-lora" in vllm
    assert vllm[vllm.index("--served-model-name") + 1] == "base"
    assert json.loads(vllm[vllm.index("--additional-config") + 1])["vera"]["store"] == os.path.abspath("s")


def test_an_engine_elsewhere_goes_and_comes(world):
    fake = Fake("other-base")
    with serving(fake.app) as elsewhere:
        url = world.gateway(engine_url=f"{elsewhere}/v1")
        http = world.http(url)
        assert http.get("/v1/models").json()["data"][0]["id"] == "other-base"
    gone = http.post("/v1/completions", json=TEXT)
    assert gone.status_code == 503 and gone.headers["retry-after"] == "2" and http.get("/ready").status_code == 503


def test_a_stream_that_breaks_is_an_error_to_the_client(world):
    client = world.client(world.gateway())
    stream = client.completions.create(model="acme:ann", prompt="die", stream=True)
    with pytest.raises(openai.APIError, match="engine"):
        list(stream)


def test_an_engine_that_says_nothing(world):
    http = world.http(world.gateway(engine_seconds=1.0))
    answer = http.post("/v1/completions", json={**TEXT, "prompt": "silent"})
    assert answer.status_code == 504 and wait_until(lambda: world.fake.cancelled)


@pytest.mark.parametrize("status,expected", [(400, 400), (422, 422), (500, 502), (503, 503), (429, 503), (401, 502), (404, 400)])
def test_what_the_engine_refuses(world, status, expected):
    """404 is the fake's for a path that it lacks: its message speaks of no model."""
    http = world.http(world.gateway())
    answer = http.post("/v1/completions", json={**TEXT, "prompt": f"fail:{status}"})
    assert answer.status_code == expected and (answer.headers.get("retry-after") is not None) == (expected == 503)


def test_an_engine_that_says_why_it_cannot_now_is_quoted(world):
    http = world.http(world.gateway())
    away = http.post("/v1/completions", json={**TEXT, "prompt": "fail:503 type:store_unavailable"})
    assert (away.status_code, away.json()["error"]["code"]) == (503, "store_unavailable")
    changing = http.post("/v1/completions", json={**TEXT, "prompt": "fail:503 type:model_changing"})
    error = changing.json()["error"]
    assert changing.status_code == 503 and error["code"] == "model_changing" and changing.headers["retry-after"]
    assert error["message"].startswith("acme:ann and … failed")


def test_an_engine_that_could_not_be_asked_is_not_absent(world, monkeypatch):
    """A gateway without descriptors must not end an engine for it."""
    world.gateway()
    client = world.apps[0].state.gateway.client

    async def look(error):
        async def get(*args, **options):
            raise httpx2.ConnectError("no connection") from error

        monkeypatch.setattr(client._looks, "get", get)
        return await client._look()

    assert asyncio.run(look(ConnectionRefusedError(111, "refused"))) == ABSENT
    assert asyncio.run(look(OSError(24, "Too many open files"))) == SILENT


def test_jobs_of_a_rank_that_the_engine_does_not_take(world, tmp_path, caplog):
    settings = {"state": str(tmp_path), "store": world.store_path, "model": "m", "engine": "vllm", "max_rank": 32}
    make_app(GatewaySettings(**settings))  # nobody said that jobs come
    assert "rank 64" in caplog.text
    for rank in ("64", "{q_proj: 8, v_proj: 64}"):
        (tmp_path / "jobs.yaml").write_text(f"rank: {rank}\n")
        with pytest.raises(ConfigError, match=r"rank 64, .* up to 32: give --max-rank 64"):
            make_app(GatewaySettings(**settings, jobs=str(tmp_path / "jobs.yaml")))


def test_the_engine_is_asked_with_its_own_key_never_with_the_clients(world, monkeypatch):
    monkeypatch.setenv("VERA_ENGINE_KEY", "engine-secret")
    world.http(world.gateway()).post("/v1/completions", json=TEXT).raise_for_status()
    assert world.fake.headers[-1]["authorization"] == "Bearer engine-secret"
    assert world.keys["acme"] not in json.dumps(world.fake.headers) + json.dumps(world.fake.asked)


def test_a_look_at_the_engine_does_not_wait_behind_requests(world):
    """An engine that seems not to answer is ended; and /ready, which anybody may ask, costs one look at a time."""

    async def check():
        client = EngineClient(SimpleNamespace(url=world.engine_url, key=None, run=1), 20.0, 1)
        async with client.stream("/v1/completions", {"model": "tiny-base", "prompt": "slow long", "stream": True}):
            looks, look = [], client._look

            async def counted():
                looks.append(1)
                return await look()

            client._look = counted
            answers = await asyncio.gather(*(client.healthy() for _ in range(50)))
        about = [await client.about(fresh=True)]
        cards, asked = client._cards, []

        async def counted_cards():
            asked.append(1)
            return await cards()

        client._cards, client._about = counted_cards, None
        about += await asyncio.gather(*(client.about() for _ in range(50)))
        about += await asyncio.gather(*(client.about(fresh=True) for _ in range(50)))
        await client.close()
        return answers, len(looks), {each.name for each in about}, len(asked)

    assert asyncio.run(check()) == ([True] * 50, 1, {"tiny-base"}, 2)


@pytest.mark.parametrize(("pause", "answers"), [(0.0, True), (1.2, False)])
def test_what_was_sent_into_a_connection_that_closed_is_sent_again(pause, answers):
    """At once, and once: a connection that ends later may have ended because of the request."""

    async def check():
        came = []

        async def serve(reader, writer):
            await reader.readuntil(b"\r\n\r\n")
            came.append(1)
            if len(came) == 1:
                await asyncio.sleep(pause)
            else:
                writer.write(b"HTTP/1.1 200 OK\r\nContent-Length: 2\r\n\r\n{}")
            writer.close()

        server = await asyncio.start_server(serve, "127.0.0.1", 0)
        url = f"http://127.0.0.1:{server.sockets[0].getsockname()[1]}"
        client = EngineClient(SimpleNamespace(url=url, key=None, run=1), 20.0, 4)
        try:
            async with client.stream("/v1/completions", {}) as answer:
                return await answer.aread(), len(came)
        except ApiError as e:
            return e.status, len(came)
        finally:
            await client.close()
            server.close()

    assert asyncio.run(check()) == ((b"{}", 2) if answers else (503, 1))


def test_counts_of_tokens_leave_connections_for_what_runs(world, monkeypatch):
    most = []

    async def check():
        client = EngineClient(SimpleNamespace(url=world.engine_url, key=None, run=1), 20.0, 100)
        running = 0

        async def post(path, body):
            nonlocal running
            running += 1
            most.append(running)
            await asyncio.sleep(0.01)
            running -= 1
            return SimpleNamespace(status_code=404)

        client.post = post
        await asyncio.gather(*(client.count_tokens({}) for _ in range(100)))
        await client.close()

    asyncio.run(check())
    assert len(most) == 100 and max(most) == COUNTS


def test_a_stream_is_passed_on_as_it_comes(world):
    http = world.http(world.gateway())
    times = []
    with http.stream("POST", "/v1/completions", json={**TEXT, "prompt": "slow", "stream": True}) as answer:
        for line in answer.iter_lines():
            if line:
                times.append(time.monotonic())
    assert len(times) == 6 and times[4] - times[0] > 0.15


def test_a_connection_is_given_up_before_an_engine_closes_it():
    """Both at 5 seconds meet now and then: a request goes into a connection that is being closed, and becomes a 503."""
    import inspect

    import uvicorn

    from veralib.serving.gateway.client import IDLE_SECONDS

    kept = inspect.signature(uvicorn.Config).parameters["timeout_keep_alive"].default
    assert kept / 2 >= IDLE_SECONDS
