"""Methods that put a module of their own behind a linear: a child of it, called by a forward hook.

The hook is a function of this file and finds the child on the module it is called with, so that copies and pickles of the model
work with their own.
"""

from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from .base import Attached, Notes, freeze, load_tensors, save_tensors

CHILD = "method"


def _after(module: nn.Module, args: tuple, output: Tensor) -> Tensor:
    return getattr(module, CHILD)(args[0], output, module)


def attach_behind(model: nn.Module, parts: Mapping[str, nn.Module], head: tuple[str, ...], file: str, **more: Any) -> Attached:
    """The model with parts[name] behind the module `name`: part(x, output, module) -> output. Their parameters train.

    more: further fields of Attached. Saved are the parts' tensors, frozen ones too, and the heads.
    """
    rest = freeze(model, head)
    adapter: list[nn.Parameter] = []
    for name, part in parts.items():
        module = model.get_submodule(name)
        weight = next(module.parameters())
        module.add_module(CHILD, part.to(weight.device))
        module.register_forward_hook(_after)
        adapter += [p for p in part.parameters() if p.requires_grad]
    inside = (*(f"{name}.{CHILD}." for name in parts), *(h + "." for h in head))

    def save(folder: Path, notes: Notes) -> list[Path]:
        return save_tensors(model, lambda key: key.startswith(inside), folder / file, notes)

    return Attached(model, tuple(adapter), rest, save, lambda folder: load_tensors(model, folder / file), **more)


def detach_behind(model: nn.Module, names: Iterable[str], fold: Callable[[nn.Module], None] | None = None) -> None:
    """Takes the parts away again; fold(module) may first write one into its module's weight."""
    for name in names:
        module = model.get_submodule(name)
        if fold is not None:
            fold(module)
        delattr(module, CHILD)
        for key, hook in list(module._forward_hooks.items()):
            if hook is _after:
                del module._forward_hooks[key]
