"""Which adapters the engine has in memory: the engine core's side, and an API server's over it. Neither needs vLLM."""

import asyncio
import random
import sys
import types
from http import HTTPStatus

import pytest

from veralib.errors import AdapterMismatch, StateError, StoreError, StoreUnavailable
from veralib.serving.vllm import server
from veralib.serving.vllm.bases import FULL
from veralib.serving.vllm.residents import Residents, add_lora
from veralib.serving.vllm.settings import Settings


class Core:
    """An engine core whose two workers take everything but "bad", of three bases: those that names begin with."""

    BASES = 3

    def __init__(self):
        self.asked, self.loaded = [], {}
        self.scheduler = types.SimpleNamespace(requests={})
        self.model_executor = self

    def collective_rpc(self, method, args):
        self.asked.append(method)
        if method == "remove_lora":
            self.loaded.pop(args[0], None)
            return [True, True]
        name = args[0].lora_name
        if name == "bad":
            return ["it is bad", "it is bad"]
        places = list(dict.fromkeys(self.loaded.values()))
        if name[0] not in places and len(places) == self.BASES:
            return [FULL, FULL]
        self.loaded[args[0].lora_int_id] = name[0]
        return [(ord(name[0]), 40), (ord(name[0]), 40)]


class Queue:
    """Residents over a Core, and its requests."""

    def __init__(self, capacity):
        msgspec = pytest.importorskip("msgspec")
        self.lora = msgspec.defstruct("Lora", [("lora_name", str), ("lora_int_id", int), ("load_inplace", bool, False)])
        self.core = Core()
        self.residents = Residents(self.core, capacity)

    def admit(self, name, number):
        """The workers' number."""
        request = types.SimpleNamespace(lora_request=self.lora(name, number))
        self.residents.admit(request)
        self.core.scheduler.requests[name] = request
        return request.lora_request.lora_int_id


def test_residents_never_evict_what_a_request_waits_for():
    queue = Queue(2)
    core, residents = queue.core, queue.residents
    numbers = [queue.admit(f"a{i}", 2**60 + i) for i in range(5)]
    assert set(core.loaded) == set(numbers) == {1, 2, 3, 4, 5}  # all in use, above the capacity
    with pytest.raises(AdapterMismatch, match="it is bad"):
        queue.admit("bad", 9)
    assert set(core.loaded) == {1, 2, 3, 4, 5}
    core.scheduler.requests = {"a0": core.scheduler.requests["a0"]}
    assert queue.admit("a5", 2**60 + 5) == 7
    assert set(core.loaded) == {1, 5, 7}  # one in use, two idle
    assert residents.report() == {"gone": ["a1", "a2", "a3"], "adapters": 3, "bytes": 240, "bases": 1}
    assert residents.remove(2**60 + 4) and not residents.remove(2**60 + 4)
    assert set(core.loaded) == {1, 7}


def test_what_is_removed_in_use_goes_when_its_last_request_ends():
    queue = Queue(4)
    core, residents = queue.core, queue.residents
    first = queue.admit("a0", 10)
    assert residents.remove(10) and not residents.remove(10)
    assert residents.report() == {"gone": [], "adapters": 0, "bytes": 0, "bases": 0}
    residents.sweep()
    assert set(core.loaded) == {first}
    waiting = core.scheduler.requests.pop("a0")
    second = queue.admit("a0", 10)  # asked for again: anew, beside the one that leaves
    core.scheduler.requests["again"] = waiting
    residents.sweep()
    assert set(core.loaded) == {first, second}
    del core.scheduler.requests["again"]
    residents.sweep()
    assert set(core.loaded) == {second} and residents.report()["bytes"] == 80


def test_idle_adapters_of_an_unused_basis_make_room_for_another():
    queue = Queue(8)
    core, residents = queue.core, queue.residents
    for number, name in enumerate(("a0", "b0", "c0", "b1", "a1")):
        queue.admit(name, number)
    for name in ("a0", "b0", "c0", "b1"):
        del core.scheduler.requests[name]
    queue.admit("d0", 20)  # a is in use, c was asked for before b
    assert residents.report()["gone"] == ["c0"] and residents.bases == {ord("a"): 2, ord("b"): 2, ord("d"): 1, ord("c"): 0}
    assert sorted(core.loaded.values()) == ["a", "a", "b", "b", "d"]
    queue.admit("e0", 21)
    assert residents.report() == {"gone": ["b0", "b1"], "adapters": 4, "bytes": 320, "bases": 3}
    with pytest.raises(StateError, match=r'ask again later, .* larger "max_bases"') as e:
        queue.admit("f0", 22)
    assert "seed 3" not in str(e.value) and sorted(core.loaded.values()) == ["a", "a", "d", "e"]
    core.scheduler.requests.clear()
    residents.remove(20)
    queue.admit("f0", 22)  # a place that nobody has any more is simply taken
    assert residents.report()["gone"] == []


class Client:
    """What an API server has of an engine, over Residents."""

    def __init__(self, residents, memory=32):
        self.residents = self._vera_residents = residents
        self.engine_core = self
        self.vllm_config = types.SimpleNamespace(lora_config=types.SimpleNamespace(max_cpu_loras=memory))

    async def add_lora(self, request):
        return add_lora(self, None, request)

    async def remove_lora(self, number):
        return self.residents.remove(number)

    async def call_utility_async(self, method):
        return {"vera_report": self.residents.report}[method]()


@pytest.fixture
def adapters_over(monkeypatch):
    """adapters_over(residents): the Adapters of an API server, whose store has whatever name `versions` has."""
    msgspec = pytest.importorskip("msgspec")
    fields = [("lora_name", str), ("lora_int_id", int), ("lora_path", str), ("load_inplace", bool, False)]
    for name in ("vllm", "vllm.lora", "vllm.lora.request"):
        monkeypatch.setitem(sys.modules, name, types.ModuleType(name))
    sys.modules["vllm.lora.request"].LoRARequest = msgspec.defstruct("LoRARequest", fields)

    def made(residents, versions):
        for name, stub in {
            "check_with_lora": lambda config: None,
            "open_store": lambda url: None,
            "engine_name": lambda store, plain: f"{plain}@{versions[plain]}-000000000000",
            "read": lambda *args: None,
            "pack": lambda vectors: "packed",
        }.items():
            monkeypatch.setattr(server, name, stub)
        return server.Adapters(types.SimpleNamespace(engine_client=Client(residents), lora_requests={}), Settings(store="s"))

    return made


def test_what_the_api_server_takes_for_loaded_is_in_the_engine(adapters_over):
    """Versions change, requests wait in a queue: the engine core itself never has to read an adapter, which might be damaged."""
    versions = dict.fromkeys((f"n{k}" for k in range(60)), 1)

    class Reading(Core):
        paths = ()

        def collective_rpc(self, method, args):
            self.paths += (args[0].lora_path,) if method == "add_lora" else ()
            return super().collective_rpc(method, args)

    core = Reading()
    residents = Residents(core, 32)
    adapters = adapters_over(residents, versions)
    draw, queue = random.Random(0), []

    async def load():
        for step in range(4000):
            name = f"n{min(59, int(draw.expovariate(0.06)))}"
            versions[name] += draw.random() < 0.2
            queue.append(await adapters.request_for(name))
            if len(queue) > 6:
                request = types.SimpleNamespace(lora_request=queue.pop(draw.randrange(3)))
                residents.admit(request)
                core.scheduler.requests[step] = request
                core.scheduler.requests.pop(step - 8, None)

    asyncio.run(load())
    assert len(core.paths) > 500 and set(core.paths) == {"packed"}
    assert set(adapters.models.lora_requests) == {held.name for held in residents.held.values()}


def refused(adapters, name):
    """(status, words) of the Refusal; (503, kind, words)."""
    with pytest.raises(server.Refusal) as e:
        asyncio.run(adapters.request_for(name))
    later = (e.value.kind,) if e.value.status == HTTPStatus.SERVICE_UNAVAILABLE else ()
    return e.value.status, *later, e.value.text


def test_unloading_takes_all_versions_out_of_memory(adapters_over):
    core, versions = Core(), {"ann": 1, "bob": 1}
    adapters = adapters_over(Residents(core, 32), versions)
    for versions["ann"] in (1, 2, 3):
        asyncio.run(adapters.request_for("ann"))
    asyncio.run(adapters.request_for("bob"))
    listed = [f"ann@{v}-000000000000" for v in (1, 2, 3)]
    assert list(adapters.models.lora_requests) == [*listed, "bob@1-000000000000"] and len(core.loaded) == 4
    asyncio.run(adapters.unload(listed[0]))
    assert len(core.loaded) == 3 and refused(adapters, listed[0])[0] == 404
    asyncio.run(adapters.unload("ann"))
    assert list(core.loaded.values()) == ["b"] and list(adapters.models.lora_requests) == ["bob@1-000000000000"]
    for name in ("ann", listed[2], "nobody"):
        with pytest.raises(server.Refusal, match="isn't loaded"):
            asyncio.run(adapters.unload(name))


def test_a_version_that_is_newer_than_what_is_trusted_is_found(adapters_over):
    versions = {"ann": 1}
    adapters = adapters_over(Residents(Core(), 32), versions)
    adapters.settings = Settings(store="s", check_every=60.0)
    asyncio.run(adapters.request_for("ann"))
    versions["ann"] = 2
    assert asyncio.run(adapters.request_for("ann")).lora_name == "ann@1-000000000000"  # trusted for a minute
    assert asyncio.run(adapters.request_for("ann@2-000000000000")).lora_name == "ann@2-000000000000"
    assert refused(adapters, "ann@1-000000000000")[0] == refused(adapters, "ann@3-000000000000")[0] == 404


def test_what_failed_decides_the_status(adapters_over, monkeypatch):
    core = Core()
    core.BASES = 1
    residents = Residents(core, 32)
    adapters = adapters_over(residents, dict.fromkeys(("ann", "bob", "cal"), 1))
    request = asyncio.run(adapters.request_for("ann"))
    core.scheduler.requests["r"] = types.SimpleNamespace(lora_request=None)
    residents.admit(running := types.SimpleNamespace(lora_request=request))
    core.scheduler.requests["r"] = running
    status, kind, text = refused(adapters, "bob")
    assert (status, kind) == (503, "overloaded") and "seed 3" not in text
    assert text.startswith("running requests use as many different pairs")
    core.scheduler.requests.clear()
    asyncio.run(adapters.request_for("bob"))
    assert list(adapters.models.lora_requests) == ["bob@1-000000000000"]  # ann made room, and is read again
    asyncio.run(adapters.request_for("ann"))
    assert list(core.loaded.values()) == ["a"]

    monkeypatch.setattr(core, "collective_rpc", lambda method, args: ["it has rank 64"])
    assert refused(adapters, "cal") == (400, "it has rank 64")

    def dead(method, args):
        raise RuntimeError("Executor failed. /usr/lib/secret.py")

    monkeypatch.setattr(core, "collective_rpc", dead)
    assert refused(adapters, "cal") == (503, "engine_unavailable", "the engine failed.")

    for error, status in (
        (StoreUnavailable("can't read it: Input/output error."), 503),
        (OSError("stale handle"), 503),
        (StoreError("it is damaged"), 400),
        (AdapterMismatch("it doesn't fit"), 400),
    ):
        for step in ("engine_name", "read"):

            def fail(*args, error=error):
                raise error

            with monkeypatch.context() as patch:
                patch.setattr(server, step, fail)
                assert refused(adapters, "cal")[0] == status, (error, step)


@pytest.mark.parametrize("status", [400, 404, 503])
def test_pooling_routes_answer_with_the_refusals_status(status):
    pytest.importorskip("vllm")
    from vllm.entrypoints.serve.exception_handling.error_response import create_error_response

    async def request_for(name):
        raise server.Refusal(HTTPStatus(status), "why")

    models = types.SimpleNamespace(vera=types.SimpleNamespace(request_for=request_for), is_base_model=lambda name: False)
    check = server.check_pooling_model(types.SimpleNamespace(models=models), None, types.SimpleNamespace(model="ann"))
    with pytest.raises(Exception, match="why") as e:
        asyncio.run(check)
    assert getattr(e.value, "status_code", None) == status or create_error_response(e.value).error.code == status
