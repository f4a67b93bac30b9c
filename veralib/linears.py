"""Kinds of base linear: their shape, reading and writing their weight, knowing it again.

A linear here is nn.Linear with its subclasses (bitsandbytes' Linear4bit and Linear8bitLt too), transformers' Conv1D,
whose weight is (inputs, outputs), or a foreign one (foreign.py), whose weight nobody touches. Everything outside this file
sees a weight as W0 (m, n): m outputs, n inputs.
targets.py finds linears in a model, fused.py knows which rows of a fused one are its query, key and value.
"""

import copy
import sys
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from .errors import ConfigError, StateError, need
from .foreign import is_foreign, plain_class
from .sharded import is_piece

MATMUL_DTYPES = frozenset({torch.float32, torch.bfloat16, torch.float16, torch.float64})
_PLAIN_TENSORS = frozenset({nn.Parameter, Tensor})


def is_conv1d(module: nn.Module) -> bool:
    """Whether it is transformers' Conv1D (GPT-2 and kin), found without importing transformers."""
    conv1d = getattr(sys.modules.get("transformers.pytorch_utils"), "Conv1D", None)
    return conv1d is not None and isinstance(module, conv1d)


def is_linear(module: nn.Module) -> bool:
    """Whether it is nn.Linear, a subclass of it, Conv1D, or a foreign linear."""
    return isinstance(module, nn.Linear) or is_conv1d(module) or is_foreign(module)


def unfit(module: nn.Module) -> str:
    """Why a linear can't carry an adapter, as the end of a sentence; "" for all that can."""
    if isinstance(module, nn.modules.linear.NonDynamicallyQuantizableLinear):
        return (
            "the out_proj of torch's MultiheadAttention, which reads its weight and never calls it, so an adapter there "
            "would do nothing"
        )
    if isinstance(module, nn.modules.lazy.LazyModuleMixin):
        return "uninitialised: run the model once before attaching"
    owner = _forward_owner(type(module))
    if owner.__module__.startswith("transformers.models.") and owner not in _plain_classes():
        return f"a {owner.__name__}, whose forward is more than x W0ᵀ (a router, or a product by groups)"
    return ""


def shape(module: nn.Module) -> tuple[int, int]:
    """(m, n): outputs, inputs. A 4-bit weight is packed, so the module's own numbers count."""
    if is_conv1d(module):
        return module.nf, module.weight.shape[0]  # type: ignore[return-value, union-attr, index]
    return module.out_features, module.in_features  # type: ignore[return-value]


def quantisation(module: nn.Module) -> str:
    """How the weight is stored: "" for plain floating point, "bnb-nf4", "bnb-fp4", "bnb-int8", or the class's name."""
    for cls in type(module).__mro__:
        if cls.__module__.startswith("bitsandbytes."):
            if cls.__name__ == "Linear8bitLt":
                return "bnb-int8"
            if cls.__name__ == "Linear4bit":
                return f"bnb-{getattr(module.weight, 'quant_type', '4bit')}"
    weight = getattr(module, "weight", None)
    if isinstance(weight, Tensor) and weight.dtype in MATMUL_DTYPES and weight.dim() == 2 and not is_foreign(module):
        return "" if is_plain(weight) or is_piece(weight) else type(weight).__name__
    return plain_class(module).__name__


def is_plain(weight: Tensor) -> bool:
    """Whether it is a plain tensor or Parameter: no quantised one, no DTensor."""
    return type(weight) in _PLAIN_TENSORS


def dense_weight(module: nn.Module) -> Tensor | None:
    """W0 as an (m, n) view for our own matmul, or None where only the base's own forward may use it.

    None where it is quantised, sharded (DTensor), offloaded (meta), parametrised, or trained itself (or its bias is), and where
    the class has a forward of its own. Called in every forward: half a microsecond (Conv1D, whose weight is transposed: 3).
    """
    weight = module._parameters.get("weight")
    if (
        type(weight) not in _PLAIN_TENSORS
        or not computes_plainly(module)
        or weight.requires_grad  # type: ignore[union-attr]
        or ((bias := module._parameters.get("bias")) is not None and bias.requires_grad)
        or weight.dtype not in MATMUL_DTYPES  # type: ignore[union-attr]
        or weight.is_meta  # type: ignore[union-attr]
    ):
        return None
    return weight if isinstance(module, nn.Linear) else weight.t()  # type: ignore[union-attr]


def _forward_owner(cls: type) -> type:
    """The class whose forward a linear runs, below the class that attach puts over it."""
    return next(c for c in cls.__mro__ if "forward" in vars(c) and not c.__module__.startswith("veralib."))


def _plain_classes() -> tuple[type, ...]:
    """Classes whose forward is x W0ᵀ + bias and nothing else, so that a matmul of ours can stand in for it."""
    falcon = getattr(sys.modules.get("transformers.models.falcon.modeling_falcon"), "FalconLinear", nn.Linear)
    return nn.Linear, falcon, getattr(sys.modules.get("transformers.pytorch_utils"), "Conv1D", nn.Linear)


_plain: dict[type, bool] = {}


def computes_plainly(module: nn.Module) -> bool:
    """Whether its forward is x W0ᵀ + bias and nothing else; False for subclasses with a forward of their own."""
    cls = type(module)
    known = _plain.get(cls)
    if known is None:
        known = _plain[cls] = _forward_owner(cls) in _plain_classes()
    return known


def _bnb(module: nn.Module) -> Any:
    try:
        import bitsandbytes.functional
    except ImportError as e:
        raise need("bitsandbytes", "quantised", f"a {quantisation(module)} base weight") from e
    return bitsandbytes.functional


def _readable(module: nn.Module, what: str) -> Tensor:
    """The weight itself, or an error that says why it can't be read or written."""
    weight = getattr(module, "weight", None)
    kind = quantisation(module)
    if not isinstance(weight, Tensor) or (kind and not kind.startswith("bnb-")):
        raise ConfigError(
            f"can't {what} the weight of a {plain_class(module).__name__} ({kind or 'no tensor'}): known are plain "
            f"floating-point weights and bitsandbytes' nf4, fp4 and int8. Load the base model without this "
            f"quantisation to merge; the unmerged adapter works on it as it is."
        )
    if weight.is_meta:
        raise StateError(
            f"can't {what} a weight on the meta device: it has no data. Load the model without offloading "
            f"(device_map=None), or with device_map='cpu'."
        )
    if is_piece(weight):
        raise StateError(
            f"can't {what} a weight that is sharded over processes (DTensor): load the model on one device to merge."
        )
    return weight


def refuse_computed(module: nn.Module, where: str) -> None:
    """StateError where the weight is made of other tensors before each forward, so that writing it changes nothing."""
    own = "weight" in module._parameters or "weight" in module._buffers
    if not own and not quantisation(module) and isinstance(getattr(module, "weight", None), Tensor):
        raise StateError(
            f"can't write the weight of {where}: it is computed from other tensors (pruning, weight_norm, a parametrisation). "
            "Make it permanent first (torch.nn.utils.prune.remove, remove_parametrizations), or serve the adapter unmerged."
        )


def read_weight(module: nn.Module) -> Tensor:
    """W0 (m, n), detached; dequantised where it is quantised: 4-bit in the dtype it was quantised from, int8 in fp32.

    A plain weight comes back as a view, not a copy. ConfigError for an unknown kind, StateError where there is no data.
    """
    weight = _readable(module, "read")
    kind = quantisation(module)
    if kind == "bnb-int8" and weight.dtype == torch.int8:
        data, scale = _int8(module)
        return data.float() * (scale.float()[:, None] / 127)
    if kind.startswith("bnb-") and (state := _quant_state(module)) is not None:
        data = weight.data
        if getattr(state, "packing_format_for_cpu", False):
            data, state = _unpack_for_cpu(module, data, state)
        return _bnb(module).dequantize_4bit(data, state).reshape(shape(module))
    weight = weight.detach()
    return weight.t() if is_conv1d(module) else weight


@torch.no_grad()
def write_weight(module: nn.Module, W: Tensor) -> None:
    """Writes W (m, n) into the base weight, in place, rounded to its dtype or quantised again with the same settings.

    A plain weight keeps its storage, so tied weights stay tied.
    """
    weight = _readable(module, "write")
    if tuple(W.shape) != shape(module):
        raise StateError(f"write_weight got a weight of shape {tuple(W.shape)}, this linear's is {shape(module)}.")
    kind = quantisation(module)
    if kind == "bnb-int8" and weight.dtype == torch.int8:
        # bitsandbytes quantises from float16, always.
        data, scale, _ = _bnb(module).int8_vectorwise_quant(W.to(weight.device, torch.float16).contiguous())
        _set_int8(module, data, scale)
    elif kind.startswith("bnb-") and (state := _quant_state(module)) is not None:
        packed = getattr(state, "packing_format_for_cpu", False)
        data, new = _bnb(module).quantize_4bit(
            W.to(weight.device, state.original_dtype if packed else state.dtype).contiguous(),
            blocksize=state.blocksize,
            compress_statistics=state.original_nested if packed else state.nested,
            quant_type=state.quant_type,
            quant_storage=weight.quant_storage,  # type: ignore[attr-defined]
        )
        _set_4bit(module, data, new)
    else:
        weight.data.copy_(W.t() if is_conv1d(module) else W)


@dataclass(frozen=True)
class Snapshot:
    """A base weight's stored bits. kind: quantisation(module) when it was taken; stats: of a quantised weight."""

    kind: str
    data: Tensor
    stats: Any = None

    @property
    def bytes(self) -> int:
        """Bytes of the weight's data (a quantised weight's statistics, a few per cent, aren't counted)."""
        return self.data.numel() * self.data.element_size()


@torch.no_grad()
def snapshot(module: nn.Module, device: torch.device | str | None = None) -> Snapshot:
    """A copy of the stored bits, on `device` (None: where the weight is), for restore."""
    weight = _readable(module, "copy")
    device = weight.device if device is None else torch.device(device)
    kind = quantisation(module)
    if kind == "bnb-int8" and weight.dtype == torch.int8:
        data, scale = _int8(module)
        return Snapshot(kind, _copy(data, device), _copy(scale, device))
    if kind.startswith("bnb-") and (state := _quant_state(module)) is not None:
        return Snapshot(kind, _copy(weight.data, device), _copy_state(state, device))
    return Snapshot(kind, _copy(weight.detach(), device))


@torch.no_grad()
def restore(module: nn.Module, kept: Snapshot) -> None:
    """Puts the bits of a snapshot back into the module it was taken of, on whatever device that is by now."""
    weight = _readable(module, "restore")
    if quantisation(module) != kept.kind:
        raise StateError(
            f"the base weight was {kept.kind or 'plain'} when it was copied and is {quantisation(module) or 'plain'} "
            f"now: load the base model again."
        )
    if kept.stats is None:
        weight.data.copy_(kept.data)
    elif kept.kind == "bnb-int8":
        _set_int8(module, _copy(kept.data, weight.device), _copy(kept.stats, weight.device))
    else:
        _set_4bit(module, _copy(kept.data, weight.device), _copy_state(kept.stats, weight.device))


def _copy(tensor: Tensor, device: torch.device) -> Tensor:
    return tensor.detach().to(device, copy=True)


def _copy_state(state: Any, device: torch.device) -> Any:
    """A copy of bitsandbytes' QuantState with tensors of its own: a forward may change the original in place."""
    new = copy.copy(state)
    for name, value in vars(state).items():
        if isinstance(value, Tensor):
            setattr(new, name, _copy(value, device))
        elif name == "state2" and value is not None:
            setattr(new, name, _copy_state(value, device))
    return new


def _quant_state(module: nn.Module) -> Any:
    state = getattr(module.weight, "quant_state", None)
    return state if state is not None else getattr(module, "quant_state", None)


def _unpack_for_cpu(module: nn.Module, data: Tensor, state: Any) -> tuple[Tensor, Any]:
    """Undoes the repacking that bitsandbytes' forward does on CPUs with AVX512-BF16, without touching the module.

    Its own inverse leaves absmax transposed and in bf16 where the statistics weren't nested, so that is done here.
    """
    state = copy.copy(state)
    absmax = state.absmax.T.reshape(-1).float()
    state.original_nested = False
    data, state = _bnb(module)._convert_weight_packed_for_cpu_inverse(data, state)
    state.absmax, state.nested, state.state2 = absmax, False, None
    return data, state


def keep_unpacked(model: nn.Module) -> None:
    """Keeps bitsandbytes from repacking 4-bit weights for CPUs with AVX512-BF16, and undoes what is repacked.

    It does so in the first forward without gradients. From then on the layer computes in bf16, its scales are rounded to bf16, no
    gradient reaches what lies below it, and inputs of less than a block (64) end in a RuntimeError (bitsandbytes 0.50).
    """
    for module in model.modules():
        if getattr(module, "support_avx512bf16_for_cpu", None) is None:
            continue
        module.support_avx512bf16_for_cpu = False  # type: ignore[assignment]
        state = _quant_state(module)
        if state is not None and getattr(state, "packing_format_for_cpu", False):
            _set_4bit(module, *_unpack_for_cpu(module, module.weight.data, state))  # type: ignore[arg-type]


def _set_4bit(module: nn.Module, data: Tensor, state: Any) -> None:
    module.weight.data = data  # type: ignore[union-attr]
    module.weight.quant_state = state  # type: ignore[union-attr]
    if hasattr(module, "quant_state"):
        module.quant_state = state


def _int8(module: nn.Module) -> tuple[Tensor, Tensor]:
    """CB (m, n) int8 and SCB (m,): on the weight until the first forward, on module.state from then on."""
    weight, state = module.weight, module.state
    data = weight.CB if getattr(weight, "CB", None) is not None else state.CB  # type: ignore[union-attr]
    scale = weight.SCB if getattr(weight, "SCB", None) is not None else state.SCB  # type: ignore[union-attr]
    if scale is None:
        raise StateError("an int8 weight without its scales (SCB): load the quantised model again.")
    return (weight.data if data is None else data), scale  # type: ignore[union-attr, return-value]


def _set_int8(module: nn.Module, data: Tensor, scale: Tensor) -> None:
    weight, state = module.weight, module.state
    weight.data = data  # type: ignore[union-attr]
    holder = weight if getattr(weight, "SCB", None) is not None else state
    holder.CB, holder.SCB = data, scale  # type: ignore[union-attr]
