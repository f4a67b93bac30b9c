"""The embedded engine over HTTP: the openai client, streams, errors, cancelling, SIGTERM, death."""

import contextlib
import json
import os
import re
import signal
import socket
import subprocess
import sys
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import openai
import pytest
import torch

from tests.serving.serving import call, served
from veralib import VeraConfig, attach
from veralib.serving.embedded import EmbeddedEngine, Sampling
from veralib.serving.embedded.app import make_app
from veralib.serving.names import engine_name
from veralib.store import open_store

BOOKS = Path(__file__).parents[2] / "models" / "books-4m"


def books():
    from transformers import AutoModelForCausalLM

    return AutoModelForCausalLM.from_pretrained(BOOKS, dtype=torch.float32).eval()


def make_adapters(store, names):
    vera = attach(books())
    for seed, name in enumerate(names):
        vera.add(VeraConfig(rank=16, targets=["q_proj", "v_proj", "down_proj"], seed=seed % 2), name)
        generator = torch.Generator().manual_seed(seed)
        with torch.no_grad():
            for unit in vera.member(name).layout.units:
                for v in vera.member(name).vectors(unit.unit):
                    v.copy_(torch.randn(v.shape, generator=generator))
        store.put(name, vera.adapter(name))
    return vera


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    """(engine, address, store)."""
    store = open_store(tmp_path_factory.mktemp("store"))
    make_adapters(store, ["acme:ann", "acme:bob"])
    engine_of = EmbeddedEngine(str(BOOKS), store, name="books", max_requests=64, dtype="float32")  # whatever the processor has
    with engine_of as engine, served(make_app(engine)) as url:
        yield engine, url, store


@pytest.fixture
def client(place):
    return openai.OpenAI(base_url=place[1] + "/v1", api_key="none", max_retries=0, timeout=60)


def test_completions_equal_the_library(place, client):
    engine, _, store = place
    for model in ("books", "acme:ann", engine_name(store, "acme:bob")):
        asked = Sampling(max_tokens=10)
        expected = engine.generate(["Once upon a time"], None if model == "books" else model, asked)[0]
        answer = client.completions.create(model=model, prompt="Once upon a time", max_tokens=10, temperature=0)
        assert (answer.choices[0].text, answer.choices[0].finish_reason) == (expected.text, expected.finish)
        assert (answer.usage.prompt_tokens, answer.usage.completion_tokens) == (expected.prompt_tokens, len(expected.tokens))
        assert answer.model == model and answer.object == "text_completion"


def test_streams_say_the_same(client):
    asked = dict(model="acme:ann", prompt=["The king", "She said"], max_tokens=12, temperature=0, n=2)
    whole = client.completions.create(**asked)
    texts, usage, ends = [""] * 4, None, [None] * 4
    for chunk in client.completions.create(**asked, stream=True, stream_options={"include_usage": True}):
        usage = chunk.usage or usage
        for choice in chunk.choices:
            texts[choice.index] += choice.text
            ends[choice.index] = choice.finish_reason or ends[choice.index]
    assert texts == [c.text for c in whole.choices] and ends == [c.finish_reason for c in whole.choices]
    assert usage == whole.usage and texts[0] == texts[1] != texts[2]


def test_chat_whole_and_streamed(place, client):
    messages = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": [{"type": "text", "text": "Hello"}]}]
    asked = dict(model="acme:bob", messages=messages, max_completion_tokens=9, temperature=0)
    whole = client.chat.completions.create(**asked, logprobs=True, top_logprobs=2)
    deltas = [c.choices[0].delta for c in client.chat.completions.create(**asked, stream=True)]
    assert deltas[0].role == "assistant"
    assert "".join(d.content or "" for d in deltas) == whole.choices[0].message.content
    said = whole.choices[0].logprobs.content
    assert len(said) == whole.usage.completion_tokens and all(len(s.top_logprobs) == 2 for s in said)
    assert all(s.logprob == s.top_logprobs[0].logprob < 0 for s in said)  # greedy: the chosen is the likeliest
    tokens = call(place[1] + "/tokenize", {"messages": [{"role": "user", "content": "Hello"}]})[1]
    assert tokens["count"] == len(tokens["tokens"]) > 2 and tokens["max_model_len"] == 512


def test_tokenize_models_load_unload_metrics(place):
    engine, url, store = place
    assert call(url + "/tokenize", {"prompt": "Once upon"}) == (
        200,
        {"count": 4, "max_model_len": 512, "tokens": engine.encode("Once upon"), "token_strs": None},
    )
    name = engine_name(store, "acme:ann")
    assert call(url + "/v1/load_lora_adapter", {"lora_name": name, "lora_path": ""})[0] == 200
    assert name in [m["id"] for m in call(url + "/v1/models")[1]["data"]]
    assert call(url + "/v1/unload_lora_adapter", {"lora_name": name})[0] == 200
    assert call(url + "/health")[0] == 200  # what was to be done between two steps is done soon
    for _ in range(1000):
        if name not in engine.residents.names:
            break
        time.sleep(0.01)
    assert name not in [m["id"] for m in call(url + "/v1/models")[1]["data"]]
    assert call(url + "/v1/unload_lora_adapter", {"lora_name": name})[0] == 404
    text = call(url + "/metrics")[1]
    assert re.search(r'veralib_engine_requests_total{route="/v1/load_lora_adapter",status="200"} \d', text)
    assert "acme" not in text and "veralib_engine_resident_adapters" in text


GOOD = {"model": "books", "prompt": "Hello", "max_tokens": 2}
BAD = [
    ("prompt too long", {"prompt": "word " * 600}, 400, "maximum context length"),
    ("answer too long", {"max_tokens": 600}, 400, "maximum context length"),
    ("empty prompt", {"prompt": []}, 400, "empty"),
    ("token out of range", {"prompt": [1, 99999]}, 400, "99999"),
    ("negative token", {"prompt": [[-1]]}, 400, "-1"),
    ("wrong type", {"max_tokens": "many"}, 400, "max_tokens"),
    ("bool for int", {"max_tokens": True}, 400, "max_tokens"),
    ("no tokens", {"max_tokens": 0}, 400, "max_tokens"),
    ("hot", {"temperature": 1000}, 400, "temperature"),
    ("cold", {"temperature": -1}, 400, "temperature"),
    ("top_p", {"top_p": 0}, 400, "top_p"),
    ("n", {"n": 1000}, 400, "n is 1000"),
    ("best_of", {"best_of": 3}, 400, "best_of isn't supported"),
    ("echo", {"echo": True}, 400, "echo isn't supported"),
    ("unknown field", {"temprature": 1}, 400, "temprature isn't a field"),
    ("logprobs", {"logprobs": 99}, 400, "logprobs"),
    ("stop", {"stop": ""}, 400, "stop"),
    ("huge seed", {"seed": 2**70}, 400, "seed"),
    ("usage without stream", {"stream_options": {"include_usage": True}}, 400, "stream"),
    ("no such model", {"model": "acme:nobody"}, 404, "no model"),
    ("old version", {"model": "acme:ann@7-000000000000"}, 404, "no model"),
    ("path", {"model": "../../etc/passwd"}, 404, "no model"),
    ("NUL", {"model": "a\0b"}, 404, "no model"),
    ("half a pair", {"prompt": "\ud800"}, 400, "surrogate"),
    ("half a pair in the name", {"model": "a\udfff"}, 400, "unicode"),
    ("long name", {"model": "a" * 100_000}, 404, "no model"),
]


@pytest.mark.parametrize("change,status,said", [b[1:] for b in BAD], ids=[b[0] for b in BAD])
def test_bad_requests_are_refused_in_words(place, change, status, said):
    for stream in (False, True):
        body = {**GOOD, **change} | ({"stream": True} if stream else {})
        if stream and "stream_options" in change:
            continue
        got, answer = call(place[1] + "/v1/completions", body)
        assert got == status and said in answer["error"]["message"], answer
        assert set(answer["error"]) == {"message", "type", "param", "code"} and len(answer["error"]["message"]) < 1000
        if status == 404:
            assert answer["error"]["code"] == "model_not_found" and "acme:bob" not in answer["error"]["message"]


@pytest.mark.parametrize("data", [b"{", b"", b"[1]", b"\xff\xfe", b'{"model": "books"}', b'{"model": "books", "prompt": NaN}'])
def test_malformed_json_is_a_400(place, data):
    for route in ("/v1/completions", "/v1/chat/completions", "/tokenize", "/v1/load_lora_adapter"):
        status, answer = call(place[1] + route, data=data)
        assert status == 400 and answer["error"]["message"], (route, answer)


def test_an_embedding_of_a_language_model_is_refused(place):
    assert call(place[1] + "/v1/embeddings", {"model": "books", "input": "x"})[0] == 400


def test_broken_adapters_disturb_nobody(place):
    """Damaged in the store, for another base, of a rank too high, of huge numbers: 422, and the others' answers stay."""
    _, url, store = place
    vera = attach(books())
    for name, config in {
        "acme:wide": VeraConfig(rank=2048),
        "acme:huge": VeraConfig(rank=4),
        "acme:cut": VeraConfig(rank=4),
    }.items():
        vera.add(config, name)
        if name == "acme:huge":
            with torch.no_grad():
                for unit in vera.member(name).layout.units:
                    for v in vera.member(name).vectors(unit.unit):
                        v.fill_(1e30)
        store.put(name, vera.adapter(name))
    with torch.no_grad():
        other = books()
        other.model.layers[0].self_attn.q_proj.weight.add_(1.0)
    stranger = attach(other, VeraConfig(rank=4))
    store.put("acme:stranger", stranger.adapter("default"))
    cut = next(p for p in Path(store.files.root).glob("adapters/*/*cut*/*.vera"))
    cut.write_bytes(cut.read_bytes()[:-100])
    good = {**GOOD, "model": "acme:ann", "max_tokens": 20, "temperature": 0, "ignore_eos": True}
    expected = call(url + "/v1/completions", good)[1]["choices"][0]["text"]
    names = ["acme:wide", "acme:huge", "acme:cut", "acme:stranger"] * 2
    with ThreadPoolExecutor(16) as threads:
        fine = [threads.submit(call, url + "/v1/completions", good) for _ in range(8)]
        bad = [threads.submit(call, url + "/v1/completions", {**good, "model": n}) for n in names]
    assert [f.result()[1]["choices"][0]["text"] for f in fine] == [expected] * 8
    assert [b.result()[0] for b in bad] == [422] * 8, [b.result() for b in bad]
    words = " ".join(b.result()[1]["error"]["message"] for b in bad)
    assert "rank 2048" in words and "overflowed" in words and "damaged" in words and "other weights" in words


def test_a_new_version_answers_the_next_request_and_a_deleted_one_none(place):
    _, url, store = place
    vera = make_adapters(store, ["acme:eve"])
    old = engine_name(store, "acme:eve")
    ask = lambda model: call(url + "/v1/completions", {**GOOD, "model": model, "max_tokens": 8, "temperature": 0})  # noqa: E731
    first = ask(old)
    with torch.no_grad():
        for unit in vera.member("acme:eve").layout.units:
            vera.member("acme:eve").vectors(unit.unit)[1].neg_()
    store.put("acme:eve", vera.adapter("acme:eve"))
    second = ask("acme:eve")
    assert first[0] == second[0] == 200 and first[1]["choices"][0]["text"] != second[1]["choices"][0]["text"]
    assert ask(old)[0] == 404
    store.delete("acme:eve")
    assert ask("acme:eve")[0] == 404 and ask(engine_name(store, "acme:ann"))[0] == 200


def test_a_store_that_is_away_is_no_damaged_adapter(place, monkeypatch):
    _, url, store = place
    call(url + "/v1/unload_lora_adapter", {"lora_name": engine_name(store, "acme:bob")})
    broken = OSError(5, "Input/output error")
    for name in ("posix_fadvise", "listdir"):  # a record that can't be read, and a folder that can't be listed
        with monkeypatch.context() as m:
            m.setattr(os, name, lambda *_: (_ for _ in ()).throw(broken))
            status, answer = call(url + "/v1/completions", {**GOOD, "model": "acme:bob"})
        assert (status, answer["error"]["code"]) == (503, "store_unavailable"), answer
    assert call(url + "/v1/completions", {**GOOD, "model": "acme:bob"})[0] == 200


@pytest.mark.parametrize("stream", [True, False])
def test_a_client_that_leaves_stops_the_computing(place, stream):
    engine, url, _ = place
    host, port = url.removeprefix("http://").split(":")
    body = json.dumps({**GOOD, "model": "acme:ann", "max_tokens": 480, "ignore_eos": True, "stream": stream, "n": 2}).encode()
    with socket.create_connection((host, int(port))) as connection:
        head = (
            f"POST /v1/completions HTTP/1.1\r\nHost: x\r\nContent-Type: application/json\r\nContent-Length: {len(body)}\r\n\r\n"
        )
        connection.sendall(head.encode() + body)
        deadline = time.monotonic() + 20
        while engine.load != 2 and time.monotonic() < deadline:
            time.sleep(0.005)
        assert engine.load == 2
    while engine.load and time.monotonic() < deadline:
        time.sleep(0.01)
    before = engine.generated
    time.sleep(0.2)
    assert engine.load == 0 and engine.generated == before and all(e.pins == 0 for e in engine.residents.entries.values())


@pytest.mark.slow
def test_no_made_up_request_ends_in_a_5xx(place):
    """schemathesis: random values of the described types, and of other types."""
    schemathesis = pytest.importorskip("schemathesis")
    from hypothesis import HealthCheck, Phase, given, settings
    from hypothesis.errors import Unsatisfiable

    schema, sent, bad = schemathesis.openapi.from_url(place[1] + "/openapi.json"), 0, []
    quick = settings(
        max_examples=8, deadline=None, database=None, derandomize=True, phases=[Phase.generate],
        suppress_health_check=list(HealthCheck),
    )  # fmt: skip
    for operation in schema.get_all_operations():
        for mode in schemathesis.GenerationMode:

            @quick
            def ask(case):
                nonlocal sent
                sent += 1
                answer = case.call(timeout=20)
                if answer.status_code >= 500:
                    bad.append((case.path, answer.status_code, answer.text[:200]))

            with contextlib.suppress(Unsatisfiable):  # a route without parameters can't be asked wrongly
                given(operation.ok().as_strategy(generation_mode=mode))(ask)()
    assert not bad and sent > 50


def test_too_many_requests_are_told_to_come_back(place, monkeypatch):
    engine, url, _ = place
    monkeypatch.setattr(engine, "max_requests", 1)
    gate = threading.Event()
    engine.loop.between_steps(gate.wait)
    with ThreadPoolExecutor(1) as threads:
        first = threads.submit(call, url + "/v1/completions", GOOD)
        try:
            while not engine.load and not first.done():
                time.sleep(0.001)
            status, answer = call(url + "/v1/completions", GOOD)
        finally:
            gate.set()
        assert (status, answer["error"]["type"], first.result()[0]) == (429, "rate_limit_error", 200)


def test_a_key_is_asked_of_everybody_where_one_is_set(place, monkeypatch):
    monkeypatch.setenv("VLLM_API_KEY", "s3cret")
    with served(make_app(place[0])) as url:
        for authorization in (None, "s3cret", "Bearer", "Bearer s3cre", "Bearer s3cret2", "Basic s3cret", "Bearer s\u00e9cret"):
            headers = {} if authorization is None else {"Authorization": authorization}
            for path, body in (("/v1/models", None), ("/metrics", None), ("/v1/completions", GOOD), ("/nowhere", None)):
                status, answer = call(url + path, body, headers=headers)
                assert (status, answer["error"]["type"]) == (401, "authentication_error")
            assert call(url + "/health", headers=headers)[0] == 200
        for authorization in ("Bearer s3cret", "bearer s3cret"):
            assert call(url + "/v1/completions", GOOD, headers={"Authorization": authorization})[0] == 200


def start_server(store, *more):
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    command = [sys.executable, "-m", "veralib.serving.embedded", "--model", str(BOOKS), "--port", str(port), "--threads", "1"]
    environment = {**os.environ, "PYTHONPATH": str(BOOKS.parents[1])}
    process = subprocess.Popen([*command, "--store", str(store), *more], env=environment, stderr=subprocess.PIPE, text=True)
    url = f"http://127.0.0.1:{port}"
    for _ in range(600):
        assert process.poll() is None, process.stderr.read()
        try:
            if call(url + "/health")[0] == 200:
                return process, url
        except OSError:
            time.sleep(0.1)
    raise AssertionError("it didn't start")


@pytest.mark.slow
def test_sigterm_lets_an_answer_end(tmp_path):
    process, url = start_server(tmp_path / "store", "--served-model-name", "base")
    try:
        with ThreadPoolExecutor(1) as threads:
            body = {"model": "base", "prompt": "Once", "max_tokens": 300, "ignore_eos": True, "temperature": 0}
            answer = threads.submit(call, url + "/v1/completions", body)
            while "veralib_engine_running 0.0" in call(url + "/metrics")[1]:
                assert not answer.done(), "it was answered before the signal: nothing was tested"
                time.sleep(0.005)
            process.send_signal(signal.SIGTERM)
            status, said = answer.result()
        assert status == 200 and said["usage"]["completion_tokens"] == 300
        assert process.wait(30) == 0
    finally:
        process.kill()
        process.wait()


@pytest.mark.slow
def test_the_process_ends_when_the_loop_dies(tmp_path):
    script = tmp_path / "broken.py"
    script.write_text(
        "import sys\n"
        "from veralib.serving.embedded import batching\n"
        "from veralib.serving.embedded.__main__ import main\n"
        "real = batching.Loop._generation_step\n"
        "def step(self):\n"
        "    if self.steps > 3: raise MemoryError('no room')\n"
        "    real(self)\n"
        "batching.Loop._generation_step = step\n"
        "sys.exit(main(sys.argv[1:]))\n"
    )
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    arguments = ["--model", str(BOOKS), "--port", str(port), "--served-model-name", "base"]
    environment = {**os.environ, "PYTHONPATH": str(BOOKS.parents[1])}
    process = subprocess.Popen([sys.executable, str(script), *arguments], env=environment, stderr=subprocess.PIPE, text=True)
    try:
        url = f"http://127.0.0.1:{port}"
        for _ in range(600):
            try:
                if call(url + "/health")[0] == 200:
                    break
            except OSError:
                time.sleep(0.1)
        status, answer = call(url + "/v1/completions", {**GOOD, "model": "base", "max_tokens": 50, "ignore_eos": True})
        assert status == 503 and answer["error"]["type"] == "server_error"
        assert process.wait(30) == 3
    finally:
        process.kill()
        process.wait()
