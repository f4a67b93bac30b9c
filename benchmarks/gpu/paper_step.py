"""Time and memory of a training step at the paper's own shapes: RoBERTa-large on GLUE (Table 8), GPT-2 large on E2E (Table 10).

Random weights. Two precisions: float32 weights under bf16 autocast, as Trainer trains with bf16=True, and float32 throughout.
LoRA's and VeRA's layers are the same: query and value, or GPT-2's c_attn as a whole.
"""

import contextlib
import functools
import gc
from dataclasses import dataclass

import torch
from torch import nn

from veralib import kernels

from .. import models
from ..models import SHAPES, Contestant
from . import common
from .train_step import Entered, contest

REFERENCE = "lora-8"


@dataclass(frozen=True)
class Setting:
    """A shape with the paper's batch and rank. GPT-2's rows are padded to 512 tokens, as in Hu et al.'s code."""

    shape: str
    rows: int
    length: int
    rank: int


SETTINGS = (Setting("roberta-large", 32, 128, 256), Setting("gpt2-large", 8, 512, 1024))
TINY = (Setting("tiny-roberta", 2, 8, 8), Setting("tiny-gpt2", 2, 8, 8))


def make(setting: Setting, base: nn.Module, contestant: Contestant, fused: bool, autocast: bool, clock: common.Clock) -> Entered:
    """One contestant on the device; fused: with veralib's Triton kernels."""
    model = models.contest(base, SHAPES[setting.shape], contestant).to(clock.device)
    batch = {k: v.to(clock.device) for k, v in models.batch(SHAPES[setting.shape], setting.rows, setting.length).items()}
    trained = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=1e-4, fused=True) if trained else None

    def forward() -> torch.Tensor:
        kernels.use(fused)
        with torch.autocast(clock.device.type, torch.bfloat16) if autocast else contextlib.nullcontext():
            return model(**batch).loss

    def step() -> None:
        forward().backward()
        if optimizer is not None:
            optimizer.step()
            optimizer.zero_grad()

    return sum(p.numel() for p in trained), forward, step


def main(arguments: list[str] | None = None) -> int:
    """Writes paper_step.json: a table for each setting and precision."""
    options = common.options(__doc__, arguments)
    results = options.results("paper_step")
    for setting in TINY if options.tiny else SETTINGS:
        base = models.base_model(SHAPES[setting.shape])
        rank = setting.rank
        here = [Contestant("frozen"), Contestant("lora", 1), Contestant("lora", 8), Contestant("peft-vera", rank)]
        here += [Contestant("veralib", rank), Contestant("full")]
        for precision in ("autocast", "float32"):
            if options.late:
                results.put("left_out", f"{setting.shape} {precision}")
                continue
            bound = functools.partial(make, setting, base, autocast=precision == "autocast", clock=options.clock)
            makers = {c.name: functools.partial(bound, c, False) for c in here}
            if kernels.installed() and options.clock.cuda:
                makers[f"veralib-{rank}-kernels"] = functools.partial(bound, Contestant("veralib", rank), True)
            with results.attempt(f"{setting.shape} {precision}"):
                facts = contest(options, results, f"{setting.shape} {precision}", makers)
                results.put("tables", vars(setting) | {"precision": precision, "reference": REFERENCE, "contestants": facts})
            gc.collect()
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
