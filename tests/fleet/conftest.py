"""The base, the rows and the settings of the small fleet."""

import random
from pathlib import Path

import pytest

from tests.fleet.workshop import SIZES, sentences
from tests.training import tiny
from veralib.fleet.settings import FleetSettings


@pytest.fixture(scope="module")
def base(tmp_path_factory) -> Path:
    return tiny.make_llama(tmp_path_factory.mktemp("llama"))


@pytest.fixture
def rows(tmp_path) -> Path:
    path = tmp_path / "rows.jsonl"
    everything = [row for owner, count in SIZES.items() for row in sentences(owner, count)]
    random.Random(0).shuffle(everything)
    tiny.write_jsonl(path, everything)
    return path


@pytest.fixture
def settings(base, rows, tmp_path) -> FleetSettings:
    return FleetSettings(
        model=base, data=rows, output=tmp_path / "fleet", rank=8, epochs=2, slots=3, batch_rows=8, lr=2e-2, seed=3, plot=False
    )
