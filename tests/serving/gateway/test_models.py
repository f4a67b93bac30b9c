"""/v1/models: versions, rollback, deletion with everything that belongs to it, loading."""

import os
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from tests.serving.gateway.conftest import small_adapter
from veralib import UnknownName
from veralib.serving.names import engine_name
from veralib.store import open_store
from veralib.store.folder import FolderStore
from veralib.store.names import key_of


def say(http, name="acme:ann"):
    return http.post("/v1/completions", json={"model": name, "prompt": "x"}).raise_for_status().json()["choices"][0]["text"]


def test_rollback_is_one_call(world):
    http = world.http(world.gateway())
    world.store.put("acme:ann", small_adapter(1), notes={"loss": "2.5"})
    found = http.get("/v1/models/acme:ann/versions").json()
    assert found["current"] == 2 and [v["number"] for v in found["data"]] == [1, 2] and found["data"][1]["notes"]["loss"] == "2.5"
    assert http.post("/v1/models/acme:ann/rollback", json={"version": 1}).json()["version"] == 3
    assert world.store.get("acme:ann").config.seed == 0
    assert say(http).startswith(engine_name(world.store, "acme:ann") + " says")
    missing = http.post("/v1/models/acme:ann/rollback", json={"version": 9})
    assert missing.status_code == 404 and "Known: 1, 2, 3" in missing.text


def test_rollback_from_a_damaged_version(world):
    """That the current one can't be read is when it is needed."""
    http = world.http(world.gateway())
    world.store.put("acme:ann", small_adapter(1))
    (path,) = world.store.files.root.glob(f"adapters/*/{key_of('acme:ann')}/000000000002-*.vera")
    path.write_bytes(path.read_bytes()[:-20])
    assert http.get("/v1/models/acme:ann").status_code == 422
    assert http.post("/v1/models/acme:ann/rollback", json={"version": 1}).json()["version"] == 3
    assert say(http).startswith(engine_name(world.store, "acme:ann") + " says")


def test_a_rollback_does_not_bring_back_what_is_deleted_meanwhile(world, monkeypatch):
    http = world.http(world.gateway())
    world.store.put("acme:ann", small_adapter(1))
    store, write = world.apps[0].state.gateway.store, FolderStore._write
    with ThreadPoolExecutor(1) as thread:
        deleted = []

        def slow(self, records):
            if self is store and not deleted:
                deleted.append(thread.submit(http.delete, "/v1/models/acme:ann"))
                time.sleep(0.5)
            return write(self, records)

        monkeypatch.setattr(FolderStore, "_write", slow)
        assert http.post("/v1/models/acme:ann/rollback", json={"version": 1}).status_code == 200
        assert deleted[0].result().json()["removed"]["versions"] == 3
    assert "acme:ann" not in world.store and http.get("/v1/models/acme:ann").status_code == 404


def test_an_answer_waits_for_nobodys_list(world, monkeypatch):
    url = world.gateway()
    store, free = world.apps[0].state.gateway.store, threading.Event()

    def page(*_):
        free.wait(20)
        return []

    monkeypatch.setattr(store, "page", page)
    with ThreadPoolExecutor(12) as threads:
        lists = [threads.submit(world.http(url, "globex").get, "/v1/models") for _ in range(12)]
        time.sleep(0.3)
        assert say(world.http(url)) and not any(one.done() for one in lists)
        free.set()
        assert [one.result().status_code for one in lists] == [200] * 12


def test_delete_takes_everything_along(world):
    url = world.gateway()
    http, other = world.http(url), world.http(url, "globex")
    called = []

    async def files(name):
        called.append(name)
        return {"files": 2, "jobs": 1} if len(called) in (1, 3) else {}

    world.apps[0].state.on_delete.append(files)
    say(http), say(other, "globex:ann")
    world.store.put("acme:ann", small_adapter())
    say(http)
    assert len([n for n in world.fake.loaded if n.startswith("acme:ann@")]) == 2
    answer = http.delete("/v1/models/acme:ann").json()
    assert answer == {
        "id": "acme:ann",
        "object": "model",
        "deleted": True,
        "removed": {"versions": 2, "files": 2, "jobs": 1, "loaded": 2},
    }
    assert called == ["acme:ann"] and [n.partition("@")[0] for n in world.fake.loaded] == ["globex:ann"]
    with pytest.raises(UnknownName):
        world.store.get("acme:ann")
    again = http.delete("/v1/models/acme:ann")
    assert again.status_code == 404 and called == ["acme:ann"] * 2
    # A job that never came to a version leaves files and itself: they go too.
    assert http.delete("/v1/models/acme:zoe").json()["removed"] == {"versions": 0, "files": 2, "jobs": 1, "loaded": 0}
    assert http.delete("/v1/models/globex:ann").status_code == 404 and len(called) == 3
    assert http.delete("/v1/models/tiny-base").status_code == 403


def test_ones_own_names_are_listed_while_the_engine_is_away(world):
    http = world.http(world.gateway(ready=False, engine_url="http://127.0.0.1:9", model_name="base"))
    assert [m["id"] for m in http.get("/v1/models").json()["data"]] == ["base", "acme:ann", "acme:bob"]
    assert http.delete("/v1/models/acme:ann").json()["removed"] == {"versions": 1, "loaded": 0}


def test_load_and_unload(world):
    http = world.http(world.gateway())
    assert http.post("/v1/load_lora_adapter", json={"lora_name": "acme:ann"}).json()["loaded"]
    assert world.fake.loaded == {engine_name(world.store, "acme:ann")}
    assert http.post("/v1/unload_lora_adapter", json={"lora_name": "acme:ann"}).json()["unloaded"] == 1
    assert world.fake.loaded == set()
    path = {"lora_name": "acme:ann", "lora_path": "/etc/passwd"}
    assert http.post("/v1/load_lora_adapter", json=path).status_code == 400


def test_a_put_between_question_and_answer_is_answered_by_the_new_version(world):
    """The engine no longer knows the version that the gateway was told a moment before: it is asked for once more."""
    http = world.http(world.gateway())
    names = world.apps[0].state.gateway.names
    old = engine_name(world.store, "acme:ann")
    world.store.put("acme:ann", small_adapter())
    new = engine_name(world.store, "acme:ann")
    world.fake.known = {new}
    inner, first = names.live, [old]

    async def live(tenant, name):
        return first.pop() if first else await inner(tenant, name)

    names.live = live
    assert say(http).startswith(f"{new} says")
    assert [body["model"] for _, body in world.fake.asked] == [old, new]


COMPLETE, LOAD = "/v1/completions", "/v1/load_lora_adapter"
BODIES = {COMPLETE: {"model": "acme:ann", "prompt": "x"}, LOAD: {"lora_name": "acme:ann"}}


@pytest.mark.parametrize("path", BODIES)
def test_what_the_store_says_is_live_is_never_a_404(world, path):
    http = world.http(world.gateway())
    world.fake.known = set()
    answer = http.post(path, json=BODIES[path])
    assert answer.status_code == 503 and answer.json()["error"]["code"] == "engine_error" and answer.headers["retry-after"]
    assert len(world.fake.asked) == 3


@pytest.mark.parametrize("path", BODIES)
@pytest.mark.parametrize("meanwhile", ["loaded", "put", "deleted"])
def test_what_happens_while_the_engine_lacks_a_version(world, path, meanwhile):
    """It has been unloaded as it was asked for, and has it when it is asked again; or a newer version came; or it is gone."""
    http, inner = world.http(world.gateway()), world.fake.read
    first = engine_name(world.store, "acme:ann")
    world.fake.known = set()

    def put():
        world.store.put("acme:ann", small_adapter())
        return engine_name(world.store, "acme:ann")

    async def read(request):
        body = await inner(request)
        if len(world.fake.asked) == 2:
            if meanwhile == "deleted":
                world.store.delete("acme:ann")
            else:
                world.fake.known = {put() if meanwhile == "put" else first}
        return body

    world.fake.read = read
    answer = http.post(path, json=BODIES[path])
    asked = [body.get("model") or body["lora_name"] for _, body in world.fake.asked]
    assert asked[:2] == [first] * 2 and answer.status_code == (404 if meanwhile == "deleted" else 200)
    assert asked[2:] == ([engine_name(world.store, "acme:ann")] if meanwhile == "put" else [])


def test_versions_that_come_faster_than_answers_are_followed(world):
    """Each version is outdated when the engine is asked for it, five times; and at last one that never ends."""
    http = world.http(world.gateway())
    names = world.apps[0].state.gateway.names
    versions = [f"acme:ann@{k}-000000000000" for k in range(1, 7)]
    world.fake.known = {versions[-1]}
    coming = iter(versions)

    async def live(tenant, name):
        return next(coming)

    names.live = live
    assert say(http).startswith(f"{versions[-1]} says")
    assert [body["model"] for _, body in world.fake.asked] == versions
    endless = iter(f"acme:ann@{k}-000000000000" for k in range(1, 1000))
    coming, world.fake.known = endless, set()
    answer = http.post("/v1/completions", json={"model": "acme:ann", "prompt": "x"})
    assert answer.status_code == 503 and answer.json()["error"]["code"] == "model_changing" and answer.headers["retry-after"]


def test_a_store_that_is_damaged_fails_its_own_requests_only(world):
    http = world.http(world.gateway())
    (path,) = Path(world.store_path).glob("adapters/*/acme=3aann/*.vera")
    path.write_bytes(b"x" * 100)
    card = next(m for m in http.get("/v1/models").json()["data"] if m["id"] == "acme:ann")
    assert card["damaged"] and card["created"] == 0
    assert http.get("/v1/models/acme:ann").status_code == 422 and http.get("/v1/models/acme:ann/versions").status_code == 422
    assert say(http, "acme:bob") and http.delete("/v1/models/acme:ann").json()["removed"] == {"versions": 1, "loaded": 0}
    assert http.get("/v1/models/acme:ann").status_code == 404


@pytest.mark.parametrize("kind", ["folder", "packed"])
def test_a_page_of_a_store(tmp_path, kind):
    store = open_store(tmp_path, kind)
    names = ["acme:z", "acme:a", "acme:é", "acme:a" + "b" * 200, "Acme:b", "acme", "globex:a", "acme:" + "é" * 90]
    store.put_many([(n, small_adapter()) for n in names])
    own = sorted((n for n in names if n.startswith("acme:")), key=lambda n: n.encode())
    assert store.page("acme:", limit=10) == own and store.page("acme:", own[1], 2) == own[2:4]
    assert store.page("acme:", own[-1]) == [] == store.page("nobody:") and store.page("acme:", "globex:") == []
    assert store.page(limit=100) == sorted(names, key=lambda n: n.encode())
    found = store.latest("acme:z")
    assert (found.number, found.bytes) == (1, store.versions("acme:z")[0].bytes)


def test_a_packed_store_is_served_alike(world, tmp_path):
    """Its lookups run in several threads, each with a connection to the index of its own."""
    store = open_store(tmp_path / "packed", "packed")
    store.put_many([(f"acme:n{k:03}", small_adapter()) for k in range(150)] + [("globex:x", small_adapter())])
    http = world.http(world.gateway(store=str(tmp_path / "packed")))
    with ThreadPoolExecutor(8) as pool:
        texts = list(pool.map(lambda k: say(http, f"acme:n{k:03}"), range(40)))
    assert all(t.startswith(engine_name(store, f"acme:n{k:03}") + " says") for k, t in enumerate(texts))
    page = http.get("/v1/models", params={"limit": 1000}).json()
    assert len(page["data"]) == 151 and not page["has_more"] and {m.get("version") for m in page["data"][1:]} == {1}
    store.put("acme:n000", small_adapter())
    assert say(http, "acme:n000").startswith("acme:n000@2-")


def test_a_store_that_is_away_is_nobodys_fault(world, monkeypatch):
    """503, and no adapter is called damaged."""
    http = world.http(world.gateway())
    listdir = os.listdir

    def away(path="."):
        if str(path).startswith(world.store_path):
            raise OSError(5, "Input/output error")
        return listdir(path)

    monkeypatch.setattr(os, "listdir", away)
    asked = [
        ("GET", "/v1/models"),
        ("GET", "/v1/models/acme:ann"),
        ("POST", "/v1/completions"),
        ("DELETE", "/v1/models/acme:ann"),
    ]
    for method, path in asked:
        answer = http.request(method, path, json={"model": "acme:ann", "prompt": "x"} if method == "POST" else None)
        assert answer.status_code == 503 and answer.json()["error"]["code"] == "store_unavailable", (path, answer.text)
        assert answer.headers["retry-after"] == "5" and world.store_path not in answer.text
    monkeypatch.undo()
    monkeypatch.setattr(os, "posix_fadvise", lambda *_: away(world.store_path))
    assert http.get("/v1/models").status_code == 503  # the names can be listed, and no record can be read
    monkeypatch.undo()
    assert say(http)


def test_loading_that_failed_is_not_called_done(world):
    """Whatever the engine's words, and the adapter's name is among them."""
    http = world.http(world.gateway())
    world.store.put("acme:already-x", small_adapter())
    for status, expected in ((422, 422), (400, 400), (503, 503), (500, 502)):
        world.fake.failing = status
        answer = http.post("/v1/load_lora_adapter", json={"lora_name": "acme:already-x"})
        assert answer.status_code == expected and "loaded" not in answer.json(), answer.text
    world.fake.failing = 404  # the path itself isn't there
    answer = http.post("/v1/load_lora_adapter", json={"lora_name": "acme:already-x"})
    assert answer.status_code == 400 and answer.json()["error"]["code"] == "unsupported"
    world.fake.failing = None
    assert http.post("/v1/load_lora_adapter", json={"lora_name": "acme:already-x"}).json()["loaded"]


def test_names_that_nobody_can_ask_for_are_not_listed(world):
    url = world.gateway()
    http = world.http(url)
    odd = [f"acme:a/{k}" for k in range(5)] + ["acme:é", "acme:" + "x" * 200, "acme:b b"]
    world.store.put_many([(name, small_adapter()) for name in odd])
    listed, query = [], {"limit": 1}
    while True:
        page = http.get("/v1/models", params=query).json()
        listed += [m["id"] for m in page["data"]]
        if not page["has_more"]:
            break
        query["after"] = page["last_id"]
    assert listed == ["tiny-base", "acme:ann", "acme:bob"]
    assert all(say(http, name) for name in listed)


def test_a_name_is_no_near_name_of_itself(world):
    http = world.http(world.gateway())
    assert 'Did you mean "acme:ann"?' in http.get("/v1/models/acme:anne").json()["error"]["message"]
    http.delete("/v1/models/acme:ann").raise_for_status()
    message = http.get("/v1/models/acme:ann").json()["error"]["message"]  # near names are up to half a minute old
    assert 'Did you mean "acme:ann"' not in message and 'Did you mean "acme:bob"' in message
