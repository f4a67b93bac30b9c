"""A place for a store, of every kind."""

import random

import pytest

from tests.store.samples import KINDS


@pytest.fixture(params=KINDS)
def place(request, tmp_path):
    """(where, kind) of a store that isn't there yet."""
    pytest.importorskip("fsspec")
    if request.param == "memory":
        return f"memory://{tmp_path.name}-{random.random()}", None
    return str(tmp_path / "store"), request.param
