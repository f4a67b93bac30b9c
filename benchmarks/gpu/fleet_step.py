"""A fleet's training step with 1 to 512 owners in one batch, on Llama-7B-shape layers: all linears, the base in bf16.

512 rows of 32 tokens, neighbouring rows of one owner. Beside it one PEFT adapter for all rows, and a bank of LoRA pairs, one
for each owner, by batched products: what many LoRAs in one batch cost. A step is forward, backward, the optimiser; inputs are
vectors.
"""

import functools
import gc

import torch
from torch import nn

from veralib import VeraConfig, attach, kernels
from veralib.fleet import FleetAdamW

from ..fleet import lora_bank
from . import common
from .train_step import Contestant, Entered, contest, enter, make_step

ROWS, LENGTH, OWNERS, RANKS = 512, 32, (1, 8, 64, 512), (256, 1024)
REFERENCE = "lora-16"


def fleet(base: nn.Module, owners: int, rank: int, x: torch.Tensor, g: torch.Tensor, fused: bool) -> Entered:
    """The owners' step."""
    model = common.twin(base)
    vera = attach(model)
    made = vera.fleet(VeraConfig(rank=rank, targets=list(common.LINEARS)), slots=owners)
    names = [f"owner {i}" for i in range(owners)]
    made.add(names)
    made.bank.table.uniform_(-0.02, 0.02)
    optimizer = FleetAdamW(made, lr=1e-4)
    rows = [names[i * owners // len(x)] for i in range(len(x))]

    def forward() -> torch.Tensor:
        kernels.use(fused)
        with vera.rows(rows):
            return model(inputs_embeds=x, use_cache=False).last_hidden_state

    def step() -> None:
        forward().backward(g)
        x.grad = None
        optimizer.step()
        optimizer.zero_grad()

    return owners * made.parameters_per_owner, forward, step


def bank(base: nn.Module, owners: int, rank: int, x: torch.Tensor, g: torch.Tensor) -> Entered:
    """A LoRA pair for each owner."""
    return make_step(lora_bank(common.twin(base), owners, rank), x, g, autocast=False)


def alone(base: nn.Module, contestant: Contestant, x: torch.Tensor, g: torch.Tensor) -> Entered:
    """One adapter for all rows."""
    return make_step(enter(base, contestant), x, g, autocast=False)


def main(arguments: list[str] | None = None) -> int:
    """Writes fleet_step.json: one table."""
    options = common.options(__doc__, arguments)
    results = options.results("fleet_step")
    base = common.build(options.size, options.clock.device)
    rows, length, owners, ranks = (4, 8, (1, 4), (8,)) if options.tiny else (ROWS, LENGTH, OWNERS, RANKS)
    generator = torch.Generator().manual_seed(2)
    draw = lambda: torch.randn(rows, length, options.size.hidden, generator=generator)  # noqa: E731
    x, g = (draw().to(options.clock.device, torch.bfloat16) for _ in range(2))
    x.requires_grad_()
    groups = [
        {f"veralib fleet r={r}, {n} owners": functools.partial(fleet, base, n, r, x, g, False) for n in owners} for r in ranks
    ]
    if kernels.installed() and options.clock.cuda:
        many = owners[-1]
        groups += [
            {f"veralib fleet r={r}, {many} owners, kernels": functools.partial(fleet, base, many, r, x, g, True)} for r in ranks
        ]
    groups += [{f"LoRA bank r={r}, {n} owners": functools.partial(bank, base, n, r, x, g)} for n in owners[1:] for r in (1, 16)]
    single = {c.name: functools.partial(alone, base, c, x, g) for c in (Contestant("frozen"), Contestant("lora", 1))}
    single |= {f"veralib-{r}": functools.partial(alone, base, Contestant("veralib", r), x, g) for r in ranks}
    reference = {REFERENCE: functools.partial(alone, base, Contestant("lora", 16), x, g)}
    for group in (single, *groups):  # each with the reference, so that not all must fit into the memory at once
        if options.late:
            results.put("left_out", ", ".join(group))
            continue
        with results.attempt(", ".join(group)):
            facts = contest(options, results, "fleet", reference | group)
            results.put("tables", {"rows": rows, "length": length, "reference": REFERENCE, "contestants": facts})
        gc.collect()
        if options.clock.cuda:
            torch.cuda.empty_cache()
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
