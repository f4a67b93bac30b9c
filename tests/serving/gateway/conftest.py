"""A store with adapters of two tenants, a fake engine, and gateways in front of it."""

from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from typing import Any

import pytest
import torch

pytest.importorskip("fastapi")

import httpx2
import openai

from tests.serving.gateway.fake import Fake, serving, wait_until
from tests.serving.gateway.workplace import Settling, Workplace, make_adapter, make_model
from veralib import VeraConfig, attach
from veralib.serving.gateway.app import make_app
from veralib.serving.gateway.keys import Keys
from veralib.serving.gateway.settings import GatewaySettings
from veralib.store import open_store


def small_adapter(seed=0):
    """The smallest one there is."""
    vera = attach(torch.nn.Sequential(torch.nn.Linear(4, 4)), VeraConfig(rank=2, seed=seed, targets="all-linear"))
    return vera.adapter("default")


@dataclass
class World:
    """Everything of one test: store, fake, state folder, keys, gateways."""

    store: Any
    store_path: str
    state: str
    fake: Fake
    engine_url: str
    keys: dict[str, str]
    stack: ExitStack
    apps: list[Any] = field(default_factory=list)
    url: str = ""

    def gateway(self, ready=True, trains=True, **settings):
        """The url of one more gateway. trains=False: it takes jobs, and nothing runs them."""
        given = {"store": self.store_path, "state": self.state, "engine_url": self.engine_url, **settings}
        app = make_app(GatewaySettings(**given))
        if not trains:
            app.state.background.clear()
        self.apps.append(app)
        url = self.stack.enter_context(serving(app))
        if ready:
            assert wait_until(lambda: httpx2.get(f"{url}/ready").status_code == 200)
        return url

    def client(self, url, who="acme"):
        """The official client."""
        client = openai.OpenAI(base_url=f"{url}/v1", api_key=self.keys[who], max_retries=0, timeout=20)
        return self.stack.enter_context(client)

    def http(self, url, who="acme", **options):
        """A plain client."""
        headers = {"Authorization": f"Bearer {self.keys[who]}"}
        return self.stack.enter_context(httpx2.Client(base_url=url, headers=headers, timeout=20, **options))


@contextmanager
def make_world(folder):
    """acme: has ann and bob, globex: has ann, an admin has all."""
    store = open_store(folder / "store")
    for name in ("acme:ann", "acme:bob", "globex:ann"):
        store.put(name, small_adapter())
    keys = Keys(folder / "state")
    made = {"acme": keys.add("acme:")[0], "globex": keys.add("globex:")[0], "admin": keys.add(admin=True)[0]}
    fake = Fake()
    with ExitStack() as stack:
        url = stack.enter_context(serving(fake.app))
        yield World(store, str(folder / "store"), str(folder / "state"), fake, url, made, stack)


@pytest.fixture
def world(tmp_path):
    """A new one for each test."""
    with make_world(tmp_path) as world:
        yield world


@pytest.fixture(scope="module")
def shared_world(tmp_path_factory):
    """One for all tests of a file, which leave it as it was."""
    with make_world(tmp_path_factory.mktemp("world")) as world:
        world.url = world.gateway()
        yield world


@pytest.fixture(scope="session")
def model(tmp_path_factory):
    """A tiny Llama's folder."""
    return make_model(tmp_path_factory.mktemp("llama"))


@pytest.fixture(scope="session")
def adapter(model):
    """A trained-looking adapter of that model."""
    return make_adapter(model)


@pytest.fixture
def place(tmp_path, model):
    """Files, jobs and what trains them, around that model."""
    return Workplace(tmp_path, model)


@pytest.fixture
def settling(tmp_path, adapter):
    """A place without a model, for jobs whose training is over."""
    return Settling(Workplace(tmp_path), adapter)
