"""The loss of a fleet: the sum over owners of each one's own mean, so that nobody's step depends on who else is there."""

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor
from torch.nn import functional as F

from ..errors import ConfigError


def owner_losses(
    logits: Tensor, labels: Tensor, owners: Sequence[str | None], counts: Mapping[str, int] | None = None
) -> dict[str, Tensor]:
    """Each owner's mean cross-entropy over its labelled tokens or rows, as 0-d tensors.

    logits: (R, t, V) with labels (R, t), where position i predicts labels[:, i + 1] and -100 is left out, as in transformers'
    causal models; or (R, V) with labels (R,), classes; or (R, 1) with floating labels (R,): the squared error, NaN left out.
    owners: one for each row; None's rows count for nothing.
    counts: what to divide by for each owner, where its step is spread over several batches; else its labels in this batch.
    An owner without labels has the loss 0.
    """
    if len(owners) != logits.shape[0]:
        raise ConfigError(f"{len(owners)} owners for a batch of {logits.shape[0]} rows: give one for each row.")
    if logits.dim() == 3:  # the labels move, not the logits: a slice of those would be copied, forward and backward
        labels = torch.cat([labels[:, 1:], labels.new_full((len(labels), 1), -100)], 1)
    else:
        logits, labels = logits[:, None], labels[:, None]
    # float32 at least: a sum of bf16 terms loses the small ones. Row by row: no owner's sum depends on another's rows.
    wide = logits.float() if logits.dtype in (torch.bfloat16, torch.float16) else logits
    if labels.is_floating_point():
        known = ~labels.isnan()
        each = torch.where(known, wide.squeeze(-1) - labels.nan_to_num().to(wide.dtype), 0.0).square()
    else:
        known = labels != -100
        each = F.cross_entropy(wide.flatten(0, 1), labels.flatten(), reduction="none", ignore_index=-100).view(labels.shape)
    rows, labelled = each.sum(1), known.sum(1)
    place: dict[str, list[int]] = {}
    for i, owner in enumerate(owners):
        if owner is not None:
            place.setdefault(owner, []).append(i)
    out = {}
    for owner, mine in place.items():
        index = torch.tensor(mine, device=logits.device)
        by = counts[owner] if counts is not None else labelled[index].sum().clamp(min=1)
        out[owner] = rows[index].sum() / by
    return out


def owner_loss(
    logits: Tensor,
    labels: Tensor,
    owners: Sequence[str | None],
    counts: Mapping[str, int] | None = None,
    weights: Mapping[str, float] | None = None,
) -> Tensor:
    """The sum of owner_losses over the owners: what to call backward on. weights: each one's factor, a loss scale say."""
    return total(owner_losses(logits, labels, owners, counts), weights)


def total(losses: Mapping[str, Tensor], weights: Mapping[str, float] | None = None) -> Tensor:
    """The sum of owner_losses, each times its weight: what to call backward on. ConfigError where there are none."""
    if not losses:
        raise ConfigError("every row of this batch is the base model's: there is no owner to train.")
    if weights is not None:
        losses = {owner: loss * weights[owner] for owner, loss in losses.items()}
    return torch.stack(list(losses.values())).sum()
