"""Whatever is sent, the answer is a 4xx in the OpenAI API's form, and the next request is answered."""

import json
import socket

import pytest

from veralib.serving.gateway import errors

JSON = {"Content-Type": "application/json"}
CHAT = {"model": "acme:ann", "messages": [{"role": "user", "content": "x"}]}
TEXT = {"model": "acme:ann", "prompt": "x"}


@pytest.fixture
def world(shared_world):
    shared_world.fake.asked.clear()
    return shared_world


@pytest.fixture
def http(world):
    return world.http(world.url)


def check(answer, status, world):
    assert answer.status_code == status, answer.text[:500]
    error = answer.json()["error"]
    assert error["message"] and error["type"] and len(answer.content) < 3000
    assert len(world.fake.asked) == 0


@pytest.mark.parametrize(
    "name",
    [
        "a/b",
        "../../etc/passwd",
        "..",
        ".",
        "acme:a\0b",
        "аcme:ann",
        "acme:ann ",
        "ACME:ann",
        "%2e%2e",
        "acme:" + "a" * 200,
        "x" * 3_000_000,
        "\ud800",
        "acme:\u202eann",
        "",
        "acme:ann\n",
        "acme:'; DROP TABLE adapters;--",
    ],
)
def test_names_that_are_none(world, http, name):
    for path, body in (("/v1/completions", {**TEXT, "model": name}), ("/v1/load_lora_adapter", {"lora_name": name})):
        check(
            http.post(path, content=json.dumps(body), headers=JSON),
            404,
            world,
        )
    assert http.post("/v1/completions", json=TEXT).status_code == 200


def test_a_name_of_10_megabytes(world, http):
    check(http.post("/v1/completions", json={**TEXT, "model": "x" * 10_000_000}), 413, world)
    check(http.post("/v1/unload_lora_adapter", json={"lora_name": "x" * 4_000_000}), 404, world)


@pytest.mark.parametrize(
    "path",
    [
        "/v1/models/a%2Fb",
        "/v1/models/..%2f..%2fetc",
        "/v1/models/acme:a%00b",
        "/v1/models/%ff%fe",
        "/v1/models/acme:ann/x/y",
        "/v1/models/%D0%B0cme:ann",
        "/v1/nothing",
        "/v1/models/acme:ann/versions/2",
    ],
)
def test_paths_that_are_none(world, http, path):
    for method in ("GET", "DELETE"):
        answer = http.request(method, path)
        assert answer.status_code in (404, 405) and answer.json()["error"]["message"]
    assert sorted(world.store.names()) == ["acme:ann", "acme:bob", "globex:ann"]


@pytest.mark.parametrize(
    "content", [b"", b"{", b"[]", b"null", b'"x"', b"\xff\xfe", b"[" * 100_000, b'{"model": NaN}', b'{"a":' * 5000, b"1" * 5000]
)
def test_bodies_that_are_none(world, http, content):
    for path in ("/v1/completions", "/v1/chat/completions", "/v1/embeddings", "/v1/models/acme:ann/rollback"):
        check(http.post(path, content=content, headers=JSON), 400, world)


@pytest.mark.parametrize(
    "wrong",
    [
        {"temperature": -1},
        {"temperature": "warm"},
        {"temperature": 1e400},
        {"top_p": 0},
        {"top_p": 2},
        {"n": 0},
        {"n": 10**6},
        {"n": 1.5},
        {"n": True},
        {"max_tokens": 0},
        {"max_tokens": -5},
        {"max_tokens": 10**9},
        {"max_tokens": "1"},
        {"stop": ["a"] * 5},
        {"stop": ["x" * 1000]},
        {"stop": [1]},
        {"stop": ""},
        {"seed": 2**70},
        {"logit_bias": {"a": 1}},
        {"logit_bias": {"1": 1000}},
        {"top_k": 1.5},
        {"min_p": 2},
        {"repetition_penalty": 0},
        {"stream": "maybe"},
        {"stream_options": {"x": 1}},
        {"stream_options": {"include_usage": True}},
        {"stop_token_ids": [-1]},
        {"frequency_penalty": 3},
        {"model": None},
        {"model": 3},
        {"user": 7},
        {"cache_salt": "x" * 300},
        {"cache_salt": 3},
        {"max_tokens": 64},
        {"min_tokens": -1},
        {"metadata": {"a": 1}},
    ],
    ids=str,
)
def test_values_that_are_wrong(world, http, wrong):
    for path, body in (("/v1/completions", TEXT), ("/v1/chat/completions", CHAT)):
        answer = http.post(path, content=json.dumps({**body, **wrong}), headers=JSON)
        world.fake.asked[:] = [a for a in world.fake.asked if a[0] != "/tokenize"]
        check(answer, 400, world)
        assert next(iter(wrong)) in answer.text or "max_tokens" in wrong


@pytest.mark.parametrize(
    "field",
    [
        "lora_request",
        "kv_transfer_params",
        "prompt_embeds",
        "mm_processor_kwargs",
        "media_io_kwargs",
        "documents",
        "guided_regex",
        "chat_template",
        "chat_template_kwargs",
        "add_generation_prompt",
        "priority",
        "prompt_logprobs",
        "vllm_xargs",
        "truncate_prompt_tokens",
        "allowed_token_ids",
        "structured_outputs",
        "logits_processors",
        "request_id",
        "cache_salt2",
        "echo2",
    ],
)
def test_fields_of_the_engines_own_are_refused_by_name(world, http, field):
    for path, body in (("/v1/completions", TEXT), ("/v1/chat/completions", CHAT)):
        answer = http.post(path, json={**body, field: {"url": "file:///etc/passwd"}})
        check(answer, 400, world)
        assert f"{field}: this field isn't taken here" in answer.json()["error"]["message"]


@pytest.mark.parametrize(
    "messages",
    [
        [],
        [{}],
        [{"role": "god", "content": "x"}],
        [{"role": "user", "content": 3}],
        "x",
        [{"role": "user", "content": [{"type": "image_url", "image_url": {"url": "http://10.0.0.1/"}}]}],
        [{"role": "user", "content": "x", "prefix": True}],
    ],
    ids=str,
)
def test_messages_that_are_none(world, http, messages):
    check(http.post("/v1/chat/completions", json={**CHAT, "messages": messages}), 400, world)


@pytest.mark.parametrize("prompt", [[], [[]], None, 3, {"a": 1}, [1, "a"], [-1], [["a"]], ["x"] * 17, [1] * 100, "\ud800"])
def test_prompts_that_are_none(world, http, prompt):
    content = json.dumps({**TEXT, "prompt": prompt})
    check(http.post("/v1/completions", content=content, headers=JSON), 400, world)


MANY = 40_000
EXTRA = {f"x{i}": 1 for i in range(MANY)}
FLOODS = {
    "prompts": ("/v1/completions", {"prompt": [None] * MANY}),
    "tokens": ("/v1/completions", {"prompt": [[None] * MANY]}),
    "inputs": ("/v1/embeddings", {"input": [{}] * MANY}),
    "messages": ("/v1/chat/completions", {"messages": [1] * MANY}),
    "fields": ("/v1/chat/completions", {"messages": [{"role": "user", "content": "x"}], **EXTRA}),
    "fields of a message": ("/v1/chat/completions", {"messages": [{"role": "user", "content": "x", **EXTRA}]}),
    "parts": ("/v1/chat/completions", {"messages": [{"role": "user", "content": [{"type": "text"}] * MANY}]}),
    "calls": ("/v1/chat/completions", {"messages": [{"role": "assistant", "tool_calls": [1] * MANY}]}),
    "tools": ("/v1/chat/completions", {"messages": [{"role": "user", "content": "x"}], "tools": [1] * MANY}),
    "stream options": ("/v1/completions", {"prompt": "x", "stream_options": EXTRA}),
    "metadata": ("/v1/completions", {"prompt": "x", "metadata": EXTRA}),
    "stops": ("/v1/completions", {"prompt": "x", "stop": [1] * MANY}),
    "stop tokens": ("/v1/completions", {"prompt": "x", "stop_token_ids": [None] * MANY}),
    "biases": ("/v1/completions", {"prompt": "x", "logit_bias": EXTRA}),
    "a job's fields": ("/v1/fine_tuning/jobs", {"training_file": "x", **EXTRA}),
    "a job's metadata": ("/v1/fine_tuning/jobs", {"training_file": "x", "metadata": EXTRA}),
    "a job's hyperparameters": ("/v1/fine_tuning/jobs", {"training_file": "x", "hyperparameters": EXTRA}),
    "a version": ("/v1/models/acme:ann/rollback", EXTRA),
}


@pytest.mark.parametrize("what", FLOODS)
def test_a_flood_of_faults_costs_no_more_than_one(http, what, monkeypatch):
    """An error for each of 800,000 list entries, which fit into 4 MiB, held everybody's requests up for half a minute."""
    path, body = FLOODS[what]
    made, inner = [], errors.from_validation
    monkeypatch.setattr(errors, "from_validation", lambda e: made.append(len(e.errors())) or inner(e))
    answer = http.post(path, json={"model": "acme:ann", **body})
    assert answer.status_code == 400 and len(answer.content) < 1500, answer.text[:500]
    assert made and made[0] < 20


def test_tools_nested_without_end(world, http):
    deep = '{"a":' * 900 + "1" + "}" * 900
    body = json.dumps(CHAT)[:-1] + f', "tools": [{deep}]}}'
    answer = http.post("/v1/chat/completions", content=body, headers=JSON)
    assert 400 <= answer.status_code < 500
    assert http.post("/v1/completions", json=TEXT).status_code == 200


@pytest.mark.parametrize(
    "raw",
    [
        b"GET / HTTP/9.9\r\n\r\n",
        b"\0\0\0\0",
        b"POST /v1/completions HTTP/1.1\r\nContent-Length: -3\r\n\r\n",
        b"GET /" + b"a" * 200_000 + b" HTTP/1.1\r\n\r\n",
    ],
)
def test_bytes_that_are_no_http(world, raw):
    url = world.url
    host, _, port = url.removeprefix("http://").partition(":")
    with socket.create_connection((host, int(port)), timeout=5) as s:
        s.sendall(raw)
        s.settimeout(5)
        assert b" 4" in s.recv(200)[:15]
    assert world.http(url).post("/v1/completions", json=TEXT).status_code == 200
