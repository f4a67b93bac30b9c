"""Linears that are no nn.Linear, known by what they look like: the layers of GPTQ, AWQ, HQQ, AQLM, EETQ and kin, and users' own.

An adapter needs of such a layer no more than its own forward and its shape; its weight is neither read nor written.
"""

import functools
import inspect
import re

import torch
from torch import Tensor, nn

_NOT_FROM = ("torch.nn.", "transformers.models.", "peft.", "veralib.")
_NAMED = re.compile(r"(?<![Nn]on)(?<!Bi)(Linear|_linear)(?![a-z])|^linear")  # QuantLinear, WQLinear_GEMM; no BilinearUpsample
_POSITIONAL = (inspect.Parameter.POSITIONAL_ONLY, inspect.Parameter.POSITIONAL_OR_KEYWORD)


def is_foreign(module: nn.Module) -> bool:
    """Whether it calls itself a linear, says how many features go in and come out, has no modules inside and takes one x.

    transformers' model files are left out: what is called a linear there and is none has a product by groups or by experts.
    """
    return (
        not isinstance(module, nn.Linear)
        and _is_a_linears(plain_class(module))
        and type(getattr(module, "in_features", None)) is int
        and type(getattr(module, "out_features", None)) is int
        and not module._modules
    )


def plain_class(module: nn.Module) -> type:
    """A linear's class, below the one that attach puts over it."""
    return getattr(type(module), "_vera_plain", type(module))


@functools.cache
def _is_a_linears(cls: type) -> bool:
    if not _NAMED.search(cls.__name__) or cls.__module__.startswith(_NOT_FROM):
        return False
    try:
        given = list(inspect.signature(cls.forward).parameters.values())[1:]  # type: ignore[attr-defined]
    except (AttributeError, ValueError, TypeError):
        return False
    needed = [p for p in given if p.default is p.empty and p.kind not in (p.VAR_POSITIONAL, p.VAR_KEYWORD)]
    return len(needed) == 1 and needed[0].kind in _POSITIONAL


def device_of(module: nn.Module) -> torch.device:
    """Where a linear's weight lies, or the first tensor of one that has none; the CPU where that is the meta device."""
    weight = getattr(module, "weight", None)
    tensors = (weight,) if isinstance(weight, Tensor) else (*module.parameters(False), *module.buffers(False))
    device = next((t.device for t in tensors if t is not None), torch.device("cpu"))
    return torch.device("cpu") if device.type == "meta" else device
