"""PEFT's VeRA folders read and written, its config translated, a live PeftModel taken over.

PEFT keeps one pair A (r, widest input), B (widest output, r) for all layers of an adapter and slices it for each; a folder
holds the pair or only the seed it grew from (save_projection). Checked with PEFT 0.21, tuners/vera; reading and writing
folders doesn't need it installed.
"""

import warnings
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from torch import nn

from .. import hashes, linears
from ..adapter import Adapter
from ..config import VeraConfig
from ..errors import AdapterFileError, ConfigError, StateError, VeraWarning, need
from .folder import PREFIX, method_of, plain_key, read_config, read_tensors, write_folder
from .parse import adapter_from_peft, require_shapes, translate, with_shapes

if TYPE_CHECKING:
    from ..model import Vera

# What PEFT's PeftModelFor… classes add to modules_to_save.
_HEADS = {
    "SEQ_CLS": ("classifier", "score"),
    "TOKEN_CLS": ("classifier", "score"),
    "QUESTION_ANS": ("qa_outputs",),
}


def read_peft(folder: str | Path, model: nn.Module | None = None) -> Adapter:
    """The Adapter in a folder that PEFT saved with peft_type VERA, basis kind "peft".

    Saved projections that equal the pair grown from the seed bit for bit are dropped, others kept as a StoredPair. The
    files don't say how many inputs a layer has: with `model`, the base model, its layers do; without, base.layers holds
    (m, 0) and, where the projections weren't saved, basis.max_in is 0, until with_shapes() fills them in, as vera.load does.
    AdapterFileError: damaged, another method, bias="all". AdapterMismatch: the layers aren't those of `model`.
    """
    folder = Path(folder)
    adapter = adapter_from_peft(read_config(folder), read_tensors(folder), str(folder))
    return adapter if model is None else with_shapes(adapter, _shapes(model))


def write_peft(adapter: Adapter, folder: str | Path, save_projection: bool | None = None) -> Path:
    """The folder, written so that PEFT loads it with equal logits: adapter_config.json and adapter_model.safetensors.

    A native adapter's A and B are stored and its scales folded into d, in float32; an adapter on PEFT's own basis keeps its
    seed, and A and B are stored where the seed doesn't give them back (save_projection: None; True stores them always).
    AdapterFileError where PEFT has no place for it: parts of fused linears, ranks that differ, sharing="unique"; to_lora can.
    """
    if problems := list(_beyond_peft(adapter)):
        raise AdapterFileError(
            f"PEFT's VeRA can't hold this adapter: {'; '.join(problems)}. Write it as LoRA, which holds it exactly: "
            "veralib.interop.lora.to_lora(adapter, folder), or vera convert SRC DST --to lora."
        )
    rank = next(iter(adapter.vectors.values()))[0].numel()
    if save_projection is False:
        if adapter.basis.kind == "peft":
            require_shapes(adapter, "save_projection=False")
        if _must_store(adapter):
            raise ConfigError(
                "save_projection=False, but PEFT can't grow this adapter's A and B from its seed: leave save_projection out."
            )
    store = _must_store(adapter) if save_projection is None else save_projection
    tensors = {}
    if store:
        m, n = _widest(adapter)
        tensors["base_model.vera_A"] = adapter.basis.A(rank, n).clone()
        tensors["base_model.vera_B"] = adapter.basis.B(m, rank).clone()
    for unit, (d, b) in adapter.vectors.items():
        tensors[f"{PREFIX}{unit}.vera_lambda_d"] = d.float() * adapter.scale_of(unit)
        tensors[f"{PREFIX}{unit}.vera_lambda_b"] = b.float().clone()
    config = {
        "peft_type": "VERA",
        "r": rank,
        "projection_prng_key": _key(adapter),
        "save_projection": store,
        "vera_dropout": adapter.config.dropout,
        "d_initial": adapter.config.d_start,
        "init_weights": True,
        "bias": "vera_only" if adapter.biases else "none",
        "layers_pattern": None,
        "layers_to_transform": None,
    }
    return write_folder(folder, adapter, config, tensors)


def config_from_peft(peft_config: Any, model: nn.Module | None = None) -> VeraConfig:
    """The VeraConfig that means the same as a peft.VeraConfig, basis "peft"; attach accepts either.

    model: the base model, for what PEFT takes from it: its default targets where target_modules is None, and the heads that
    task_type adds to modules_to_save. ConfigError for another PEFT method and for what veralib doesn't do: biases trained,
    init_weights=False.
    """
    fields = peft_config.to_dict() if hasattr(peft_config, "to_dict") else dict(peft_config)
    if (method := method_of(fields)) != "VERA":
        raise ConfigError(f"this is PEFT's config for {method}; veralib takes peft.VeraConfig.")
    faults = []
    if fields.get("bias", "none") != "none":
        faults.append(f"bias={fields['bias']!r}: veralib trains no biases; leave it 'none'")
    if fields.get("init_weights", True) is not True:
        faults.append("init_weights=False: veralib starts from d_initial and b = 0; leave it True")
    if faults:
        raise ConfigError(f"peft.VeraConfig: {'; '.join(faults)}.")
    if fields.get("layers_pattern"):
        warnings.warn(
            "peft.VeraConfig's layers_pattern is left out: the first number in a module's name is its layer here.",
            VeraWarning,
            stacklevel=2,
        )
    targets, modules = None, list(fields.get("modules_to_save") or ())
    if model is not None:
        if fields.get("target_modules") is None:
            targets = _default_targets(getattr(getattr(model, "config", None), "model_type", ""))
        task = str(getattr(fields.get("task_type"), "value", fields.get("task_type")))
        modules += [name for name in _HEADS.get(task, ()) if hasattr(model, name) and name not in modules]
    return translate(fields, targets=targets, modules=tuple(modules))


def from_peft(peft_model: Any) -> "Vera":
    """The handle on a live PeftModel's base model, its VeRA adapters taken over by name, with equal logits.

    PEFT's wrappers are taken off the model in place; afterwards `peft_model` is not to be used. The active adapter is
    active and trainable. StateError where an adapter is merged, or several are active; ConfigError for other PEFT methods.
    """
    try:
        import peft
    except ImportError as e:
        raise need("peft", "peft", "from_peft") from e
    from ..attaching import attach

    if not isinstance(peft_model, peft.PeftModel):
        raise ConfigError(
            f"from_peft takes a PeftModel, this is a {type(peft_model).__name__}. Use attach(model) and vera.load(folder)."
        )
    adapters = {name: _live_adapter(peft_model, name) for name in peft_model.peft_config}
    layers = [m for m in peft_model.modules() if isinstance(m, peft.tuners.vera.VeraLayer)]
    if any(layer.merged for layer in layers):
        raise StateError("this PeftModel is merged, so its base weights aren't the base model's: unmerge_adapter() first.")
    active = [] if any(layer.disable_adapters for layer in layers) else list(peft_model.active_adapters)
    if len(active) > 1:
        raise StateError(f"this PeftModel adds up {len(active)} adapters, {active}; veralib uses one: set_adapter(name) first.")
    if any(a.biases for a in adapters.values()):
        warnings.warn(
            "PEFT trained biases of the base model in place, and the original ones are gone: the base model under the "
            "adapter keeps the trained ones. Load the base model again, then vera.load, to have both.",
            VeraWarning,
            stacklevel=2,
        )
    training = peft_model.training
    wrappers = {
        plain_key(name): m.original_module
        for name, m in peft_model.named_modules()
        if isinstance(m, peft.utils.other.ModulesToSaveWrapper)
    }
    model = peft_model.unload()
    for name, original in wrappers.items():  # unload leaves the trained copy in the original module's place
        parent, _, last = name.rpartition(".")
        setattr(model.get_submodule(parent), last, original)
    vera = attach(model)
    for name, adapter in adapters.items():
        vera.load(adapter, name=name, trainable=name in active)
    vera.use(active[0] if active else None)
    model.train(training)
    return vera


def _live_adapter(peft_model: Any, name: str) -> Adapter:
    """One adapter of a PeftModel, its pair read from the live buffers: a second adapter has the first one's pair."""
    from peft.utils import get_peft_model_state_dict

    where = f'the PeftModel\'s adapter "{name}"'
    fields = peft_model.peft_config[name].to_dict()
    if method_of(fields) != "VERA":
        raise ConfigError(f"{where} is a {method_of(fields)} adapter; veralib takes over VeRA alone.")
    # save_embedding_layers="auto" would ask the hub whether the vocabulary has grown.
    tensors = get_peft_model_state_dict(peft_model, adapter_name=name, save_embedding_layers=False)
    tensors |= {f"vera_{x}": getattr(peft_model.base_model, f"vera_{x}")[name] for x in "AB"}
    adapter = adapter_from_peft(fields, tensors, where)
    bases = {
        plain_key(key): module.get_base_layer()
        for key, module in peft_model.named_modules()
        if hasattr(module, "vera_lambda_d") and name in module.vera_lambda_d
    }
    adapter = with_shapes(adapter, {layer: linears.shape(module) for layer, module in bases.items()})
    config = getattr(peft_model.get_base_model(), "config", None)
    # Unlike a folder, a live model tells all there is to know of the base.
    base = replace(
        adapter.base,
        id=str(getattr(config, "_name_or_path", "") or ""),
        revision=str(getattr(config, "_commit_hash", "") or ""),
        hashes={layer: h for layer, module in bases.items() if (h := hashes.weight_hash(module))},
        quantised=next((q for module in bases.values() if (q := linears.quantisation(module))), ""),
    )
    return replace(adapter, base=base)


def _default_targets(model_type: str) -> tuple[str, ...] | None:
    """PEFT's own default targets of an architecture, None where PEFT isn't installed or knows none."""
    try:
        from peft.utils import TRANSFORMERS_MODELS_TO_VERA_TARGET_MODULES_MAPPING as defaults
    except ImportError:
        return None
    return tuple(defaults[model_type]) if model_type in defaults else None


def _shapes(model: nn.Module) -> dict[str, tuple[int, int]]:
    """module name -> (m, n) of every linear."""
    return {name: linears.shape(module) for name, module in model.named_modules() if linears.is_linear(module)}


def _widest(adapter: Adapter) -> tuple[int, int]:
    """(most outputs, most inputs) of the adapter's layers; PEFT's own numbers where inputs aren't known."""
    m = max(m for m, _ in adapter.base.layers.values())
    inputs = [n for _, n in adapter.base.layers.values()]
    return m, max(inputs) if all(inputs) else adapter.basis.max_in


def _must_store(adapter: Adapter) -> bool:
    """Whether PEFT needs A and B in the folder: it grows them from the seed and the widest layers, and from nothing else."""
    basis = adapter.basis
    if basis.kind != "peft" or basis.stored is not None:
        return True
    if basis.max_in == 0:
        return False
    known = all(n for _, n in adapter.base.layers.values())
    return not known or _widest(adapter) != (basis.max_out, basis.max_in)


def _key(adapter: Adapter) -> int:
    """PEFT's projection_prng_key. Native adapters get one that tells their A and B apart, though nothing grows from it.

    PEFT gives all adapters of a model one A and B, and goes by this key to refuse adapters with others.
    """
    if adapter.basis.kind == "peft":
        return adapter.basis.seed
    return int(adapter.basis.fingerprint()[:8], 16)


def _beyond_peft(adapter: Adapter):
    """What of the adapter PEFT's VeRA has no place for."""
    if parts := [unit for unit in adapter.vectors if ":" in unit]:
        yield f'it adapts parts of fused linears ("{parts[0]}"{" and others" if len(parts) > 1 else ""})'
    ranks = sorted({d.numel() for d, _ in adapter.vectors.values()})
    if len(ranks) > 1:
        yield f"its layers have different ranks ({', '.join(map(str, ranks))})"
    if adapter.layer_ids:
        yield "each of its layers has an A and B of its own (sharing='unique')"
