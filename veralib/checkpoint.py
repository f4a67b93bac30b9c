"""An adapter out of a model as plain data; what a Trainer checkpoint of a model with adapters holds, and how it comes back."""

import os
import warnings
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from safetensors import SafetensorError
from safetensors.torch import save_file
from torch import Tensor, nn

from . import sharded
from .adapter import Adapter, BaseModel
from .autograd import UnitSpec
from .errors import AdapterFileError, AdapterMismatch, StateError, VeraWarning
from .format import CHECKPOINT_NAME, SEVERAL, save_adapter
from .layers import is_own_key
from .linears import shape
from .matching import quantisation_of

if TYPE_CHECKING:
    from .bank import Member
    from .model import Vera

_RESUME = "Resume with the adapters and settings that the checkpoint was made with."


def adapter_of(vera: "Vera", member: "Member", state: Mapping[str, Tensor] | None = None) -> Adapter:
    """A copy of an adapter's present state, on the CPU. state: a full state_dict of a sharded model, which is read then."""
    inside = vera.inside
    sharded.put_in_pieces(vera.model)
    read = sharded.reader(state)
    vectors = {}
    for unit in member.layout.units:
        d, b = (read(name, vector) for _, name, vector in _vectors(member, unit))
        dtype = torch.promote_types(d.dtype, torch.float32)  # a fleet's table may be bf16, a file is not
        vectors[unit.unit] = (d.to(dtype), b.to(dtype))
    modules = {head: {key: read(name, t) for key, name, t in _head(vera, member, head)} for head in member.heads}
    layers = list(dict.fromkeys([*member.layout.by_layer, *member.biases]))
    config = getattr(vera.model, "config", None)
    base = BaseModel(
        id=str(getattr(config, "_name_or_path", "") or ""),
        revision=str(getattr(config, "_commit_hash", "") or ""),
        layers={n: shape(inside.sites[n]) for n in layers},
        hashes=inside.hashes_of(layers),
        quantised=quantisation_of(inside.sites[n] for n in layers),
    )
    return Adapter(
        member.config,
        next(iter(member.layout.units)).basis.shared(),
        base,
        vectors,
        {u.unit: u.basis.layer_id for u in member.layout.units if u.basis.layer_id},
        {k: v.to("cpu", copy=True) for k, v in member.biases.items()},
        modules,
        dict(member.notes),
    )


def _saved_members(vera: "Vera") -> "list[Member]":
    """The adapters that a checkpoint is about: all trainable ones, else the active one, else the first."""
    trainable = [m for m in vera.members.values() if m.trainable]
    return trainable or [m for m in (vera.runtime.active.member, *vera.members.values()) if m is not None][:1]


def _vectors(member: "Member", unit: UnitSpec) -> Iterator[tuple[str, str, Tensor]]:
    """d and b of a unit, live: (its letter, its name in the model, the tensor)."""
    _, *names = member.owners.get(unit.unit, ("", "", ""))
    for letter, name, vector in zip("db", names, member.vectors(unit.unit), strict=True):
        yield letter, f"{unit.layer}.{name}", vector


def _head(vera: "Vera", member: "Member", head: str) -> Iterator[tuple[str, str, Tensor]]:
    """The tensors of a member's own copy of a head, live: (key in it, name in the model, the tensor)."""
    for key, tensor in vera.inside.head_state(head, member).items():
        yield key, f"{head}.vera_{member.number}.{key}", tensor


def _tensors(vera: "Vera") -> dict[str, tuple[str, Tensor]]:
    """Every tensor of a checkpoint with its name in the model: one adapter's as in its file, several adapters' with their name
    in front."""
    members = _saved_members(vera)
    sharded.put_in_pieces(vera.model)
    out: dict[str, tuple[str, Tensor]] = {}
    for member in members:
        prefix = f"{member.name}/" if len(members) > 1 else ""
        for unit in member.layout.units:
            out |= {f"{prefix}{unit.unit}.{letter}": (name, t) for letter, name, t in _vectors(member, unit)}
        for head in member.heads:
            out |= {f"{prefix}module.{head}.{key}": (name, t) for key, name, t in _head(vera, member, head)}
    return out


def save(vera: "Vera", folder: Path, state: Mapping[str, Tensor] | None = None, write: bool = True) -> None:
    """model.safetensors: an adapter file; or, since a file holds one adapter, the bare tensors of several.

    Of a sharded model: state is the whole model's, gathered before; or all processes call this, and one has write=True.
    """
    members = _saved_members(vera)
    if not members:
        raise StateError("there is no adapter to save: merge one to write the whole model, or detach() to write the plain one.")
    if len(members) == 1:
        adapter = adapter_of(vera, members[0], state)
    else:
        read = sharded.reader(state)
        tensors = {key: read(name, t).contiguous() for key, (name, t) in _tensors(vera).items()}
    if not write:
        return
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as e:
        raise AdapterFileError(f"can't write to {folder}: {e.strerror or e}. Choose another folder.") from e
    if len(members) == 1:
        save_adapter(adapter, folder / CHECKPOINT_NAME)
        return
    part = folder / f"{CHECKPOINT_NAME}.part"
    try:
        save_file(tensors, part, metadata={"format": "pt", SEVERAL: ", ".join(m.name for m in members)})
        with open(part, "rb") as f:
            os.fsync(f.fileno())
        part.replace(folder / CHECKPOINT_NAME)
    except (OSError, SafetensorError) as e:
        part.unlink(missing_ok=True)
        raise AdapterFileError(f"can't write {folder / CHECKPOINT_NAME}: {e}. What was there before is unchanged.") from e


def batches_seen(model: nn.Module) -> dict[str, int]:
    """For each normalisation of the base that keeps running statistics of its batches, how many it has seen."""
    kept = {n: getattr(m, "num_batches_tracked", None) for n, m in model.named_modules() if not is_own_key(n)}
    return {n: int(t) for n, t in kept.items() if isinstance(t, Tensor) and not t.is_meta}


def warn_of_what_stays_behind(vera: "Vera") -> None:
    """VeraWarning where something trained that no adapter file holds: base parameters unfrozen by hand, running statistics."""
    unfrozen = [n for n, p in vera.model.named_parameters() if p.requires_grad and not is_own_key(n)]
    moved = [n for n, seen in batches_seen(vera.model).items() if seen != vera.batches_at_start.get(n, seen)]
    for names, what in ((unfrozen, "trains beside the adapter"), (moved, "has updated its running statistics in training")):
        if names:
            more = f" (and {len(names) - 1} more)" if len(names) > 1 else ""
            warnings.warn(
                f"{names[0]}{more} {what}, and an adapter's file doesn't hold it: name its module in train_modules"
                f"{', or keep it in eval()' if names is moved else ''}, or save it yourself.",
                VeraWarning,
                stacklevel=3,
            )


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
    for key, (_, tensor) in live.items():
        if state[key].shape != tensor.shape:
            have, found = list(tensor.shape), list(state[key].shape)
            raise AdapterMismatch(f"the checkpoint's \"{key}\" has the shape {found}, this model's {have}. {_RESUME}")
    for key, (_, tensor) in live.items():
        sharded.fill(tensor, state[key])
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
        if sharded.shards(vera.model):  # FSDP2's own casts, for one forward; its tensors' data mustn't be exchanged
            return
        for vector in (v for unit in units for v in member.vectors(unit.unit)):
            vector.data = vector.data.float()
            vector.grad = None if vector.grad is None else vector.grad.float()
