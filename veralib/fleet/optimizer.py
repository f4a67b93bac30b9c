"""FleetAdamW: AdamW with moments, step count, schedule and clipping of each owner's own."""

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.optim.adamw import adamw

from ..errors import ConfigError, StateError, unknown_name
from .fleet import Fleet

Schedule = Callable[[float], float]
SCHEDULES: dict[str, Schedule] = {
    "constant": lambda part: 1.0,
    "linear": lambda part: 1.0 - part,
    "cosine": lambda part: 0.5 * (1.0 + math.cos(math.pi * part)),
}
"""Share of the steps after the warm-up that an owner has taken -> factor on the learning rate."""
MAX_SKIPS = 16  # steps in a row that overflow before an owner counts as diverged: the loss scale has shrunk 65,536-fold by then

GROWTH_STEPS = 2000  # steps without overflow after which the loss scale doubles, as torch.amp.GradScaler's


@dataclass(frozen=True)
class StepReport:
    """What one step did: owners that moved, and those whose gradient wasn't finite, which did not."""

    moved: tuple[str, ...]
    skipped: tuple[str, ...] = ()
    """Overflowed under their loss scale: tried again at half of it."""
    diverged: tuple[str, ...] = ()
    """NaN or inf without a loss scale, or too often with one."""


class FleetAdamW:
    """AdamW (decoupled weight decay) for a Fleet: each owner moves exactly as if it trained alone.

    Only owners whose rows took part in a backward since zero_grad() move, decay and count a step. lr, warmup and schedule apply
    to an owner's own steps out of its own total: total_steps, or what plan(name, steps) says. max_norm clips each owner's
    gradient by its own norm. lr_head: of modules trained in full (train_modules), which each owner has a copy of; left out, lr.
    loss_scale, for fp16: where each owner's own begins; owner_loss(…, weights=optimizer.loss_scales) multiplies by it, and an
    owner that overflows skips its step and halves its own.
    The arithmetic is torch.optim.AdamW(fused=True)'s, row by row.
    """

    def __init__(
        self,
        fleet: Fleet,
        lr: float = 1e-2,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: float = 0.0,
        max_norm: float | None = None,
        schedule: str = "constant",
        warmup: float = 0.0,
        total_steps: int | None = None,
        loss_scale: float | None = None,
        lr_head: float | None = None,
    ) -> None:
        if not lr > 0 or not math.isfinite(lr):
            raise ConfigError(f"lr is {lr!r}, expected a positive number; d and b train at 1e-3 to 1e-1 (docs/choosing.md).")
        if not 0 <= warmup < 1:
            raise ConfigError(f"warmup is {warmup!r}, expected the share of an owner's steps, from 0 to below 1.")
        if schedule not in SCHEDULES:
            raise unknown_name("schedule", schedule, SCHEDULES)
        if max_norm is not None and not max_norm > 0:
            raise ConfigError(f"max_norm is {max_norm!r}, expected a positive number, or None to clip nothing.")
        self.fleet = fleet
        if lr_head is not None and (not lr_head > 0 or not math.isfinite(lr_head)):
            raise ConfigError(f"lr_head is {lr_head!r}, expected a positive number, or None to train heads at lr.")
        self.lr, self.betas, self.eps, self.weight_decay = lr, betas, eps, weight_decay
        self.lr_head = lr if lr_head is None else lr_head
        self.max_norm, self.schedule, self.warmup, self.total_steps = max_norm, schedule, warmup, total_steps
        self.loss_scale = loss_scale
        table = fleet.bank.table
        self.exp_avg = torch.zeros_like(table)
        self.exp_avg_sq = torch.zeros_like(table)
        slots = fleet.bank.slots
        self._steps = torch.zeros(slots, dtype=torch.float32, device=table.device)  # torch's fused step counts in float32
        self._taken, self._totals, self._skips = [0] * slots, [total_steps] * slots, [0] * slots
        self._scales, self._clean = [loss_scale or 1.0] * slots, [0] * slots
        self._generation = list(fleet.bank.generation)

    # An owner's own state

    def plan(self, name: str, steps: int) -> None:
        """How many steps this owner takes in all: what its schedule and warm-up are a share of."""
        slot = self._fresh(self.fleet.slot(name))
        self._totals[slot] = steps

    def steps_of(self, name: str) -> int:
        """Steps that this owner has taken."""
        return self._taken[self._fresh(self.fleet.slot(name))]

    @property
    def loss_scales(self) -> dict[str, float] | None:
        """Owner -> what its loss is to be multiplied by; None without loss_scale."""
        if self.loss_scale is None:
            return None
        return {name: self._scales[self._fresh(slot)] for slot, name in self.fleet.by_slot().items()}

    def state_of(self, name: str) -> dict[str, Any]:
        """A copy of what resuming this owner needs: step, total, exp_avg, exp_avg_sq (the table's width,)."""
        slot = self._fresh(self.fleet.slot(name))
        moments = {"exp_avg": self.exp_avg[slot].cpu().clone(), "exp_avg_sq": self.exp_avg_sq[slot].cpu().clone()}
        scale = {"scale": self._scales[slot], "clean": self._clean[slot]}
        return {"step": self._taken[slot], "total": self._totals[slot], **scale, **moments}

    def load_state_of(self, name: str, state: Mapping[str, Any]) -> None:
        """Goes on where state_of left this owner."""
        slot = self._fresh(self.fleet.slot(name))
        self._taken[slot], self._totals[slot] = int(state["step"]), state["total"]
        self._steps[slot] = self._taken[slot]
        self._scales[slot], self._clean[slot] = float(state["scale"]), int(state["clean"])
        self.exp_avg[slot].copy_(state["exp_avg"])
        self.exp_avg_sq[slot].copy_(state["exp_avg_sq"])

    def _fresh(self, slot: int) -> int:
        """The slot, its state cleared where its owner is another than the one the state is of."""
        if self._generation[slot] != self.fleet.bank.generation[slot]:
            self._generation[slot] = self.fleet.bank.generation[slot]
            self._taken[slot], self._totals[slot], self._skips[slot] = 0, self.total_steps, 0
            self._scales[slot], self._clean[slot] = self.loss_scale or 1.0, 0
            for state in (self.exp_avg[slot], self.exp_avg_sq[slot], self._steps[slot]):
                state.zero_()
        return slot

    def _rate(self, slot: int) -> float:
        taken, total = self._taken[slot], self._totals[slot]
        if total is None:
            if self.schedule == "constant" and not self.warmup:
                return self.lr
            owner = self.fleet.by_slot()[slot]
            raise StateError(f'schedule "{self.schedule}" needs the number of steps: total_steps=…, or plan("{owner}", steps).')
        warm = math.ceil(self.warmup * total)
        if taken < warm:
            return self.lr * (taken + 1) / (warm + 1)
        return self.lr * SCHEDULES[self.schedule](min(1.0, (taken - warm) / max(1, total - warm)))

    # The step

    @torch.no_grad()
    def step(self) -> StepReport:
        """Moves every owner that has a gradient; StateError where none has. One wait for the device, for the norms."""
        bank = self.fleet.bank
        slots = sorted(bank.touched)
        if not slots:
            raise StateError(
                "no owner of this fleet has a gradient: run the model inside vera.rows([…owners…]), then loss.backward(); "
                "vera.use() trains no fleet."
            )
        names = self.fleet.by_slot()
        gradients = [bank.gradients[self._fresh(s)] for s in slots]
        if self.fleet.trained is not None:
            torch._foreach_mul_(gradients, [self.fleet.trained] * len(gradients))
        if self.loss_scale is not None:
            torch._foreach_div_(gradients, [self._scales[s] for s in slots])
        norms = torch.stack(torch._foreach_norm(gradients)).tolist()
        moved: list[str] = []
        skipped: list[str] = []
        diverged: list[str] = []
        for slot, g, norm in zip(slots, gradients, norms, strict=True):
            if not math.isfinite(norm):
                self._skips[slot] += 1
                self._scales[slot], self._clean[slot] = self._scales[slot] / 2, 0
                give_up = self.loss_scale is None or self._skips[slot] >= MAX_SKIPS
                (diverged if give_up else skipped).append(names[slot])
                continue
            if self.max_norm is not None and norm > self.max_norm:
                g.mul_(self.max_norm / (norm + 1e-6))  # as torch.nn.utils.clip_grad_norm_
            self._skips[slot] = 0
            self._move(slot, g)
            moved.append(names[slot])
            self._clean[slot] += 1
            if self._clean[slot] % GROWTH_STEPS == 0:
                self._scales[slot] *= 2
        return StepReport(tuple(moved), tuple(skipped), tuple(diverged))

    def _move(self, slot: int, g: Tensor) -> None:
        row, keep = self.fleet.bank.row(slot), None
        if self.fleet.trained is not None and self.weight_decay:
            keep = row.clone()
        rate, vectors = self._rate(slot), self.fleet.bank.layout.size
        for columns, lr in ((slice(vectors), rate), (slice(vectors, None), rate * self.lr_head / self.lr)):
            if not row[columns].numel():
                continue
            adamw(
                [row[columns]],
                [g[columns]],
                [self.exp_avg[slot, columns]],
                [self.exp_avg_sq[slot, columns]],
                [],
                [self._steps[slot].clone()],
                fused=True,
                amsgrad=False,
                beta1=self.betas[0],
                beta2=self.betas[1],
                lr=lr,
                weight_decay=self.weight_decay,
                eps=self.eps,
                maximize=False,
            )
        self._steps[slot] += 1
        if keep is not None:  # what doesn't train doesn't decay
            row.copy_(torch.where(self.fleet.trained.bool(), row, keep))  # type: ignore[union-attr]
        self._taken[slot] += 1

    def zero_grad(self) -> None:
        """Forgets the gradients of every owner that has one."""
        self.fleet.bank.clear()
