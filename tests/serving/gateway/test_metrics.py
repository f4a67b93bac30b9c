"""/metrics: what it counts, and that no label holds a name."""

import re

from prometheus_client.parser import text_string_to_metric_families

from veralib.serving.gateway.metrics import from_engine


def values(text):
    """{(name, labels as text): value}."""
    return {
        (s.name, ",".join(f"{k}={v}" for k, v in sorted(s.labels.items()))): s.value
        for family in text_string_to_metric_families(text)
        for s in family.samples
    }


def test_counts(world):
    url = world.gateway(key_requests_per_minute=4)
    acme, admin = world.http(url), world.http(url, "admin")
    for body in ({"prompt": "x"}, {"prompt": "x", "stream": True}, {"prompt": "x", "n": 99}):
        acme.post("/v1/completions", json={"model": "acme:ann", **body})
    for name in ("acme:nobody", "globex:ann"):
        acme.post("/v1/completions", json={"model": name, "prompt": "x"})
    acme.post("/v1/completions", json={"model": "acme:ann", "prompt": "x"})
    assert acme.get("/v1/models/acme:ann").status_code == 429
    for path in ("/v1/models/acme:ann", "/v1/models/acme:x", "/nothing/acme:ann"):
        acme.get(path)
    found = values(admin.get("/metrics").text)
    one = "code={},route=/v1/completions".format
    assert [found["vera_requests_total", one(code)] for code in ("2xx", "4xx")] == [2, 2]
    assert found["vera_requests_total", "code=4xx,route=other"] == 6  # what a key's rate refuses comes to no route
    assert found["vera_tokens_total", "direction=in"] == 14 and found["vera_tokens_total", "direction=out"] == 10
    assert found["vera_time_to_first_token_seconds_count", ""] == 1 and found["vera_refused_total", "limit=key_requests"] == 5
    assert found["vera_request_seconds_count", "route=/v1/completions"] == 4
    assert found["vera_engine_prefix_cache_hits_total", ""] == 7 and found["vera_engine_resident_adapters", ""] == 1
    assert found["vera_engine_up", ""] == 1 and found["vera_running", ""] == 0 == found["vera_waiting", ""]


def test_no_label_holds_a_name(world):
    url = world.gateway()
    acme, admin = world.http(url), world.http(url, "admin")
    admin.get("/metrics")
    before = len(admin.get("/metrics").text.splitlines())
    for k in range(30):
        acme.post("/v1/completions", json={"model": f"acme:name{k}", "prompt": "x"})
        acme.get(f"/v1/models/acme:name{k}")
        acme.get(f"/path{k}")
    acme.post("/v1/completions", json={"model": "acme:ann", "prompt": "x"})
    text = admin.get("/metrics").text
    assert not re.search(r"acme|globex|ann|name\d|path\d|sk-vera", text)
    assert len(text.splitlines()) < before + 100


def test_names_of_the_engines_own():
    """Both engines' own names; the gateway's own gauge isn't said twice; what vLLM says of names isn't passed on."""
    page = "".join(
        f"# TYPE {name} gauge\n{name}{labels} 2\n"
        for name, labels in (
            ("veralib_engine_resident_bytes", ""),
            ("vera:resident_bases", ""),
            ("veralib_engine_up", ""),
            ("vllm:lora_requests_info", '{names="acme:ann"}'),
            ("verandas", ""),
        )
    )
    assert {m.name: m.samples[0].value for m in from_engine(page)} == {
        "vera_engine_resident_bytes": 2,
        "vera_engine_resident_bases": 2,
    }


def test_an_engines_page_that_is_cut():
    assert from_engine("") == [] == from_engine("# TYPE vera:x gauge\nvera:x{a=") == from_engine("\0")
