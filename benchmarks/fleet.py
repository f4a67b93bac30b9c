"""A fleet's training step and a fleet end to end: `python -m benchmarks.fleet [--quick] [--only steps|runs]`.

steps: one mixed step, optimiser included, on the Llama shape of the train-step benchmark, contestants interleaved; ratios to
PEFT's LoRA r=8 with one owner. runs: 64 owners end to end, against PEFT one owner after another (a few are run, the rest is
extrapolated, and marked so).
"""

import argparse
import json
import os
import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

os.environ.setdefault("KINETO_LOG_LEVEL", "99")

import torch
from torch import Tensor, nn

from veralib import VeraConfig, attach
from veralib.fleet import FleetAdamW, owner_loss

from . import measure
from .fleet_page import OWNERS, render
from .fleet_runs import LR, runs
from .models import SHAPES, Contestant, base_model, contest, frozen_tensors

BATCHES = {"64x64": (64, 64), "16x256": (16, 256)}
RANKS = (64, 256)
RECOMPUTED = ", B u recomputed"
FLOOR = "the base alone, nothing trained"
REFERENCE = "PEFT LoRA r=8"


class LoraBank(nn.Module):
    """A linear with a LoRA pair for each owner: h = W0 x + 2 B_i A_i x, by two batched products. The rows are owners 0, 1, 2 …"""

    def __init__(self, base: nn.Linear, owners: int, rank: int) -> None:
        super().__init__()
        self.base = base
        device = base.weight.device
        self.A = nn.Parameter(torch.randn(owners, base.in_features, rank, device=device) / rank)
        self.B = nn.Parameter(torch.zeros(owners, rank, base.out_features, device=device))

    def forward(self, x: Tensor) -> Tensor:
        per = x.shape[0] // self.A.shape[0]  # neighbouring rows are of one owner
        flat = x.reshape(self.A.shape[0], per * x.shape[1], -1)
        h = self.base(x)
        return h + (2.0 * torch.bmm(torch.bmm(flat, self.A.to(x.dtype)), self.B.to(x.dtype))).view(h.shape)


def lora_bank(model: nn.Module, owners: int, rank: int) -> nn.Module:
    """Every linear but the output head with a bank of LoRA pairs."""
    model.requires_grad_(False)
    for name, module in list(model.named_modules()):
        if isinstance(module, nn.Linear) and name != "lm_head":
            parent, _, leaf = name.rpartition(".")
            setattr(model.get_submodule(parent), leaf, LoraBank(module, owners, rank))
    return model


def fleet_step(
    base: nn.Module, shape: str, owners: int, rank: int, ids: Tensor, recompute: bool | None = None
) -> tuple[Callable[[], None], dict[str, Any]]:
    """A fleet's step on `owners` slots; with more owners than rows, others each step."""
    import copy

    model = copy.deepcopy(base).eval()
    vera = attach(model)
    fleet = vera.fleet(VeraConfig(rank=rank, targets=SHAPES[shape].targets), slots=owners, recompute=recompute)
    names = [f"owner {i}" for i in range(owners)]
    fleet.add(names)
    optimizer = FleetAdamW(fleet, lr=LR, max_norm=1.0)
    chooser = random.Random(0)
    present = min(owners, len(ids))

    def loss() -> Tensor:
        here = chooser.sample(names, present)
        rows = [here[i * present // len(ids)] for i in range(len(ids))]
        with vera.rows(rows):
            return owner_loss(model(input_ids=ids).logits, ids, rows)

    def step() -> None:
        loss().backward()
        optimizer.step()
        optimizer.zero_grad()

    step()
    each = fleet.parameters_per_owner
    tensors = (fleet.bank.table, fleet.bank.gradients, optimizer.exp_avg, optimizer.exp_avg_sq, optimizer._steps)
    training = sum(t.numel() * t.element_size() for t in tensors) / owners
    facts = {"owners": owners, "rank": rank, "parameters_per_owner": each, "training_bytes_per_parameter": training / each}
    frozen = [*frozen_tensors(model, Contestant("veralib", rank)), fleet.bank.table]
    return step, facts | {"saved_bytes": measure.saved_bytes(loss, frozen)}


def floor_step(model: nn.Module, ids: Tensor) -> tuple[Callable[[], None], dict[str, Any]]:
    """The frozen base forward, and backward down to its embeddings: what every adapter method runs at least."""
    model.eval().requires_grad_(False)
    embedded = model.get_input_embeddings()(ids).requires_grad_()  # type: ignore[operator]
    rows = ["one"] * len(ids)

    def loss() -> Tensor:
        return owner_loss(model(inputs_embeds=embedded).logits, ids, rows)

    def step() -> None:
        loss().backward()
        embedded.grad = None

    step()
    saved = measure.saved_bytes(loss, [*model.parameters(), *model.buffers()])
    return step, {"owners": 0, "parameters_per_owner": 0, "saved_bytes": saved}


def plain_step(model: nn.Module, ids: Tensor, owners: int = 1) -> tuple[Callable[[], None], dict[str, Any]]:
    """A step of torch's own AdamW on a model's trainable parameters."""
    model.eval()
    trained = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=1e-3, fused=True)
    rows = [f"{i * owners // len(ids)}" for i in range(len(ids))]

    def loss() -> Tensor:
        return owner_loss(model(input_ids=ids).logits, ids, rows)

    def step() -> None:
        loss().backward()
        torch.nn.utils.clip_grad_norm_(trained, 1.0)
        optimizer.step()
        optimizer.zero_grad()

    step()
    saved = measure.saved_bytes(loss, frozen_tensors(model, Contestant("veralib", 1)))  # A and B, if it has any
    return step, {"owners": owners, "parameters_per_owner": sum(p.numel() for p in trained) // owners, "saved_bytes": saved}


def groups(rows: int) -> list[list[tuple[str, str, int, int]]]:
    """(name, kind, rank, owners) of everything that is timed, in groups that fit into memory; the reference is in each."""
    single = [("PEFT LoRA r=1", "lora", 1, 1), ("PEFT VeRA r=64", "peft-vera", 64, 1), (FLOOR, "floor", 0, 0)]
    single += [(f"veralib r={rank}", "veralib", rank, 1) for rank in RANKS]
    banks = [(f"LoRA bank r={rank}, {rows} owners", "bank", rank, rows) for rank in (1, 8)]
    fleets = [[(f"fleet r={rank}, {owners} owners", "fleet", rank, owners) for owners in OWNERS] for rank in RANKS]
    again = [(f"fleet r={rank}, {OWNERS[-1]} owners{RECOMPUTED}", "recomputed", rank, OWNERS[-1]) for rank in RANKS]
    return [[(REFERENCE, "lora", 8, 1), *group] for group in (single, banks + again, *fleets)]


def entered(kind: str, rank: int, owners: int, shape: str, base: nn.Module, ids: Tensor) -> tuple[Callable, dict[str, Any]]:
    """A contestant's step, and its facts."""
    import copy

    if kind in ("fleet", "recomputed"):
        return fleet_step(base, shape, owners, rank, ids, recompute=True if kind == "recomputed" else None)
    if kind == "floor":
        return floor_step(copy.deepcopy(base), ids)
    if kind == "bank":
        return plain_step(lora_bank(copy.deepcopy(base), owners, rank), ids, owners)
    return plain_step(contest(base, SHAPES[shape], Contestant(kind, rank)), ids)  # type: ignore[arg-type]


def group_steps(batch: str, shape: str, rounds: int, number: int, threads: int) -> dict[str, dict[str, Any]]:
    """Facts and times of one group, interleaved; in a process of its own."""
    torch.set_num_threads(threads)
    measure.keep_memory()
    rows, length = BATCHES[batch] if not shape.startswith("tiny") else (4, 8)
    base = base_model(SHAPES[shape])
    ids = torch.randint(3, SHAPES[shape].vocabulary, (rows, length), generator=torch.Generator().manual_seed(0))
    contestants, facts = {}, {}
    for name, kind, rank, owners in groups(rows)[number]:
        contestants[name], facts[name] = entered(kind, rank, owners, shape, base, ids)
    seconds = measure.interleave(contestants, rounds, warmup=1)
    for name, taken in seconds.items():
        facts[name] |= {
            "seconds": measure.spread(taken),
            "ratio": measure.spread([t / r for t, r in zip(taken, seconds[REFERENCE], strict=True)]),
            "saved_ratio": facts[name]["saved_bytes"] / facts[REFERENCE]["saved_bytes"],
            "tokens_per_second": rows * length / measure.spread(taken)["median"],
        }
    return facts


def steps(batch: str, shape: str, rounds: int, log: Callable[[str], None]) -> dict[str, Any]:
    """One table: seconds a step and ratios."""
    rows, length = BATCHES[batch] if not shape.startswith("tiny") else (4, 8)
    facts: dict[str, dict[str, Any]] = {}
    for number in range(len(groups(rows))):
        arguments = (batch, shape, rounds, number, torch.get_num_threads())
        found = group_steps(*arguments) if shape.startswith("tiny") else measure.in_own_process(group_steps, *arguments)
        for name, fact in found.items():
            log(f"  {name}: {fact['seconds']['median']:.3f} s, {fact['ratio']['median']:.3f} x {REFERENCE}")
        facts = {**found, **facts}  # the reference of the first group stands for all
    order = [name for group in groups(rows) for name, *_ in group]
    contestants = {name: facts[name] for name in dict.fromkeys(order)}
    return {"batch": batch, "rows": rows, "length": length, "shape": shape, "rounds": rounds, "contestants": contestants}


def main(arguments: list[str] | None = None) -> int:
    """Writes fleet-steps.json, fleet-runs.json and README.md into the output folder."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.fleet", description=__doc__)
    parser.add_argument("--quick", action="store_true", help="tiny shapes, for tests: the numbers mean nothing")
    parser.add_argument("--only", choices=("steps", "runs"))
    parser.add_argument("--threads", type=int, default=2, help="1: processor time, for a busy machine")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--out", type=Path, default=measure.ROOT / "results/fleet")
    options = parser.parse_args(arguments)
    shape = "tiny-llama" if options.quick else "llama"
    torch.set_num_threads(options.threads)
    options.out.mkdir(parents=True, exist_ok=True)

    def log(line: str) -> None:
        print(line, flush=True)

    measure.keep_memory()
    with measure.alone():
        if options.only != "runs":
            tables = []
            for batch in BATCHES:
                log(batch)
                tables.append(steps(batch, shape, options.rounds, log))
            found = {"run": "fleet-steps", "environment": measure.environment(), "tables": tables}
            (options.out / "fleet-steps.json").write_text(json.dumps(found, indent=1) + "\n")
        if options.only != "steps":
            found = {"run": "fleet-runs", "environment": measure.environment(), **runs(shape, 4 if options.quick else 64, log)}
            (options.out / "fleet-runs.json").write_text(json.dumps(found, indent=1) + "\n")
    (options.out / "README.md").write_text(render(options.out))
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
