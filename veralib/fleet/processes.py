"""The processes of one fleet run, as torchrun starts them: who we are, waiting for all, what all of them found."""

import os
from collections.abc import Sequence
from datetime import timedelta
from typing import Any

import torch


def join() -> tuple[int, int]:
    """(rank, how many) under torchrun; (0, 1) alone."""
    world = int(os.environ.get("WORLD_SIZE", 1))
    if world > 1 and not torch.distributed.is_initialized():
        # Owners differ in size, so one process may wait for another for hours.
        torch.distributed.init_process_group("gloo", timeout=timedelta(days=30))
    return int(os.environ.get("RANK", 0)), world


def wait(world: int) -> None:
    """Until every process is here."""
    if world > 1:
        torch.distributed.barrier()


def together(world: int, mine: dict[str, str]) -> dict[str, str]:
    """Every process's entries."""
    if world == 1:
        return mine
    parts: list[Any] = [None] * world
    torch.distributed.all_gather_object(parts, mine)
    return {k: v for part in parts for k, v in part.items()}


def total(world: int, numbers: Sequence[int]) -> list[int]:
    """Each number summed over all processes."""
    summed = torch.tensor(numbers, dtype=torch.int64)
    if world > 1:
        torch.distributed.all_reduce(summed)
    return summed.tolist()
