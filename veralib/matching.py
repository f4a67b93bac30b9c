"""Is this adapter for this base model? By its layers' names, shapes and a hash of their weights."""

import os
import warnings
from collections.abc import Iterable, Mapping
from typing import TYPE_CHECKING, Any

from torch import Tensor, nn

from . import layers
from .adapter import Adapter, layer_of
from .autograd import UnitSpec
from .errors import AdapterMismatch, VeraWarning, nearest
from .fused import parts
from .hashes import weight_hashes
from .linears import is_linear, quantisation, shape
from .sharded import is_piece

if TYPE_CHECKING:
    from .residence import Residence


def check(inside: "Residence", adapter: Adapter, name: str, allow_other_base: bool) -> dict[str, nn.Module]:
    """The adapter's layers in this model; raises AdapterMismatch where it was trained on another, a different id only warns."""
    modules = {}
    known: dict[str, nn.Module] = inside.sites
    if not adapter.base.layers.keys() <= known.keys():  # one walk: get_submodule for each layer takes as long as the file
        known = dict(inside.model.named_modules(remove_duplicate=False))
    for layer, trained in adapter.base.layers.items():
        module = known.get(layer)
        if module is None or not is_linear(module):
            raise _no_layer(inside.model, module, layer, adapter, name)
        modules[layer] = module
        have = shape(module)
        if have != tuple(trained):
            raise AdapterMismatch(
                f'adapter "{name}" was trained with {trained[0]} outputs and {trained[1]} inputs at layer "{layer}"; this base '
                f"model has {have[0]} and {have[1]} there. {_trained_on(adapter)}"
            )
    config = getattr(inside.model, "config", None)
    model_id = str(getattr(config, "_name_or_path", "") or "")
    same_id = _same_id(adapter.base.id, model_id)
    have_hashes = cached_hashes(inside, {layer: modules[layer] for layer in adapter.base.hashes if layer in modules})
    if adapter.base.hashes and have_hashes:
        wrong = [layer for layer, h in adapter.base.hashes.items() if layer in have_hashes and have_hashes[layer] != h]
        if wrong and not allow_other_base:
            raise AdapterMismatch(
                f'adapter "{name}" was trained on other weights than this base model\'s at {len(wrong)} of {len(have_hashes)} '
                f'layers, the first "{wrong[0]}": another revision, a fine-tuned or an -Instruct twin. {_trained_on(adapter)} '
                "Or pass allow_other_base=True to load it all the same."
            )
        if not wrong and not same_id and adapter.base.id and model_id:
            warnings.warn(
                f'adapter "{name}" was trained on "{adapter.base.id}"; this base model calls itself "{model_id}". Its weights '
                "are the same.",
                VeraWarning,
            )
        return modules
    # No two hashes to compare, so the model's id and the kind of quantisation must do.
    if allow_other_base:
        return modules
    if adapter.base.hashes or adapter.base.quantised:
        why = "quantised or offloaded weights can't be compared"
    else:
        why = "its file (PEFT's, say) has no hashes of weights to compare"
    if not adapter.base.id:
        warnings.warn(
            f"adapter \"{name}\" doesn't say which model it was trained on, and {why}: only the layers' names and shapes are "
            "known to fit.",
            VeraWarning,
        )
        return modules
    if not same_id:
        raise AdapterMismatch(
            f'adapter "{name}" was trained on "{adapter.base.id}", and this base model calls itself "{model_id or "(nothing)"}"; '
            f"{why}, so the base is checked by its id and its quantisation. "
            f"{_trained_on(adapter)} Or pass allow_other_base=True to load it all the same."
        )
    now = quantisation_of(modules.values())
    if now != adapter.base.quantised:
        warnings.warn(
            f'adapter "{name}" was trained on a base quantised as {adapter.base.quantised or "nothing"}, and this one is '
            f"{now or 'not quantised'}: expect small differences. Weights were not compared, only the model's id.",
            VeraWarning,
        )
    revision = str(getattr(config, "_commit_hash", "") or "")
    if revision and adapter.base.revision and revision != adapter.base.revision:
        warnings.warn(
            f'adapter "{name}" was trained on revision {adapter.base.revision} of "{adapter.base.id}", and this is {revision}: '
            f"weights may differ, and {why}.",
            VeraWarning,
        )
    return modules


def _no_layer(model: nn.Module, module: nn.Module | None, layer: str, adapter: Adapter, name: str) -> AdapterMismatch:
    linears = [n for n, m in model.named_modules() if is_linear(m)]
    found = f"is a {type(module).__name__}" if module is not None else "has no such layer"
    return AdapterMismatch(
        f'adapter "{name}" adapts layer "{layer}"; this base model {found}.{nearest(layer, linears)} {_trained_on(adapter)}'
    )


def _trained_on(adapter: Adapter) -> str:
    if not adapter.base.id:
        return "Load the base model it was trained on, or train a new adapter."
    revision = f' at revision "{adapter.base.revision}"' if adapter.base.revision else ""
    return f'The adapter was trained on "{adapter.base.id}"{revision}: load that model, or train a new adapter.'


def _same_id(one: str, other: str) -> bool:
    """Hub ids are compared whole, folders by their last part: they lie elsewhere on every machine."""
    is_hub = [i.count("/") == 1 and i[0] not in "./~" and not os.path.isdir(i) for i in (one, other)]
    return one == other if all(is_hub) else _last(one) == _last(other)


def _last(model_id: str) -> str:
    return model_id.rstrip("/").rpartition("/")[2]


def quantisation_of(modules: Iterable[nn.Module]) -> str:
    """How the first quantised one of these linears is stored, "" where none is."""
    return next((q for m in modules if (q := quantisation(m))), "")


def cached_hashes(inside: "Residence", modules: Mapping[str, nn.Module]) -> dict[str, str]:
    """hashes.weight_hash of these layers where they have one, computed once for each state of a weight; while merged, the
    base weight's; of a sharded weight, what it was when whole."""
    stale: dict[str, tuple[int, int]] = {}
    for layer, module in modules.items():
        weight: Any = getattr(module, "weight", None)
        state = (id(weight), 0 if not isinstance(weight, Tensor) or weight.is_inference() else weight._version)
        known = inside.hashes.get(layer)
        if known is None or (inside.runtime.merged is None and known[:2] != state and not is_piece(weight)):
            stale[layer] = state
    for (layer, state), found in zip(stale.items(), weight_hashes([modules[n] for n in stale]), strict=True):
        inside.hashes[layer] = (*state, found)
    return {layer: h for layer in modules if (h := inside.hashes[layer][2])}


def units(model: nn.Module, adapter: Adapter, modules: Mapping[str, nn.Module]) -> list[UnitSpec]:
    """The units of an adapter in this model, in the adapter's order."""
    config = getattr(model, "config", None)
    out = []
    for unit, (d, b) in adapter.vectors.items():
        layer, part = layer_of(unit), unit.partition(":")[2]
        n = adapter.base.layers[layer][1]
        rows = None
        if part:
            known = parts(layer, modules[layer], config)
            if part not in known:
                raise AdapterMismatch(
                    f'the adapter adapts part "{part}" of layer "{layer}"; this base model\'s layer has the parts '
                    f"{', '.join(known) or '(none)'}. {_trained_on(adapter)}"
                )
            rows = known[part]
        out.append(UnitSpec(unit, layer, rows, b.numel(), n, d.numel(), adapter.scale_of(unit), adapter.basis_of(unit)))
    return out


def heads(model: nn.Module, adapter: Adapter) -> dict[str, nn.Module]:
    """The modules that the adapter carries in full, found in this model; AdapterMismatch where one is missing or differs."""
    if adapter.magnitudes:
        raise AdapterMismatch(
            "the adapter is DVoRA's: beside d and b it has a magnitude for each layer, and without them it would compute "
            "something else. vera predict reads it, and vera merge writes it into its base model."
        )
    found: dict[str, nn.Module] = {}
    for name, state in adapter.modules.items():
        try:
            module = model.get_submodule(name)
        except AttributeError:
            raise AdapterMismatch(
                f'the adapter carries a fully trained module "{name}", which this base model has not: load the model by the '
                "class it was trained with (AutoModelForSequenceClassification, say)."
            ) from None
        have = {k: tuple(t.shape) for k, t in module.state_dict().items() if not layers.is_own_key(k)}
        want = {k: tuple(t.shape) for k, t in state.items()}
        if have != want:
            key = next(k for k in [*want, *have] if have.get(k) != want.get(k))
            raise AdapterMismatch(
                f'the adapter\'s module "{name}" has "{key}" of shape {want.get(key, "(none)")}; this base model\'s has '
                f"{have.get(key, '(none)')}. Load the model with the same number of labels."
            )
        found[name] = module
    return found
