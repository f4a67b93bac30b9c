"""Which images a run takes, in every form of a data set, and what is said of those that it can't."""

import io

import numpy as np
import pytest

from tests.training import tiny
from tests.training.images.photos import TEST, TRAIN, names
from veralib.errors import ConfigError, DataError
from veralib.training import Settings, train
from veralib.training.data import load_data

pytest.importorskip("PIL")


def test_shots_are_exact_and_a_function_of_the_seed(settings):
    data = load_data(settings.replace(shots=5))
    assert [label for label, _ in names(data.train)] == ["blue"] * 5 + ["green"] * 5 + ["red"] * 5
    assert len(data.test) == 3 * TEST
    assert names(load_data(settings.replace(shots=5)).train) == names(data.train)
    assert names(load_data(settings.replace(shots=5, split_seed=1)).train) != names(data.train)
    assert len(load_data(settings.replace(shots=None)).train) == 3 * TRAIN
    with pytest.raises(DataError, match=r'shots is 13, and class "blue" has 12 rows'):
        load_data(settings.replace(shots=TRAIN + 1))


def test_shots_are_drawn_from_what_the_validation_share_leaves(settings):
    data = load_data(settings.replace(shots=4, validation="0.25"))
    assert (len(data.train), len(data.validation)) == (12, 9)
    assert not set(names(data.train)) & set(names(data.validation))


def test_shots_of_a_text_classification(rows):
    data = load_data(Settings(model="m", data=rows, shots=7))
    assert sorted(row["label"] for row in data.train) == ["bad"] * 7 + ["good"] * 7 and len(data.validation) == 40


def test_the_validation_split_is_found_and_the_test_split_is_none(settings, tmp_path):
    tiny.write_images(tmp_path / "p" / "train", tiny.jpegs(8))
    tiny.write_images(tmp_path / "p" / "val", tiny.jpegs(2))
    data = load_data(settings.replace(data=tmp_path / "p", test=None))
    assert len(data.validation) == 6 and data.test is None
    data = load_data(settings.replace(data=tmp_path / "p", test="val"))
    assert len(data.test) == 6 and data.validation is None


def test_the_three_forms_give_the_same_rows(settings, photos, tmp_path, monkeypatch):
    datasets = pytest.importorskip("datasets")
    splits = {"train": tiny.jpegs(TRAIN), "test": tiny.jpegs(TEST, seed=1)}
    npz = tiny.write_npz(tmp_path / "photos.npz", list(splits.values()))
    fine = datasets.ClassLabel(names=sorted(tiny.COLOURS))
    kinds = {"img": datasets.Image(), "fine_label": fine, "coarse_label": datasets.ClassLabel(names=["a", "b"])}

    def part(images):
        flat = [(f, n) for n, files in images.items() for f in files]
        rows = [{"img": {"bytes": f, "path": None}, "fine_label": n, "coarse_label": 0} for f, n in flat]
        return datasets.Dataset.from_list(rows, features=datasets.Features(kinds))

    hub = datasets.DatasetDict({name: part(images) for name, images in splits.items()})
    monkeypatch.setattr(datasets, "load_dataset", lambda *a: hub)
    forms = {"folder": load_data(settings), "npz": load_data(settings.replace(data=npz, test="val"))}
    forms["hub"] = load_data(settings.replace(data="cifar100"))
    for role, count in (("train", 3 * 8), ("test", 3 * TEST)):
        found = {form: [(r["label"], r["image"].read()) for r in getattr(data, role)] for form, data in forms.items()}
        assert found["folder"] == found["npz"] == found["hub"] and len(found["hub"]) == count
    assert forms["folder"].hashes == forms["npz"].hashes == forms["hub"].hashes
    assert set(forms["hub"].hashes) == {"train/images", "test/images"}
    assert forms["hub"].labels == ("blue", "green", "red")
    coarse = load_data(settings.replace(data="cifar100", label="fine_label", text="img", shots=None)).train
    assert len(coarse) == 3 * TRAIN


def test_the_command_line_of_the_paper_resolves(monkeypatch):
    runner = pytest.importorskip("typer.testing")
    import veralib.training
    from veralib.cli import build

    class Asked(Exception):
        pass

    def stop(settings, **_):
        raise Asked(settings)

    monkeypatch.setattr(veralib.training, "train", stop)
    line = "train --task images --model google/vit-base-patch16-224-in21k --data cifar100 --shots 10 --test test --augment"
    done = runner.CliRunner().invoke(build(), line.split())
    (settings,) = done.exception.args
    assert (settings.task, settings.shots, settings.augment, settings.data) == ("images", 10, True, ("cifar100",))
    assert (settings.text_columns, settings.resolved_metric, settings.resolved_rank) == (("image",), "accuracy", 256)


def damage(photos, how):
    """Writes one fault into a copy of the photos; what the message has to name."""
    file = photos / "train" / "red" / "003.jpg"
    if how == "truncated":
        file.write_bytes(file.read_bytes()[:300])
        return str(file)
    if how == "no image":
        file.write_text("<html>")
        return f"{file} can't be read as an image: its format"
    if how == "empty class":
        (photos / "train" / "yellow").mkdir()
        return "yellow holds no image"
    if how == "unseen":
        tiny.write_images(photos / "test", {"violet": tiny.jpegs(1)["red"]})
        return 'the test data has labels that training has never seen: "violet"'
    if how == "one class":
        for name in ("blue", "green"):
            (photos / "train" / name).rename(photos / name)
        return "holds one label alone"
    for name in tiny.COLOURS:
        (photos / "train" / name).rename(photos / name)
    return "train has no classes"


@pytest.mark.parametrize("how", ["truncated", "no image", "empty class", "unseen", "one class", "no classes"])
def test_bad_folders_are_named_before_training(settings, tmp_path, how):
    photos = tmp_path / "photos"
    tiny.write_images(photos / "train", tiny.jpegs(8))
    tiny.write_images(photos / "test", tiny.jpegs(2))
    said = damage(photos, how)
    with pytest.raises(DataError) as e:
        load_data(settings.replace(data=photos))
    assert said in str(e.value)


def test_files_that_are_no_images_by_name_are_left_out(settings, tmp_path):
    tiny.write_images(tmp_path / "p" / "train", tiny.jpegs(8))
    (tmp_path / "p" / "train" / "red" / "notes.txt").write_text("x")
    (tmp_path / "p" / "train" / "red" / ".hidden.jpg").write_text("x")
    assert len(load_data(settings.replace(data=tmp_path / "p", shots=None, test=None)).train) == 24


@pytest.mark.parametrize(
    ("fields", "error", "said"),
    [
        ({"split": "trian"}, DataError, 'no split "trian". Did you mean "train"?'),
        ({"test": "tset"}, DataError, 'no split "tset"'),
        ({"data": "/absent/photos"}, DataError, "there is no folder or .npz file /absent/photos"),
        ({"data": "one,two"}, DataError, "data names 2"),
        ({"data": "BERT"}, DataError, 'no split "train"'),
        ({"model": "BERT"}, ConfigError, "is a bert and takes no images"),
        ({"model": "GREY"}, ConfigError, "reads images of 1 channels"),
    ],
)
def test_other_faults_show_before_training(settings, bert, tmp_path, fields, error, said):
    known = {"BERT": bert, "GREY": tmp_path / "grey"}
    if fields.get("model") == "GREY":
        tiny.make_vit(known["GREY"], num_channels=1)
    with pytest.raises(error) as e:
        train(settings.replace(**{k: known.get(v, v) for k, v in fields.items()}))
    assert said in str(e.value)


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"split": None}, "has no split; expected the arrays"),
        ({"offsets": np.array([0, 5])}, "doesn't fit together"),
        ({"names": np.array(["blue"])}, "names 1 classes"),
    ],
)
def test_a_bad_npz_is_named(settings, tmp_path, change, said):
    path = tiny.write_npz(tmp_path / "a.npz", [tiny.jpegs(8), tiny.jpegs(2)])
    with np.load(path) as file:
        arrays = {k: file[k] for k in file.files if change.get(k, "") is not None}
    np.savez(path, **{**arrays, **{k: v for k, v in change.items() if v is not None}})
    with pytest.raises(DataError, match=said):
        load_data(settings.replace(data=path, test="val"))
    path.write_bytes(b"PK broken")
    with pytest.raises(DataError, match=r"can't read .*a\.npz"):
        load_data(settings.replace(data=path, test="val"))


@pytest.mark.parametrize(
    ("fields", "said"),
    [
        ({"task": "regression", "shots": 3}, "shots is 3"),
        ({"augment": True}, "augment crops and flips images"),
        ({"task": "images", "group_by_length": True}, "group_by_length is for texts"),
        ({"task": "images", "text": "a,b"}, "text names 2 columns"),
    ],
)
def test_settings_that_do_not_go_together(fields, said):
    with pytest.raises(ConfigError, match=said):
        Settings(model="m", data="d", **fields)


def test_odd_images_are_read_as_rgb_and_upright(tmp_path):
    from PIL import Image

    from veralib.training.images import Picture

    def decoded(image, kind, **options):
        image.save(file := io.BytesIO(), kind, **options)
        return Picture("x", file.getvalue).decode()

    grey = decoded(Image.new("L", (3, 2), 7), "PNG")
    assert (grey.mode, grey.getpixel((0, 0))) == ("RGB", (7, 7, 7))
    exif = Image.Exif()
    exif[0x0112] = 6  # orientation: turn by 90 degrees
    assert decoded(Image.new("RGB", (8, 4)), "JPEG", exif=exif).size == (4, 8)


def test_tiny_imagenet_has_its_official_counts(data):
    npz = data / "tiny_imagenet32" / "tiny_imagenet32.npz"
    if not npz.exists():
        pytest.skip("there is no tiny_imagenet32.npz in VERALIB_DATA")
    found = load_data(Settings(model="m", data=npz, task="images", shots=2, test="val"))
    assert (len(found.labels), len(found.train), len(found.test), found.labels[0]) == (200, 400, 10000, "n01443537")
