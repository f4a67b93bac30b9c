"""The cache in front of a store."""

import pytest

from tests.store.killing import filled
from tests.store.samples import trained
from veralib import UnknownName
from veralib.store import CachedStore, open_store


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
