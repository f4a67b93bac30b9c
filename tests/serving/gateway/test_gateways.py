"""Two gateways over one store and one state folder agree: on keys, on versions, on what is gone."""

from pathlib import Path

import httpx2
import openai
import pytest

from tests.serving.gateway.conftest import small_adapter
from tests.serving.gateway.fake import Fake, serving, wait_until
from veralib.serving.names import engine_name


@pytest.fixture
def pair(world):
    """Two gateways with an engine each."""
    second = Fake()
    elsewhere = world.stack.enter_context(serving(second.app))
    return world, world.gateway(), world.gateway(engine_url=elsewhere), second


def test_a_key_made_through_one_is_known_to_the_other(pair):
    world, one, two, _ = pair
    key, record = world.apps[0].state.gateway.keys.add("initech:")
    ask = {"headers": {"Authorization": f"Bearer {key}"}}
    assert [httpx2.get(f"{url}/v1/models", **ask).status_code for url in (one, two)] == [200, 200]
    world.apps[1].state.gateway.keys.revoke(record.id)
    assert [httpx2.get(f"{url}/v1/models", **ask).status_code for url in (one, two)] == [401, 401]


def test_a_new_version_is_served_by_both_at_once(pair):
    world, one, two, second = pair
    clients = [world.client(url) for url in (one, two)]
    for seed in range(4):
        world.apps[seed % 2].state.gateway.store.put("acme:ann", small_adapter(seed))
        live = engine_name(world.store, "acme:ann")
        texts = [c.completions.create(model="acme:ann", prompt="x").choices[0].text for c in clients]
        assert all(t.startswith(f"{live} says") for t in texts)
    assert {body["model"] for _, body in second.asked} == {body["model"] for _, body in world.fake.asked}


def test_what_one_deletes_the_other_no_longer_serves(pair):
    world, one, two, second = pair
    first, other = world.client(one), world.client(two)
    assert other.completions.create(model="acme:ann", prompt="x").choices
    assert other.completions.create(model="acme:bob", prompt="x").choices
    assert first.models.delete("acme:ann").deleted
    assert wait_until(lambda: [n.partition("@")[0] for n in second.loaded] == ["acme:bob"]), "it is in the other engine's memory"
    assert "ann" not in "".join(p.name + p.read_text() for p in (Path(world.state) / "deleted").iterdir())
    with pytest.raises(openai.NotFoundError):
        other.completions.create(model="acme:ann", prompt="x")
    assert [m.id for m in other.models.list()] == ["tiny-base", "acme:bob"]
    world.store.put("acme:ann", small_adapter(5))
    assert other.completions.create(model="acme:ann", prompt="x").choices[0].text.startswith(engine_name(world.store, "acme:ann"))
