"""What the tests of files and jobs share: an application with two tenants and an admin, and the process that trains."""

import json
import random
import time
from pathlib import Path

import torch
from fastapi import FastAPI, Request
from openai import OpenAI
from starlette.testclient import TestClient

from tests.training import tiny
from veralib import VeraConfig, attach
from veralib.serving.gateway import errors, learning, promotion, routes_files, routes_jobs
from veralib.serving.gateway.auth import tenant_of
from veralib.serving.gateway.learning import Learning, LearningSettings
from veralib.serving.gateway.runner import Runner
from veralib.serving.gateway.runs import Entry
from veralib.serving.gateway.tenants import Tenant
from veralib.store import Store, open_store

TENANTS = {
    "acme": Tenant("k1", "acme:"),
    "acme2": Tenant("k2", "acme:"),
    "evil": Tenant("k3", "evil:"),
    "admin": Tenant("k4", "", admin=True),
}
BASE = "tiny"


def chats(count: int, seed: int = 0, animal: str = "cat") -> bytes:
    """Rows of a chat file: a question about an animal, an answer in one of a few forms."""
    chooser = random.Random(f"{seed}/{animal}")
    rows = []
    for _ in range(count):
        said = " ".join(["the", animal, "likes", chooser.choice(["red", "blue"]), "house"] * chooser.randint(1, 2))
        messages = [{"role": "user", "content": f"who sees the {animal}"}, {"role": "assistant", "content": said}]
        rows.append(json.dumps({"messages": messages}))
    return "\n".join(rows).encode() + b"\n"


class Workplace:
    """One state folder, one store, one application; runner() makes what trains."""

    def __init__(self, folder: Path, model: Path | str | None = "nowhere", kind: str = "folder", **settings) -> None:
        self.folder = folder
        self.store: Store = open_store(folder / "served", kind=kind)
        fields = dict(
            rank=8, epochs=2, lr=2e-2, gather_seconds=0.0, threads=1, nice=0, progress_seconds=0.0, batch_rows=8, slots=4
        )
        self.settings = LearningSettings(None if model is None else str(model), BASE, **(fields | settings))
        self.learning = Learning(folder / "state", self.store, self.settings)
        self.app = FastAPI()
        self.app.state.background, self.app.state.on_delete = [], []
        errors.install(self.app)
        learning.install(self.app, self.learning)
        for module in (routes_files, routes_jobs):
            self.app.include_router(module.router)

        def by_key(request: Request) -> Tenant:
            return TENANTS[request.headers["authorization"].removeprefix("Bearer ")]

        self.app.dependency_overrides[tenant_of] = by_key

    def http(self, key: str = "acme") -> TestClient:
        return TestClient(self.app, headers={"Authorization": f"Bearer {key}"}, raise_server_exceptions=False)

    def openai(self, key: str = "acme") -> OpenAI:
        return OpenAI(base_url="http://testserver/v1", api_key=key, http_client=self.http(key), max_retries=0)

    def upload(self, content: bytes, key: str = "acme") -> str:
        return self.openai(key).files.create(file=("rows.jsonl", content), purpose="fine-tune").id

    def runner(self) -> Runner:
        return Runner(self.learning)

    def work(self) -> None:
        """Until nobody waits."""
        runner = self.runner()
        while runner.step():
            pass

    def texts(self) -> bytes:
        """All bytes of all files, and their names."""
        found = [p for p in self.folder.rglob("*")]
        return b"\n".join(str(p).encode() + b"\n" + (p.read_bytes() if p.is_file() else b"") for p in found)


def make_model(folder: Path) -> Path:
    """What jobs train on."""
    return tiny.make_llama(folder)


def make_adapter(model: Path):
    """An adapter that a job can go on from."""
    from transformers import AutoModelForCausalLM

    vera = attach(AutoModelForCausalLM.from_pretrained(model), VeraConfig(rank=8, targets="all-linear"))
    for d, b in vera.adapter().vectors.values():
        d += 0.01
        b += 0.01
    return vera.adapter()


def wait(condition, seconds: float = 400.0):
    """Until it is true; an AssertionError after so many seconds."""
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.02)


def flat(store, name: str, version: int | None = None) -> torch.Tensor:
    """All vectors of an adapter, one after the other."""
    return torch.cat([t for pair in store.get(name, version).vectors.values() for t in pair])


RESULT = {
    **{"name": "acme:ann", "status": "trained", "examples": 6, "steps": 4, "held_out": 2, "tokens": 60},
    **{"loss_before": 3.0, "loss_after": 2.0},
}


class Settling:
    """A job that has trained, without the training."""

    def __init__(self, place: Workplace, adapter) -> None:
        self.place = place
        self.staged = open_store(place.folder / "staged")
        self.staged.put("acme:ann", adapter)

    def job(self):
        client = self.place.openai()
        made = client.fine_tuning.jobs.create(model=BASE, training_file=self.place.upload(chats(4)), suffix="ann")
        return self.place.learning.jobs.find("acme=3a", made.id)

    def entry(self, job) -> Entry:
        store = self.place.store
        there = job.name in store
        if not there:
            return Entry(job.id, "acme=3a", job.name, None, None)
        latest = store.latest(job.name)
        return Entry(job.id, "acme=3a", job.name, repr(store.stamp(job.name)), latest.number, latest.milliseconds)

    def settle(self, job, entry=None, **changes):
        promotion.settle(self.place.learning, job, entry or self.entry(job), {**RESULT, **changes}, self.staged)
        return self.place.openai().fine_tuning.jobs.retrieve(job.id)
