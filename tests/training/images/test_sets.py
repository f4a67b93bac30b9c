"""The original files of the four image sets, made small: their splits, labels and pixels, and the recipes that score them."""

import numpy as np
import pytest

from tests.training import tiny
from veralib.errors import DataError
from veralib.recipes import settings_of
from veralib.training import Settings, train
from veralib.training.data import load_data

pytest.importorskip("PIL")
scipy_io = pytest.importorskip("scipy.io")
NAMES = ("blue", "green", "red")


def cifar(folder, shots=12):
    rng = np.random.default_rng(0)
    for split, count in (("train", shots), ("test", 2)):
        records = []
        for _ in range(count):
            for label, name in enumerate(NAMES):
                pixels = rng.normal(tiny.COLOURS[name], 20, (32, 32, 3)).clip(0, 255).astype(np.uint8)
                records.append(bytes([9, label]) + pixels.transpose(2, 0, 1).tobytes())
        (folder / f"{split}.bin").write_bytes(b"".join(records))
    (folder / "fine_label_names.txt").write_text("\n".join(NAMES) + "\n")


def food(folder):
    for split, (count, seed) in {"train": (12, 0), "test": (2, 1)}.items():
        lines = []
        for name, files in tiny.jpegs(count, seed).items():
            (folder / "images" / name).mkdir(parents=True, exist_ok=True)
            for i, content in enumerate(files):
                (folder / "images" / name / f"{split}{i}.jpg").write_bytes(content)
                lines.append(f"{name}/{split}{i}")
        (folder / "meta").mkdir(exist_ok=True)
        (folder / "meta" / f"{split}.txt").write_text("\n".join(lines) + "\n")


def flowers(folder):
    (folder / "jpg").mkdir()
    flat = [(content, label) for label, files in enumerate(tiny.jpegs(14).values(), 1) for content in files]
    for i, (content, _) in enumerate(flat, 1):
        (folder / "jpg" / f"image_{i:05d}.jpg").write_bytes(content)
    place = np.arange(len(flat)) % 14
    numbers = np.arange(1, len(flat) + 1)
    scipy_io.savemat(folder / "imagelabels.mat", {"labels": [[label for _, label in flat]]})
    held = {"trnid": numbers[place < 11], "valid": numbers[place == 11], "tstid": numbers[place > 11]}
    scipy_io.savemat(folder / "setid.mat", {k: v[None] for k, v in held.items()})


def resisc(folder):
    tiny.write_images(folder, tiny.jpegs(12))


@pytest.mark.parametrize("name", ["cifar100", "food101", "flowers102", "resisc45"])
@pytest.mark.parametrize("below", [True, False])
def test_a_recipe_on_the_original_files_scores_its_test(name, below, vit, tmp_path, monkeypatch):
    folder = tmp_path / name
    folder.mkdir()
    {"cifar100": cifar, "food101": food, "flowers102": flowers, "resisc45": resisc}[name](folder)
    monkeypatch.delenv("VERALIB_DATA", raising=False)
    if below:
        monkeypatch.setenv("VERALIB_DATA", str(tmp_path))
    data = {} if below else {"data": folder}
    small = {"rank": 4, "batch_size": 8, "plot": False, "lr_head": 3e-2, "epochs": 8, "output": tmp_path / "run"}
    result = train(settings_of(f"images-{name}-base", model=vit, **small, **data))
    own = {"validation": 3} if name == "flowers102" else {}
    assert result.rows == {"train": 30, "test": 6, **own} and len(result.labels) == 3
    assert result.metrics["test_accuracy"] > 0.9


def test_cifars_pixels_are_where_they_were(tmp_path):
    pixels = np.arange(32 * 32 * 3, dtype=np.uint32).reshape(32, 32, 3).astype(np.uint8)
    other = bytes([0, 1]) + bytes(3072)
    (tmp_path / "train.bin").write_bytes(bytes([3, 0]) + pixels.transpose(2, 0, 1).tobytes() + other)
    (tmp_path / "fine_label_names.txt").write_text("apple\naquarium_fish\n")
    rows = load_data(Settings(model="m", data=tmp_path, task="images")).train
    assert [row["label"] for row in rows] == ["apple", "aquarium_fish"]
    assert np.array_equal(np.asarray(rows[0]["image"].decode()), pixels)


def test_rest_is_what_the_shots_leave(tmp_path):
    resisc(tmp_path)
    data = load_data(Settings(model="m", data=tmp_path, task="images", shots=5, test="rest"))
    drawn, left = ({row["image"].name for row in rows} for rows in (data.train, data.test))
    assert (len(drawn), len(left)) == (15, 21) and not drawn & left
    with pytest.raises(DataError, match="set shots"):
        load_data(Settings(model="m", data=tmp_path, task="images", test="rest"))


def test_damaged_sets_are_refused_in_words(tmp_path):
    def load(folder):
        return load_data(Settings(model="m", data=folder, task="images", test="test"))

    for name, make in {"cifar": cifar, "food": food, "flowers": flowers}.items():
        (tmp_path / name).mkdir()
        make(tmp_path / name)
    with open(tmp_path / "cifar" / "test.bin", "ab") as f:
        f.write(b"x")
    with pytest.raises(DataError, match="multiple of 3074"):
        load(tmp_path / "cifar")
    (tmp_path / "food" / "images" / "red" / "train3.jpg").unlink()
    with pytest.raises(DataError, match=r"train3\.jpg is missing"):
        load(tmp_path / "food")
    (tmp_path / "flowers" / "setid.mat").write_bytes(b"no matrix")
    with pytest.raises(DataError, match="can't be read as Flowers-102"):
        load(tmp_path / "flowers")
    (tmp_path / "pickled").mkdir()
    (tmp_path / "pickled" / "train").write_bytes(b"\x80\x02.")
    with pytest.raises(DataError, match="binary version"):
        load(tmp_path / "pickled")
