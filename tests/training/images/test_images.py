"""Images: every method learns from a few of each class, a run repeats to the bit, and a merged model predicts without veralib."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch

from tests.training import tiny
from tests.training.images.photos import TEST
from tests.training.test_run import assert_same_bits, interrupted
from veralib.baselines import METHODS
from veralib.errors import DataError
from veralib.training import train
from veralib.training.loading import load_base
from veralib.training.pixels import generator_of
from veralib.training.predict import predict

pytest.importorskip("PIL")


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


@pytest.mark.parametrize("method", ["head", "full", "bitfit"])
def test_statistics_of_batch_norms_are_part_of_what_is_saved_or_stay(settings, photos, tmp_path, method):
    """Trainer's model.train() moves them in a frozen base too, where no adapter has room for them."""
    from transformers import ResNetConfig, ResNetModel, ViTImageProcessorPil

    torch.manual_seed(0)
    shape = {"embedding_size": 8, "hidden_sizes": [8, 16], "depths": [1, 1], "layer_type": "basic"}
    ResNetModel(ResNetConfig(**shape)).save_pretrained(tmp_path / "resnet")
    ViTImageProcessorPil(size={"height": 32, "width": 32}).save_pretrained(tmp_path / "resnet")
    settings = settings.replace(model=tmp_path / "resnet", method=method, lr=3e-3, save_every=2)
    whole = settings.replace(output=tmp_path / "whole")
    expected = train(whole)
    guesses = [found["prediction"] == Path(found["image"]).parent.name for found in predict(whole.output, photos / "test")]
    assert np.mean(guesses) == pytest.approx(expected.metrics["test_accuracy"])
    interrupted(settings, 9)
    assert train(settings).metrics == expected.metrics
    assert_same_bits(settings, whole)


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
    from transformers import AutoModelForImageClassification
    from transformers.models.auto.image_processing_auto import AutoImageProcessor

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
