"""vera merge and vera predict: one answer from a run's folder, from its file, and from the merged plain model."""

import pytest
import torch
from transformers import AutoModelForSequenceClassification, AutoTokenizer
from typer.testing import CliRunner

from veralib.cli import build
from veralib.errors import ConfigError
from veralib.training import Settings, train
from veralib.training.predict import predict

ROWS = [{"text": "the cat likes a dog"}, {"text": "a bird eats the blue fish"}, {"text": "the big house"}]


@pytest.fixture
def trained(bert, rows, tmp_path):
    def make(method, **more):
        fields = {"rank": 4, "lr": 3e-2, "epochs": 1, "max_length": 16, "plot": False, **more}
        train(Settings(model=bert, data=rows, output=tmp_path / method, method=method, **fields))
        return tmp_path / method

    return make


def vera(*args):
    return CliRunner().invoke(build(), [str(a) for a in args])


@pytest.mark.parametrize("method", ["dvora", "lora", "dylora", "lora_xs", "bitfit", "full"])
def test_a_run_of_any_method_merges_to_a_plain_model(method, trained, tmp_path):
    if method == "lora":
        pytest.importorskip("peft")
    run = trained(method)
    done = vera("merge", run, tmp_path / "merged")
    assert done.exit_code == 0, done.output
    assert ("of the change survived" in done.output) == (method in ("dvora", "dylora", "lora_xs"))
    model = AutoModelForSequenceClassification.from_pretrained(tmp_path / "merged").eval()
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "merged")
    for row, said in zip(ROWS, predict(run, ROWS), strict=True):
        with torch.no_grad():
            best = model(**tokenizer(row["text"], return_tensors="pt")).logits.softmax(-1).max(-1)
        assert model.config.id2label[int(best.indices)] == said["prediction"]
        assert float(best.values) == pytest.approx(said["score"], abs=1e-5)


def test_a_bottleneck_adapters_run_says_that_it_cant_be_merged(trained, tmp_path):
    done = vera("merge", trained("adapter_p"), tmp_path / "merged")
    assert done.exit_code == 1 and "can't be merged" in " ".join(done.output.split()) and not (tmp_path / "merged").exists()


def test_dvoras_file_alone_says_what_its_run_says(trained, tmp_path):
    run = trained("dvora", options={"scale": 1.5}, targets="key,value", basis_seed=7)
    file = tmp_path / "alone.safetensors"
    file.write_bytes((run / "adapter_model.safetensors").read_bytes())
    expected = list(predict(run, ROWS))
    assert list(predict(file, ROWS)) == expected
    assert len({row["score"] for row in expected}) == 3
    done = vera("merge", file, tmp_path / "merged")
    assert done.exit_code == 0 and "merged 4 layers" in done.output, done.output
    assert vera("merge", run, tmp_path / "again").exit_code == 0
    weights = [(tmp_path / name / "model.safetensors").read_bytes() for name in ("merged", "again")]
    assert weights[0] == weights[1]
    with pytest.raises(ConfigError, match="an adapter for each row needs VeRA adapters"):
        list(predict(trained("vera"), [{**ROWS[0], "adapter": str(file)}], adapter_column="adapter"))
