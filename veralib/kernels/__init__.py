"""Triton kernels for GPUs, optional, each with its plain PyTorch form. No GPU has run them yet, so they are off by default.

`use(True)`, or VERALIB_KERNELS=1, turns them on; what they can't take (another device, float64, a subclass) keeps the
plain form. With TRITON_INTERPRET=1 in force from the process's start Triton's interpreter runs them on the CPU: so the tests hold
them to the plain forms. `python -m benchmarks.gpu.kernels` measures them against those.

    plain.py    the plain forms
    grow.py     A and B on the device, the bits of basis.py
    mixed.py    u = A x, and out += b ∘ B(d ∘ u) with an adapter for each row; A, B read as numbers or as bytes, or never stored
    folding.py  C = Λ_b B Λ_d, and ∂d, ∂b from P, each in one pass
    merge.py    W0 + ΔW into a weight in one pass
"""

import os
from functools import cache
from importlib.util import find_spec

import torch
from torch import Tensor

from ..errors import need
from . import plain

DTYPES = (torch.bfloat16, torch.float16, torch.float32)
_wanted: list[bool] = [os.environ.get("VERALIB_KERNELS", "") not in ("", "0")]


def use(wanted: bool = True) -> None:
    """Kernels on or off in this process. MissingPackage where Triton isn't installed."""
    if wanted and not installed():
        raise need("triton", "gpu", "veralib's GPU kernels")
    _wanted[0] = bool(wanted)


def wanted() -> bool:
    """Whether they are on."""
    return _wanted[0]


@cache
def installed() -> bool:
    """Whether Triton can be imported."""
    return find_spec("triton") is not None


@cache
def interpreted() -> bool:
    """Whether Triton's interpreter was asked for when this was first wanted to be known; it runs kernels on the CPU."""
    return os.environ.get("TRITON_INTERPRET", "") == "1"


def on(*tensors: Tensor) -> bool:
    """Whether kernels are to be used, and can take these tensors: all on one device."""
    return _wanted[0] and all(takes(t) and t.device == tensors[0].device for t in tensors) and installed()


def takes(tensor: Tensor) -> bool:
    """Whether a kernel can read this tensor: a plain one of bf16, fp16 or fp32, its columns side by side, on a GPU (or anywhere,
    interpreted)."""
    plain = type(tensor) in (Tensor, torch.nn.Parameter) and tensor.dtype in DTYPES
    beside = tensor.dim() > 0 and (tensor.shape[-1] < 2 or tensor.stride(-1) == 1)
    return plain and beside and (tensor.is_cuda or (interpreted() and tensor.device.type == "cpu"))


def fold(B: Tensor, d: Tensor, b: Tensor, scale: float, dtype: torch.dtype) -> Tensor:
    """C = Λ_b B Λ_d with the scale in it: plain.fold, by a kernel where they are on."""
    if on(B, d, b):
        from .folding import fold as fused

        return fused(B, d, b, scale, dtype)
    return plain.fold(B, d, b, scale, dtype)


def vector_gradients(P: Tensor, B: Tensor, d: Tensor, b: Tensor, scale: float, needs: tuple[bool, bool]) -> list[Tensor | None]:
    """∂d and ∂b, those that are needed: plain.vector_gradients, by a kernel where they are on."""
    if all(needs) and on(P, B, d, b):
        from .folding import vector_gradients as fused

        return list(fused(P, B, d, b, scale))
    return plain.vector_gradients(P, B, d, b, scale, needs)
