"""Head only: the frozen model with a trained classification head, the floor that an adapter has to beat."""

from pathlib import Path
from typing import TYPE_CHECKING

from torch import nn

from .base import Attached, Notes, freeze, load_tensors, save_tensors

if TYPE_CHECKING:
    from ..training.settings import Settings


def attach_head(model: nn.Module, settings: "Settings", head: tuple[str, ...]) -> Attached:
    """The model with its head alone trained; saved as head.safetensors."""

    inside = tuple(h + "." for h in head)

    def save(folder: Path, notes: Notes) -> list[Path]:
        return save_tensors(model, lambda key: key.startswith(inside), folder / "head.safetensors", notes)

    def load(folder: Path) -> None:
        load_tensors(model, lambda key: key.startswith(inside), folder / "head.safetensors")

    return Attached(model, (), freeze(model, head), save, load, merge=lambda: None)
