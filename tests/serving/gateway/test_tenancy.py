"""A key never sees, uses, lists or infers what is another tenant's."""

import json
import re

import pytest

from tests.serving.gateway.conftest import small_adapter

FOREIGN = ("globex:ann", "globex:nobody", "ann", "globex:", "Acme:ann", "acme", "acme:ann@1-0123456789ab", "initech:x")


def calls(name):
    """Every way to name an adapter: (method, path, body)."""
    return [
        ("POST", "/v1/completions", {"model": name, "prompt": "x"}),
        ("POST", "/v1/chat/completions", {"model": name, "messages": [{"role": "user", "content": "x"}], "stream": True}),
        ("POST", "/v1/embeddings", {"model": name, "input": "x"}),
        ("POST", "/classify", {"model": name, "input": "x"}),
        ("GET", f"/v1/models/{name}", None),
        ("GET", f"/v1/models/{name}/versions", None),
        ("DELETE", f"/v1/models/{name}", None),
        ("POST", f"/v1/models/{name}/rollback", {"version": 1}),
        ("POST", "/v1/load_lora_adapter", {"lora_name": name}),
        ("POST", "/v1/unload_lora_adapter", {"lora_name": name}),
    ]


def test_what_is_anothers_answers_as_what_is_nowhere(world):
    http = world.http(world.gateway())
    answers = {}
    for name in FOREIGN:
        for number, (method, path, body) in enumerate(calls(name)):
            answer = http.request(method, path, json=body)
            assert answer.status_code == 404, (path, answer.text)
            # The name in it, and the near name of one's own, are all that differs.
            answers.setdefault(number, set()).add(
                re.sub(r' Did you mean \\"acme:\w+\\"\?', "", answer.text).replace(f'\\"{name}\\"', "N")
            )
    assert len(answers) == 10 and all(len(texts) == 1 for texts in answers.values()), answers
    assert world.fake.asked == [] and "globex:ann" in set(world.store.names())


def test_the_store_is_never_asked_for_what_is_anothers(world, monkeypatch):
    url = world.gateway()
    asked = []
    store = world.apps[0].state.gateway.store
    for method in ("stamp", "current", "versions", "latest", "delete", "rollback"):
        inner = getattr(type(store), method)
        monkeypatch.setattr(store, method, lambda name, *a, inner=inner: asked.append(name) or inner(store, name, *a))
    http = world.http(url)
    for name in FOREIGN:
        for method, path, body in calls(name):
            http.request(method, path, json=body)
    assert asked == []
    assert http.get("/v1/models/acme:ann").status_code == 200 and asked == ["acme:ann"]


def test_lists_and_near_names_hold_ones_own_only(world):
    url = world.gateway()
    acme, globex, admin = (world.http(url, who) for who in ("acme", "globex", "admin"))
    names = [[m["id"] for m in http.get("/v1/models").json()["data"]] for http in (acme, globex, admin)]
    assert names == [
        ["tiny-base", "acme:ann", "acme:bob"],
        ["tiny-base", "globex:ann"],
        ["tiny-base", "acme:ann", "acme:bob", "globex:ann"],
    ]
    for cursor in ("globex:a", "acme:zzz", "", "zzz", "\u00e9"):
        found = acme.get("/v1/models", params={"after": cursor}).text
        assert "globex:ann" not in found
    near = acme.post("/v1/completions", json={"model": "acme:anna", "prompt": "x"}).json()["error"]["message"]
    assert near == 'There is no model "acme:anna" for this key. Did you mean "acme:ann"?'
    far = acme.post("/v1/completions", json={"model": "globex:an", "prompt": "x"}).json()["error"]["message"]
    assert "globex:ann" not in far


def test_prefix_caches_never_meet(world):
    """The salt is the tenant's whatever the client sends, and two gateways agree on it."""
    url, other = world.gateway(), world.gateway()
    second = world.apps[0].state.gateway.keys.add("acme:")[0]
    world.keys["acme again"] = second

    def salt(who, url=url, **extra):
        world.http(url, who).post("/v1/completions", json={"model": "tiny-base", "prompt": "x", **extra}).raise_for_status()
        return world.fake.asked[-1][1]["cache_salt"]

    acme, globex, admin = salt("acme"), salt("globex"), salt("admin")
    assert len({acme, globex, admin}) == 3
    assert salt("acme again") == acme == salt("acme", other)
    own = salt("acme", cache_salt="mine")
    assert own not in (acme, globex) and salt("globex", cache_salt="mine") not in (own, globex)
    for forged in (globex, json.dumps(["globex:", False, None])):
        assert salt("acme", cache_salt=forged) not in (acme, globex)


def test_without_a_key_nothing_but_health(world):
    http = world.http(world.gateway())
    description = http.get("/openapi.json").json()
    tried = 0
    for path, methods in description["paths"].items():
        for method in methods:
            answer = http.request(method, path.replace("{name}", "acme:ann"), headers={"Authorization": ""}, json={})
            expected = 200 if path in ("/health", "/ready") else 401
            assert answer.status_code == expected, path
            tried += 1
    assert tried >= 12
    for header in ("Bearer", "Bearer x", f"Basic {world.keys['acme']}", world.keys["acme"], "Bearer " + "a" * 5000):
        assert http.get("/v1/models", headers={"Authorization": header}).status_code == 401


def test_a_body_without_a_key_is_never_read(world):
    http = world.http(world.gateway())
    answer = http.post("/v1/completions", content=b"{" * 10**6, headers={"Authorization": "Bearer x"})
    assert answer.status_code == 401


def test_metrics_are_for_the_admin(world):
    url = world.gateway()
    assert [world.http(url, who).get("/metrics").status_code for who in ("acme", "admin")] == [403, 200]


@pytest.mark.parametrize("stream", [False, True])
def test_no_name_of_the_engines_comes_through(world, stream):
    """Neither the own adapter's engine name, nor another tenant's, nor a path, in answers or in errors."""
    http = world.http(world.gateway())
    for order in ("fine", "fail:400", "fail:422", "fail:500", "fail:404", "fail:503", "fail:401"):
        body = {"model": "acme:ann", "messages": [{"role": "user", "content": order}], "stream": stream}
        answer = http.post("/v1/chat/completions", json=body)
        lines = answer.text.replace("data: ", "").split("\n\n") if stream else [answer.text]
        for text in lines:
            if "choices" in text:
                parsed = json.loads(text)
                assert parsed["model"] == "acme:ann"
                parsed["choices"] = []  # the fake's own words
                text = json.dumps(parsed)
            assert "@" not in text and "globex" not in text
    world.store.put("acme:ann", small_adapter())


def test_off_means_everybody_is_admin(world):
    http = world.http(world.gateway(auth=False))
    http.headers.pop("Authorization")
    assert http.post("/v1/completions", json={"model": "globex:ann", "prompt": "x"}).status_code == 200
    assert http.get("/metrics").status_code == 200


def test_no_path_comes_through_however_it_is_reached(world, tmp_path):
    """The engine is given the folder that a link leads to; its errors name that one."""
    (tmp_path / "link").symlink_to(tmp_path, target_is_directory=True)
    url = world.gateway(store=str(tmp_path / "link" / "store"))
    for path in (tmp_path / "store", tmp_path / "link" / "store", tmp_path / "state"):
        answer = world.http(url).post("/v1/completions", json={"model": "acme:ann", "prompt": f"fail:422 says:{path}/x"})
        assert answer.status_code == 422 and answer.json()["error"]["message"].endswith("failed at …/x"), answer.text
