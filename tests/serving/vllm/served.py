"""A server in processes of its own over a store: what its tests share. The model is the one that ships here."""

import os
import socket
import subprocess
import time
from pathlib import Path

import httpx2
import openai
import pytest
import torch

from veralib import VeraConfig, attach
from veralib.store import open_store

MODEL = Path(__file__).parents[3] / "models" / "books-4m"
PROMPT = "The old man went to the"


def model():
    """The base."""
    from transformers import AutoModelForCausalLM

    return AutoModelForCausalLM.from_pretrained(MODEL, dtype=torch.float32).eval()


class Served:
    """Base class of the servers: a store, a port, a process, the official client."""

    def __init__(self, folder: Path) -> None:
        self.store, self.log = open_store(folder / "store"), folder / "server.log"
        with socket.socket() as s:
            s.bind(("127.0.0.1", 0))
            self.port = s.getsockname()[1]
        self.url = f"http://127.0.0.1:{self.port}"
        self.client = openai.OpenAI(base_url=self.url + "/v1", api_key="none", max_retries=0)

    def start(self, command, environment, ready):
        """Returns when `ready` answers with 200."""
        environment = {**os.environ, "OMP_NUM_THREADS": "1", **environment}
        del environment["VLLM_ENABLE_V1_MULTIPROCESSING"]
        with open(self.log, "w") as log:
            self.process = subprocess.Popen(command, env=environment, stdout=log, stderr=log)
        deadline = time.monotonic() + 240
        while True:
            if self.process.poll() is not None or time.monotonic() > deadline:
                if self.process.poll() is None:
                    self.end()
                pytest.fail(self.log.read_text()[-3000:])
            try:
                if httpx2.get(self.url + ready).status_code == 200:
                    break
            except httpx2.TransportError:
                pass
            time.sleep(0.3)

    def end(self):
        """SIGTERM, and a wait."""
        self.process.terminate()
        self.process.wait(60)

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
