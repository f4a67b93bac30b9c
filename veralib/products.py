"""Products of two matrices, on processors without bf16 or fp16 arithmetic too.

There torch multiplies such matrices as they lie at about 1 GFLOP/s, a fiftieth of its float32 speed (measured with torch
2.13 on AVX2; docs/LOG.md). So they are multiplied in float32, which is exact for each term, and the sum is rounded once.
"""

import functools
from typing import Any

import torch
from torch import Tensor
from torch.autograd import Function
from torch.autograd.function import once_differentiable


@functools.cache
def _emulated(dtype: torch.dtype) -> bool:
    """Whether this processor's products of the type are torch's plain loops."""
    known = {torch.bfloat16: "_is_mkldnn_bf16_supported", torch.float16: "_is_mkldnn_fp16_supported"}
    try:
        return dtype in known and not getattr(torch.ops.mkldnn, known[dtype])()
    except (AttributeError, RuntimeError):  # a torch that can't say
        return False


def emulated(t: Tensor) -> bool:
    """Whether products of tensors like this are emulated, and faster in float32."""
    return t.dtype != torch.float32 and t.device.type == "cpu" and _emulated(t.dtype)


def product(left: Tensor, right: Tensor) -> Tensor:
    """left @ right, in their dtype. (…, a, b), (b, c) -> (…, a, c)."""
    return (left.float() @ right.float()).to(left.dtype) if emulated(left) else left @ right


def add_product(out: Tensor, left: Tensor, right: Tensor) -> Tensor:
    """out += left @ right, in place. All of one dtype."""
    return out.add_(left.float() @ right.float()) if emulated(left) else out.addmm_(left, right)


class _Apply(Function):
    """x Wᵀ with a frozen W, and its gradient, as `product` makes them."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, W: Tensor) -> Tensor:
        ctx.save_for_backward(W)
        return product(x, W.t())

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, g: Tensor) -> tuple[Tensor, None]:
        return product(g, ctx.saved_tensors[0]), None


def apply_frozen(x: Tensor, W: Tensor) -> Tensor:
    """x Wᵀ where W is never trained. x: (…, n)  W: (r, n)  ->  (…, r)."""
    return _Apply.apply(x, W) if emulated(x) else torch.nn.functional.linear(x, W)
