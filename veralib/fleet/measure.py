"""What adapters lose on rows that only measure, many adapters in one batch."""

from collections.abc import Callable, Mapping, Sequence
from math import nan
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor

from .batches import Example
from .loss import owner_losses

if TYPE_CHECKING:
    from ..model import Vera


class Score(NamedTuple):
    """Of an owner's rows: the mean loss, a token or a row, and the share predicted right; NaN in regression."""

    loss: float
    accuracy: float


@torch.no_grad()
def scores(
    vera: "Vera",
    rows: Mapping[str, Sequence[Example]],
    collate: Callable[[Any], dict[str, Tensor]],
    batch_rows: int = 64,
    adapters: Mapping[str, str | None] | None = None,
) -> dict[str, Score]:
    """Each owner's score over its rows, in mixed batches of rows of like length.

    adapters: owner -> the adapter that reads its rows, None the base model; left out: the adapter of the owner's own name.
    """
    flat = sorted(((n, e) for n, mine in rows.items() for e in mine), key=lambda pair: len(pair[1]["input_ids"]))
    sums, rights, counts = dict.fromkeys(rows, 0.0), dict.fromkeys(rows, 0.0), dict.fromkeys(rows, 0)
    for k in range(0, len(flat), batch_rows):
        part = flat[k : k + batch_rows]
        owners = [n for n, _ in part]
        batch = on_device(vera, collate([e for _, e in part]))
        with vera.rows([adapters[n] if adapters else n for n in owners]):
            logits = logits_of(vera.model, batch)
        known, right = _right(logits, batch["labels"])
        for i, (n, _) in enumerate(part):
            counts[n] += known[i]
            rights[n] += right[i]
        for n, loss in owner_losses(logits, batch["labels"], owners, dict.fromkeys(owners, 1)).items():
            sums[n] += float(loss)
    return {n: Score(sums[n] / max(1, counts[n]), rights[n] / max(1, counts[n])) for n in rows}


def _right(logits: Tensor, labels: Tensor) -> tuple[list[int], list[float]]:
    """How many labels each row has, and how many of them are predicted."""
    if labels.is_floating_point():
        return [1] * len(labels), [nan] * len(labels)
    if logits.dim() == 3:
        logits, labels = logits[:, :-1], labels[:, 1:]
    known = labels != -100
    right = (logits.argmax(-1) == labels) & known
    by_row = lambda t: t.reshape(len(t), -1).sum(1).tolist()  # noqa: E731
    return by_row(known), by_row(right)


def on_device(vera: "Vera", batch: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The batch where the model is."""
    return {k: v.to(vera.inside.device, non_blocking=True) for k, v in batch.items()}


def logits_of(model: Any, batch: Mapping[str, Tensor]) -> Tensor:
    """The model's logits for a batch, whose labels aren't given to it: its own loss would mix owners."""
    return model(**{k: v for k, v in batch.items() if k != "labels"}).logits
