"""The HTTP server, started as a user starts it, asked by the official client."""

import json
import os
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest

pytest.importorskip("vllm", reason="needs vLLM: make test-vllm builds an environment with it and runs this there")

import httpx2
import openai
import torch

from veralib import VeraConfig, attach
from veralib.serving.names import engine_name
from veralib.store import open_store

MODEL = Path(__file__).parents[3] / "models" / "books-4m"
PROMPT = "The old man went to the"


def model():
    from transformers import AutoModelForCausalLM

    return AutoModelForCausalLM.from_pretrained(MODEL, dtype=torch.float32).eval()


class Server:
    """vLLM in processes of its own, over a store."""

    def __init__(self, folder: Path) -> None:
        self.store = open_store(folder / "store")
        with socket.socket() as s:
            s.bind(("127.0.0.1", 0))
            port = s.getsockname()[1]
        vera = {"vera": {"store": str(folder / "store"), "max_rank": 32}}
        command = [
            sys.executable, "-m", "vllm.entrypoints.openai.api_server", "--host", "127.0.0.1", "--port", str(port),
            "--model", str(MODEL), "--served-model-name", "base", "--dtype", "float32", "--max-model-len", "256",
            "--enforce-eager",
            "--enable-lora", "--max-loras", "2", "--max-cpu-loras", "4", "--additional-config", json.dumps(vera),
        ]  # fmt: skip
        environment = {**os.environ, "VLLM_ALLOW_RUNTIME_LORA_UPDATING": "1", "OMP_NUM_THREADS": "1"}
        del environment["VLLM_ENABLE_V1_MULTIPROCESSING"]
        self.log = folder / "server.log"
        with open(self.log, "w") as log:
            self.process = subprocess.Popen(command, env=environment, stdout=log, stderr=log)
        self.url = f"http://127.0.0.1:{port}"
        self.client = openai.OpenAI(base_url=self.url + "/v1", api_key="none", max_retries=0)
        deadline = time.monotonic() + 240
        while True:
            try:
                assert httpx2.get(self.url + "/health").status_code == 200
                break
            except httpx2.TransportError:
                assert self.process.poll() is None and time.monotonic() < deadline, self.log.read_text()[-3000:]
                time.sleep(0.3)

    def put(self, name, draw, **config):
        vera = attach(model(), VeraConfig(**({"rank": 16, "targets": "all-linear"} | config)), name="a")
        generator = torch.Generator().manual_seed(draw)
        with torch.no_grad():
            for p in vera.parameter_groups()[0]["params"]:
                p.copy_(torch.randn(p.shape, generator=generator))
        return self.store.put(name, vera.adapter("a"))

    def ask(self, name):
        """(the model that answered, its text)."""
        answer = self.client.completions.create(model=name, prompt=PROMPT, max_tokens=12, temperature=0)
        return answer.model, answer.choices[0].text

    def refused(self, name):
        """(status, words)."""
        with pytest.raises(openai.APIStatusError) as e:
            self.ask(name)
        return e.value.status_code, e.value.message

    @torch.no_grad()
    def merged(self, name):
        """The merged model's text, by transformers."""
        from transformers import AutoTokenizer

        tokenizer = AutoTokenizer.from_pretrained(MODEL)
        plain = model()
        if name is not None:
            vera = attach(plain)
            vera.load(self.store.get(name), "a")
            vera.merge("a", keep=None)
            plain = vera.detach()
        ids = tokenizer(PROMPT, return_tensors="pt").input_ids
        out = plain.generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=12, do_sample=False)
        return tokenizer.decode(out[0, ids.shape[1] :], skip_special_tokens=True)

    def post(self, path, body):
        return httpx2.post(self.url + path, json=body, timeout=60)


@pytest.fixture(scope="module")
def server(tmp_path_factory):
    server = Server(tmp_path_factory.mktemp("server"))
    for draw, name in enumerate(("ann", "bob"), start=1):
        server.put(name, draw)
    yield server
    server.process.terminate()
    server.process.wait(60)


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
    server.put("seeded", 5, seed=9)
    server.put("damaged", 6)
    file = next(p for p in (Path(server.store.files.root) / "adapters").rglob("*.vera") if "damaged" in str(p))
    data = bytearray(file.read_bytes())
    data[-40] ^= 255
    file.write_bytes(data)
    for name in ("nobody", "../etc/passwd", "ann@1-000000000000", "ann\0", "аnn", "a" * 100_000, "ann@", "@"):
        assert server.refused(name)[0] == 404, name
    for name, words in {"large": "rank 64", "unique": "sharing", "seeded": "max_bases", "damaged": "damaged"}.items():
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
