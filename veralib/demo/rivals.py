"""What people do today: an adapter for each owner by PEFT, one owner after another."""

import copy
import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import torch

from ..fleet.batches import Example, Order, OwnerData
from ..fleet.loss import owner_loss

if TYPE_CHECKING:
    from .comparison import Recipe


def one_after_another(
    base: Any,
    rank: int,
    rows: Mapping[str, Sequence[Example]],
    held_out: Mapping[str, Sequence[Example]],
    recipe: "Recipe",
    collate: Callable,
    owners: int,
) -> dict[str, Any]:
    """PEFT's LoRA for each of `rows`' owners: the base loaded once, the same rows in the same order, the same epochs.

    seconds: of these owners; extrapolated_seconds: for `owners` like them, by their mean; losses: held out, a token.
    """
    from peft import LoraConfig, get_peft_model
    from transformers import get_linear_schedule_with_warmup

    config = LoraConfig(r=rank, lora_alpha=2 * rank, target_modules="all-linear", task_type="CAUSAL_LM")
    seconds, losses, parameters = [], {}, 0
    for name, mine in rows.items():
        model = get_peft_model(copy.deepcopy(base), config).eval()
        began = time.perf_counter()
        trained = [p for p in model.parameters() if p.requires_grad]
        parameters = sum(p.numel() for p in trained)
        optimizer = torch.optim.AdamW(trained, recipe.lora_lr[rank], weight_decay=0.0, fused=True)
        order = Order(OwnerData(name, mine), recipe.owner_rows, recipe.epochs, recipe.seed)
        schedule = get_linear_schedule_with_warmup(optimizer, -(-order.total // 10), order.total)
        while not order.done:
            _loss(model, collate(order.rows())).backward()
            torch.nn.utils.clip_grad_norm_(trained, 1.0)
            optimizer.step()
            optimizer.zero_grad()
            schedule.step()
            order.taken += 1
        seconds.append(time.perf_counter() - began)
        losses[name] = _held_out(model, held_out[name], collate)
    return {
        "method": f"PEFT LoRA r={rank}",
        "parameters": parameters,
        "owners": list(rows),
        "seconds": seconds,
        "extrapolated_seconds": statistics.mean(seconds) * owners,
        "losses": losses,
    }


def _loss(model: Any, batch: Mapping[str, torch.Tensor]) -> torch.Tensor:
    logits = model(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"]).logits
    return owner_loss(logits, batch["labels"], ["owner"] * len(logits))


@torch.no_grad()
def _held_out(model: Any, rows: Sequence[Example], collate: Callable) -> float:
    batch = collate(rows)
    return float(_loss(model, batch))
