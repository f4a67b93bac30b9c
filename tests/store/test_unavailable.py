"""A disk or a network that doesn't answer isn't a damaged adapter, and says so by its kind of error."""

import os
import sqlite3

import pytest

from tests.store.killing import filled
from tests.store.samples import trained
from veralib import StoreError, StoreUnavailable
from veralib.store import open_store


def raises(error):
    def call(*_, **__):
        raise error

    return call


def test_a_disk_that_fails_is_not_a_damaged_adapter(tmp_path, monkeypatch):
    store = open_store(tmp_path)
    store.put("ann", trained())
    broken = OSError(5, "Input/output error")
    for name, call in (
        ("listdir", lambda: store.get("ann")),
        ("listdir", lambda: store.stamp("ann")),
        ("listdir", lambda: store.page()),
        ("posix_fadvise", lambda: store.get("ann")),
        ("fsync", lambda: store.put("ann", trained())),
    ):
        with monkeypatch.context() as m:
            m.setattr(os, name, raises(broken))
            with pytest.raises(StoreUnavailable, match="Input/output error"):
                call()
    file = next(tmp_path.rglob("*.vera"))
    file.write_bytes(file.read_bytes()[:-9])
    with pytest.raises(StoreError) as e:
        store.get("ann")
    assert not isinstance(e.value, StoreUnavailable)


def test_a_network_that_fails(tmp_path, monkeypatch):
    fsspec = pytest.importorskip("fsspec")
    store = open_store(f"memory://{tmp_path.name}")
    store.put("ann", trained())
    memory = type(fsspec.filesystem("memory"))
    for name in ("cat_file", "ls"):
        with monkeypatch.context() as m:
            m.setattr(memory, name, raises(RuntimeError("503 Slow Down")))
            with pytest.raises(StoreUnavailable, match="503 Slow Down"):
                store.get("ann")
    with monkeypatch.context() as m:
        m.setattr(memory, "pipe_file", raises(RuntimeError("503 Slow Down")))
        with pytest.raises(StoreUnavailable, match="503 Slow Down"):
            store.put("ann", trained())


def test_a_delete_that_fails_halfway_brings_no_older_version_back(tmp_path, monkeypatch):
    fsspec = pytest.importorskip("fsspec")
    store = open_store(f"memory://{tmp_path.name}-halfway")
    for v in (1.0, 2.0, 3.0):
        store.put("ann", filled(trained(), v))
    memory = type(fsspec.filesystem("memory"))
    real, removed = memory.rm_file, []

    def twice(self, path):
        if len(removed) == 2:
            raise RuntimeError("503 Slow Down")
        removed.append(path)
        return real(self, path)

    with monkeypatch.context() as m:
        m.setattr(memory, "rm_file", twice)
        with pytest.raises(StoreUnavailable, match="503 Slow Down"):
            store.delete("ann")
    assert store.current("ann") == 3 and next(iter(store.get("ann").vectors.values()))[0][0] == 3.0
    store.delete("ann")
    assert "ann" not in store


def test_a_disk_that_is_not_mounted_knows_of_no_name(tmp_path):
    store = open_store(tmp_path / "mount" / "store")
    store.put("ann", trained())
    (tmp_path / "mount").rename(tmp_path / "elsewhere")
    with pytest.raises(StoreUnavailable, match="isn't mounted"):
        store.stamp("ann")
    (tmp_path / "elsewhere").rename(tmp_path / "mount")
    assert store.current("ann") == 1


def test_a_packed_store_whose_index_cannot_be_read(tmp_path, monkeypatch):
    store = open_store(tmp_path, kind="packed")
    store.put("ann", trained())

    class Broken:
        def __init__(self, error):
            self.execute = raises(error)

    asked = (lambda: store.get("ann"), lambda: store.stamp("ann"), lambda: store.page(), lambda: store.put("ann", trained()))
    for call in asked:
        for error, unavailable in (
            (sqlite3.OperationalError("disk I/O error"), True),
            (sqlite3.DatabaseError("malformed"), False),
        ):
            with monkeypatch.context() as m:
                m.setattr(store._index, "_connection", lambda error=error: Broken(error))
                with pytest.raises(StoreError, match=str(error)) as e:
                    call()
            assert isinstance(e.value, StoreUnavailable) == unavailable
    (tmp_path / "lock").unlink()
    (tmp_path / "lock").mkdir()
    with pytest.raises(StoreUnavailable, match="lock"):
        store.put("ann", trained())
