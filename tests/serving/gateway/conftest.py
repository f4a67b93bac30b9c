"""A store with adapters of two tenants, a fake engine, and gateways in front of it."""

from contextlib import ExitStack
from dataclasses import dataclass, field
from typing import Any

import pytest
import torch

pytest.importorskip("fastapi")

import httpx2  # noqa: E402
import openai  # noqa: E402

from tests.serving.gateway.fake import Fake, serving, wait_until  # noqa: E402
from veralib import VeraConfig, attach  # noqa: E402
from veralib.serving.gateway.app import make_app  # noqa: E402
from veralib.serving.gateway.keys import Keys  # noqa: E402
from veralib.serving.gateway.settings import GatewaySettings  # noqa: E402
from veralib.store import open_store  # noqa: E402


def adapter(seed=0):
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

    def gateway(self, ready=True, **settings):
        """The url of one more gateway."""
        given = {"store": self.store_path, "state": self.state, "engine_url": self.engine_url, **settings}
        app = make_app(GatewaySettings(**given))
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


@pytest.fixture
def world(tmp_path):
    """acme: has ann and bob, globex: has ann, an admin has all."""
    store = open_store(tmp_path / "store")
    for name in ("acme:ann", "acme:bob", "globex:ann"):
        store.put(name, adapter())
    keys = Keys(tmp_path / "state")
    made = {"acme": keys.add("acme:")[0], "globex": keys.add("globex:")[0], "admin": keys.add(admin=True)[0]}
    fake = Fake()
    with ExitStack() as stack:
        url = stack.enter_context(serving(fake.app))
        yield World(store, str(tmp_path / "store"), str(tmp_path / "state"), fake, url, made, stack)
