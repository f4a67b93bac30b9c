"""Methods that put a module of their own behind a linear: a child of it, called by a forward hook.

The hook is a function of this file and finds the child on the module it is called with, so that copies and pickles of the model
work with their own.
"""

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from ..linears import read_weight, shape
from .base import Attached, Notes, freeze, load_tensors, save_tensors

if TYPE_CHECKING:
    from ..merge_report import MergeReport

CHILD = "method"


def _after(module: nn.Module, args: tuple, output: Tensor) -> Tensor:
    return getattr(module, CHILD)(args[0], output, module)


def start_weight(module: nn.Module) -> Tensor:
    """W0 (m, n) in float32, to start a part from; of a plan on the meta device its shape alone."""
    weight: Any = module.weight
    return torch.empty(shape(module), device="meta") if weight.is_meta else read_weight(module).float()


def put_behind(model: nn.Module, parts: Mapping[str, nn.Module]) -> None:
    """Puts parts[name] behind the module `name`: part(x, output, module) -> output."""
    for name, part in parts.items():
        module = model.get_submodule(name)
        weight = next(module.parameters())
        module.add_module(CHILD, part.to(weight.device))
        module.register_forward_hook(_after)


def attach_behind(model: nn.Module, parts: Mapping[str, nn.Module], head: tuple[str, ...], file: str, **more: Any) -> Attached:
    """The model with the parts behind its modules; their parameters train.

    more: further fields of Attached. Saved are the parts' tensors, frozen ones too, and the heads.
    """
    rest = freeze(model, head)
    put_behind(model, parts)
    adapter = tuple(p for part in parts.values() for p in part.parameters() if p.requires_grad)
    inside = (*(f"{name}.{CHILD}." for name in parts), *(h + "." for h in head))

    def is_own(key: str) -> bool:
        return key.startswith(inside)

    def save(folder: Path, notes: Notes) -> list[Path]:
        return save_tensors(model, is_own, folder / file, notes)

    return Attached(model, adapter, rest, save, lambda folder: load_tensors(model, is_own, folder / file), **more)


def fold_behind(model: nn.Module, parts: Mapping[str, Any]) -> "MergeReport":
    """Writes part.change(module), what the part adds to W0, into each module's weight, and takes the parts away."""
    from ..merge_report import Tally

    tally = Tally()
    for name, part in parts.items():
        module = model.get_submodule(name)
        tally.write(name, module, part.change(module))
        delattr(module, CHILD)
        for key, hook in list(module._forward_hooks.items()):
            if hook is _after:
                del module._forward_hooks[key]
    return tally.report("adapter", {name: model.get_submodule(name) for name in parts})
