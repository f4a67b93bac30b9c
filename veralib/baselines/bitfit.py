"""BitFit (Ben Zaken et al., 2022): every bias trains, those of layer norms too, and nothing else."""

from pathlib import Path
from typing import TYPE_CHECKING

from torch import nn

from ..errors import ConfigError
from .base import Attached, Notes, freeze, load_tensors, save_tensors

if TYPE_CHECKING:
    from ..training.settings import Settings

FILE = "biases.safetensors"


def attach_bitfit(model: nn.Module, settings: "Settings", head: tuple[str, ...]) -> Attached:
    """The model with its biases trained; ConfigError where it has none (Llama, T5)."""
    rest = freeze(model, head)
    inside = tuple(h + "." for h in head)
    named = {n: p for n, p in model.named_parameters() if n.rpartition(".")[2] == "bias" and not n.startswith(inside)}
    if not named:
        raise ConfigError("this model has no biases, so BitFit has nothing to train: use another method.")
    for parameter in named.values():
        parameter.requires_grad_(True)

    def is_own(key: str) -> bool:
        return key in named or key.startswith(inside)

    def save(folder: Path, notes: Notes) -> list[Path]:
        return save_tensors(model, is_own, folder / FILE, notes)

    def load(folder: Path) -> None:
        load_tensors(model, is_own, folder / FILE)

    return Attached(model, tuple(named.values()), rest, save, load, merge=lambda: None)
