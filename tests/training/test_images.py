"""Images: every method learns from a few of each class, the same rows come from all three forms, bad input is named."""

import io
import json

import numpy as np
import pytest
import torch

from veralib.baselines import METHODS
from veralib.errors import ConfigError, DataError, VeraWarning
from veralib.training import Settings, train
from veralib.training.data import load_data
from veralib.training.loading import load_base
from veralib.training.pixels import AREA, Pixels, apply_views, draw_views, generator_of, preparation

from . import tiny
from .test_run import assert_same_bits, interrupted

pytest.importorskip("PIL")
TRAIN, TEST = 12, 7
"""Images of each colour."""


@pytest.fixture(scope="module")
def vit(tmp_path_factory):
    return tiny.make_vit(tmp_path_factory.mktemp("vit"))


@pytest.fixture(scope="module")
def photos(tmp_path_factory):
    """train/ and test/ with three colours as classes."""
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


def names(rows):
    return [(row["label"], row["image"].name) for row in rows]


@pytest.mark.parametrize(("method", "lr"), [("vera", 0.1), ("lora", 1e-2), ("full", 3e-3), ("head", None)])
def test_it_learns_colours_and_counts_what_it_trains(settings, method, lr):
    if method == "lora":
        pytest.importorskip("peft")
    result = train(settings.replace(method=method, lr=lr))
    assert result.metrics["test_accuracy"] > 0.8  # guessing gives a third
    assert result.rows == {"train": 3 * 8, "test": 3 * TEST} and result.labels == ("blue", "green", "red")
    # Query and value of 2 layers, (32, 32) each. All weights: patches (3·8·8 in), class token, 5 positions, blocks, last norm.
    block = 4 * (32 * 32 + 32) + 2 * 32 * 48 + 48 + 32 + 4 * 32
    everything = 3 * 64 * 32 + 32 + 32 + 5 * 32 + 2 * block + 2 * 32
    counts = {"vera": 4 * (32 + 4), "lora": 4 * 4 * (32 + 32), "full": everything, "head": 0}
    assert (result.adapter_parameters, result.head_parameters) == (counts[method], 32 * 3 + 3)


@pytest.mark.parametrize("method", [m for m in METHODS if m not in ("vera", "lora", "full", "head")])
def test_every_other_method_trains_too(settings, method):
    if method in ("lora_fa", "adalora"):
        pytest.importorskip("peft")
    options = {"drop": 1} if method == "adapter_d" else {}
    result = train(settings.replace(method=method, epochs=2, options=options))
    assert result.steps == 6 and result.adapter_parameters > 0 and 0 <= result.metrics["test_accuracy"] <= 1


def test_vera_sits_on_query_and_value_by_default(settings):
    import veralib

    train(settings.replace(epochs=1))
    layers = {name.rpartition(".")[2] for name in veralib.load_adapter(settings.output).vectors}
    assert layers in ({"q_proj", "v_proj"}, {"query", "value"})


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


def test_an_augmented_run_repeats_and_resumes_to_the_bit(settings, tmp_path, monkeypatch):
    from veralib.training import pixels

    settings = settings.replace(augment=True)
    whole, plain = settings.replace(output=tmp_path / "whole"), settings.replace(output=tmp_path / "plain", augment=False)
    drawn = []
    with monkeypatch.context() as m:
        m.setattr(pixels, "generator_of", lambda *numbers: drawn.append(numbers) or generator_of(*numbers))
        expected, other = train(whole), train(plain)
    assert sorted(drawn) == [(0, epoch, row) for epoch in range(6) for row in range(24)]  # training rows, each epoch, no others
    interrupted(settings, 5)
    interrupted(settings, 10)
    result = train(settings)
    assert result.resumed == 2 and result.metrics == expected.metrics
    assert_same_bits(settings, whole)
    with pytest.raises(AssertionError):
        assert_same_bits(whole, plain)
    assert other.data == expected.data


def test_best_keeps_the_best_evaluation(settings):
    fields = {"best": True, "evaluate_every": 3, "validation": "0.25", "shots": 6}
    result = train(settings.replace(**fields))
    scores = [h["eval_accuracy"] for h in result.history if "eval_accuracy" in h]
    assert len(scores) == result.steps // 3 and result.metrics["eval_accuracy"] == max(scores)


def test_the_head_starts_anew_where_the_classes_are_others(settings, photos, tmp_path):
    train(settings.replace(method="full", lr=1e-3))
    trained = settings.output

    def head(labels, **more):
        torch.manual_seed(0)
        return load_base(settings.replace(model=trained, **more), labels).model.classifier.weight

    tiny.make_vit(tmp_path / "p").joinpath("preprocessor_config.json").rename(f"{trained}/preprocessor_config.json")
    kept, others, more = head(("blue", "green", "red")), head(("cat", "dog", "fish")), head(("a", "b", "c", "d"))
    from safetensors.torch import load_file

    assert torch.equal(kept, load_file(f"{trained}/model.safetensors")["classifier.weight"])
    assert others.shape == kept.shape and not torch.equal(others, kept) and 0.01 < others.std() < 0.03  # initializer_range 0.02
    assert more.shape == (4, 32)


def test_predictions_are_what_was_evaluated(settings, photos, tmp_path):
    from veralib.training.predict import predict

    result = train(settings.replace(epochs=3))
    found = list(predict(settings.output, photos / "test", batch_size=5))
    assert len(found) == 3 * TEST and all(set(f) == {"image", "prediction", "score"} for f in found)
    right = [f["prediction"] == f["image"].split("/")[0] for f in found]
    assert np.mean(right) == pytest.approx(result.metrics["test_accuracy"])
    file = tiny.write_jsonl(photos / "rows.jsonl", [{"image": f"test/{f['image']}", "who": "x"} for f in found])
    again = list(predict(f"{settings.output}/adapter_model.safetensors", file))
    assert [(a["prediction"], a["who"]) for a in again] == [(f["prediction"], "x") for f in found]
    json.dumps(again)
    with pytest.raises(DataError, match=r"absent\.jpg can't be read"):
        predict(settings.output, [{"image": "absent.jpg"}])


def test_a_merged_model_predicts_without_veralib(settings, photos, tmp_path):
    runner = pytest.importorskip("typer.testing")
    from PIL import Image
    from transformers import AutoImageProcessor, AutoModelForImageClassification

    from veralib.cli import build
    from veralib.training.predict import predict

    train(settings.replace(epochs=3))
    done = runner.CliRunner().invoke(build(), ["merge", settings.output, str(tmp_path / "merged")])
    assert done.exit_code == 0, done.output
    model = AutoModelForImageClassification.from_pretrained(tmp_path / "merged").eval()
    processor = AutoImageProcessor.from_pretrained(tmp_path / "merged", backend="pil")
    found = list(predict(settings.output, photos / "test"))
    with torch.no_grad():
        for row in found[::5]:
            pixels = processor(images=[Image.open(photos / "test" / row["image"])], return_tensors="pt")
            scores = model(**pixels).logits.softmax(-1)[0]
            assert model.config.id2label[int(scores.argmax())] == row["prediction"]
            assert float(scores.max()) == pytest.approx(row["score"], abs=1e-5)


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


def test_pixels_travel_to_a_loaders_processes(vit, photos):
    import pickle

    from veralib.training.images import file_picture

    base = load_base(Settings(model=vit, data=photos, task="images"), ("a", "b"))
    made = Pixels([file_picture(photos / "test" / "red" / "000.jpg")], preparation(base.processor), [1], augment=3)
    again = pickle.loads(pickle.dumps(made))
    assert torch.equal(again[0]["pixel_values"], made[0]["pixel_values"]) and again[0]["labels"] == 1


def test_tiny_imagenet_has_its_official_counts(data):
    npz = data / "tiny_imagenet32" / "tiny_imagenet32.npz"
    if not npz.exists():
        pytest.skip("there is no tiny_imagenet32.npz in VERALIB_DATA")
    found = load_data(Settings(model="m", data=npz, task="images", shots=2, test="val"))
    assert (len(found.labels), len(found.train), len(found.test), found.labels[0]) == (200, 400, 10000, "n01443537")


def test_a_bf16_model_that_does_not_cast_its_pixels_trains_and_predicts(settings, photos, tmp_path):
    """ViT casts what it reads, Swin doesn't: the batch has the model's dtype."""
    from transformers import SwinConfig, SwinForImageClassification, ViTImageProcessorPil

    from veralib.training.predict import predict

    torch.manual_seed(0)
    shape = {"image_size": 16, "patch_size": 4, "embed_dim": 16, "depths": [1, 1], "num_heads": [2, 2], "window_size": 2}
    SwinForImageClassification(SwinConfig(**shape)).save_pretrained(tmp_path / "swin")
    ViTImageProcessorPil(size={"height": 16, "width": 16}).save_pretrained(tmp_path / "swin")
    run = settings.replace(model=tmp_path / "swin", dtype="bfloat16", targets=("q_proj", "v_proj"), epochs=1)
    result = train(run)
    assert result.steps == 3
    found = list(predict(run.output, photos / "test"))
    right = [f["prediction"] == f["image"].split("/")[0] for f in found]
    assert np.mean(right) == pytest.approx(result.metrics["test_accuracy"])
