"""Scores equal scikit-learn's and scipy's."""

import types

import numpy as np
import pytest
import torch

from veralib.training.metrics import accuracy, f1, matthews, metrics_of, pearson, spearman, token_losses

sklearn_metrics = pytest.importorskip("sklearn.metrics")
stats = pytest.importorskip("scipy.stats")


@pytest.mark.parametrize("classes", [2, 5])
@pytest.mark.parametrize("seed", range(3))
def test_classification_scores_equal_sklearns(classes, seed):
    rng = np.random.default_rng(seed)
    truth = rng.integers(0, classes, 200)
    guess = np.where(rng.random(200) < 0.6, truth, rng.integers(0, classes, 200))
    assert accuracy(truth, guess) == pytest.approx(sklearn_metrics.accuracy_score(truth, guess))
    assert matthews(truth, guess) == pytest.approx(sklearn_metrics.matthews_corrcoef(truth, guess))
    average = "binary" if classes == 2 else "macro"
    assert f1(truth, guess) == pytest.approx(sklearn_metrics.f1_score(truth, guess, average=average))


def test_f1_of_classes_that_are_not_seen():
    zeros = np.zeros(4, int)
    assert f1(zeros, zeros) == 0 == sklearn_metrics.f1_score(zeros, zeros, zero_division=0)
    logits = np.eye(3)[[0, 1, 1, 0]]
    for shift in (0, 1):  # the third class absent, or the first
        truth, guess = np.array([0, 1, 0, 0]) + shift, np.array([0, 1, 1, 0]) + shift
        right = sklearn_metrics.f1_score(truth, guess, average="macro")
        found = metrics_of("classification")[0](types.SimpleNamespace(label_ids=truth, predictions=np.roll(logits, shift, 1)))
        assert found["f1"] == pytest.approx(right) == pytest.approx(f1(truth, guess, 3))


def test_constant_guesses_score_zero_instead_of_nan():
    truth, guess = np.array([0, 1, 1]), np.array([1, 1, 1])
    assert matthews(truth, guess) == 0 == sklearn_metrics.matthews_corrcoef(truth, guess)
    assert pearson(np.array([1.0, 2, 3]), np.ones(3)) == 0


@pytest.mark.parametrize(
    ("task", "predictions"), [("classification", [[0.0, 1], [np.nan, np.nan]]), ("regression", [1.0, np.nan])]
)
def test_predictions_that_are_no_numbers_have_no_score(task, predictions):
    found = metrics_of(task)[0](types.SimpleNamespace(label_ids=np.array([1, 0]), predictions=np.array(predictions)))
    assert len(found) == 3 and np.isnan(list(found.values())).all()


def test_correlations_equal_scipys_with_ties():
    rng = np.random.default_rng(0)
    truth = rng.integers(0, 6, 300) / 1.0
    guess = truth + rng.normal(size=300).round(1)
    assert pearson(truth, guess) == pytest.approx(stats.pearsonr(truth, guess)[0])
    assert spearman(truth, guess) == pytest.approx(stats.spearmanr(truth, guess)[0])


def test_language_loss_is_the_mean_over_counted_tokens_of_all_rows():
    torch.manual_seed(0)
    logits, labels = torch.randn(3, 6, 11), torch.randint(0, 11, (3, 6))
    labels[0, :3], labels[2, 1:] = -100, -100
    per_row = token_losses(logits, labels).numpy()
    compute, _ = metrics_of("causal-lm")
    got = compute(type("P", (), {"predictions": per_row, "label_ids": None})())
    plain = torch.nn.functional.cross_entropy(logits[:, :-1].reshape(-1, 11), labels[:, 1:].reshape(-1))
    assert got["loss"] == pytest.approx(float(plain), rel=1e-6)
    assert got["perplexity"] == pytest.approx(float(plain.exp()), rel=1e-6)
