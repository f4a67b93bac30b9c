"""Time and memory of one training step (forward, backward, AdamW, zero_grad), contestants interleaved in one process."""

import contextlib
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from . import measure
from .models import SEED, SHAPES, Contestant, base_model, batch, contest, frozen_tensors

REFERENCE = Contestant("lora", 8)


@dataclass(frozen=True)
class Setting:
    """One table of results: a shape, a batch, the ranks of VeRA and what we aim at."""

    name: str
    shape: str
    rows: int
    length: int
    ranks: tuple[int, ...]
    rounds: int
    precision: str = "fp32"
    """"fp32", "bf16" (weights in bf16) or "autocast" (fp32 weights, matmuls in bf16)."""
    time_goals: tuple[float, ...] = ()
    """A rank each: our step over PEFT's LoRA r=8, at most. Empty in bf16, where the goal is half of PEFT's extra cost."""
    saved_goal: float = 1.01
    """Our saved activations over PEFT's LoRA r=8, at most."""

    @property
    def contestants(self) -> list[Contestant]:
        """All of them, in the first round's order."""
        both = [Contestant(method, r) for r in self.ranks for method in ("peft-vera", "veralib")]  # type: ignore[arg-type]
        return [Contestant("frozen"), Contestant("lora", 1), REFERENCE, Contestant("full"), *both]


SETTINGS = [
    Setting("llama-16x256", "llama", 16, 256, (1024, 256, 64), 5, time_goals=(1.35, 1.10, 0.90)),
    Setting("llama-4x256", "llama", 4, 256, (1024, 256), 9, time_goals=(2.1, 1.20)),
    Setting("roberta-32x128", "roberta", 32, 128, (1024,), 5, time_goals=(1.05,)),
    Setting("llama-bf16", "llama", 1, 128, (1024, 256), 2, precision="bf16", saved_goal=1.0),
    Setting("llama-autocast", "llama", 1, 128, (1024, 256), 2, precision="autocast", saved_goal=1.0),
]
QUICK = [
    Setting("quick-llama", "tiny-llama", 2, 8, (16, 4), 3, time_goals=(1.35, 1.10)),
    Setting("quick-roberta", "tiny-roberta", 2, 8, (16,), 2, time_goals=(1.05,)),
    Setting("quick-bf16", "tiny-llama", 2, 8, (4,), 2, precision="bf16", saved_goal=1.0),
    Setting("quick-autocast", "tiny-llama", 2, 8, (4,), 2, precision="autocast", saved_goal=1.0),
]


def run(
    setting: Setting, log: Callable[[str], None] = print, skip: tuple[str, ...] = (), *, own_process: bool = True
) -> dict[str, Any]:
    """The setting's result: for each contestant seconds, ratio to LoRA r=8, saved bytes, peak bytes, parameters.

    skip: methods to leave out. Ratios are taken round by round, then their median: a disturbance hits neighbours alike.
    own_process: each contestant's bytes are counted in a new process, for the profiler's traces add up to gigabytes.
    """
    contestants = [c for c in setting.contestants if c.method not in skip]
    facts: dict[str, dict[str, Any]] = {}
    for contestant in contestants:
        arguments = setting, contestant, torch.get_num_threads()
        facts[contestant.name] = measure.in_own_process(count, *arguments) if own_process else count(*arguments)
        log(f"  {contestant.name}: saved {facts[contestant.name]['saved_bytes'] / 2**20:.1f} MiB")
    before = measure.environment()
    base = _base(setting)
    steps = {c.name: _enter(base, setting, c).step for c in contestants}
    seconds = measure.interleave(steps, setting.rounds, warmup=1)
    reference, saved = seconds[REFERENCE.name], facts[REFERENCE.name]["saved_bytes"]
    for name, taken in seconds.items():
        facts[name] |= {
            "seconds": measure.spread(taken),
            "ratio": measure.spread([t / r for t, r in zip(taken, reference, strict=True)]),
            "saved_ratio": facts[name]["saved_bytes"] / saved,
        }
        log(f"  {name}: {facts[name]['seconds']['median']:.3f} s, {facts[name]['ratio']['median']:.3f} x LoRA r=8")
    return {
        "run": setting.name,
        "seed": SEED,
        "shape": setting.shape,
        "rows": setting.rows,
        "length": setting.length,
        "precision": setting.precision,
        "ranks": list(setting.ranks),
        "goals": {"time": list(setting.time_goals), "saved": setting.saved_goal},
        "reference": REFERENCE.name,
        "rounds": setting.rounds,
        "environment": before | {"load_average_after": measure.environment()["load_average"]},
        "contestants": facts,
    }


def count(setting: Setting, contestant: Contestant, threads: int) -> dict[str, Any]:
    """The contestant's parameters and bytes, measured in the process that calls it."""
    torch.set_num_threads(threads)
    entered = _enter(_base(setting), setting, contestant)
    live, _ = measure.allocations(entered.forward)
    _, peak = measure.allocations(entered.step)
    return {
        "parameters": sum(p.numel() for p in entered.model.parameters() if p.requires_grad),
        "saved_bytes": measure.saved_bytes(entered.forward, frozen_tensors(entered.model, contestant)),
        "live_bytes_after_forward": live,
        "peak_bytes_of_step": peak,
    }


class Entered(NamedTuple):
    """A contestant that has taken its first step: A and B have grown, the optimiser has its state, and neither is measured."""

    model: nn.Module
    forward: Callable[[], Tensor]
    step: Callable[[], None]


def _base(setting: Setting) -> nn.Module:
    return base_model(SHAPES[setting.shape], torch.bfloat16 if setting.precision == "bf16" else torch.float32)


def _enter(base: nn.Module, setting: Setting, contestant: Contestant) -> Entered:
    shape = SHAPES[setting.shape]
    data = batch(shape, setting.rows, setting.length)
    model = contest(base, shape, contestant)
    trained = [p for p in model.parameters() if p.requires_grad]
    # fused: what Trainer uses by default (adamw_torch_fused).
    optimizer = torch.optim.AdamW(trained, lr=1e-3, fused=True) if trained else None

    def forward() -> Tensor:
        cast = torch.autocast("cpu", torch.bfloat16) if setting.precision == "autocast" else contextlib.nullcontext()
        with cast:
            return model(**data).loss

    def step() -> None:
        forward().backward()
        if optimizer is not None:
            optimizer.step()
            optimizer.zero_grad()

    step()
    measure.trim()
    return Entered(model, forward, step)
