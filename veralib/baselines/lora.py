"""LoRA by Hugging Face PEFT, the method that every ratio is given to (Hu et al., 2021)."""

from pathlib import Path
from typing import TYPE_CHECKING, Any

from torch import nn

from ..errors import ConfigError, need
from .base import Attached, Notes

if TYPE_CHECKING:
    from ..training.settings import Settings


def attach_lora(model: nn.Module, settings: "Settings", head: tuple[str, ...]) -> Attached:
    """The model wrapped by PEFT; saved as PEFT saves it. lora_alpha is 2·rank unless options name another."""
    try:
        from peft import LoraConfig, get_peft_model, set_peft_model_state_dict
    except ImportError as e:
        raise need("peft", "peft", "LoRA") from e
    rank = settings.resolved_rank
    if not isinstance(rank, int):
        raise ConfigError(f"rank is {rank!r}, and LoRA takes one whole number here; use options: {{rank_pattern: …}}")
    fields: dict[str, Any] = {"r": rank, "lora_alpha": 2 * rank, "modules_to_save": list(head) or None, **settings.options}
    if settings.targets is not None:
        fields["target_modules"] = list(settings.targets) if isinstance(settings.targets, tuple) else settings.targets
    else:
        fields.setdefault("target_modules", _default_targets(model))
    try:
        wrapped = get_peft_model(model, LoraConfig(**fields))  # type: ignore[arg-type]
    except (TypeError, ValueError) as e:
        raise ConfigError(f"PEFT can't make this LoRA: {e}") from e
    trained = [(n, p) for n, p in wrapped.named_parameters() if p.requires_grad]
    adapter = tuple(p for n, p in trained if "modules_to_save" not in n)
    rest = tuple(p for n, p in trained if "modules_to_save" in n)

    def save(folder: Path, notes: Notes) -> list[Path]:
        wrapped.save_pretrained(str(folder))
        return [folder / "adapter_model.safetensors"]

    def load(folder: Path) -> None:
        from safetensors.torch import load_file

        set_peft_model_state_dict(wrapped, load_file(folder / "adapter_model.safetensors"))

    return Attached(wrapped, adapter, rest, save, load)


def _default_targets(model: nn.Module) -> list[str] | None:
    """VeRA's default targets, query and value; PEFT's own (None) where those are parts of a fused linear."""
    from ..targets import default_targets

    try:
        names = default_targets(model)
    except ConfigError:
        return None
    return None if any(":" in name for name in names) else list(names)
