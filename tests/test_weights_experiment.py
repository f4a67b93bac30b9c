"""The comparison of weight changes: what is measured is what the words say, on matrices where the answer is known."""

import json

import pytest
import torch

from experiments import weights
from tests.training.tiny import make_bert, sentences


def test_intruders_are_directions_that_the_base_does_not_have():
    """With W of well separated singular values, ΔW along W's own directions brings none; large new outputs do."""
    generator = torch.Generator().manual_seed(0)
    U, V = (torch.linalg.qr(torch.randn(64, 64, generator=generator))[0] for _ in range(2))
    W = U @ torch.diag(torch.linspace(2, 1, 64)) @ V.T
    assert weights.intruders(W, torch.zeros(64, 64)) == 0
    assert weights.intruders(W, 3 * torch.outer(U[:, 5], V[:, 5])) == 0
    mixed = U @ torch.ones(64) / 8  # as far from every singular vector of W as can be: cosine 1/8
    assert weights.intruders(W, 50 * torch.outer(mixed, V[:, 0])) == 1


def test_the_experiment_finds_each_methods_change_of_the_weights(tmp_path, monkeypatch):
    pytest.importorskip("peft")
    bert = make_bert(tmp_path / "bert")
    folder = tmp_path / "glue" / "CoLA"
    folder.mkdir(parents=True)
    for name, count in (("train", 64), ("dev", 20)):
        lines = [f"gj04\t{int(r['label'] == 'good')}\t\t{r['text']}\n" for r in sentences(count, seed=count)]
        (folder / f"{name}.tsv").write_text("".join(lines))

    class Here:
        """A pool that runs in this process."""

        def __init__(self, *a, **k): ...
        def __enter__(self):
            return self

        def __exit__(self, *a): ...
        def submit(self, f, *a):
            value = f(*a)
            return type("Done", (), {"result": lambda self: value})()

    monkeypatch.setattr(weights, "ProcessPoolExecutor", Here)
    line = ["--data", str(tmp_path), "--model", str(bert), "--epochs", "1"]
    line += ["--runs", str(tmp_path / "runs"), "--results", str(tmp_path / "results")]
    found = weights.main(line)
    assert json.loads((tmp_path / "results" / "weights.json").read_text()) == json.loads(json.dumps(found))
    layers = {f"bert.encoder.layer.{i}.attention.self.{part}" for i in range(2) for part in ("query", "value")}
    assert set(found["d_norms"]) == layers and all(abs(n - 0.8) < 0.5 and n != 0.8 for n in found["d_norms"].values())
    for name in weights.METHODS:
        assert set(found["change"][name]) == layers and all(v > 0 for v in found["change"][name].values())
    assert all(abs(v) <= 1 for of in found["cosines"].values() for v in of.values()) and str(tmp_path) not in json.dumps(found)
    # LoRA of rank 1 learns from the same rows as LoRA of rank 64; a random matrix doesn't.
    mean = {name: sum(abs(v) for v in of.values()) for name, of in found["cosines"].items()}
    assert mean["LoRA r=1"] > mean["random"]
