"""vera serve, as a process: it starts, takes keys while it runs, and lets streams end when it is told to end."""

import json
import os
import platform
import re
import signal
import socket
import subprocess
import sys
import threading
import time
from pathlib import Path

import httpx2
import psutil
import pytest

from tests.serving.gateway.fake import fake_python, wait_until
from tests.serving.gateway.workplace import chats
from tests.test_cli import plain, vera
from veralib.serving.gateway.engine import free_port

TEXT = {"model": "tiny-base", "prompt": "x"}


@pytest.fixture
def server(world, tmp_path):
    """(process, url) of a vera serve in front of the fake."""
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        port = s.getsockname()[1]
    settings = tmp_path / "serve.yaml"
    settings.write_text(f"store: {world.store_path}\nstate: {world.state}\nport: 1\ndrain_delay: 0.5\ndrain_seconds: 5\n")
    command = [sys.executable, "-m", "veralib.cli", "serve", "--settings", settings, "--port", str(port)]
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)}
    process = subprocess.Popen([*command, "--engine-url", world.engine_url], env=environment, stderr=subprocess.DEVNULL)
    url = f"http://127.0.0.1:{port}"
    try:
        assert wait_until(lambda: _status(f"{url}/ready") == 200, 40)
        yield process, url
    finally:
        process.kill()
        process.wait()


def _status(url, **options):
    try:
        return httpx2.get(url, **options).status_code
    except httpx2.HTTPError:
        return None


def test_keys_come_and_go_while_it_runs(world, server):
    _, url = server
    out = vera("serve", "keys", "add", "--prefix", "initech:", "--note", "trial", "--state", world.state)
    key, id = re.search(r"^(sk-vera-(\w{12})-\S{43})$", out, re.MULTILINE).groups()
    ask = {"headers": {"Authorization": f"Bearer {key}"}}
    assert _status(f"{url}/v1/models", **ask) == 200
    listed = plain(vera("serve", "keys", "list", "--state", world.state))
    assert f"{id} initech:" in listed and "trial" in listed and key not in listed
    assert f"revoked {id}" in vera("serve", "keys", "revoke", id, "--state", world.state)
    assert _status(f"{url}/v1/models", **ask) == 401
    assert 'prefix is "initech"' in vera("serve", "keys", "add", "--prefix", "initech", "--state", world.state, code=1)


def test_a_tenant_is_forgotten_while_a_gateway_runs(world, server):
    _, url = server
    for name in ("acme:ann", "globex:ann"):
        world.http(url, name.split(":")[0]).post("/v1/completions", json={**TEXT, "model": name}).raise_for_status()
    files = world.client(url).files
    files.create(file=("a.jsonl", chats(2)), purpose="fine-tune")
    where = ("--store", world.store_path, "--state", world.state)
    out = plain(vera("serve", "forget", "acme:", *where))
    assert all(line in out for line in ("adapters 2", "keys 1", "files 1", "versions 2")) and "acme:ann acme:bob" in out
    assert world.http(url).get("/v1/models").status_code == 401 and list(world.store.names()) == ["globex:ann"]
    assert wait_until(lambda: [name.partition("@")[0] for name in world.fake.loaded] == ["globex:ann"])
    assert world.http(url, "globex").get("/v1/models/globex:ann").status_code == 200
    assert 'nothing begins with "acme:"' in plain(vera("serve", "forget", "acme:", *where, code=1))
    for wrong in (("globex", *where), ("globex:", "--store", "none", *where[2:]), ("globex:", *where[:2], "--state", "none")):
        vera("serve", "forget", *wrong, code=1)
    assert list(world.store.names()) == ["globex:ann"] and not os.path.exists("none")


def test_sigterm_lets_streams_end(world, server):
    process, url = server
    http = world.http(url)
    seen = []

    def read():
        with http.stream("POST", "/v1/completions", json={**TEXT, "prompt": "long", "stream": True}) as answer:
            seen.extend(line for line in answer.iter_lines() if line)

    reading = threading.Thread(target=read)
    reading.start()
    assert wait_until(lambda: world.fake.asked)
    process.send_signal(signal.SIGTERM)
    assert wait_until(lambda: _status(f"{url}/ready") == 503, 2), "a balancer must be told before the port closes"
    assert world.http(url).post("/v1/completions", json=TEXT).status_code == 200, "requests on their way are still taken"
    assert wait_until(lambda: _status(f"{url}/health") is None, 5)
    began = time.monotonic()
    reading.join()
    assert seen[-1] == "data: [DONE]" and process.wait(10) == 0 and time.monotonic() - began < 6


def test_the_deadline_ends_what_never_ends(world, server):
    process, url = server
    sent = threading.Thread(target=lambda: _post(world, url), daemon=True)
    sent.start()
    assert wait_until(lambda: world.fake.asked)
    began = time.monotonic()
    process.send_signal(signal.SIGTERM)
    process.wait(15)
    assert 4 < time.monotonic() - began < 12
    assert wait_until(lambda: world.fake.cancelled)


def test_sigterm_lets_a_stream_of_the_gateways_own_engine_end(tmp_path):
    """The real one, a child: it ends after the stream, and the gateway after it."""
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        port = s.getsockname()[1]
    url, root = f"http://127.0.0.1:{port}", Path(__file__).parents[3]
    given = {"store": tmp_path / "store", "state": tmp_path / "state", "model": root / "models" / "books-4m", "port": port}
    given["drain-seconds"] = 120  # a busy machine takes its time for 480 tokens
    command = [sys.executable, "-m", "veralib.cli", "serve", "--no-auth", "--engine-args", "--threads 1"]
    command += [str(part) for name, value in given.items() for part in (f"--{name}", value)]
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)}
    process = subprocess.Popen(command, env=environment, stderr=subprocess.DEVNULL)
    try:
        assert wait_until(lambda: _status(f"{url}/ready") == 200, 120)
        (engine,) = [p for p in psutil.Process(process.pid).children(recursive=True) if "veralib.serving.embedded" in p.cmdline()]
        asked = {"model": "books-4m", "prompt": "Once", "max_tokens": 480, "ignore_eos": True, "stream": True}
        asked["stream_options"] = {"include_usage": True}
        lines = []
        with httpx2.stream("POST", f"{url}/v1/completions", json=asked, timeout=60) as answer:
            for line in filter(None, answer.iter_lines()):
                if not lines:
                    process.send_signal(signal.SIGTERM)
                lines.append(line)
        assert lines[-1] == "data: [DONE]", lines[-1]
        assert json.loads(lines[-2].removeprefix("data: "))["usage"]["completion_tokens"] == 480
        assert process.wait(30) == 0 and wait_until(lambda: not engine.is_running(), 10)
    finally:
        process.kill()
        process.wait()


@pytest.mark.skipif(sys.platform != "linux", reason="the kernel of Linux alone tells a child that its parent is gone")
def test_a_gateway_that_is_killed_takes_its_engine_along(world, tmp_path):
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        port = s.getsockname()[1]
    given = {"store": world.store_path, "state": world.state, "model": "m", "engine-python": fake_python(tmp_path), "port": port}
    command = [sys.executable, "-m", "veralib.cli", "serve", "--no-auth"]
    command += [part for name, value in given.items() for part in (f"--{name}", str(value))]
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)}
    for _ in range(2):  # the second one serves what the first one left
        process = subprocess.Popen(command, env=environment, stderr=subprocess.DEVNULL)
        try:
            assert wait_until(lambda: _status(f"http://127.0.0.1:{port}/ready") == 200, 40)
            engines = [p for p in psutil.Process(process.pid).children(recursive=True) if "--served-model-name" in p.cmdline()]
            answer = httpx2.post(f"http://127.0.0.1:{port}/v1/completions", json={"model": "acme:ann", "prompt": "x"})
            assert answer.status_code == 200 and len(engines) == 1
        finally:
            process.kill()
            process.wait()
        assert wait_until(lambda engine=engines[0]: not engine.is_running())


def _post(world, url):
    try:
        world.http(url).post("/v1/completions", json={**TEXT, "prompt": "silent"})
    except httpx2.HTTPError:
        return


def test_what_cannot_be_served_is_said_in_one_line(tmp_path):
    assert "--store" in vera("serve", "--model", "m", code=1)
    assert "--engine-url" in vera("serve", "--store", tmp_path / "s", code=1)
    assert "everybody admin" in plain(vera("serve", "--store", "s", "--model", "m", "--no-auth", "--host", "0.0.0.0", code=1))
    assert "max_tokens" in vera("serve", "--store", "s", "--model", "m", "--max-tokens", "many", code=1)
    assert "can't read" in vera("serve", "--settings", tmp_path / "none.yaml", code=1)


def test_a_port_in_use_is_said_before_an_engine_starts(tmp_path):
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = taken.getsockname()[1]
        words = ("--store", tmp_path / "s", "--model", "m", "--no-auth", "--port", port, "--state", tmp_path / "state")
        said = plain(vera("serve", *words, code=1))
    assert f"can't listen on 127.0.0.1, port {port}" in said and "--port" in said
    assert not (tmp_path / "state/logs").exists()


def test_an_engine_that_never_answered_says_why_in_the_gateways_log(tmp_path):
    """A model that isn't there: its output lies in a file that a newcomer doesn't know of."""
    state, port = tmp_path / "state", free_port()
    words = ["--store", tmp_path / "s", "--model", tmp_path / "bsae", "--no-auth", "--port", str(port), "--state", state]
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)}
    with open(tmp_path / "log", "wb") as log:
        process = subprocess.Popen([sys.executable, "-m", "veralib.cli", "serve", *words], env=environment, stderr=log)
    try:
        assert wait_until(lambda: "bsae" in (tmp_path / "log").read_text().partition("the end of its output:")[2], 60)
    finally:
        process.terminate()
        process.wait(30)


ARENAS = """
import ctypes, sys, threading
from veralib.serving.gateway.run import share_arenas

if sys.argv[1] == "shared":
    share_arenas()
together = threading.Barrier(12)

def work():
    kept = [bytearray(600) for _ in range(50)]
    together.wait()

threads = [threading.Thread(target=work) for _ in range(12)]
[t.start() for t in threads]
[t.join() for t in threads]
ctypes.CDLL(None).malloc_stats()
"""


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="arenas are glibc's")
def test_threads_share_the_allocators_arenas():
    """Each arena keeps what its threads ever needed at once: many of them hold what nobody needs."""

    def arenas(how):
        command = [sys.executable, "-c", ARENAS, how]
        return subprocess.run(command, capture_output=True, text=True, check=True).stderr.count("Arena ")

    assert arenas("shared") <= 2 < arenas("alone")
