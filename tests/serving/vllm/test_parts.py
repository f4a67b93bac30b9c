"""The plugin's parts that need no vLLM: settings, the wire, bases, tables and sums, taking hold of a module."""

import sys
import types

import pytest
import torch

from veralib.basis import Basis
from veralib.core import delta
from veralib.errors import ConfigError, StateError
from veralib.serving.vllm import patches, server
from veralib.serving.vllm.bases import Bases, NoPlace
from veralib.serving.vllm.manager import Manager
from veralib.serving.vllm.settings import Settings, settings_of
from veralib.serving.vllm.sites import Piece, Place
from veralib.serving.vllm.sums import Site
from veralib.serving.vllm.tables import Layout, Loaded, Tables
from veralib.serving.vllm.wire import Unit, Vectors, pack, request_id, unpack

NATIVE = [Basis("philox-u8", 3), Basis("philox-u8", 2**63 + 5, "rademacher")]
PEFT = Basis("peft", 7, rank=8, max_in=24, max_out=40)


def config_with(vera):
    return types.SimpleNamespace(additional_config=vera)


def test_settings_and_their_faults():
    assert settings_of(config_with({})) is settings_of(config_with(None)) is settings_of(types.SimpleNamespace()) is None
    assert settings_of(config_with({"vera": {"store": "s"}})) == Settings("s")
    with pytest.raises(ConfigError, match=r'no field "max_rnk"\. Did you mean "max_rank"'):
        settings_of(config_with({"vera": {"store": "s", "max_rnk": 1}}))
    with pytest.raises(ConfigError, match=r"store is None.*max_rank is 0.*max_bases is True.*check_every is -1"):
        settings_of(config_with({"vera": {"max_rank": 0, "max_bases": True, "check_every": -1}}))
    with pytest.raises(ConfigError, match=r"expected \{"):
        settings_of(config_with({"vera": "s"}))


@pytest.mark.parametrize("basis", [*NATIVE, PEFT])
def test_an_adapter_comes_back_from_its_path(basis):
    sent = Vectors(
        basis, (Unit("a.q", 40, 24, torch.randn(8), torch.randn(40)), Unit("a.v", 8, 24, torch.randn(4), torch.randn(8)))
    )
    got = unpack(pack(sent))
    assert got.basis == basis and [u.name for u in got.units] == ["a.q", "a.v"]
    for one, other in zip(sent.units, got.units, strict=True):
        assert (one.outputs, one.inputs) == (other.outputs, other.inputs)
        assert torch.equal(one.d, other.d) and torch.equal(one.b, other.b)


def test_numbers_of_names_are_the_same_in_every_process():
    import hashlib

    name = "ann@1-2bc183fb4468"
    assert request_id(name) == int.from_bytes(hashlib.sha256(name.encode()).digest()[:8], "little") // 4 < 2**62
    assert len({request_id(f"a{i}@1-000000000000") for i in range(10_000)}) == 10_000


@pytest.mark.parametrize("basis", [*NATIVE, PEFT])
def test_blocks_of_the_basis_are_those_of_the_whole(basis):
    bases = Bases(2, 8, torch.float32, torch.device("cpu"))
    blocks = {(0, 24): bases.A(0, 24), (8, 16): bases.A(8, 16)}
    rows = {(0, 40): bases.B(0, 40), (17, 29): bases.B(17, 29)}
    at = bases.place(basis)
    for (first, last), block in blocks.items():
        assert torch.equal(block[at], basis.A(8, 24)[:, first:last])
    for (first, last), block in rows.items():
        assert torch.equal(block[at], basis.B(40, 8)[first:last])
    assert bases.A(0, 24) is blocks[0, 24]


def test_places_for_bases_are_taken_reused_and_refused():
    bases = Bases(2, 4, torch.float32, torch.device("cpu"))
    bases.A(0, 8)
    assert [bases.place(b) for b in (NATIVE[0], NATIVE[1], NATIVE[0])] == [0, 1, 0]
    with pytest.raises(NoPlace):
        bases.place(Basis("philox-u8", 9))
    bases.leave(1)
    assert bases.place(Basis("philox-u8", 9)) == 1 and bases.users == [2, 1]


def test_packed_products_follow_the_basis_and_are_few(monkeypatch):
    made = []

    def pack(W):
        made.append(tuple(W.shape))
        kept = W.clone()
        return lambda x: x @ kept.t()

    bases = Bases(1, 12, torch.float32, torch.device("cpu"))
    monkeypatch.setattr(bases, "_packs", pack)
    A, B = bases.A(0, 24), bases.B(0, 40)
    x, h = torch.randn(5, 24), torch.randn(5, 12)
    for basis in NATIVE[:2]:
        at = bases.place(basis)
        for _ in range(2):
            for r in range(1, 13):
                torch.testing.assert_close(bases.product(x, A, at, rows=r), x @ basis.A(r, 24).t())
                torch.testing.assert_close(bases.product(h[:, :r], B, at, columns=r), h[:, :r] @ basis.B(40, r).t())
        bases.leave(at)
    ranks = [1, 2, 4, 8, 12]
    assert sorted(made) == sorted([(r, 24) for r in ranks] * 2 + [(40, r) for r in ranks] * 2)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_products_are_right_as_this_processor_makes_them(dtype):
    bases = Bases(2, 64, dtype, torch.device("cpu"))
    A = bases.A(0, 96)
    at = bases.place(NATIVE[0])
    for tokens, rank in [(1, 64), (7, 32), (40, 48)]:
        x = torch.randn(tokens, 96).to(dtype)
        want = x.double() @ A[at, :rank].double().t()
        torch.testing.assert_close(bases.product(x, A, at, rows=rank).double(), want, rtol=2e-2, atol=2e-2)


class Setting:
    """Two fused linears over one table: k and v read the same rows of B, q others; adapters on some, of two bases."""

    R, SLOTS, TOKENS = 8, 4, 12

    def __init__(self, dtype=torch.float32, static=False, device=torch.device("cpu")):  # noqa: B008
        self.bases = Bases(2, self.R, dtype, device)
        place = Place(
            "qkv", 24, 0, 24, (Piece("q", 0, 0, 16), Piece("k", 16, 4, 4), Piece("v", 20, 4, 4)), {"q": 16, "k": 8, "v": 8}
        )
        self.tables = Tables(self.SLOTS, self.R, 2, 3 * self.R, 24, self.TOKENS, dtype, device, static)
        self.site = Site(place, self.tables, self.bases, 0, 0, 0)
        self.vectors = []
        generator = torch.Generator().manual_seed(0)
        for slot, (basis, rank, which) in enumerate([(0, 8, (0, 1, 2)), (1, 4, (0, 2)), (0, 2, (1,)), (1, 8, (2,))]):
            at = self.bases.place(NATIVE[basis])
            d = {i: torch.randn(rank, generator=generator) for i in which}
            scaled = torch.cat([*d.values()]) / self.bases.factor(NATIVE[basis])  # as the manager does
            b = {i: torch.randn(place.pieces[i].width, generator=generator) for i in which}
            columns_d = torch.cat([torch.arange(i * self.R, i * self.R + rank) for i in which])
            columns_b = torch.cat([torch.arange(p.out, p.out + p.width) for p in (place.pieces[i] for i in which)])
            layout = Layout(columns_d, columns_b, frozenset(which), rank)
            self.tables.write(slot, Loaded(slot + 1, layout, at, scaled.to(dtype), torch.cat([*b.values()]).to(dtype)))
            self.vectors.append((NATIVE[basis], rank, d, b))
        self.place = place

    def want(self, x, out, ids):
        """By core.delta, a token and a piece at a time, in float64."""
        out = out.double().clone()
        for t, number in enumerate(ids):
            if number == 0:
                continue
            basis, rank, ds, bs = self.vectors[number - 1]
            for i, d in ds.items():
                p = self.place.pieces[i]
                A, B = basis.A(rank, 24).double(), basis.B(16, rank)[p.start : p.start + p.width].double()
                out[t, p.out : p.out + p.width] += delta(x[t].double(), A, B, d.double(), bs[i].double())
        return out


@pytest.mark.parametrize("ids", [(1, 2, 3, 4, 0, 0, 1), (2,) * 5, (1, 1, 0), (0, 3, 0, 3), (1, 3), (4, 2, 4), (0, 0)])
@pytest.mark.parametrize("static", [False, True])
@pytest.mark.parametrize("dtype, bound", [(torch.float32, 1e-5), (torch.float16, 2e-2), (torch.bfloat16, 0.2)])
def test_sums_equal_the_reference(ids, static, dtype, bound):
    s = Setting(dtype, static=static)
    x, out = torch.randn(len(ids), 24).to(dtype), torch.randn(len(ids), 24).to(dtype)
    want = s.want(x, out, ids)
    s.tables.follow(ids, {n: n - 1 for n in (1, 2, 3, 4)})
    base = out.clone()
    got = s.site._add_static(x, out) if static else s.site.add(x, out)
    assert got.data_ptr() == out.data_ptr()
    torch.testing.assert_close(got.double(), want, rtol=bound, atol=bound)
    for t, number in enumerate(ids):
        if number == 0:
            assert torch.equal(got[t], base[t])


def test_sums_in_chunks_equal_the_reference(monkeypatch):
    from veralib.serving.vllm import sums

    monkeypatch.setattr(sums, "CHUNK", 2)
    for ids in [(1, 2, 3, 4, 0, 0, 1), (2,) * 7, (1, 3, 1, 3, 1)]:
        s = Setting()
        x, out = torch.randn(len(ids), 24), torch.randn(len(ids), 24)
        want = s.want(x, out, ids)
        s.tables.follow(ids, {n: n - 1 for n in (1, 2, 3, 4)})
        torch.testing.assert_close(s.site.add(x, out).double(), want, rtol=1e-5, atol=1e-5)


def test_a_compiled_layer_follows_the_tables_without_being_compiled_anew():
    s = Setting(static=True)
    compiled = torch.compile(lambda x, out: s.site.add(x, out.clone()), backend="eager", fullgraph=True)
    for ids in [(1, 2, 3), (0, 4, 1), (0, 0, 0)]:
        x, out = torch.randn(3, 24), torch.randn(3, 24)
        s.tables.follow(ids, {n: n - 1 for n in (1, 2, 3, 4)})
        with torch.compiler.set_stance("default" if ids == (1, 2, 3) else "fail_on_recompile"):
            torch.testing.assert_close(compiled(x, out).double(), s.want(x, out, ids), rtol=1e-5, atol=1e-5)


def test_padding_is_left_alone_and_missing_tokens_are_refused():
    s = Setting()
    s.tables.follow((1, 2), {n: n - 1 for n in (1, 2)})
    x, out = torch.randn(4, 24), torch.randn(4, 24)
    before = out.clone()
    s.site.add(x, out)
    assert torch.equal(out[2:], before[2:]) and not torch.equal(out[:2], before[:2])
    with pytest.raises(RuntimeError, match="got 1 of 2 tokens"):
        s.site.add(x[:1], out[:1])


def test_steps_of_ever_other_pieces_take_no_more_memory(monkeypatch):
    from veralib.serving.vllm import sums, tables

    monkeypatch.setattr(tables, "MOST_KEYS", 2)
    monkeypatch.setattr(sums, "MOST_KEYS", 2)
    s, seen = Setting(), {}
    for ids in [(1,), (2,), (3,), (4,), (2, 3), (1, 2), (3, 4), (4,), (2,), (1,)] * 2:
        s.tables.follow(ids, {n: n - 1 for n in (1, 2, 3, 4)})
        step = s.tables.step
        assert seen.setdefault(step.key, step.pieces) == step.pieces  # a number stands for the same pieces for ever
        x, out = torch.randn(len(ids), 24), torch.randn(len(ids), 24)
        want = s.want(x, out, ids)
        torch.testing.assert_close(s.site.add(x, out).double(), want, rtol=1e-5, atol=1e-5)
        assert len(s.tables._keys) <= 2 and len(s.site._by_key) <= 2
    s.tables.follow((1, 3), {1: 0, 3: 2})
    key = s.tables.step.key
    s.tables.follow((1, 2), {1: 0, 2: 1})
    assert s.tables.step.key == key  # other layouts, the same pieces


def test_a_vllm_that_differs_is_refused_in_words(monkeypatch):
    monkeypatch.setattr(patches, "_faults", [])
    monkeypatch.setattr(patches._Later, "waiting", set())
    module = types.ModuleType("vllm.v1.engine.core")

    class EngineCore:
        def __init__(self, vllm_config): ...
        def add_lora(self, request): ...
        def remove_lora(self, lora_id): ...

    module.EngineCore = EngineCore
    patches._take_hold(module)
    with pytest.raises(
        StateError, match=r"add_lora takes \(self, request\), expected \(self, lora_request, …\).*has no EngineCore.add_request"
    ):
        patches.demand()


def test_an_api_server_refuses_a_vllm_that_differs_in_its_own_modules(tmp_path, monkeypatch):
    """In processes of its own the engine is sound: nobody else would notice that names are no longer looked up in the store."""
    (tmp_path / "vllm_routes.py").write_text("class BaseServing:\n    async def _check_model(self, raw_request): ...\n")
    monkeypatch.syspath_prepend(str(tmp_path))
    monkeypatch.setattr(patches, "_faults", [])
    monkeypatch.setattr(patches._Later, "waiting", {"vllm_routes"})
    monkeypatch.setattr(sys, "meta_path", [patches._Later(), *sys.meta_path])
    check = {"BaseServing._check_model": (("self", "request"), server.check_model)}
    monkeypatch.setattr(patches, "_EXPECTED", {"vllm_routes": check})
    monkeypatch.setattr(patches, "API_SERVER", "vllm_routes")
    monkeypatch.setattr(server, "check_with_lora", lambda config: None)
    engine = types.SimpleNamespace(vllm_config=config_with({"vera": {"store": str(tmp_path)}}))
    with pytest.raises(StateError, match=r"_check_model takes \(self, raw_request\), expected \(self, request, …\)"):
        server.attach(types.SimpleNamespace(engine_client=engine), lambda models: None)


def test_a_module_is_taken_hold_of_when_it_is_imported(tmp_path, monkeypatch):
    (tmp_path / "taken_later.py").write_text("class Thing:\n    def double(self, x):\n        return 2 * x\n")
    monkeypatch.syspath_prepend(str(tmp_path))
    monkeypatch.setattr(patches, "_faults", [])
    around = lambda self, upstream, x: upstream(self, x) + 1  # noqa: E731
    monkeypatch.setitem(patches._EXPECTED, "taken_later", {"Thing.double": (("self", "x"), around)})
    monkeypatch.setattr(patches._Later, "waiting", {"taken_later"})
    finder = patches._Later()
    monkeypatch.setattr(sys, "meta_path", [finder, *sys.meta_path])
    import importlib.util

    assert importlib.util.find_spec("taken_later") is not None  # looking isn't importing
    import taken_later

    assert taken_later.Thing().double(4) == 9 and not patches._faults


def test_the_manager_refuses_to_start_without_settings_or_lora():
    with pytest.raises(StateError, match="without the setting"):
        Manager(config_with({}), torch.device("cpu"))
    with pytest.raises(ConfigError, match="--enable-lora"):
        Manager(types.SimpleNamespace(additional_config={"vera": {"store": "s"}}, lora_config=None), torch.device("cpu"))
