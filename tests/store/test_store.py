"""A store gives back what was put, under any name, in every version."""

import os
import time
from dataclasses import replace

import pytest
import torch

from tests.conftest import tiny_bert, tiny_llama
from tests.store.killing import filled
from tests.store.samples import equal, trained
from veralib import ConfigError, StoreError, UnknownName, VeraConfig, attach
from veralib.serving.names import engine_name
from veralib.store import CachedStore, open_store, open_there


@pytest.mark.parametrize(
    "config",
    [
        VeraConfig(rank=8, targets="all-linear"),
        VeraConfig(rank={"query": 4, "value": 12}, targets=["query", "value"], sharing="unique", scale=2.0),
        VeraConfig(rank=4, targets=["query"], basis="peft", train_modules=("classifier",)),
    ],
    ids=["plain", "unique", "peft and head"],
)
def test_get_gives_what_was_put(place, config):
    build = tiny_llama if config.targets == "all-linear" else tiny_bert
    adapter = replace(trained(config, build), notes={"accuracy": "0.9"})
    store = open_store(place[0], place[1])
    assert store.put("ann", adapter) == 1
    for again in (store, open_store(place[0])):
        found = again.get("ann")
        assert equal(found, adapter) and found.notes == {"accuracy": "0.9"}
    model = build()
    vera = attach(model)
    vera.load(found, name="ann")
    vera.load(adapter, name="as trained")
    ids = torch.arange(3, 10)[None]
    vera.use("ann")
    mine = model(input_ids=ids).logits
    vera.use("as trained")
    assert torch.equal(mine, model(input_ids=ids).logits)


NASTY = [
    "../../escape", "/etc/passwd", ".", "..", "a/b", "a\\b", "A", "a", "Ä", "A\u0308", "ß", "ss", "con", "nul.txt", "x" * 5000,
    "x" * 4999 + "y", "a=2f", "=", "~", "~" * 200, "\ud800", "\udfff", "\0", "a\0b", "line\nbreak", " ", "  ", "ann ", "🦆",
    "a%2Fb", "store.json", "*", "?", "a:b", "-", "--help", "\u202eevil", "名前", "%00", "\x7f", "İ", "i̇",
]  # fmt: skip


def test_every_name_is_legal_and_none_meets_another(place, tmp_path):
    adapter = trained()
    store = open_store(place[0], place[1])
    for i, name in enumerate(NASTY):
        store.put(name, filled(adapter, float(i + 1)))
    assert sorted(store.names(), key=repr) == sorted(NASTY, key=repr) and len(store) == len(NASTY)
    for i, name in enumerate(NASTY):
        assert next(iter(store.get(name).vectors.values()))[0][0] == i + 1
    assert set(store.names("a")) == {n for n in NASTY if n.startswith("a")}
    if place[1]:
        assert os.listdir(tmp_path) == ["store"]
    for wrong in ("", None, 3, b"ann"):
        with pytest.raises(StoreError, match="expected a string"):
            store.put(wrong, adapter)


def test_versions_rollback_and_delete(place):
    adapter = trained()
    store = open_store(place[0], place[1])
    assert [store.put("ann", filled(adapter, v), notes={"v": str(v)}) for v in (1.0, 2.0, 3.0)] == [1, 2, 3]
    store.put("bob", adapter)
    value = lambda n, v=None: next(iter(store.get(n, v).vectors.values()))[0][0].item()  # noqa: E731
    assert [value("ann"), value("ann", 1), store.current("ann")] == [3.0, 1.0, 3]
    assert store.rollback("ann", 2) == 4
    assert [value("ann"), [v.number for v in store.versions("ann")]] == [2.0, [1, 2, 3, 4]]
    assert store.versions("ann")[2].notes == {"v": "3.0"} and store.versions("ann")[0].bytes > adapter.bytes
    with pytest.raises(UnknownName, match="no version 9"):
        store.get("ann", 9)
    store.delete("ann")
    for call in (store.get, store.delete, store.versions, store.current):
        with pytest.raises(UnknownName, match='no adapter "ann"'):
            call("ann")
    assert "ann" not in store and "bob" in store and list(store.names()) == ["bob"]
    store.put("ann", filled(adapter, 7.0))
    again = open_store(place[0])
    assert next(iter(again.get("ann").vectors.values()))[0][0] == 7.0 and sorted(again.names()) == ["ann", "bob"]


@pytest.mark.parametrize("keep", [1, 2, 5])
def test_keep_bounds_the_versions(place, keep):
    adapter = trained()
    store = open_store(place[0], place[1], keep=keep)
    for v in range(1, 9):
        store.put("ann", filled(adapter, float(v)))
        assert [v.number for v in store.versions("ann")] == list(range(max(1, v - keep + 1), v + 1))


@pytest.mark.parametrize(("precision", "bound"), [("bfloat16", 2**-8), ("int8", 1 / 254)])
def test_smaller_precisions_round_as_said(place, precision, bound):
    adapter = trained()
    store = open_store(place[0], place[1], precision=precision)
    store.put("ann", adapter)
    found = open_store(place[0]).get("ann")
    for unit, pair in adapter.vectors.items():
        for mine, kept in zip(pair, found.vectors[unit], strict=True):
            assert not torch.equal(mine, kept)
            assert (mine - kept).abs().max() <= bound * mine.abs().max() * (1 + 1e-6)
    raw = adapter.parameters * (2 if precision == "bfloat16" else 1)
    assert raw < store.versions("ann")[0].bytes < raw + 8 * len(adapter.vectors) + 120


def test_a_configuration_is_stored_once(tmp_path):
    adapter = trained()
    folder, packed = open_store(tmp_path / "f"), open_store(tmp_path / "p", kind="packed")
    for store in (folder, packed):
        for i in range(50):
            store.put(f"owner {i}", filled(adapter, float(i)))
        store.put("other", trained(VeraConfig(rank=4, targets="all-linear")))
    assert len(list((tmp_path / "f/configurations").iterdir())) == 2
    assert len(list((tmp_path / "p").glob("configuration-*"))) == 2
    one = os.path.getsize(next((tmp_path / "f/adapters").glob("*/owner=*/*.vera")))
    assert adapter.bytes < one < adapter.bytes + 120


@pytest.mark.parametrize("kind", ["folder", "packed"])
def test_put_many_of_a_thousand_is_one_batch(tmp_path, kind, monkeypatch):
    store = open_store(tmp_path / "s", kind=kind)
    adapter = trained(VeraConfig(rank=2, targets=["q_proj"]))
    store.put("first", adapter)
    syncs = []
    monkeypatch.setattr(os, "fsync", lambda f, sync=os.fsync: syncs.append(f) or sync(f))
    versions = store.put_many((f"{i % 400}", filled(adapter, float(i))) for i in range(1000))
    assert versions[0] == 1 and versions[400] == 2 and versions[999] == 3 and len(store) == 401
    assert next(iter(store.get("199").vectors.values()))[0][0] == 999
    if kind == "packed":
        assert len(syncs) == 1


def test_compact_keeps_what_is_wanted(tmp_path):
    adapter = trained()
    store = open_store(tmp_path, kind="packed", keep=1)
    for v in range(20):
        store.put_many([(f"owner {i}", filled(adapter, float(v))) for i in range(10)])
    for i in range(5):
        store.delete(f"owner {i}")
    other = open_store(tmp_path)
    assert next(iter(other.get("owner 7").vectors.values()))[0][0] == 19.0
    before = sum(p.stat().st_size for p in tmp_path.glob("data-*"))
    freed = store.compact()
    after = sum(p.stat().st_size for p in tmp_path.glob("data-*"))
    assert freed == before - after and after < before / 30
    for s in (store, other, open_store(tmp_path)):
        assert sorted(s.names()) == [f"owner {i}" for i in range(5, 10)]
        assert next(iter(s.get("owner 7").vectors.values()))[0][0] == 19.0
    other.put("owner 7", filled(adapter, 20.0))
    assert store.current("owner 7") == 21


@pytest.mark.parametrize("lost", [False, True], ids=["index kept", "index lost"])
def test_an_emptied_packed_store_gives_no_stamp_twice(tmp_path, lost):
    adapter = trained()
    value = lambda found: float(next(iter(found.vectors.values()))[0][0])  # noqa: E731
    server, admin = open_store(tmp_path, kind="packed"), open_store(tmp_path)
    admin.put("ann", filled(adapter, 1.0))
    assert value(server.get("ann")) == 1.0
    stamp, name = server.stamp("ann"), engine_name(server, "ann")
    admin.delete("ann")
    admin.compact()
    if lost:
        server.close()
        admin.close()
        for file in tmp_path.glob("index.sqlite*"):
            file.unlink()
        admin = open_store(tmp_path)
    admin.put("ann", filled(adapter, 2.0))
    assert value(server.get("ann")) == value(admin.get("ann")) == 2.0
    assert server.stamp("ann") != stamp and engine_name(server, "ann") != name
    assert len(server._segments.mapped) == 1  # the removed file's bytes aren't held


def test_bad_stores_and_settings(tmp_path):
    adapter = trained()
    (tmp_path / "photos").mkdir()
    (tmp_path / "photos/cat.jpg").write_bytes(b"meow")
    with pytest.raises(StoreError, match="is no store"):
        open_store(tmp_path / "photos")
    assert os.listdir(tmp_path / "photos") == ["cat.jpg"]
    open_store(tmp_path / "s").put("ann", adapter)
    with pytest.raises(StoreError, match="has kind 'folder'"):
        open_store(tmp_path / "s", kind="packed")
    with pytest.raises(ConfigError, match="precision"):
        open_store(tmp_path / "t", precision="int4")
    with pytest.raises(ConfigError, match="kind of store"):
        open_store(tmp_path / "t", kind="sql")
    with pytest.raises(StoreError, match="appends"):
        open_store("memory://packed-not-here", kind="packed")
    assert not (tmp_path / "t").exists()
    with pytest.raises(StoreError, match="NaN"):
        open_store(tmp_path / "s").put("ann", filled(adapter, float("nan")))
    about = tmp_path / "s/store.json"
    about.write_text(about.read_text().replace('"veralib_store": 1', '"veralib_store": 2'))
    with pytest.raises(StoreError, match=r"format 2.*Upgrade"):
        open_store(tmp_path / "s")
    about.write_text("{")
    with pytest.raises(StoreError, match="can't be read"):
        open_store(tmp_path / "s")


def test_a_cache_never_serves_a_deleted_adapter(place):
    adapter = trained()
    store = open_store(place[0], place[1])
    cache = CachedStore(store)
    store.put("ann", filled(adapter, 1.0))
    cache.get("ann")
    store.delete("ann")
    store.put("ann", filled(adapter, 2.0))
    assert store.current("ann") == 1  # again
    assert next(iter(cache.get("ann").vectors.values()))[0][0] == 2.0


@pytest.mark.parametrize("name", ["ann", "A" * 60])
def test_what_goes_while_it_is_listed_is_no_error(tmp_path, monkeypatch, name):
    """With `keep`, a put removes the version that somebody is about to read; the name of a long one is in its record alone."""
    store = open_store(tmp_path, keep=1)
    store.put(name, trained())
    read, gone = store.files.read, []

    def late(path):
        if not gone:
            gone.append(path)
            store.delete(name)
        return read(path)

    monkeypatch.setattr(store.files, "read", late)
    if name == "ann":
        with pytest.raises(UnknownName):
            store.versions(name)
    else:
        assert list(store.names()) == []
    assert len(gone) == 1


def test_a_long_name_is_read_from_an_earlier_version_where_the_newest_is_damaged(tmp_path):
    store = open_store(tmp_path)
    for _ in range(2):
        store.put("A" * 60, trained())
    newest = max(tmp_path.glob("adapters/*/*/*.vera"))
    newest.write_bytes(newest.read_bytes()[:-1])
    assert list(store.names()) == ["A" * 60]


def test_what_a_killed_process_left_half_done_is_gone_when_a_store_is_opened(tmp_path, monkeypatch):
    """Killed while it deleted: nobody reads the bytes any more, but their owner wants them gone."""
    store = open_store(tmp_path / "store")
    store.put("ann", trained())
    scratch = tmp_path / "store/tmp"

    def kill(*_, **__):
        raise KeyboardInterrupt

    with monkeypatch.context() as m:
        m.setattr("shutil.rmtree", kill)
        with pytest.raises(KeyboardInterrupt):
            store.delete("ann")
    for name, age in (("written-long-ago", 3601), ("being-written", 0)):
        (scratch / name).write_bytes(b"x")
        os.utime(scratch / name, (time.time() - age,) * 2)
    assert len(list(scratch.iterdir())) == 3
    assert "ann" not in open_store(tmp_path / "store")
    assert [path.name for path in scratch.iterdir()] == ["being-written"]


def test_only_a_store_that_is_there_is_opened_there(tmp_path):
    with pytest.raises(StoreError, match=r"there is no store at .*nowhere"):
        open_there(tmp_path / "nowhere")
    assert not (tmp_path / "nowhere").exists()
    open_store(tmp_path / "somewhere", precision="bfloat16")
    assert open_there(tmp_path / "somewhere").precision == "bfloat16"


def test_only_adapters_are_stored(tmp_path):
    store = open_store(tmp_path)
    with pytest.raises(ConfigError, match=r"is a str, expected an Adapter: vera\.adapter\(name\)"):
        store.put("ann", "ann.safetensors")
    assert list(store.names()) == []


def test_a_mistyped_setting_of_a_local_store_is_named(tmp_path):
    with pytest.raises(ConfigError, match=r'no setting of a store on a local disk "knd"\. Did you mean "kind"\?'):
        open_store(tmp_path / "adapters", knd="packed")
    assert not (tmp_path / "adapters").exists()
