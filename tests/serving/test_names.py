"""Names of adapters, and the engines' names of their versions."""

import pytest
import torch

from veralib import VeraConfig, attach
from veralib.errors import StoreError, UnknownName
from veralib.serving.names import engine_name, is_name, parse_engine_name
from veralib.store import open_store


def adapter(seed=0):
    model = torch.nn.Sequential(torch.nn.Linear(4, 4))
    vera = attach(model, VeraConfig(rank=2, seed=seed, targets="all-linear"))
    return vera.adapter("default")


@pytest.mark.parametrize("name", ["ann", "acme:ann-2", "a.b_c", "0", "a" * 128])
def test_good_names(name):
    assert is_name(name)


@pytest.mark.parametrize("name", ["", "a/b", "../a", ".a", "a\0b", "аnn", "a" * 129, "a@1", "a b", "ann\n", None, 3])
def test_bad_names(name):
    assert not is_name(name)


@pytest.mark.parametrize("kind", ["folder", "packed"])
def test_every_version_has_an_engine_name_of_its_own(tmp_path, kind):
    store = open_store(tmp_path, kind)
    with pytest.raises(UnknownName):
        engine_name(store, "ann")
    seen = []
    for _ in range(2):
        store.put("ann", adapter())
        seen.append(engine_name(store, "ann"))
        assert engine_name(store, "ann") == seen[-1] == engine_name(open_store(tmp_path), "ann")
    store.delete("ann")
    store.put("ann", adapter())
    seen.append(engine_name(store, "ann"))
    assert len(set(seen)) == 3
    assert [parse_engine_name(s)[:2] for s in seen[:2]] == [("ann", 1), ("ann", 2)]


@pytest.mark.parametrize("name", ["ann", "ann@1", "ann@x-000000000000", "a/b@1-000000000000", "ann@1-00000000000g"])
def test_what_is_no_engine_name_is_refused(name):
    with pytest.raises(StoreError, match="names no version"):
        parse_engine_name(name)
