"""A store gives back what was put, under any name, whoever is killed, and says so when it can't."""

import errno
import os
import random
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from tests.conftest import randomise, tiny_bert, tiny_llama
from tests.store.killing import filled
from veralib import ConfigError, StoreError, UnknownName, VeraConfig, attach
from veralib.store import CachedStore, open_store

KINDS = ("folder", "packed", "memory")


def trained(config=None, build=tiny_llama, seed=0):
    vera = attach(build(), config or VeraConfig(rank=8, targets="all-linear"))
    randomise(vera, "default", seed)
    return vera.adapter()


@pytest.fixture(params=KINDS)
def place(request, tmp_path):
    """(where, kind) of a store that isn't there yet."""
    pytest.importorskip("fsspec")
    if request.param == "memory":
        return f"memory://{tmp_path.name}-{random.random()}", None
    return str(tmp_path / "store"), request.param


def equal(a, b) -> bool:
    same = a.config == b.config and a.basis == b.basis and a.base == b.base and dict(a.layer_ids) == dict(b.layer_ids)
    pairs = [(x, y) for u in a.vectors for x, y in zip(a.vectors[u], b.vectors[u], strict=True)]
    pairs += [(a.biases[n], b.biases[n]) for n in a.biases]
    pairs += [(t, b.modules[n][k]) for n, state in a.modules.items() for k, t in state.items()]
    return same and list(a.vectors) == list(b.vectors) and all(torch.equal(x, y) for x, y in pairs)


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


def test_a_compaction_that_failed_brings_nobody_back(tmp_path, monkeypatch):
    adapter = trained()
    store = open_store(tmp_path, kind="packed")
    for v in (1.0, 2.0, 3.0):
        store.put_many([(f"owner {i}", filled(adapter, v)) for i in range(6)])

    def full(_):
        raise OSError(errno.ENOSPC, "No space left on device")

    real, written = store._append, []

    def once(index, records, *place):
        written.append(real(index, records[:9], *place))  # some are copied, then the disk is full
        with monkeypatch.context() as m:
            m.setattr(os, "fsync", full)
            return real(index, records[9:], *place)

    monkeypatch.setattr(store, "_append", once)
    with pytest.raises(StoreError, match="disk is full"):
        store.compact()
    monkeypatch.undo()
    assert written
    other = open_store(tmp_path)
    other.delete("owner 1")
    other.put("owner 2", filled(adapter, 9.0))
    for s in (open_store(tmp_path), store):
        assert sorted(s.names()) == [f"owner {i}" for i in (0, 2, 3, 4, 5)]
        assert next(iter(s.get("owner 2").vectors.values()))[0][0] == 9.0
    store.compact()
    assert sorted(open_store(tmp_path).names()) == [f"owner {i}" for i in (0, 2, 3, 4, 5)]
    assert len(list(tmp_path.glob("data-*"))) == 1


# Damage


def test_a_damaged_record_costs_no_other_when_the_index_is_lost(tmp_path):
    adapter = trained()
    store = open_store(tmp_path, kind="packed")
    places = []
    for i in range(6):
        places.append((tmp_path / "data-000001.vera").stat().st_size if i else 0)
        store.put(f"owner {i}", filled(adapter, float(i)))
    store.close()
    data = bytearray((tmp_path / "data-000001.vera").read_bytes())
    data[places[2] + 200] ^= 1  # the payload of the third
    data[places[4]] ^= 1  # the first byte of the fifth
    (tmp_path / "data-000001.vera").write_bytes(data)
    for file in tmp_path.glob("index.sqlite*"):
        file.unlink()
    again = open_store(tmp_path)
    assert sorted(again.names()) == [f"owner {i}" for i in (0, 1, 3, 5)] and again.damaged == 2
    again.put("owner 4", filled(adapter, 44.0))
    last = open_store(tmp_path)
    assert next(iter(last.get("owner 5").vectors.values()))[0][0] == 5.0
    assert next(iter(last.get("owner 4").vectors.values()))[0][0] == 44.0


def test_a_record_of_a_newer_format_is_refused_not_written_over(tmp_path):
    store = open_store(tmp_path, kind="packed")
    store.put("ann", trained())
    store.put("bob", trained())
    store.close()
    file = tmp_path / "data-000001.vera"
    data = bytearray(file.read_bytes())
    data[len(data) // 2 + 4] = 2
    file.write_bytes(data)
    for index in tmp_path.glob("index.sqlite*"):
        index.unlink()
    with pytest.raises(StoreError, match=r"format 2.*Upgrade"):
        open_store(tmp_path)
    assert file.read_bytes() == data


def test_a_cut_packed_file_keeps_its_complete_records(tmp_path):
    adapter = trained()
    store = open_store(tmp_path, kind="packed")
    ends = []
    for i in range(10):
        store.put(f"owner {i}", filled(adapter, float(i)))
        ends.append((tmp_path / "data-000001.vera").stat().st_size)
    store.close()
    os.truncate(tmp_path / "data-000001.vera", ends[6] + 100)
    again = open_store(tmp_path)
    assert sorted(again.names()) == [f"owner {i}" for i in range(7)]
    assert next(iter(again.get("owner 6").vectors.values()))[0][0] == 6.0
    again.put("owner 8", filled(adapter, 88.0))
    assert next(iter(open_store(tmp_path).get("owner 8").vectors.values()))[0][0] == 88.0


def test_a_lost_index_is_made_anew(tmp_path):
    adapter = trained()
    store = open_store(tmp_path, kind="packed")
    for v in (1.0, 2.0):
        store.put_many([(f"owner {i}", filled(adapter, v)) for i in range(4)])
    store.delete("owner 3")
    store.close()
    for file in tmp_path.glob("index.sqlite*"):
        file.unlink()
    again = open_store(tmp_path)
    assert again.recovered == 8 and sorted(again.names()) == ["owner 0", "owner 1", "owner 2"]
    assert [v.number for v in again.versions("owner 0")] == [1, 2] and equal(again.get("owner 0"), filled(adapter, 2.0))


@pytest.mark.parametrize("kind", ["folder", "packed"])
def test_a_flipped_bit_is_found(tmp_path, kind):
    store = open_store(tmp_path, kind=kind)
    store.put("ann", trained())
    file = next(tmp_path.rglob("*.vera"))
    whole = file.read_bytes()
    chooser = random.Random(0)
    for _ in range(64):
        data = bytearray(whole)
        data[chooser.randrange(len(data))] ^= 1 << chooser.randrange(8)
        file.write_bytes(data)
        with pytest.raises(StoreError):
            _fresh(store).get("ann")
    file.write_bytes(whole)
    assert equal(_fresh(store).get("ann"), trained())


def _fresh(store):
    getattr(store, "_maps", {}).clear()  # a mapped file that was written anew is another one
    return store


@pytest.mark.parametrize("kind", ["folder", "packed"])
def test_a_full_disk_leaves_the_old_version(tmp_path, kind, monkeypatch):
    adapter = trained()
    store = open_store(tmp_path, kind=kind)
    store.put("ann", adapter)

    def full(_):
        raise OSError(errno.ENOSPC, "No space left on device")

    with monkeypatch.context() as m:
        m.setattr(os, "fsync", full)
        with pytest.raises(StoreError, match="disk is full"):
            store.put("ann", filled(adapter, 5.0))
    for s in (store, open_store(tmp_path)):
        assert equal(s.get("ann"), adapter)
    assert store.put("ann", filled(adapter, 6.0)) == 2
    assert not list(tmp_path.glob("tmp/*"))


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


def test_a_lost_configuration_is_named(tmp_path):
    open_store(tmp_path).put("ann", trained())
    next((tmp_path / "configurations").iterdir()).unlink()
    with pytest.raises(StoreError, match="is gone: restore it"):
        open_store(tmp_path).get("ann")


# Many at once


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["folder", "packed"])
def test_two_hundred_kills(tmp_path, kind):
    done = subprocess.run(
        [sys.executable, "-m", "tests.store.killing", kind, str(tmp_path / "s"), "200"],
        capture_output=True,
        text=True,
        cwd=Path(__file__).parents[2],
    )
    assert done.returncode == 0, done.stderr
    words = done.stdout.split()
    assert words[0] == "200" and words[-2:] == ["0", "broken"] and int(words[2]) > 100, done.stdout


@pytest.mark.parametrize("kind", ["folder", "packed"])
def test_concurrent_writers_of_one_name(tmp_path, kind):
    adapter = trained(VeraConfig(rank=64, targets="all-linear"))
    open_store(tmp_path / "s", kind=kind).put("ann", filled(adapter, 1000.0))
    children = []
    for writer in range(4):
        child = os.fork()
        if child == 0:
            try:
                store = open_store(tmp_path / "s")
                for i in range(25):
                    store.put("ann", filled(adapter, float(100 * writer + i)))
                os._exit(0)
            finally:
                os._exit(1)
        children.append(child)
    store, reads = open_store(tmp_path / "s"), 0
    while children:
        flat = torch.cat([t for pair in store.get("ann").vectors.values() for t in pair])
        assert (flat == flat[0]).all()
        reads += 1
        done, status = os.waitpid(children[0], os.WNOHANG)
        if done:
            assert status == 0
            children.pop(0)
    value = next(iter(store.get("ann").vectors.values()))[0][0].item()
    assert value % 100 == 24 and reads > 4
    if kind == "packed":
        assert store.current("ann") == 101


# The cache


def test_cache_counts_and_bounds(tmp_path):
    adapter = trained()
    store = open_store(tmp_path)
    for i in range(5):
        store.put(f"{i}", filled(adapter, float(i)))
    cache = CachedStore(store, max_bytes=3 * adapter.bytes)
    for name in "0120123401":
        assert next(iter(cache.get(name).vectors.values()))[0][0] == float(name)
    found = cache.statistics
    assert (found.hits, found.misses, found.adapters, found.bytes) == (3, 7, 3, 3 * adapter.bytes)
    store.put("1", filled(adapter, 11.0))  # a changed adapter answers the next request
    assert next(iter(cache.get("1").vectors.values()))[0][0] == 11.0
    store.delete("1")
    with pytest.raises(UnknownName):
        cache.get("1")
    lazy = CachedStore(store, check_every=60.0)
    lazy.get("2")
    store.put("2", filled(adapter, 22.0))
    assert next(iter(lazy.get("2").vectors.values()))[0][0] == 2.0
    assert next(iter(cache.get("2").vectors.values()))[0][0] == 22.0
    small = CachedStore(store, max_bytes=10)
    small.get("2")
    assert small.statistics.adapters == 0


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
