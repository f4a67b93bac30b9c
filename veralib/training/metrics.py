"""Scores of predictions, in plain numpy: GLUE's metrics, and token-weighted loss and perplexity."""

import math
from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from torch import Tensor

METRICS = {
    "classification": ("accuracy", "matthews", "f1", "loss"),
    "regression": ("pearson", "spearman", "mse", "loss"),
    "images": ("accuracy", "matthews", "f1", "loss"),
    "causal-lm": ("loss", "perplexity"),
    "prompt-completion": ("loss", "perplexity"),
    "chat": ("loss", "perplexity"),
}
LOWER_IS_BETTER = ("loss", "perplexity", "mse")


def confusion(truth: np.ndarray, guess: np.ndarray, classes: int = 0) -> np.ndarray:
    """Counts (classes, classes): row the truth, column the guess. classes: how many there are, if more than are seen here."""
    classes = max(classes, int(max(truth.max(initial=0), guess.max(initial=0))) + 1)
    counts = np.zeros((classes, classes))
    np.add.at(counts, (truth, guess), 1)
    return counts


def accuracy(truth: np.ndarray, guess: np.ndarray) -> float:
    """The share of right guesses."""
    return float((truth == guess).mean())


def matthews(truth: np.ndarray, guess: np.ndarray) -> float:
    """Matthews' correlation, in its form for any number of classes (Gorodkin, 2004); 0 where one side is constant."""
    c = confusion(truth, guess)
    t, p, n = c.sum(1), c.sum(0), c.sum()
    scale = math.sqrt((n**2 - (p**2).sum()) * (n**2 - (t**2).sum()))
    return float((np.trace(c) * n - t @ p) / scale) if scale else 0.0


def f1(truth: np.ndarray, guess: np.ndarray, classes: int = 2) -> float:
    """F1 of class 1 where there are two classes (MRPC's), 0 if it is neither there nor guessed; of more classes the mean over
    those that are."""
    c = confusion(truth, guess, classes)
    both = c.sum(0) + c.sum(1)
    each = np.divide(2 * np.diag(c), both, out=np.zeros(len(c)), where=both > 0)
    return float(each[1] if len(c) == 2 else each[both > 0].mean())


def pearson(truth: np.ndarray, guess: np.ndarray) -> float:
    """Pearson's correlation; 0 where one side is constant."""
    t, g = truth - truth.mean(), guess - guess.mean()
    scale = math.sqrt((t @ t) * (g @ g))
    return float(t @ g / scale) if scale else 0.0


def spearman(truth: np.ndarray, guess: np.ndarray) -> float:
    """Pearson's correlation of the ranks, equal values sharing their mean rank."""
    return pearson(_ranks(truth), _ranks(guess))


def _ranks(values: np.ndarray) -> np.ndarray:
    _, place, count = np.unique(values, return_inverse=True, return_counts=True)
    last = np.cumsum(count)
    return (last - (count - 1) / 2)[place]


def token_losses(logits: Any, labels: Tensor) -> Tensor:
    """(rows, 2) of a batch: the summed loss of the counted tokens, and how many there are. Keeps no logits in memory."""
    logits = (logits[0] if isinstance(logits, tuple) else logits)[:, :-1]
    labels = labels[:, 1:]
    losses = torch.nn.functional.cross_entropy(logits.float().transpose(1, 2), labels, reduction="none", ignore_index=-100)
    return torch.stack([losses.sum(1), (labels != -100).sum(1).to(losses.dtype)], dim=1)


def only_logits(logits: Any, labels: Tensor) -> Tensor:
    """A classifier's logits, without the caches and hidden states that some models return beside them."""
    return logits[0] if isinstance(logits, tuple) else logits


def metrics_of(task: str) -> tuple[Callable[[Any], dict[str, float]], Callable[[Any, Tensor], Tensor]]:
    """What Trainer asks for: compute_metrics and preprocess_logits_for_metrics of a task."""
    if task in ("classification", "images"):
        return _classification, only_logits
    if task == "regression":
        return _regression, only_logits
    return _language, token_losses


def _classification(p: Any) -> dict[str, float]:
    truth, logits = np.asarray(p.label_ids), np.asarray(p.predictions)
    if np.isnan(logits).any():  # argmax would take them for the first class
        return dict.fromkeys(("accuracy", "matthews", "f1"), math.nan)
    guess = logits.argmax(-1)
    return {
        "accuracy": accuracy(truth, guess), "matthews": matthews(truth, guess), "f1": f1(truth, guess, logits.shape[-1])
    }  # fmt: skip


def _regression(p: Any) -> dict[str, float]:
    truth = np.asarray(p.label_ids, np.float64).reshape(-1)
    guess = np.asarray(p.predictions, np.float64).reshape(-1)
    if not np.isfinite(guess).all():  # its ranks would be in order
        return dict.fromkeys(("pearson", "spearman", "mse"), math.nan)
    mse = float(((truth - guess) ** 2).mean())
    return {"pearson": pearson(truth, guess), "spearman": spearman(truth, guess), "mse": mse}


def _language(p: Any) -> dict[str, float]:
    total, count = np.asarray(p.predictions, np.float64).sum(0)
    loss = total / max(count, 1)
    return {"loss": float(loss), "perplexity": math.exp(min(loss, 700.0))}
