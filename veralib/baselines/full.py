"""Full fine-tuning: every weight trains and every weight is saved."""

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from torch import Tensor, nn

from ..errors import AdapterFileError
from .base import Attached, Notes, batch_norms

if TYPE_CHECKING:
    from ..training.settings import Settings


def attach_full(model: Any, settings: "Settings", head: tuple[str, ...]) -> Attached:
    """The model with everything trained; saved as transformers' save_pretrained writes it."""
    adapter: list[nn.Parameter] = []
    rest: list[nn.Parameter] = []
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(True)
        in_head = any(name.startswith(h + ".") for h in head)
        (rest if in_head else adapter).append(parameter)

    def save(folder: Path, notes: Notes) -> list[Path]:
        from ..training.loading import quiet_transformers

        with quiet_transformers():
            model.save_pretrained(folder)
        return sorted(folder.glob("model*.safetensors"))

    def load(folder: Path) -> None:
        from safetensors.torch import load_file

        files = sorted(folder.glob("model*.safetensors"))
        if not files:
            raise AdapterFileError(f"{folder} holds no model*.safetensors, where the trained weights were: copy the run again.")
        for file in files:
            model.load_state_dict(load_file(file), strict=False)

    def statistics() -> dict[str, Tensor]:
        names = {m: n for n, m in model.named_modules()}
        return {f"{names[m]}.{k}": v for m in batch_norms(model) for k, v in m.named_buffers(recurse=False)}

    def load_statistics(state: Mapping[str, Tensor]) -> None:
        for name, buffer in statistics().items():
            buffer.copy_(state[name])

    return Attached(
        model, tuple(adapter), tuple(rest), save, load, merge=lambda: None, more=statistics, load_more=load_statistics
    )
