"""Tiny models and data sets for the tests of training, predicting and the command line."""

from pathlib import Path

import pytest

from . import tiny


@pytest.fixture(scope="session")
def bert(tmp_path_factory) -> Path:
    return tiny.make_bert(tmp_path_factory.mktemp("bert"))


@pytest.fixture(scope="session")
def llama(tmp_path_factory) -> Path:
    return tiny.make_llama(tmp_path_factory.mktemp("llama"))


@pytest.fixture(scope="session")
def rows(tmp_path_factory) -> Path:
    """A folder with train.jsonl (96 rows) and dev.jsonl (40) of "good" and "bad" sentences."""
    folder = tmp_path_factory.mktemp("rows")
    tiny.write_jsonl(folder / "train.jsonl", tiny.sentences(96))
    tiny.write_jsonl(folder / "dev.jsonl", tiny.sentences(40, seed=1))
    return folder
