"""Fleets end to end, from data to saved adapters, beside PEFT one owner after another: the runs of `python -m benchmarks.fleet`.

A processor's speed drifts over minutes, and a fleet can't be interrupted: so in every round half of PEFT's owners train before it
and half after it.
"""

import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from veralib import VeraConfig, attach
from veralib.fleet import FleetAdamW

from . import measure
from .models import SHAPES, base_model

LR = 1e-2
OWNER_ROWS = 4
FLEET = "veralib fleet r=64"
ONE_BASE = {"PEFT LoRA r=8": ("lora", 8), "PEFT LoRA r=1": ("lora", 1), "PEFT VeRA r=64": ("peft-vera", 64)}
ROUNDS = {32: 2, 4: 3}
"""How often each number of examples an owner is measured."""
HALF = 4
"""PEFT's owners on one base, before the fleet and again after it; a process each: one and one."""


def owners_data(count: int, examples: int, length: int, vocabulary: int) -> dict[str, Tensor]:
    """Token rows of each owner."""
    generator = torch.Generator().manual_seed(1)
    return {f"owner {i}": torch.randint(3, vocabulary, (examples, length), generator=generator) for i in range(count)}


def train_one(model: nn.Module, rows: Tensor) -> None:
    """PEFT's one owner, one epoch: AdamW, as many rows a step as an owner has in the fleet's."""
    trained = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=1e-3, fused=True)
    for part in rows.split(OWNER_ROWS):
        model(input_ids=part, labels=part).loss.backward()
        torch.nn.utils.clip_grad_norm_(trained, 1.0)
        optimizer.step()
        optimizer.zero_grad()


def run_fleet(shape: str, examples: int, owners: int, length: int, folder: Path, batch_rows: int = 64) -> float:
    """Seconds of a fleet from data to saved adapters, base loaded already."""
    from veralib.fleet.batches import OwnerData
    from veralib.fleet.trainer import FleetTrainer, Plan
    from veralib.store import open_store

    model = base_model(SHAPES[shape]).eval()
    data = owners_data(owners, examples, length, SHAPES[shape].vocabulary)
    start = time.perf_counter()
    vera = attach(model)
    fleet = vera.fleet(VeraConfig(rank=64, targets=SHAPES[shape].targets), slots=owners)
    optimizer = FleetAdamW(fleet, lr=LR, max_norm=1.0)
    trainer = FleetTrainer(fleet, optimizer, Plan(epochs=1, owner_rows=OWNER_ROWS, batch_rows=batch_rows, measure=False))
    store = open_store(folder)
    everyone = [OwnerData(n, [{"input_ids": r.tolist(), "labels": r.tolist()} for r in rows]) for n, rows in data.items()]
    for result, adapter in trainer.run(everyone):
        store.put(result.name, adapter)
    return time.perf_counter() - start


def run_peft(shape: str, method: str, rank: int, examples: int, owners: int, length: int, folder: Path) -> float:
    """Seconds for PEFT's owners one after another on one base, adapters added, trained, saved and removed."""
    import peft

    model: Any = base_model(SHAPES[shape]).eval()
    data = owners_data(owners, examples, length, SHAPES[shape].vocabulary)
    start = time.perf_counter()
    for name, rows in data.items():
        adapted = _adapted(model, shape, method, rank)
        train_one(adapted, rows)
        adapted.save_pretrained(folder / name)
        model = adapted.unload()
        assert not isinstance(model, peft.PeftModel)
    return time.perf_counter() - start


def _adapted(model: nn.Module, shape: str, method: str, rank: int) -> Any:
    """PEFT on the model itself, without a copy."""
    import peft

    targets: Any = SHAPES[shape].targets
    config: peft.PeftConfig
    if method == "lora":
        config = peft.LoraConfig(r=rank, lora_alpha=2 * rank, target_modules=targets)
    else:
        config = peft.VeraConfig(r=rank, target_modules=targets)
    return peft.get_peft_model(model, config)


# With the allocator as a user's own process has it.
PROCESS = """
import sys, torch
torch.set_num_threads(int(sys.argv[1]))
from pathlib import Path
from benchmarks import fleet_runs
fleet_runs.run_peft(sys.argv[2], "lora", 8, int(sys.argv[3]), 1, int(sys.argv[4]), Path(sys.argv[5]))
"""


def run_process(shape: str, examples: int, length: int, folder: Path) -> float:
    """Seconds of PEFT's one owner in a process of its own, start and base included."""
    words = [str(torch.get_num_threads()), shape, str(examples), str(length), str(folder)]
    environment = {**os.environ, "PYTHONPATH": str(measure.ROOT)}
    start = time.perf_counter()
    subprocess.run([sys.executable, "-c", PROCESS, *words], check=True, cwd=measure.ROOT, env=environment, capture_output=True)
    return time.perf_counter() - start


def one_round(shape: str, examples: int, owners: int, length: int, place: Path) -> dict[str, float]:
    """Seconds of each contestant, PEFT's for all owners: extrapolated."""
    half = min(HALF, owners // 2)
    taken: dict[str, float] = {}

    def some_of_pefts(when: str) -> None:
        for label, (method, rank) in ONE_BASE.items():
            name = f"{label}, one base ({2 * half} run)"
            seconds = run_peft(shape, method, rank, examples, half, length, place / when / label)
            taken[name] = taken.get(name, 0) + seconds * owners / (2 * half)
        name = "PEFT LoRA r=8, a process each (2 run)"
        taken[name] = taken.get(name, 0) + run_process(shape, examples, length, place / when / "own") * owners / 2

    some_of_pefts("before")
    fleet = run_fleet(shape, examples, owners, length, place / "store")
    some_of_pefts("after")
    return {FLEET: fleet, **taken}


def runs(shape: str, owners: int, log: Callable[[str], None]) -> dict[str, Any]:
    """`owners` owners with 32 and with 4 examples of 64 tokens each: seconds in each round, and their ratios to the fleet's."""
    length = 64 if not shape.startswith("tiny") else 8
    out: dict[str, Any] = {"owners": owners, "length": length, "shape": shape, "examples": {}}
    for examples, rounds in ROUNDS.items():
        found: list[dict[str, float]] = []
        for _ in range(1 if shape.startswith("tiny") else rounds):
            with tempfile.TemporaryDirectory() as scratch:
                found.append(one_round(shape, examples, owners, length, Path(scratch)))
        contestants = {}
        for name in found[0]:
            ratios = [r[name] / r[FLEET] for r in found]
            contestants[name] = {"seconds": measure.spread([r[name] for r in found]), "ratio": measure.spread(ratios)}
        out["examples"][str(examples)] = contestants
        for name, c in contestants.items():
            log(f"  {examples} examples, {name}: {c['seconds']['median']:.1f} s, {c['ratio']['median']:.2f} x the fleet")
    return out
