"""A gateway in front of the real embedded engine with an encoder: embeddings, classes, metrics, clients that leave."""

import re
import threading

import httpx2
import pytest
import torch

from tests.conftest import randomise, tiny_bert
from tests.serving.gateway.conftest import make_world
from tests.serving.gateway.fake import asking, serving, wait_until
from tests.serving.gateway.test_metrics import values
from tests.serving.test_embedded_encoder import Letters
from veralib import VeraConfig, attach
from veralib.serving.embedded.app import make_app
from veralib.serving.embedded.encoder import EncoderEngine

TEXTS = ["abc", "the longest of all"]


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    """(world, engine): adapters of acme:ann and globex:ann have heads of their own."""
    with make_world(tmp_path_factory.mktemp("world")) as world:
        vera = attach(tiny_bert())
        for seed, name in enumerate(("acme:ann", "globex:ann")):
            vera.add(VeraConfig(rank=4, targets=["query", "value"], train_modules=["classifier"]), name)
            randomise(vera, name, seed, 0.8)
            world.store.put(name, vera.adapter(name))
        with EncoderEngine(tiny_bert(), world.store, tokenizer=Letters(), name="bert") as engine:
            world.url = world.gateway(engine_url=world.stack.enter_context(serving(make_app(engine))))
            yield world, engine


def test_embeddings_by_the_official_client(place):
    world, engine = place
    client = world.client(world.url)
    for name in ("bert", "acme:ann"):
        answer = client.embeddings.create(model=name, input=TEXTS)
        expected = engine.embed(TEXTS, None if name == "bert" else name)
        torch.testing.assert_close(torch.tensor([d.embedding for d in answer.data]), torch.tensor(expected))
        assert answer.model == name and answer.usage.prompt_tokens == sum(map(len, TEXTS))
    assert world.http(world.url).post("/v1/embeddings", json={"model": "globex:ann", "input": "x"}).status_code == 404


def test_classes_by_the_tenants_own_head(place):
    world, engine = place
    for who, name, foreign in (("acme", "acme:ann", "globex:ann"), ("globex", "globex:ann", "acme:ann")):
        http = world.http(world.url, who)
        answer = http.post("/classify", json={"model": name, "input": TEXTS}).raise_for_status().json()
        probabilities = [d["probs"] for d in answer["data"]]
        torch.testing.assert_close(torch.tensor(probabilities), torch.tensor(engine.classify(TEXTS, name)))
        assert answer["model"] == name and answer["usage"]["prompt_tokens"] == sum(map(len, TEXTS))
        assert http.post("/classify", json={"model": foreign, "input": TEXTS}).status_code == 404
        too_long = http.post("/classify", json={"model": name, "input": "x" * 100})
        assert too_long.status_code == 400 and too_long.json()["error"]["code"] == "context_length_exceeded"


def test_classify_has_the_limits_of_a_key(place):
    world, _ = place
    http = world.http(world.gateway(key_requests_per_minute=2, max_inputs=3, engine_url=world.apps[0].state.gateway.engine.url))
    many = http.post("/classify", json={"model": "acme:ann", "input": ["x"] * 4})
    assert many.status_code == 400 and many.json()["error"]["code"] == "limit_exceeded"
    assert [http.post("/classify", json={"model": "acme:ann", "input": "x"}).status_code for _ in range(2)] == [200, 429]


def test_what_an_encoder_has_not_is_said(place):
    """A path that the engine lacks isn't a model that nobody has."""
    world, _ = place
    answer = world.http(world.url).post("/v1/completions", json={"model": "acme:ann", "prompt": "x"})
    assert answer.status_code == 400 and "no /v1/completions" in answer.json()["error"]["message"]


def test_the_engines_own_metrics_come_through(place):
    world, engine = place
    http, admin = world.http(world.url), world.http(world.url, "admin")
    asked = {"model": "acme:ann", "input": TEXTS}
    http.post("/v1/unload_lora_adapter", json={"lora_name": "acme:ann"}).raise_for_status()
    before = values(admin.get("/metrics").text)
    http.post("/v1/embeddings", json=asked), http.post("/v1/embeddings", json=asked)
    page = admin.get("/metrics").text
    found, held = values(page), engine.residents.statistics
    assert found["vera_engine_resident_adapters", ""] == held.adapters > 0
    assert found["vera_engine_resident_bytes", ""] == held.bytes > 0
    grown = {n: found[f"vera_engine_{n}_total", ""] - before[f"vera_engine_{n}_total", ""] for n in ("adapter_hits", "steps")}
    assert grown["adapter_hits"] >= 1 and grown["steps"] >= 2
    assert found["vera_engine_adapter_misses_total", ""] == before["vera_engine_adapter_misses_total", ""] + 1
    types = re.findall(r"^# TYPE (\S+)", page, re.MULTILINE)
    assert len(types) == len(set(types)), "a name twice is a page that Prometheus refuses"


@pytest.mark.parametrize("path", ["/v1/embeddings", "/classify"])
def test_a_client_that_leaves_stops_the_computing(place, path):
    """By way of the gateway: what the engine hasn't begun, it never does."""
    world, engine = place
    asked = {"model": "bert" if path == "/v1/embeddings" else "acme:ann", "input": ["x"] * 100}
    world.http(world.url).post(path, json=asked).raise_for_status()  # the adapter is in memory
    gate = threading.Event()
    engine.between_steps(gate.wait)
    try:
        with asking(world.url, world.keys["acme"], path, asked):
            assert wait_until(lambda: engine.load == 100)
        page = lambda: httpx2.get(world.apps[0].state.gateway.engine.url + "/metrics").text  # noqa: E731
        assert wait_until(lambda: f'requests_total{{route="{path}",status="499"}}' in page())
        before = engine.steps
    finally:
        gate.set()
    assert wait_until(lambda: engine.load == 0) and engine.steps == before
    assert all(e.pins == 0 for e in engine.residents.entries.values())
    assert engine.embed(["x"]) and engine.alive
