"""Triton kernels for GPUs, optional, each beside its plain PyTorch form. No GPU has run them yet, so they are off by default.

`use(True)`, or VERALIB_KERNELS=1, turns them on; what they can't take (another device, float64, a subclass) keeps the
plain form. With TRITON_INTERPRET=1 in force from the process's start Triton's interpreter runs them on the CPU: so the tests hold
them to the plain forms. `python -m benchmarks.gpu.kernels` measures them against those.

    grow.py     A and B on the device, the bits of basis.py
    mixed.py    u = A x, and out += b ∘ B(d ∘ u) with an adapter for each row; A, B read as numbers or as bytes, or never stored
    folding.py  C = Λ_b B Λ_d, and ∂d, ∂b from P, each in one pass
"""

import os
from functools import cache
from importlib.util import find_spec

import torch
from torch import Tensor

from ..errors import need

DTYPES = (torch.bfloat16, torch.float16, torch.float32)
_wanted: list[bool] = [os.environ.get("VERALIB_KERNELS", "") not in ("", "0")]


def use(wanted: bool = True) -> None:
    """Kernels on or off in this process. MissingPackage where Triton isn't installed."""
    if wanted and not installed():
        raise need("triton", "gpu", "veralib's GPU kernels")
    _wanted[0] = wanted


@cache
def installed() -> bool:
    """Whether Triton can be imported."""
    return find_spec("triton") is not None


@cache
def interpreted() -> bool:
    """Whether Triton's interpreter was asked for when this was first wanted to be known; it runs kernels on the CPU."""
    return os.environ.get("TRITON_INTERPRET", "") == "1"


def on(*tensors: Tensor) -> bool:
    """Whether kernels are to be used, and can take these tensors."""
    return _wanted[0] and all(takes(t) for t in tensors) and installed()


def takes(tensor: Tensor) -> bool:
    """Whether a kernel can read this tensor: a plain one of bf16, fp16 or fp32 on a GPU (or anywhere, interpreted)."""
    plain = type(tensor) in (Tensor, torch.nn.Parameter)
    return plain and tensor.dtype in DTYPES and (tensor.is_cuda or (interpreted() and tensor.device.type == "cpu"))
