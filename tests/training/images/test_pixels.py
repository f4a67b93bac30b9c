"""Pixels are the processor's, and augmentation a function of seed, epoch and row."""

import numpy as np
import pytest
import torch

from tests.training import tiny
from veralib.errors import VeraWarning
from veralib.training import Settings
from veralib.training.data import load_data
from veralib.training.loading import load_base
from veralib.training.pixels import AREA, Pixels, apply_views, draw_views, generator_of, preparation

pytest.importorskip("PIL")


def test_pixels_are_the_processors_on_pillow(vit, photos):
    from PIL import Image

    base = load_base(Settings(model=vit, data=photos, task="images"), ("a", "b"))
    file = next((photos / "train" / "red").iterdir())
    found = preparation(base.processor)(Image.open(file))
    small = np.asarray(Image.open(file).resize((16, 16), Image.Resampling.BILINEAR), np.float32)
    np.testing.assert_allclose(found.numpy(), (small.transpose(2, 0, 1) / 255 - 0.5) / 0.5, atol=1e-6)


def test_a_model_without_a_processor_gets_vits_and_says_so(vit, photos, tmp_path):
    from PIL import Image

    bare = tiny.make_vit(tmp_path / "bare")
    (bare / "preprocessor_config.json").unlink()
    with pytest.warns(VeraWarning, match=r"no image processor .* resized to 16 × 16"):
        base = load_base(Settings(model=bare, data=photos, task="images"), ("a", "b"))
    whole = load_base(Settings(model=vit, data=photos, task="images"), ("a", "b"))
    image = Image.open(next((photos / "test" / "red").iterdir()))
    assert torch.equal(preparation(base.processor)(image), preparation(whole.processor)(image))


def test_views_lie_inside_and_show_what_they_cut_out():
    views = draw_views(2000, generator_of(0, 1))
    width, height, x, y = views[:, 0, 0], views[:, 1, 1], views[:, 0, 2], views[:, 1, 2]
    assert (width.abs() + x.abs()).max() <= 1 + 1e-6 and (height + y.abs()).max() <= 1 + 1e-6
    area = width.abs() * height
    assert AREA[0] - 1e-6 <= area.min() < 0.3 and 0.9 < area.max() <= 1
    assert 0.45 < (width < 0).float().mean() < 0.55

    pixels = torch.rand(2, 3, 8, 8)
    same = torch.tensor([[[1.0, 0, 0], [0, 1, 0]]]).expand(2, 2, 3)
    torch.testing.assert_close(apply_views(pixels, same), pixels)
    torch.testing.assert_close(apply_views(pixels, same * torch.tensor([[-1.0], [1.0]])), pixels.flip(-1))
    corner = torch.tensor([[[0.5, 0, -0.5], [0, 0.5, -0.5]]]).expand(2, 2, 3)
    cut = torch.nn.functional.interpolate(pixels[:, :, :4, :4], scale_factor=2, mode="bilinear")
    torch.testing.assert_close(apply_views(pixels, corner)[:, :, :7, :7], cut[:, :, :7, :7])


def test_only_training_images_are_augmented_and_the_view_is_a_function_of_seed_epoch_and_row(settings, photos):
    from veralib.training.pixels import pixel_set

    settings = settings.replace(augment=True)
    data, base = load_data(settings), load_base(settings, ("blue", "green", "red"))

    def pixels(rows, train, seed=0, epoch=0):
        made = pixel_set(rows, base.processor, settings.replace(seed=seed), data.labels, "here", train)
        made.set_epoch(epoch)
        return torch.stack([made[i]["pixel_values"] for i in range(len(made))])

    plain = pixels(data.train, False)
    views = [pixels(data.train, True), pixels(data.train, True, epoch=1), pixels(data.train, True, seed=1)]
    assert torch.equal(views[0], pixels(data.train, True))
    for i, one in enumerate(views):
        assert not torch.equal(one, plain) and all(not torch.equal(one, other) for other in views[:i])
    assert torch.equal(pixels(data.test, False), pixels(data.test, False, epoch=1))


def test_pixels_travel_to_a_loaders_processes(vit, photos):
    import pickle

    from veralib.training.images import file_picture

    base = load_base(Settings(model=vit, data=photos, task="images"), ("a", "b"))
    made = Pixels([file_picture(photos / "test" / "red" / "000.jpg")], preparation(base.processor), [1], augment=3)
    again = pickle.loads(pickle.dumps(made))
    assert torch.equal(again[0]["pixel_values"], made[0]["pixel_values"]) and again[0]["labels"] == 1
