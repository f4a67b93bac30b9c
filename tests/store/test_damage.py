"""Whoever is killed, whatever is damaged or full: the old or the new adapter, and a sentence that says so."""

import contextlib
import errno
import os
import random
import shutil
import sqlite3
import subprocess
import sys
import types
from pathlib import Path

import pytest
import torch

from tests.store.killing import filled
from tests.store.samples import equal, trained
from veralib import StoreError, StoreUnavailable, UnknownName, VeraConfig
from veralib.store import open_store, segments
from veralib.store.segments import Segments


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
    if hasattr(store, "_segments"):
        store._segments.forget()  # a mapped file that was written anew is another one
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


def test_a_power_cut_while_the_old_files_go_leaves_the_compacted_ones(tmp_path, monkeypatch):
    store = open_store(tmp_path / "store", kind="packed")
    for i in range(20):
        store.put(f"owner {i}", filled(trained(), float(i)))
    store.delete("owner 0")
    real = Segments.remove

    def remove(self, number):
        real(self, number)
        # What the disk may hold then: the removal, and of SQLite's log nothing, since an ordinary commit doesn't wait for it.
        shutil.copytree(tmp_path / "store", tmp_path / "cut", ignore=shutil.ignore_patterns("index.sqlite-*"))

    monkeypatch.setattr(Segments, "remove", remove)
    store.compact()
    monkeypatch.undo()
    for where in ("store", "cut"):
        found = open_store(tmp_path / where)
        assert sorted(found.names()) == sorted(f"owner {i}" for i in range(1, 20))
        assert next(iter(found.get("owner 7").vectors.values()))[0][0] == 7.0


@pytest.fixture
def reader(tmp_path, monkeypatch):
    """begin(): somebody reads the index's present state until end(), a backup, say; writers wait for it a third of a second."""
    real, open_ones = sqlite3.connect, []
    monkeypatch.setattr(sqlite3, "connect", lambda path, **given: real(path, **{**given, "timeout": 0.3}))

    def begin():
        open_ones.append(real(tmp_path / "index.sqlite"))
        open_ones[-1].execute("BEGIN")
        open_ones[-1].execute("SELECT * FROM adapters").fetchone()
        with contextlib.closing(real(tmp_path / "index.sqlite", isolation_level=None)) as writer:
            writer.execute("INSERT INTO configurations VALUES(x'00', x'00')")  # from now on the reader's state is an old one

    def end():
        while open_ones:
            open_ones.pop().close()

    yield types.SimpleNamespace(begin=begin, end=end)
    end()


def test_a_killed_compaction_whose_files_a_reader_holds_is_no_truth(tmp_path, monkeypatch, reader):
    store, other = open_store(tmp_path, kind="packed"), open_store(tmp_path, kind="packed")
    for i in range(5):
        store.put(f"o{i}", filled(trained(), float(i)))
    real = Segments.append

    def killed(*given):
        real(*given)
        raise KeyboardInterrupt

    monkeypatch.setattr(Segments, "append", killed)
    with pytest.raises(KeyboardInterrupt):
        store.compact()
    monkeypatch.setattr(Segments, "append", real)
    store.close()
    reader.begin()
    other.delete("o1")
    for ended in (False, True):
        if ended:
            reader.end()
        again = open_store(tmp_path)
        assert sorted(again.names()) == ["o0", "o2", "o3", "o4"]
        assert all(next(iter(again.get(f"o{i}").vectors.values()))[0][0] == i for i in (0, 2, 3, 4))
        again.close()
    assert len(list(tmp_path.glob("data-*"))) == 1


def test_a_compaction_that_a_reader_keeps_from_its_end_says_so(tmp_path, reader):
    store = open_store(tmp_path, kind="packed")
    for name in ("ann", "bob"):
        store.put(name, trained())
    store.delete("ann")
    holds_ann = lambda: any(b"ann" in path.read_bytes() for path in tmp_path.glob("data-*"))  # noqa: E731
    reader.begin()
    with pytest.raises(StoreUnavailable, match=r"reads an old state of its index.*call compact\(\) again"):
        store.compact()
    assert holds_ann() and list(store.names()) == ["bob"]
    reader.end()
    assert store.compact() >= 0 and not holds_ann() and list(store.names()) == ["bob"] and store.get("bob")


def test_old_files_are_gone_from_the_disk_before_the_index_forgets_them(tmp_path, monkeypatch):
    """Otherwise a power cut may bring one back, unknown and with what was deleted since."""
    store = open_store(tmp_path, kind="packed")
    store.put("ann", trained())
    steps, unlink, sync = [], Path.unlink, segments.sync_folder
    monkeypatch.setattr(Path, "unlink", lambda path, **given: (steps.append("unlink"), unlink(path, **given))[1])
    monkeypatch.setattr(segments, "sync_folder", lambda path: (steps.append("sync"), sync(path))[1])
    known = lambda: store._index.ask("SELECT count(*) FROM segments WHERE dead = 1")[0][0]  # noqa: E731
    monkeypatch.setattr(Segments, "remove", lambda *given, real=Segments.remove: (real(*given), steps.append(known()))[0])
    store.compact()
    assert steps[-3:] == ["unlink", "sync", 1]


def test_a_lost_index_brings_back_no_version_that_was_dropped(tmp_path):
    store = open_store(tmp_path, kind="packed", keep=2)
    for value in (1.0, 2.0, 3.0, 4.0):
        store.put("ann", filled(trained(), value))
    store.close()
    for file in tmp_path.glob("index.sqlite*"):
        file.unlink()
    again = open_store(tmp_path)
    assert again.recovered == 4 and [v.number for v in again.versions("ann")] == [3, 4]


def test_a_damaged_record_hides_its_own_name_alone(tmp_path):
    store = open_store(tmp_path)
    store.put("A" * 60, trained())  # so long that its record alone knows its name
    store.put("ann", trained())
    file = next(tmp_path.glob("adapters/*/*~*/*.vera"))
    file.write_bytes(file.read_bytes()[:-1])
    assert list(store.names()) == ["ann"] and len(store) == 1 and "new" not in store
    with pytest.raises(UnknownName, match="ann"):
        store.get("anne")
    assert store.delete_unreadable("ann") == 0 and store.delete_unreadable("A" * 8) == 1
    assert not list(tmp_path.glob("adapters/*/*~*")) and store.get("ann")


def test_an_entry_that_bf16_cannot_say_is_refused_and_the_old_version_stays(tmp_path):
    store = open_store(tmp_path, precision="bfloat16")
    store.put("ann", filled(trained(), 1.0))
    with pytest.raises(StoreError, match=r"3\.40282e\+38, more than bfloat16"):
        store.put("ann", filled(trained(), torch.finfo(torch.float32).max))
    assert next(iter(store.get("ann").vectors.values()))[0][0] == 1.0
