"""A tiny vision transformer, a folder of photos of three colours, and the settings of a run on them."""

import pytest

from tests.training import tiny
from tests.training.images.photos import TEST, TRAIN
from veralib.training import Settings


@pytest.fixture(scope="module")
def vit(tmp_path_factory):
    return tiny.make_vit(tmp_path_factory.mktemp("vit"))


@pytest.fixture(scope="module")
def photos(tmp_path_factory):
    """train/ and test/ with three colours as classes."""
    pytest.importorskip("PIL")
    folder = tmp_path_factory.mktemp("photos")
    tiny.write_images(folder / "train", tiny.jpegs(TRAIN))
    tiny.write_images(folder / "test", tiny.jpegs(TEST, seed=1))
    return folder


@pytest.fixture
def settings(vit, photos, tmp_path):
    return Settings(
        **{"model": vit, "data": photos, "output": tmp_path / "run", "task": "images", "test": "test", "plot": False},
        **{"rank": 4, "shots": 8, "epochs": 6, "batch_size": 8, "lr_head": 3e-2, "evaluate_every": "never", "save_every": 3},
    )
