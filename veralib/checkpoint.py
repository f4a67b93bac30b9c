"""What a Trainer checkpoint of a model with adapters holds, and how it comes back."""

import os
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from safetensors import SafetensorError
from safetensors.torch import save_file
from torch import Tensor

from .errors import AdapterFileError, AdapterMismatch, StateError
from .format import CHECKPOINT_NAME, SEVERAL, save_adapter

if TYPE_CHECKING:
    from .bank import Member
    from .model import Vera

_RESUME = "Resume with the adapters and settings that the checkpoint was made with."


def _saved_members(vera: "Vera") -> "list[Member]":
    """The adapters that a checkpoint is about: all trainable ones, else the active one, else the first."""
    trainable = [m for m in vera.members.values() if m.trainable]
    return trainable or [m for m in (vera.runtime.active.member, *vera.members.values()) if m is not None][:1]


def _tensors(vera: "Vera") -> dict[str, Tensor]:
    """Every tensor of a checkpoint, live: one adapter's as in its file, several adapters' with their name in front."""
    out = {}
    members = _saved_members(vera)
    for member in members:
        prefix = f"{member.name}/" if len(members) > 1 else ""
        for unit in member.layout.units:
            for vector, letter in zip(member.vectors(unit.unit), "db", strict=True):
                out[f"{prefix}{unit.unit}.{letter}"] = vector
        for head in member.heads:
            state = vera.inside.head_state(head, member)
            out |= {f"{prefix}module.{head}.{key}": tensor for key, tensor in state.items()}
    return out


def save(vera: "Vera", folder: Path) -> None:
    """model.safetensors: an adapter file; or, since a file holds one adapter, the bare tensors of several."""
    members = _saved_members(vera)
    if not members:
        raise StateError("there is no adapter to save: merge one to write the whole model, or detach() to write the plain one.")
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as e:
        raise AdapterFileError(f"can't write to {folder}: {e.strerror or e}. Choose another folder.") from e
    if len(members) == 1:
        save_adapter(vera.adapter(members[0].name), folder / CHECKPOINT_NAME)
        return
    tensors = {k: t.detach().to("cpu", copy=True).contiguous() for k, t in _tensors(vera).items()}
    part = folder / f"{CHECKPOINT_NAME}.part"
    try:
        save_file(tensors, part, metadata={"format": "pt", SEVERAL: ", ".join(m.name for m in members)})
        with open(part, "rb") as f:
            os.fsync(f.fileno())
        part.replace(folder / CHECKPOINT_NAME)
    except (OSError, SafetensorError) as e:
        part.unlink(missing_ok=True)
        raise AdapterFileError(f"can't write {folder / CHECKPOINT_NAME}: {e}. What was there before is unchanged.") from e


def holds_vectors(state: Mapping[str, Any]) -> bool:
    """Whether a state_dict has pairs of d and b."""
    return any(key.endswith(".d") and key[:-1] + "b" in state for key in state)


@torch.no_grad()
def load(vera: "Vera", state: Mapping[str, Tensor]) -> None:
    """Fills the adapters from a checkpoint of the very same adapters; nothing is changed where it is of others."""
    keep_float32(vera)
    live = _tensors(vera)
    not_trained = {"basis.A", "basis.B", *(f"{layer}.bias" for m in vera.members.values() for layer in m.biases)}
    if missing := sorted(live.keys() - state.keys()):
        raise AdapterMismatch(f'the checkpoint has no "{missing[0]}", which this model trains. {_RESUME}')
    if extra := sorted(state.keys() - live.keys() - not_trained):
        raise AdapterMismatch(f'the checkpoint has "{extra[0]}", which this model doesn\'t train. {_RESUME}')
    for key, tensor in live.items():
        if state[key].shape != tensor.shape:
            have, found = list(tensor.shape), list(state[key].shape)
            raise AdapterMismatch(f"the checkpoint's \"{key}\" has the shape {found}, this model's {have}. {_RESUME}")
    for key, tensor in live.items():
        tensor.copy_(state[key])
    vera._selections.clear()
    vera.runtime.forget_vectors()


def keep_float32(vera: "Vera") -> None:
    """Turns trained vectors back into float32 where something set their data to another type.

    TRL's trainers make bf16 of whatever trains on a quantised base, and in bf16 Adam's small steps are rounded away.
    """
    for member in vera.members.values():
        units = member.layout.units if member.trainable else ()
        if all(v.dtype == torch.float32 for unit in units[:1] for v in member.vectors(unit.unit)):
            continue
        for vector in (v for unit in units for v in member.vectors(unit.unit)):
            vector.data = vector.data.float()
            vector.grad = None if vector.grad is None else vector.grad.float()
