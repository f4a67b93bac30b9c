"""The HTTP server, started as a user starts it, asked by the official client."""

import json
import sys
import time
from pathlib import Path

import pytest

pytest.importorskip("vllm", reason="needs vLLM: make test-vllm builds an environment with it and runs this there")

import httpx2
from prometheus_client.parser import text_string_to_metric_families

from veralib.serving.names import engine_name

from .served import MODEL, PROMPT, Served


class Server(Served):
    """vLLM in processes of its own, over a store."""

    def __init__(self, folder: Path) -> None:
        super().__init__(folder)
        vera = {"vera": {"store": str(folder / "store"), "max_rank": 32}}
        command = [
            sys.executable, "-m", "vllm.entrypoints.openai.api_server", "--host", "127.0.0.1", "--port", str(self.port),
            "--model", str(MODEL), "--served-model-name", "base", "--dtype", "float32", "--max-model-len", "256",
            "--enforce-eager",
            "--enable-lora", "--max-loras", "2", "--max-cpu-loras", "4", "--additional-config", json.dumps(vera),
        ]  # fmt: skip
        self.start(command, {"VLLM_ALLOW_RUNTIME_LORA_UPDATING": "1"}, "/health")

    def listed(self):
        """The engine's names of the adapters that it has."""
        return [card.id for card in self.client.models.list() if card.id != "base"]

    def metrics(self):
        """The page's samples; none of ours has a label."""
        families = text_string_to_metric_families(httpx2.get(self.url + "/metrics").text)
        samples = [s for family in families for s in family.samples]
        assert not [s for s in samples if s.name.startswith("vera:") and s.labels]
        return {s.name: s.value for s in samples}


@pytest.fixture(scope="module")
def server(tmp_path_factory):
    server = Server(tmp_path_factory.mktemp("server"))
    for draw, name in enumerate(("ann", "bob"), start=1):
        server.put(name, draw)
    yield server
    server.end()


def test_each_name_is_answered_by_its_current_version(server):
    assert server.ask("base") == ("base", server.merged(None))
    for name in ("ann", "bob", "ann"):
        assert server.ask(name) == (engine_name(server.store, name), server.merged(name))
    first = engine_name(server.store, "ann")
    assert server.ask(first)[0] == first
    server.put("ann", 11)
    assert server.ask("ann") == (engine_name(server.store, "ann"), server.merged("ann"))
    assert server.refused(first)[0] == 404
    server.store.delete("ann")
    assert server.refused("ann")[0] == 404
    server.put("ann", 12)
    assert server.ask("ann") == (engine_name(server.store, "ann"), server.merged("ann"))


def test_chat_and_tokenize_take_the_names_too(server):
    chat = server.client.chat.completions.create(
        model="bob", messages=[{"role": "user", "content": "Hello"}], max_tokens=4, temperature=0, stream=True
    )
    chunks = list(chat)
    assert len(chunks) >= 4 and {c.model for c in chunks} == {engine_name(server.store, "bob")}
    assert server.post("/tokenize", {"model": "bob", "prompt": "Hello"}).json()["count"] > 1
    assert server.post("/tokenize", {"model": "nobody", "prompt": "Hello"}).status_code == 404


def test_bad_names_and_bad_adapters_are_the_requests_own_trouble(server):
    server.put("large", 3, rank=64)
    server.put("unique", 4, sharing="unique", targets=("q_proj",))
    server.put("damaged", 6)
    file = next(p for p in (Path(server.store.files.root) / "adapters").rglob("*.vera") if "damaged" in str(p))
    data = bytearray(file.read_bytes())
    data[-40] ^= 255
    file.write_bytes(data)
    for name in ("nobody", "../etc/passwd", "ann@1-000000000000", "ann\0", "аnn", "a" * 100_000, "ann@", "@"):
        assert server.refused(name)[0] == 404, name
    for name, words in {"large": "rank 64", "unique": "sharing", "damaged": "damaged"}.items():
        status, text = server.refused(name)
        assert status == 400 and words in text
    assert server.ask("bob") == (engine_name(server.store, "bob"), server.merged("bob"))
    assert server.process.poll() is None


def test_load_and_unload_while_running_and_more_adapters_than_memory(server):
    assert server.post("/v1/load_lora_adapter", {"lora_name": "bob", "lora_path": "-"}).status_code == 200
    assert server.post("/v1/load_lora_adapter", {"lora_name": "nobody", "lora_path": "-"}).status_code == 404
    assert server.post("/v1/load_lora_adapter", {"lora_name": "large", "lora_path": "-"}).status_code == 400
    assert server.post("/v1/unload_lora_adapter", {"lora_name": "bob"}).status_code == 200
    assert server.post("/v1/unload_lora_adapter", {"lora_name": "bob"}).status_code == 404
    for k in range(6):
        server.put(f"u{k}", 20 + k)
        server.ask(f"u{k}")
    for name in ("u0", "bob", "u5"):
        assert server.ask(name) == (engine_name(server.store, name), server.merged(name))
    metrics = httpx2.get(server.url + "/metrics").text
    assert "vllm:lora_requests_info" in metrics and "@" not in metrics


def test_all_versions_leave_memory_and_the_metrics_page_says_so(server):
    for name in server.listed():
        server.post("/v1/unload_lora_adapter", {"lora_name": name})
    before = server.metrics()
    assert before["vera:resident_adapters"] == before["vera:resident_bytes"] == before["vera:resident_bases"] == 0
    versions = []
    for draw in (31, 32):
        server.put("eve", draw)
        versions += [engine_name(server.store, "eve")]
        assert server.ask("eve") == server.ask("eve") == (versions[-1], server.merged("eve"))
    assert server.refused("large")[0] == 400
    now = server.metrics()
    one = sum(4 * (len(d) + len(b)) for d, b in server.store.get("eve").vectors.values())
    assert (now["vera:resident_adapters"], now["vera:resident_bytes"], now["vera:resident_bases"]) == (2, 2 * one, 1)
    counted = [
        now[f"vera:adapter_{what}_total"] - before[f"vera:adapter_{what}_total"] for what in ("hits", "misses", "failures")
    ]
    assert counted == [2, 3, 1] and server.listed() == versions
    assert server.post("/v1/unload_lora_adapter", {"lora_name": "eve"}).status_code == 200
    assert server.metrics()["vera:resident_bytes"] == 0 and not server.listed()


def test_a_basis_in_use_and_a_store_that_is_away_are_no_fault_of_the_request(server):
    server.put("seeded", 41, seed=9)
    server.ask("bob")
    stream = server.client.completions.create(
        model="bob", prompt=PROMPT, max_tokens=240, temperature=0, stream=True, extra_body={"ignore_eos": True}
    )
    next(iter(stream))
    status, text = server.refused("seeded")
    assert status == 503 and "running requests use" in text
    stream.close()
    deadline = time.monotonic() + 30
    while server.metrics()["vllm:num_requests_running"]:
        assert time.monotonic() < deadline
    assert server.ask("seeded") == (engine_name(server.store, "seeded"), server.merged("seeded"))
    assert server.listed() == [engine_name(server.store, "seeded")]  # bob made room
    assert server.ask("bob") == (engine_name(server.store, "bob"), server.merged("bob"))

    folder = Path(server.store.files.root)
    folder.rename(folder.with_suffix(".away"))
    for name in ("bob", "seeded", "nobody"):
        refusal = server.post("/v1/completions", {"model": name, "prompt": PROMPT, "max_tokens": 1})
        assert (refusal.status_code, refusal.json()["error"]["type"]) == (503, "store_unavailable"), name
    assert server.ask("base")[0] == "base"
    folder.with_suffix(".away").rename(folder)
    assert server.ask("bob")[0] == engine_name(server.store, "bob")
