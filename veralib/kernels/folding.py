"""C = Λ_b B Λ_d, and the gradients of d and b from P = gᵀ u: elementwise work over (m, r), in one pass each instead of five.

Both kernels read B as numbers; the sums are float32.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from . import interpreted
from .words import check_columns


@triton.jit
def _fold(out, B, d, b, scale, m, r, s_B, BI: tl.constexpr, BJ: tl.constexpr):
    i = tl.program_id(0) * BI + tl.arange(0, BI)
    j = tl.program_id(1) * BJ + tl.arange(0, BJ)
    there = (i < m)[:, None] & (j < r)[None, :]
    left = tl.load(b + i, mask=i < m, other=0.0)[:, None]
    right = (tl.load(d + j, mask=j < r, other=0.0) * scale)[None, :]
    B_tile = tl.load(B + i.to(tl.int64)[:, None] * s_B + j[None, :], mask=there, other=0.0).to(tl.float32)
    tl.store(out + i.to(tl.int64)[:, None] * r + j[None, :], (left * B_tile * right).to(out.dtype.element_ty), mask=there)


def fold(B: Tensor, d: Tensor, b: Tensor, scale: float, dtype: torch.dtype) -> Tensor:
    """plain.fold in one pass: reads B once, writes C once. d, b: float32, contiguous; B's rows are."""
    check_columns(B=B, d=d, b=b)
    m, r = B.shape
    out = torch.empty(m, r, dtype=dtype, device=B.device)
    if not out.numel():
        return out
    with torch.cuda.device_of(out):
        BI, BJ = 16, 256
        _fold[(triton.cdiv(m, BI), triton.cdiv(r, BJ))](out, B, d, b, float(scale), m, r, B.stride(0), BI=BI, BJ=BJ)
    return out


@triton.jit
def _gradients(part_d, grad_b, P, B, d, b, scale, m, r, s_P, s_B, LENGTH: tl.constexpr, BI: tl.constexpr, BJ: tl.constexpr):
    i = tl.program_id(0) * BI + tl.arange(0, BI)
    mine = i < m
    left = tl.load(b + i, mask=mine, other=0.0)
    total = tl.zeros((BI,), tl.float32)
    for start in range(0, LENGTH if LENGTH else r, BJ):
        j = start + tl.arange(0, BJ)
        there = mine[:, None] & (j < r)[None, :]
        P_tile = tl.load(P + i.to(tl.int64)[:, None] * s_P + j[None, :], mask=there, other=0.0).to(tl.float32)
        Q = P_tile * tl.load(B + i.to(tl.int64)[:, None] * s_B + j[None, :], mask=there, other=0.0).to(tl.float32)
        total += tl.sum(Q * tl.load(d + j, mask=j < r, other=0.0)[None, :], axis=1)
        tl.store(part_d + tl.program_id(0).to(tl.int64) * r + j, tl.sum(Q * left[:, None], axis=0) * scale, mask=j < r)
    tl.store(grad_b + i, total * scale, mask=mine)


def vector_gradients(P: Tensor, B: Tensor, d: Tensor, b: Tensor, scale: float) -> tuple[Tensor, Tensor]:
    """plain.vector_gradients in one pass over P and B. ∂d is added up in two steps, always in the same order."""
    check_columns(P=P, B=B, d=d, b=b)
    m, r = P.shape
    if not m or not r:
        return torch.zeros_like(d), torch.zeros_like(b)
    BI, BJ = 16, 128
    parts = triton.cdiv(m, BI)
    part_d = torch.empty(parts, r, dtype=torch.float32, device=P.device)
    grad_b = torch.empty(m, dtype=torch.float32, device=P.device)
    length = r if interpreted() else 0  # as in mixed.py
    with torch.cuda.device_of(P):
        _gradients[(parts,)](
            part_d, grad_b, P, B, d, b, float(scale), m, r, P.stride(0), B.stride(0), LENGTH=length, BI=BI, BJ=BJ
        )
    return part_d.sum(0), grad_b
