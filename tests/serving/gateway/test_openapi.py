"""schemathesis: requests made up from the served description, and not one of them ends in a 5xx."""

import contextlib
import json

import pytest

from tests.serving.gateway.conftest import make_world

schemathesis = pytest.importorskip("schemathesis")
from hypothesis import HealthCheck, Phase, given, settings  # noqa: E402
from hypothesis.errors import Unsatisfiable  # noqa: E402

EXAMPLES = 40
ROUTES = 12


@pytest.fixture(scope="module")
def served(tmp_path_factory):
    with make_world(tmp_path_factory.mktemp("openapi")) as world:
        world.url = world.gateway(max_body_bytes=100_000)
        yield world


def test_every_route_is_described(served):
    paths = served.http(served.url).get("/openapi.json").json()["paths"]
    operations = [(path, method, o) for path, methods in paths.items() for method, o in methods.items()]
    assert len(operations) >= ROUTES
    for path, method, operation in operations:
        assert operation.get("summary") and operation.get("description"), path
        if method == "post" and "application/json" in operation.get("requestBody", {}).get("content", {}):
            schema = operation["requestBody"]["content"]["application/json"]["schema"]
            assert "$ref" in schema, f"{path} takes a body without a model"


def test_no_request_ends_in_a_5xx(served):
    """Random values of the described types, and of other types. The fake's own failures aren't asked for."""
    schema = schemathesis.openapi.from_url(f"{served.url}/openapi.json")
    headers = {"Authorization": f"Bearer {served.keys['admin']}"}
    sent, bad = {}, []
    http = served.http(served.url, "admin")
    for operation in schema.get_all_operations():
        operation = operation.ok()

        @settings(
            max_examples=EXAMPLES, deadline=None, database=None, derandomize=True, phases=[Phase.generate],
            suppress_health_check=list(HealthCheck),
        )  # fmt: skip
        def ask(case):
            answer = case.call(headers=headers, timeout=10)
            label = f"{case.method} {case.path}"
            sent[label] = sent.get(label, 0) + 1
            if answer.status_code >= 500:
                bad.append(
                    (label, answer.status_code, answer.text[:200], json.dumps(case.as_transport_kwargs(), default=str)[:500])
                )

        for mode in schemathesis.GenerationMode:
            with contextlib.suppress(Unsatisfiable):  # a route without parameters can't be asked wrongly
                given(operation.as_strategy(generation_mode=mode))(ask)()
    assert not bad and len(sent) >= ROUTES and sum(sent.values()) > ROUTES * EXAMPLES / 2
    assert http.post("/v1/completions", json={"model": "tiny-base", "prompt": "x"}).status_code == 200
