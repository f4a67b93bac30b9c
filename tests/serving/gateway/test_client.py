"""The official openai client works unchanged, and never sees a name of the engine's."""

import openai
import pytest

from tests.serving.gateway.conftest import small_adapter
from veralib.serving.names import engine_name


def test_completions_come_from_the_version_that_is_live(world):
    client = world.client(world.gateway())
    for _ in range(3):
        world.store.put("acme:ann", small_adapter())
        answer = client.completions.create(model="acme:ann", prompt="hello")
        live = engine_name(world.store, "acme:ann")
        assert answer.model == "acme:ann" and answer.choices[0].text.startswith(f"{live} says")
        assert answer.usage.total_tokens == 12
    assert client.completions.create(model="tiny-base", prompt="hello").choices[0].text.startswith("tiny-base says")


@pytest.mark.parametrize("usage", [False, True])
def test_a_chat_streams_piece_by_piece(world, usage):
    client = world.client(world.gateway())
    options = {"stream_options": {"include_usage": True}} if usage else {}
    stream = client.chat.completions.create(
        model="acme:ann", messages=[{"role": "user", "content": "slow"}], stream=True, **options
    )
    pieces = list(stream)
    assert {p.model for p in pieces} == {"acme:ann"}
    text = "".join(p.choices[0].delta.content for p in pieces if p.choices)
    assert text.startswith(engine_name(world.store, "acme:ann") + " says hello")
    assert [p.usage is not None for p in pieces] == [False] * 5 + [True] * usage


def test_embeddings(world):
    client = world.client(world.gateway())
    found = client.embeddings.create(model="acme:ann", input=["a", "bcd"], encoding_format="float")
    assert [e.embedding[0] for e in found.data] == [1.0, 3.0] and found.model == "acme:ann"


def test_models_list_page_by_page(world):
    for k in range(7):
        world.store.put(f"acme:n{k}", small_adapter())
    client = world.client(world.gateway())
    every = ["tiny-base", "acme:ann", "acme:bob", *(f"acme:n{k}" for k in range(7))]
    assert [m.id for m in client.models.list()] == every
    seen, query = [], {"limit": 3}
    while True:
        page = client.models.list(extra_query=query)
        seen += [m.id for m in page]
        if not page.model_extra["has_more"]:
            break
        query = {"limit": 3, "after": page.model_extra["last_id"]}
    assert seen == every
    one = client.models.retrieve("acme:ann")
    assert one.id == "acme:ann" and one.created > 1_600_000_000 and client.models.retrieve("tiny-base").id == "tiny-base"


def test_errors_are_the_clients_own(world):
    client = world.client(world.gateway(key_concurrency=1, key_requests_per_minute=8))
    with pytest.raises(openai.NotFoundError, match="no model") as e:
        client.completions.create(model="acme:nobody", prompt="x")
    assert e.value.code == "model_not_found" and e.value.param == "model"
    with pytest.raises(openai.BadRequestError, match="temperature"):
        client.completions.create(model="acme:ann", prompt="x", temperature=9)
    with pytest.raises(openai.UnprocessableEntityError, match="acme:ann and … failed"):
        client.completions.create(model="acme:ann", prompt="fail:422")
    with pytest.raises(openai.AuthenticationError):
        client.with_options(api_key="sk-vera-wrong").models.list()
    with pytest.raises(openai.RateLimitError, match="8 requests a minute") as limited:
        for _ in range(9):
            client.completions.create(model="acme:ann", prompt="x")
    assert 1 <= int(limited.value.response.headers["retry-after"]) <= 8
