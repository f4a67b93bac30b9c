"""Time and memory of one training step on Llama-7B-shape layers: frozen base, full, PEFT's LoRA and VeRA, ours.

A step is forward, backward, fused AdamW, zero_grad; batch 1 × 2048 tokens, all linears, the base in bf16, adapters in
float32 as PEFT and veralib keep them. Inputs are vectors that ask for a gradient, so every method passes one through all
layers, as with gradient checkpointing or below a trained embedding. The floor passes it through the frozen base alone.
"""

import contextlib
import copy
import functools
import gc
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from veralib import kernels

from . import common


@dataclass(frozen=True)
class Contestant:
    """One way to train. low: the adapter's own weights in bf16 too (PEFT's autocast_adapter_dtype=False). fused: veralib's Triton
    kernels."""

    method: str
    rank: int = 0
    low: bool = False
    fused: bool = False

    @property
    def name(self) -> str:
        return self.method + (f"-{self.rank}" if self.rank else "") + "-bf16" * self.low + "-kernels" * self.fused


CONTESTANTS = (
    Contestant("frozen"),
    Contestant("lora", 1),
    Contestant("lora", 16),
    Contestant("lora", 16, low=True),
    Contestant("lora", 64),
    Contestant("peft-vera", 256),
    Contestant("veralib", 256),
    Contestant("peft-vera", 1024),
    Contestant("veralib", 1024),
    Contestant("veralib", 256, fused=True),
    Contestant("veralib", 1024, fused=True),
    Contestant("full"),
)
TOKENS, ROUNDS, REPEATS = 2048, 15, 3
Entered = tuple[int, Callable[[], Any], Callable[[], None]]


def enter(base: nn.Module, contestant: Contestant) -> nn.Module:
    """The base's twin (full: a copy with weights of its own) with this contestant's adapter, its entries random.

    Random, because a matmul on the zeros that adapters start from runs faster than one on real data.
    """
    if contestant.method == "full":
        return copy.deepcopy(base).requires_grad_(True)
    model = common.twin(base)
    if contestant.method == "veralib":
        import veralib

        veralib.attach(model, veralib.VeraConfig(rank=contestant.rank, targets=list(common.LINEARS)))
    elif contestant.method != "frozen":
        import peft

        config: Any
        if contestant.method == "lora":
            config = peft.LoraConfig(r=contestant.rank, lora_alpha=contestant.rank, target_modules=list(common.LINEARS))
        else:
            config = peft.VeraConfig(r=contestant.rank, target_modules=list(common.LINEARS))
        device = next(base.parameters()).device
        model = peft.get_peft_model(model, config, autocast_adapter_dtype=not contestant.low).to(device)
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for p in model.parameters():
            if p.requires_grad:
                p.copy_(0.02 * torch.randn(p.shape, generator=generator))
    return model


def make_step(model: nn.Module, x: torch.Tensor, g: torch.Tensor, autocast: bool, fused: bool = False) -> Entered:
    """(trained parameters, forward, whole step) of a model; fused: with veralib's Triton kernels."""
    trained = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=1e-4, fused=True) if trained else None

    def forward() -> torch.Tensor:
        kernels.use(fused)
        with torch.autocast(x.device.type, torch.bfloat16) if autocast else contextlib.nullcontext():
            return model(inputs_embeds=x, use_cache=False).last_hidden_state

    def step() -> None:
        forward().backward(g)
        x.grad = None
        if optimizer is not None:
            optimizer.step()
            optimizer.zero_grad()

    return sum(p.numel() for p in trained), forward, step


def contest(
    options: common.Options, results: common.Results, label: str, makers: dict[str, Callable[[], Entered]]
) -> dict[str, dict[str, Any]]:
    """Facts and times of each contestant, interleaved. makers: name -> makes (trained parameters, forward, whole step)."""
    clock = options.clock
    steps: dict[str, Callable[[], None]] = {}
    facts: dict[str, dict[str, Any]] = {}
    for name, make in makers.items():
        with results.attempt(f"{label} {name}"):
            before = clock.allocated()
            trained, forward, step = make()
            step()
            step()
            gc.collect()
            resident = clock.allocated() - before
            held, _ = clock.peak(forward)
            _, most = clock.peak(step)
            steps[name] = step
            facts[name] = {
                "parameters": trained,
                "resident_bytes": resident,
                "held_bytes": held,
                "peak_bytes": most,
            }
    rounds, repeats = (2, 1) if options.tiny else (ROUNDS, REPEATS)
    for name, times in clock.interleave(steps, rounds, repeats).items():
        facts[name] |= times
        print(f"{label} {name}: {times['ms']['median']:.2f} ms, host {times['host_ms']:.2f}", flush=True)
    return facts


def compare(options: common.Options, results: common.Results, base: nn.Module, tokens: int, precision: str) -> None:
    """All contestants at one length and precision, interleaved."""
    clock, width = options.clock, options.size.hidden
    generator = torch.Generator().manual_seed(2)
    draw = lambda: torch.randn(1, tokens, width, generator=generator).to(clock.device, torch.bfloat16)  # noqa: E731
    x, g = draw().requires_grad_(), draw()

    def make(contestant: Contestant) -> Entered:
        return make_step(enter(base, contestant), x, g, precision == "autocast", contestant.fused)

    here = [c for c in CONTESTANTS if not c.fused or (kernels.installed() and clock.cuda)]
    facts = contest(options, results, precision, {c.name: functools.partial(make, c) for c in here})
    results.put("tables", {"precision": precision, "tokens": tokens, "reference": "lora-16", "contestants": facts})


def main(arguments: list[str] | None = None) -> int:
    """Writes train_step.json: a table for plain bf16, one for autocast."""
    options = common.options(__doc__, arguments)
    results = options.results("train_step")
    with results.attempt("ceilings"):
        results.put("environment", common.ceilings(options.clock), "ceilings")
    base = common.build(options.size, options.clock.device)
    for precision in ("bf16", "autocast"):
        if not options.late:
            with results.attempt(precision):
                compare(options, results, base, 32 if options.tiny else TOKENS, precision)
            gc.collect()
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
