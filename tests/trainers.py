"""transformers' Trainer on tiny models, and rows for it."""

import torch

from tests.conftest import tokens
from veralib import VeraConfig, handle

QV = VeraConfig(rank=8, targets=["q_proj", "v_proj"])
NOT_THE_MODEL = {"optimizer.pt", "scheduler.pt", "rng_state.pth", "trainer_state.json", "training_args.bin"}


def causal_rows(count: int = 16):
    ids = tokens(count, 6, seed=1)
    return [{"input_ids": row, "labels": row} for row in ids]


def labelled_rows(count: int = 16):
    ids = tokens(count, 6, seed=1)
    return [{"input_ids": row, "labels": int(row[0]) % 3} for row in ids]


def make_trainer(model, folder, data=None, cls=None, optimizer=None, callbacks=None, compute_metrics=None, **changes):
    """A Trainer on the CPU; without an optimizer, AdamW over the handle's groups."""
    from transformers import Trainer, TrainingArguments

    settings = dict(
        output_dir=str(folder), max_steps=4, per_device_train_batch_size=4, use_cpu=True, report_to="none", disable_tqdm=True,
        logging_strategy="no", save_strategy="no", lr_scheduler_type="constant",
    )  # fmt: skip
    data = data or causal_rows()
    return (cls or Trainer)(
        model,
        TrainingArguments(**(settings | changes)),
        train_dataset=data,
        eval_dataset=data[:4],
        optimizers=(optimizer or torch.optim.AdamW(handle(model).parameter_groups(lr=1e-2)), None),
        callbacks=callbacks,
        compute_metrics=compute_metrics,
    )


def vectors(model, name: str = "default"):
    return {unit: torch.cat(pair) for unit, pair in handle(model).adapter(name).vectors.items()}


def same(left, right) -> bool:
    return left.keys() == right.keys() and all(torch.equal(left[k], right[k]) for k in left)


def logits(model, ids):
    with torch.no_grad():
        return model.eval()(input_ids=ids).logits
