"""VeRA, by veralib itself."""

from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

from torch import nn

from ..config import VeraConfig
from .base import Attached, Notes

if TYPE_CHECKING:
    from ..training.settings import Settings

FILE = "adapter_model.safetensors"


def vera_config(settings: "Settings", head: tuple[str, ...]) -> VeraConfig:
    """The VeraConfig that a run's settings ask for; ConfigError on faults."""
    rank = settings.resolved_rank
    fields = {"rank": rank, "seed": settings.basis_seed, "targets": settings.targets, **settings.options}
    more = fields.get("train_modules", ())
    fields["train_modules"] = (*head, *((more,) if isinstance(more, str) else more))
    return VeraConfig(**fields)  # type: ignore[arg-type]


def attach_vera(model: nn.Module, settings: "Settings", head: tuple[str, ...]) -> Attached:
    """The model with a fresh VeRA adapter; saved as one veralib file."""
    from ..attaching import attach
    from ..format import save_adapter
    from ..merge_report import MergeReport

    vera = attach(model, vera_config(settings, head))
    vectors, *heads = vera.parameter_groups(lr=settings.resolved_lr, lr_head=settings.resolved_lr_head)

    def save(folder: Path, notes: Notes) -> list[Path]:
        adapter = vera.adapter("default")
        save_adapter(replace(adapter, notes={**adapter.notes, **notes}), folder / FILE)
        return [folder / FILE]

    def load(folder: Path) -> None:
        vera.remove("default")
        vera.load(folder / FILE, name="default")
        vera.use("default")

    def merge() -> MergeReport:
        report = vera.merge("default", keep=None)
        vera.detach()
        return report

    rest = tuple(p for group in heads for p in group["params"])
    return Attached(model, tuple(vectors["params"]), rest, save, load, merge)
