"""schemathesis: requests made up from the served description, and not one of them ends in a 5xx.

Every other one of them names what is there: an adapter, a file, a job. So each route is reached behind its first question.
"""

import contextlib
import json

import pytest

from tests.serving.gateway.conftest import make_world, small_adapter
from tests.serving.gateway.fake import serving
from tests.serving.gateway.workplace import chats

schemathesis = pytest.importorskip("schemathesis")
from hypothesis import HealthCheck, Phase, given, settings  # noqa: E402
from hypothesis.errors import Unsatisfiable  # noqa: E402

EXAMPLES = 40
ROUTES = 22
UNREACHED = {"POST /v1/files"}
"""Made-up bytes are no chats."""


class Known:
    """What is there, by the names of parameters and fields; made anew where a request removed it."""

    def __init__(self, world):
        self.world, self.http = world, world.http(world.url, "admin")
        self.file = self.job = ""

    def name(self):
        if "acme:ann" not in self.world.store:
            self.world.store.put("acme:ann", small_adapter())
        return "acme:ann"

    def file_id(self):
        if self.http.get(f"/v1/files/{self.file}").status_code != 200 or not self.file:
            upload = {"file": ("rows.jsonl", chats(4)), "purpose": (None, "fine-tune")}
            self.file = self.http.post("/v1/files", files=upload).raise_for_status().json()["id"]
        return self.file

    def job_id(self):
        found = self.http.get(f"/v1/fine_tuning/jobs/{self.job}")
        if not self.job or found.status_code != 200 or found.json()["status"] == "cancelled":
            body = {"model": "tiny-base", "training_file": self.file_id(), "suffix": "acme:new"}
            self.job = self.http.post("/v1/fine_tuning/jobs", json=body).raise_for_status().json()["id"]
        return self.job

    def put_in(self, case):
        """The case, with values that are there in the place of made-up ones."""
        makers = {"name": self.name, "file_id": self.file_id, "job_id": self.job_id}
        case.path_parameters = {k: makers[k]() if k in makers else v for k, v in (case.path_parameters or {}).items()}
        if isinstance(case.body, dict):
            makers = {"model": self.name, "lora_name": self.name, "training_file": self.file_id, "validation_file": self.file_id}
            makers |= {"version": lambda: 1, "suffix": lambda: "acme:other"}
            case.body = {k: makers[k]() if k in makers else v for k, v in case.body.items()}


@pytest.fixture(scope="module")
def served(tmp_path_factory):
    with make_world(tmp_path_factory.mktemp("openapi")) as world:
        world.url = world.gateway(max_body_bytes=100_000, model="org/base", model_name="tiny-base", trains=False)
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


def ask_everything(world, examples):
    """{operation: {statuses}} of made-up requests; none of them is a 5xx."""
    schema = schemathesis.openapi.from_url(f"{world.url}/openapi.json")
    headers = {"Authorization": f"Bearer {world.keys['admin']}"}
    known, answered, bad, count = Known(world), {}, [], 0
    for operation in schema.get_all_operations():
        operation = operation.ok()

        @settings(
            max_examples=examples, deadline=None, database=None, derandomize=True, phases=[Phase.generate],
            suppress_health_check=list(HealthCheck),
        )  # fmt: skip
        def ask(case):
            nonlocal count
            count += 1
            if count % 2:
                known.put_in(case)
            answer = case.call(headers=headers, timeout=20)
            label = f"{case.method} {case.path}"
            answered.setdefault(label, []).append(answer.status_code)
            if answer.status_code >= 500:
                bad.append(
                    (label, answer.status_code, answer.text[:200], json.dumps(case.as_transport_kwargs(), default=str)[:500])
                )

        for mode in schemathesis.GenerationMode:
            with contextlib.suppress(Unsatisfiable):  # a route without parameters can't be asked wrongly
                given(operation.as_strategy(generation_mode=mode))(ask)()
    assert not bad
    return answered


def test_no_request_ends_in_a_5xx(served):
    """Random values of the described types, and of other types. The fake's own failures aren't asked for."""
    answered = ask_everything(served, EXAMPLES)
    assert len(answered) >= ROUTES and sum(map(len, answered.values())) > ROUTES * EXAMPLES / 2
    assert {label for label, statuses in answered.items() if 200 not in statuses} == UNREACHED
    http = served.http(served.url, "admin")
    assert http.post("/v1/completions", json={"model": "tiny-base", "prompt": "x"}).status_code == 200


@pytest.mark.slow
def test_nor_with_a_real_engine(tmp_path, model, adapter):
    from veralib.serving.embedded import EmbeddedEngine
    from veralib.serving.embedded.app import make_app

    with make_world(tmp_path) as world:
        world.store.put("acme:ann", adapter)
        with EmbeddedEngine(str(model), world.store, name="tiny-base") as engine, serving(make_app(engine)) as url:
            world.url = world.gateway(engine_url=url, model=str(model), model_name="tiny-base", trains=False)
            answered = ask_everything(world, 10)
            http = world.http(world.url)
            for name in ("tiny-base", "acme:bob"):
                asked = http.post("/v1/completions", json={"model": name, "prompt": "the cat", "max_tokens": 2})
                assert asked.status_code == (200 if name == "tiny-base" else 422), asked.text
    assert len(answered) >= ROUTES
