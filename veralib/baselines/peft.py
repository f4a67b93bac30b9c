"""Methods by Hugging Face PEFT: LoRA, LoRA-FA, AdaLoRA, and --method peft:TYPE for any other of its configs."""

import dataclasses
import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from ..errors import ConfigError, need, unknown_text
from .base import Attached, Notes

if TYPE_CHECKING:
    from ..training.settings import Settings

PREFIX = "peft:"
SENSITIVITIES = ("ipt", "exp_avg_ipt", "exp_avg_unc")
"""What AdaLoRA's rank allocator in PEFT learns from step to step."""
RANK_FIELDS = ("r", "rank", "init_r", "d", "u")
"""What PEFT's configs call the rank, or the size that grows with it."""


def attach_lora(model: nn.Module, settings: "Settings", head: tuple[str, ...]) -> Attached:
    """LoRA (Hu et al., 2021), the method that every ratio is given to. lora_alpha is 2·rank unless options name another."""
    return _attach(model, settings, head, "LORA", {"r": _rank(settings, "LoRA"), "lora_alpha": 2 * _rank(settings, "LoRA")})


def attach_lora_fa(model: nn.Module, settings: "Settings", head: tuple[str, ...]) -> Attached:
    """LoRA-FA (Zhang et al., 2023): A stays as it was drawn, B trains."""
    rank = _rank(settings, "LoRA-FA")
    return _attach(model, settings, head, "LORA", {"r": rank, "lora_alpha": 2 * rank}, lambda name: ".lora_A." not in name)


def attach_adalora(model: nn.Module, settings: "Settings", head: tuple[str, ...]) -> Attached:
    """AdaLoRA (Zhang et al., 2023): starts at 1.5 times the rank, prunes to it on average between 10 % and 70 % of the steps.

    Its trained numbers are counted as the paper does, at the rank that stays.
    """
    rank = _rank(settings, "AdaLoRA")
    # The number of steps isn't known yet: begin() sets it.
    fields = {"init_r": (3 * rank + 1) // 2, "target_r": rank, "lora_alpha": 2 * rank, "total_step": 10**9}
    made = _attach(model, settings, head, "ADALORA", fields)
    wrapped: Any = made.model

    def begin(steps: int) -> None:
        config = wrapped.peft_config["default"]
        config.tinit = settings.options.get("tinit", steps // 10)
        config.tfinal = settings.options.get("tfinal", steps - steps * 7 // 10)
        if steps - config.tfinal < 2 and config.rank_pattern is None:  # PEFT would fail in the middle of the run
            raise ConfigError(f"AdaLoRA prunes by what it saw in earlier steps, and the run has {steps}: give it 3 or more")
        wrapped.base_model.rankallocator.set_total_step(steps)

    def penalty() -> Tensor:
        parts = [p if ".lora_A." in n else p.T for n, p in wrapped.named_parameters() if ".lora_A." in n or ".lora_B." in n]
        off = [torch.linalg.norm(P @ P.T - torch.eye(P.shape[0], device=P.device, dtype=P.dtype)) for P in parts]
        return wrapped.peft_config["default"].orth_reg_weight * torch.stack(off).mean()

    def counted() -> int:
        kept = wrapped.peft_config["default"].rank_pattern or {}
        total = 0
        for name, layer in wrapped.base_model.model.named_modules():
            if hasattr(layer, "lora_E"):
                which = kept.get(f"{name}.lora_E.default", kept.get(f"{name}.lora_E", [1] * rank))
                total += sum(which) * (layer.in_features + layer.out_features + 1)
        return total

    def more() -> dict[str, Tensor]:
        """The sensitivities that ranks are chosen by, and which were kept."""
        allocator, kept = wrapped.base_model.rankallocator, wrapped.peft_config["default"].rank_pattern or {}
        parts = [(f"{kind}.{n}", t) for kind in SENSITIVITIES for n, t in getattr(allocator, kind).items()]
        return dict(parts) | {f"rank_pattern.{n}": torch.tensor(which) for n, which in kept.items()}

    def load_more(state: Mapping[str, Tensor]) -> None:
        found: dict[str, dict[str, Tensor]] = {kind: {} for kind in (*SENSITIVITIES, "rank_pattern")}
        for name, tensor in state.items():
            kind, _, parameter = name.partition(".")
            found[kind][parameter] = tensor
        kept = {n: t.tolist() for n, t in found["rank_pattern"].items()}
        wrapped.peft_config["default"].rank_pattern = kept or None
        for kind in SENSITIVITIES:
            places = {n: p.device for n, p in wrapped.base_model.model.named_parameters() if n in found[kind]}
            setattr(wrapped.base_model.rankallocator, kind, {n: found[kind][n].to(device) for n, device in places.items()})

    after = wrapped.base_model.update_and_allocate
    return dataclasses.replace(
        made, begin=begin, after_step=after, penalty=penalty, counted=counted, more=more, load_more=load_more
    )


def attach_any(kind: str) -> Callable[[nn.Module, "Settings", tuple[str, ...]], Attached]:
    """The method peft:KIND, "peft:vblora" say; ConfigError lists PEFT's types for an unknown one."""
    name = kind.removeprefix(PREFIX).upper()
    known = _types()
    if name not in known:
        raise ConfigError(unknown_text("PEFT type", kind, [PREFIX + k.lower() for k in sorted(known)]))

    def attach(model: nn.Module, settings: "Settings", head: tuple[str, ...]) -> Attached:
        fields = {f.name for f in dataclasses.fields(known[name])}
        rank = {field: settings.rank for field in RANK_FIELDS if field in fields and settings.rank is not None}
        return _attach(model, settings, head, name, dict(list(rank.items())[:1]))

    return attach


def _types() -> Mapping[str, Any]:
    """PEFT's name of a type -> its config class."""
    try:
        from peft.mapping import PEFT_TYPE_TO_CONFIG_MAPPING
    except ImportError as e:
        raise need("peft", "peft", "a method of PEFT's") from e
    return {str(getattr(k, "value", k)): config for k, config in PEFT_TYPE_TO_CONFIG_MAPPING.items()}


def _rank(settings: "Settings", what: str) -> int:
    rank = settings.resolved_rank
    if not isinstance(rank, int):
        raise ConfigError(f"rank is {rank!r}, and {what} takes one whole number here; use options: {{rank_pattern: …}}")
    return rank


def _check(model: nn.Module, targets: str | tuple[str, ...], kind: str) -> None:
    """PEFT passes over a name that fits nothing as long as another fits. ConfigError for it, and for a part of a fused linear."""
    names = [name for name, _ in model.named_modules()]
    for target in targets if isinstance(targets, tuple) else ():
        if ":" in target:
            raise ConfigError(f'PEFT\'s {kind} adapts whole modules, and "{target}" is a part of one: name it whole in targets.')
        if not any(name == target or name.endswith(f".{target}") for name in names) and target != "all-linear":
            raise ConfigError(unknown_text("target", target, dict.fromkeys(n.rpartition(".")[2] for n in names if n)))


def _attach(
    model: nn.Module,
    settings: "Settings",
    head: tuple[str, ...],
    kind: str,
    fields: Mapping[str, Any],
    trains: Callable[[str], bool] = lambda name: True,
) -> Attached:
    """The model wrapped by PEFT; saved as PEFT saves it. trains: which of its parameters train, by name."""
    config_type = _types()[kind]
    from peft import get_peft_model, set_peft_model_state_dict

    known = {f.name for f in dataclasses.fields(config_type)}
    values: dict[str, Any] = {**fields, **settings.options}
    if "modules_to_save" in known:
        values.setdefault("modules_to_save", list(head) or None)
    if "target_modules" in known:
        if settings.targets is not None:
            _check(model, settings.targets, kind)
            values["target_modules"] = list(settings.targets) if isinstance(settings.targets, tuple) else settings.targets
        else:
            values.setdefault("target_modules", _default_targets(model))
    if "task_type" in known:
        tasks = {"classification": "SEQ_CLS", "regression": "SEQ_CLS", "images": None}  # PEFT has no type for images
        values.setdefault("task_type", tasks.get(settings.task, "CAUSAL_LM"))
    try:
        wrapped: Any = get_peft_model(model, config_type(**values))
    except (TypeError, ValueError) as e:
        raise ConfigError(f"PEFT can't make this {kind}: {e}") from e
    trained = [(n, p) for n, p in wrapped.named_parameters() if p.requires_grad]
    for name, parameter in trained:
        parameter.requires_grad_("modules_to_save" in name or trains(name))
    trained = [(n, p) for n, p in trained if p.requires_grad]
    adapter = tuple(p for n, p in trained if "modules_to_save" not in n)
    rest = tuple(p for n, p in trained if "modules_to_save" in n)

    def save(folder: Path, notes: Notes) -> list[Path]:
        wrapped.save_pretrained(str(folder))
        return [folder / "adapter_model.safetensors"]

    def load(folder: Path) -> None:
        from safetensors.torch import load_file

        if kind == "ADALORA":  # pruned: the tensors' shapes follow from what was kept
            text = (folder / "adapter_config.json").read_text(encoding="utf-8")
            wrapped.peft_config["default"].rank_pattern = json.loads(text)["rank_pattern"]
        set_peft_model_state_dict(wrapped, load_file(folder / "adapter_model.safetensors"))

    def merge() -> None:
        try:
            wrapped.merge_and_unload()
        except (NotImplementedError, AttributeError, ValueError) as e:
            raise ConfigError(f"PEFT can't merge {kind} ({e}): vera predict runs it as it is") from e

    return Attached(wrapped, adapter, rest, save, load, merge if hasattr(wrapped.base_model, "merge_and_unload") else None)


def _default_targets(model: nn.Module) -> list[str] | None:
    """VeRA's default targets, query and value; PEFT's own (None) where those are parts of a fused linear."""
    from ..targets import default_targets

    try:
        names = default_targets(model)
    except ConfigError:
        return None
    return None if any(":" in name for name in names) else list(names)
