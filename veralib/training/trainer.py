"""AdapterTrainer: transformers' Trainer whose checkpoints hold the trained tensors alone, and are whole or not there.

Trainer writes a checkpoint file by file, so a killed process leaves half of one. Here the last file written is a seal with
every other file's size; what has no matching seal is no checkpoint and is deleted before a run goes on.
"""

import json
import math
import os
import random
import shutil
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch.utils.data import Sampler
from transformers import Trainer, TrainerCallback, TrainerState

from ..baselines.base import Attached, batch_norms
from .folder import write_json
from .metrics import LOWER_IS_BETTER
from .pixels import Pixels
from .settings import WITH_HEAD, Settings

SEAL = "sealed.json"
TENSORS = "trained.safetensors"


class AdapterTrainer(Trainer):
    """Trainer over an Attached model: its two learning rates, its small checkpoints, and a clock that leaves evaluation out."""

    def __init__(self, attached: Attached, settings: Settings, elapsed: float = 0.0, **kwargs: Any) -> None:
        self.attached, self.settings = attached, settings
        self.rows: Sequence[Any] = kwargs["train_dataset"]
        self.folder = Path(kwargs["args"].output_dir)
        self.elapsed, self.paused, self.started = elapsed, 0.0, time.perf_counter()
        super().__init__(model=attached.model, **kwargs)
        if settings.task in WITH_HEAD:
            # Of a forward with **kwargs Trainer believes that it divides by the whole step's items. Models with heads give the
            # mean of what they see: undivided, N micro-batches or processes make the gradient N times as large.
            self.model_accepts_loss_kwargs = False
        self.held = [] if settings.method == "full" else batch_norms(attached.model)
        self.add_callback(_Order(self))
        self.add_callback(_Method(attached))
        # Trainer's own "epoch" evaluates after the last step's checkpoint is written: a run that goes on from there would
        # miss the evaluation. By steps, each evaluation comes before the checkpoint of its step.
        batches = len(self.get_train_dataloader())
        steps = max(1, -(-batches // self.args.gradient_accumulation_steps))
        if settings.evaluate_every == "epoch":
            self.args.eval_steps = steps
        if settings.save_every == "epoch":
            self.args.save_steps = steps
        if "logging_steps" not in settings.training:
            total = self.args.max_steps if self.args.max_steps > 0 else steps * settings.epochs
            self.args.logging_steps = max(1, int(total / 50))

    def train_seconds(self) -> float:
        """Seconds of training so far, over all the parts of an interrupted run, without evaluations and checkpoints."""
        return self.elapsed + time.perf_counter() - self.started - self.paused

    def create_optimizer(self, model: Any = None) -> torch.optim.Optimizer:
        """The optimiser that TrainingArguments name, over the method's groups."""
        if self.optimizer is None:
            groups = self.attached.parameter_groups(
                self.settings.resolved_lr, self.settings.resolved_lr_head, self.settings.weight_decay
            )
            kind, options = self.get_optimizer_cls_and_kwargs(self.args)
            self.optimizer = kind(groups, **options)
        return self.optimizer

    def compute_loss(self, model: Any, inputs: Any, return_outputs: bool = False, num_items_in_batch: Any = None) -> Any:
        for norm in self.held:  # after Trainer's model.train()
            norm.eval()
        smoothed = self.label_smoother is not None and "labels" in inputs
        found: Any = super().compute_loss(model, inputs, return_outputs, num_items_in_batch)
        if not smoothed or self.attached.penalty is None or not model.training:
            return found
        # A loss that is a part of the step's is added to the others, not averaged with them.
        part = self.model_accepts_loss_kwargs and num_items_in_batch is not None
        penalty = self.attached.penalty() / (self.current_gradient_accumulation_steps if part else 1)
        return (found[0] + penalty, found[1]) if return_outputs else found + penalty

    def _get_train_sampler(self, train_dataset: Any = None) -> Sampler:
        lengths = [len(row["input_ids"]) for row in self.rows] if self.settings.group_by_length else None
        self.order = SeededOrder(len(self.rows), self.settings.seed, lengths, self.args.train_batch_size * 50)
        return self.order

    def evaluate(self, *args: Any, **kwargs: Any) -> dict[str, float]:
        start = time.perf_counter()
        out = super().evaluate(*args, **kwargs)
        self.paused += time.perf_counter() - start
        return out

    def _save(self, output_dir: str | None = None, state_dict: dict | None = None) -> None:
        folder = Path(output_dir) if output_dir else self.folder
        folder.mkdir(parents=True, exist_ok=True)
        save_file({k: v.cpu().contiguous() for k, v in self.attached.state().items()}, folder / TENSORS)

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: Any = None) -> None:
        self.attached.load_state(load_file(Path(resume_from_checkpoint) / TENSORS))

    def _load_best_model(self) -> None:
        assert self.state.best_model_checkpoint
        self._load_from_checkpoint(self.state.best_model_checkpoint)

    def _save_checkpoint(self, model: Any, trial: Any = None) -> None:
        seconds, start = self.train_seconds(), time.perf_counter()
        super()._save_checkpoint(model, trial)
        if self.args.world_size > 1:
            torch.distributed.barrier()  # the seal comes after every process has written its random state
        if self.args.should_save:
            folder = self.folder / f"checkpoint-{self.state.global_step}"
            seal(folder, {"seconds": seconds, "stop": self.control.should_training_stop})
            best = self.state.best_model_checkpoint
            for old in self.folder.glob("checkpoint-*"):
                if old != folder and not (self.args.load_best_model_at_end and best and old.name == Path(best).name):
                    shutil.rmtree(old, ignore_errors=True)
        self.paused += time.perf_counter() - start


class SeededOrder(Sampler):
    """Row indices of one epoch: a function of (seed, epoch) alone, so an interrupted run meets the same rows again."""

    def __init__(self, rows: int, seed: int, lengths: Sequence[int] | None = None, window: int = 0) -> None:
        self.rows, self.seed, self.lengths, self.window, self.epoch = rows, seed, lengths, window, 0

    def __len__(self) -> int:
        return self.rows

    def set_epoch(self, epoch: int) -> None:
        """Called by accelerate's data loader, too."""
        self.epoch = epoch

    def __iter__(self) -> Iterator[int]:
        shuffled = list(range(self.rows))
        rng = random.Random(f"{self.seed} {self.epoch}")
        rng.shuffle(shuffled)
        if self.lengths is None:
            return iter(shuffled)
        # By length within windows of 50 batches, then the batches shuffled; the longest first shows at once what fits in memory.
        size, lengths = self.window // 50, self.lengths
        windows = [shuffled[i : i + self.window] for i in range(0, self.rows, self.window)]
        ordered = [i for w in windows for i in sorted(w, key=lambda i: -lengths[i])]
        batches = [ordered[i : i + size] for i in range(0, self.rows, size)]
        ragged = batches.pop() if len(batches[-1]) < size else []
        first, rest = batches[:1], batches[1:]
        rng.shuffle(rest)
        return iter([i for batch in first + rest for i in batch] + ragged)


class _Order(TrainerCallback):
    """Tells the sampler and augmented images the epoch: accelerate does so only in some of its loaders."""

    def __init__(self, trainer: AdapterTrainer) -> None:
        self.trainer = trainer

    def on_epoch_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        epoch = int(state.epoch or 0)
        self.trainer.order.set_epoch(epoch)
        if isinstance(self.trainer.rows, Pixels):
            self.trainer.rows.set_epoch(epoch)

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.trainer.started, self.trainer.paused = time.perf_counter(), 0.0


class _Method(TrainerCallback):
    """Calls what a method wants to be called."""

    def __init__(self, attached: Attached) -> None:
        self.attached = attached

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if self.attached.begin is not None:
            self.attached.begin(state.max_steps)

    def on_step_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if self.attached.before_step is not None:
            self.attached.before_step(state.global_step)

    def on_optimizer_step(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if self.attached.after_step is not None:
            self.attached.after_step(state.global_step + 1)


class Patience(TrainerCallback):
    """Early stopping that reads the log alone, so an interrupted run stops where an uninterrupted one does."""

    def __init__(self, metric: str, patience: int) -> None:
        self.metric, self.patience, self.sign = metric, patience, -1 if metric in LOWER_IS_BETTER else 1

    def on_evaluate(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        key = f"eval_{self.metric}"
        values = [self.sign * h[key] if math.isfinite(h[key]) else -math.inf for h in state.log_history if key in h]
        if len(values) > self.patience and max(values[-self.patience :]) <= max(values[: -self.patience]):
            control.should_training_stop = True


def seal(folder: Path, facts: dict[str, Any]) -> None:
    """Closes a checkpoint: every file is on the disk before the seal is."""
    files = {}
    for file in sorted(p for p in folder.rglob("*") if p.is_file()):
        with open(file, "rb") as f:
            os.fsync(f.fileno())
        files[str(file.relative_to(folder))] = file.stat().st_size
    write_json(folder / SEAL, {**facts, "files": files})


def last_checkpoint(folder: Path) -> tuple[Path, dict[str, Any]] | None:
    """The newest sealed checkpoint and its seal, or None."""
    found = [(int(p.name.rpartition("-")[2]), p) for p in folder.glob("checkpoint-*") if p.name.rpartition("-")[2].isdecimal()]
    return next(((p, facts) for _, p in sorted(found, reverse=True) if (facts := unsealed(p))), None)


def unsealed(folder: Path) -> dict[str, Any] | None:
    """The facts under a checkpoint's seal; None where it is missing or a file's size differs."""
    try:
        facts = json.loads((folder / SEAL).read_text())
        whole = all((folder / name).stat().st_size == size for name, size in facts["files"].items())
        TrainerState.load_from_json(str(folder / "trainer_state.json"))
    except (OSError, ValueError, KeyError, TypeError):
        return None
    return facts if whole else None


def delete_broken(folder: Path) -> None:
    """Deletes the checkpoints without a good seal."""
    for path in folder.glob("checkpoint-*"):
        if unsealed(path) is None:
            shutil.rmtree(path, ignore_errors=True)
