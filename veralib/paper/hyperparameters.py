"""Tables 8 to 11: the printed hyperparameters beside what our recipes resolve to."""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ..config import VeraConfig
from ..recipes import Recipe, find_recipe, settings_of
from ..training import Settings
from .pages import page, write
from .published import IMAGES, TASKS

Value = float | str
Read = Callable[[Recipe, Settings], Value]

READ: dict[str, Read] = {
    "GPUs": lambda r, s: r.processes,
    "optimiser": lambda r, s: str(s.training.get("optim", "AdamW")),
    "warm-up ratio": lambda r, s: s.warmup,
    "warm-up steps": lambda r, s: s.warmup,
    "schedule": lambda r, s: s.schedule,
    "weight decay": lambda r, s: s.weight_decay,
    "label smoothing": lambda r, s: s.training["label_smoothing_factor"],
    "A and B": lambda r, s: _vera(s).levels,
    "d's start": lambda r, s: _vera(s).d_start,
    "rank": lambda r, s: s.resolved_rank if isinstance(s.resolved_rank, int) else str(s.resolved_rank),
    "epochs": lambda r, s: s.epochs,
    "rate": lambda r, s: s.resolved_lr,
    "head's rate": lambda r, s: s.resolved_lr_head,
    "tokens": lambda r, s: s.max_length,
    "batch a GPU": lambda r, s: s.batch_size,
    "accumulation": lambda r, s: s.accumulation,
    "samples a class": lambda r, s: s.shots or 0,
}
"""Where a recipe has what a table prints."""


def _vera(settings: Settings) -> VeraConfig:
    return VeraConfig(rank=settings.resolved_rank or 1, **settings.options)


@dataclass(frozen=True)
class Block:
    """Printed values of one model and method. columns: (name, recipe, method); lines: what is set -> a value for each column."""

    name: str
    columns: tuple[tuple[str, str, str], ...]
    lines: dict[str, tuple[Value, ...]]


def _glue(size: str, lines: dict[str, tuple[Value, ...]]) -> Block:
    every: dict[str, Value] = {
        "optimiser": "AdamW",
        "warm-up ratio": 0.06,
        "schedule": "linear",
        "A and B": "kaiming_uniform",
        "d's start": 0.1,
    }
    columns = tuple((task, f"glue-{task}-{size}", "vera") for task in TASKS)
    return Block(f"RoBERTa {size}", columns, {**{k: (v,) * 6 for k, v in every.items()}, **lines})


def _images(size: str, method: str, lines: dict[str, tuple[Value, ...]], rank: int | None = None) -> Block:
    every: dict[str, Value] = {"GPUs": 1, "optimiser": "AdamW", "schedule": "linear", "weight decay": 0.01}
    every |= {"rank": rank} if rank else {}
    every |= {"epochs": 10, "samples a class": 10}  # section 4.4
    columns = tuple((data, f"images-{data}-{size}", method) for data in IMAGES)
    return Block(f"ViT-{size[0].upper()}, {method}", columns, {**{k: (v,) * 4 for k, v in every.items()}, **lines})


def _instruct(model: str) -> Block:
    columns = tuple((m, f"instruct-{model}", m) for m in ("lora", "vera"))
    every: dict[str, Value] = {"GPUs": 1, "optimiser": "AdamW", "warm-up ratio": 0.1, "batch a GPU": 4, "accumulation": 4}
    every |= {"epochs": 1, "schedule": "cosine"}
    return Block(model, columns, {**{k: (v,) * 2 for k, v in every.items()}, "rank": (64, 1024), "rate": (4e-4, 4e-3)})


PRINTED: dict[str, tuple[str, tuple[Block, ...]]] = {
    "table8": (
        "Table 8: hyperparameters on GLUE",
        (
            _glue(
                "base",
                {
                    "GPUs": (1,) * 6,
                    "rank": (1024,) * 6,
                    "epochs": (60, 30, 80, 25, 160, 80),
                    "head's rate": (4e-3, 4e-3, 1e-2, 4e-3, 1e-2, 1e-2),
                    "rate": (4e-3, 1e-2, 1e-2, 1e-2, 4e-3, 1e-2),
                    "tokens": (512,) * 6,
                    "batch a GPU": (64,) * 6,
                },
            ),
            _glue(
                "large",
                {
                    "GPUs": (4,) * 6,
                    "rank": (256,) * 6,
                    "epochs": (10, 40, 40, 20, 40, 20),
                    "head's rate": (6e-3, 3e-3, 6e-3, 2e-4, 2e-3, 2e-3),
                    "rate": (1e-2, 3e-2, 1e-2, 1e-2, 2e-2, 2e-2),
                    "tokens": (128,) * 6,
                    "batch a GPU": (32,) * 6,
                },
            ),
        ),
    ),
    "table9": (
        "Table 9: hyperparameters of instruction tuning",
        tuple(_instruct(model) for model in ("llama-7b", "llama-13b", "llama2-7b", "llama2-13b")),
    ),
    "table10": (
        "Table 10: VeRA's hyperparameters on E2E",
        (
            Block(
                "GPT-2",
                tuple((size, f"e2e-{size}", "vera") for size in ("medium", "large")),
                {
                    **{"GPUs": (1, 1), "optimiser": ("AdamW", "AdamW"), "schedule": ("linear", "linear")},
                    **{"weight decay": (0.01, 0.01), "batch a GPU": (8, 8), "epochs": (5, 5), "warm-up steps": (500, 500)},
                    **{"label smoothing": (0.1, 0.1), "rank": (1024, 1024), "rate": (1e-1, 2e-2)},
                },
            ),
        ),
    ),
    "table11": (
        "Table 11: hyperparameters on images",
        (
            _images("base", "head", {"head's rate": (4e-3, 4e-3, 4e-3, 4e-2)}),
            _images("base", "full", {"rate": (4e-5, 4e-5, 4e-5, 8e-5), "head's rate": (4e-3, 4e-2, 4e-3, 4e-3)}),
            _images("base", "vera", {"rate": (2e-2, 4e-2, 4e-2, 7e-2), "head's rate": (4e-3, 4e-2, 4e-3, 5e-3)}, 256),
            _images("base", "lora", {"rate": (4e-3,) * 4, "head's rate": (4e-3,) * 4}, 8),
            _images("large", "head", {"head's rate": (4e-4, 4e-3, 4e-3, 4e-3)}),
            _images("large", "full", {"rate": (4e-5, 4e-5, 4e-5, 8e-5), "head's rate": (4e-3, 4e-3, 8e-3, 4e-3)}),
            _images("large", "vera", {"rate": (4e-2, 4e-2, 4e-2, 7e-2), "head's rate": (2e-3, 2e-3, 2e-3, 3e-3)}, 256),
            _images("large", "lora", {"rate": (4e-3,) * 4, "head's rate": (4e-3, 4e-3, 4e-3, 4e-4)}, 8),
        ),
    ),
}


def make(name: str, folder: Path) -> dict[str, Any]:
    """NAME.json and NAME.md: a table for each model and method; a cell is "printed · ours", and a line names its differences."""
    title, blocks = PRINTED[name]
    cells: list[dict[str, Any]] = []
    tables = []
    for block in blocks:
        rows = []
        for what, values in block.lines.items():
            line = [
                {"block": block.name, "what": what, "column": column, "printed": printed, "ours": _ours(what, recipe, method)}
                for printed, (column, recipe, method) in zip(values, block.columns, strict=True)
            ]
            for cell in line:
                cell["difference"] = _difference(cell["printed"], cell["ours"])
            others = [f"{c['column']}: {_text(c['difference'])}" for c in line if c["difference"] != 0]
            rows.append(
                (what, *(f"{_text(c['printed'])} · {_text(c['ours'])}" for c in line), "; ".join(others) if others else "none")
            )
            cells += line
        tables.append((block.name, ("", *(f"{c}: printed · ours" for c, _, _ in block.columns), "difference"), rows))
    recipes = dict.fromkeys(recipe for block in blocks for _, recipe, _ in block.columns)
    notes = dict.fromkeys(note for recipe in recipes for note in find_recipe(recipe).notes)
    remarks = ["Ours: what `vera train RECIPE --method METHOD --dry-run` resolves to.", *notes]
    return write(folder, name, {"title": title, "cells": cells}, page(title, name, tables, remarks))


def _ours(what: str, recipe: str, method: str) -> Value:
    found = find_recipe(recipe)
    # Named, so that where this machine keeps its data changes nothing.
    return READ[what](found, settings_of(recipe, method, data=str(found.data.hub["data"])))


def _difference(printed: Value, ours: Value) -> Value:
    """Ours minus the printed one; of words, ours where they differ, else 0."""
    if isinstance(printed, str) or isinstance(ours, str):
        return 0 if printed == ours else f"{ours} for {printed}"
    return round(ours - printed, 12)


def _text(value: Value) -> str:
    return value if isinstance(value, str) else f"{value:g}"
