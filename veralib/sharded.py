"""A model that FSDP2 (torch.distributed.fsdp.fully_shard) keeps in pieces: its vectors too are DTensors, a piece a process.

Forward and backward need nothing of this: inside them FSDP2 has put the whole tensors back. Here is what reads and writes
vectors at other times. A tensor comes whole out of its pieces when every process asks for it at the same moment.
"""

import os
import sys
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from .errors import StateError

# What activation checkpointing and torch.compile put between a module's names in a state_dict.
_WRAPPERS = ("_checkpoint_wrapped_module.", "_orig_mod.")


def is_piece(tensor: Any) -> bool:
    """Whether a tensor is a DTensor: a process holds a part of it, or shares it with others."""
    return any(c.__name__ == "DTensor" for c in type(tensor).__mro__)


def several_processes() -> bool:
    """Whether this process is one of several that train together, so that the model may be sharded later."""
    started = torch.distributed.is_available() and torch.distributed.is_initialized()
    return torch.distributed.get_world_size() > 1 if started else int(os.environ.get("WORLD_SIZE") or 1) > 1


def shards(model: nn.Module) -> list[Any]:
    """The modules of a model that fully_shard has been called on."""
    fsdp = sys.modules.get("torch.distributed.fsdp")
    return [m for m in model.modules() if isinstance(m, fsdp.FSDPModule)] if fsdp is not None else []


def refuse(model: nn.Module, what: str, instead: str) -> None:
    """StateError where a model is sharded and `what` can't be done in it."""
    if shards(model):
        raise StateError(f"can't {what}: the model is sharded over processes (fully_shard). {instead}")


def refuse_new_vectors(model: nn.Module) -> None:
    """StateError where new Parameters would stay out of what fully_shard knows."""
    refuse(
        model,
        "train a new adapter",
        "Its vectors would train apart on each process: attach, or load(…, trainable=True), before fully_shard.",
    )


def put_in_pieces(model: nn.Module) -> None:
    """Makes the modules of a sharded model hold their pieces: a forward leaves the root's whole tensors there, copies that nobody
    reads again."""
    for module in shards(model):
        module.reshard()


def is_first() -> bool:
    """Whether this process, one of a sharded model's, is the one that writes files."""
    return torch.distributed.get_rank() == 0


def reader(state: Mapping[str, Tensor] | None = None) -> Callable[[str, Tensor], Tensor]:
    """A function of a tensor's name in the model and the tensor: a whole copy on the CPU.

    Pieces are gathered, by all processes at once. With state, a full state_dict, they come from there, and one process may be
    alone; StateError where it lacks one.
    """
    known = {}
    for key, tensor in (state or {}).items():
        for wrapper in _WRAPPERS:
            key = key.replace(wrapper, "")
        known[key] = tensor

    def read(key: str, tensor: Tensor) -> Tensor:
        if is_piece(tensor) and state is not None:
            if key not in known:
                raise StateError(
                    f'the state_dict lacks "{key}", of which this process has a piece: give a full one '
                    "(StateDictOptions(full_state_dict=True), frozen parameters too), or none, on all processes."
                )
            tensor = known[key]
        if is_piece(tensor):  # with CPU offloading the piece waits where its process group can't reach it
            tensor = tensor.to(tensor.device_mesh.device_type).full_tensor()  # type: ignore[attr-defined]
        return tensor.detach().to("cpu", copy=True)

    return read


def fill(target: Tensor, source: Tensor) -> None:
    """target.copy_(source), where the target may be a piece of what this process has whole in source."""
    if is_piece(target) and not is_piece(source):
        piece: Any = target
        for k, placement in enumerate(piece.placements):
            if placement.is_shard():
                parts = source.chunk(piece.device_mesh.size(k), placement.dim)
                mine = piece.device_mesh.get_local_rank(k)
                source = parts[mine] if mine < len(parts) else source.narrow(placement.dim, 0, 0)
        target = piece.to_local()
    target.copy_(source)
