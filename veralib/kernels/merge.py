"""W0 + ΔW into a weight in one pass: W0 is read once, the new weight written once, ΔW never stored.

ΔW = Λ_b B Λ_d A is summed in float32. A and B in half precision are exact and d ∘ B isn't: it is split into two numbers of half
precision, so that the matrix units do the work and 16 bits of ΔW are right, more than the weight can hold.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from . import interpreted
from .mixed import _dot
from .words import check_columns


@triton.jit
def _merge(
    out, W0, A, B, d, b, sums, m, n, r, s_out_m, s_out_n, s_W0_m, s_W0_n, s_A, s_B,
    LENGTH: tl.constexpr, SPLIT: tl.constexpr, BI: tl.constexpr, BJ: tl.constexpr, BK: tl.constexpr,
):  # fmt: skip
    i = tl.program_id(0) * BI + tl.arange(0, BI)
    j = tl.program_id(1) * BJ + tl.arange(0, BJ)
    total = tl.zeros((BI, BJ), tl.float32)
    for start in range(0, LENGTH if LENGTH else r, BK):
        k = start + tl.arange(0, BK)
        left = tl.load(B + i.to(tl.int64)[:, None] * s_B + k[None, :], mask=(i < m)[:, None] & (k < r)[None, :], other=0.0)
        left = left.to(tl.float32) * tl.load(d + k, mask=k < r, other=0.0)[None, :]
        right = tl.load(A + k.to(tl.int64)[:, None] * s_A + j[None, :], mask=(k < r)[:, None] & (j < n)[None, :], other=0.0)
        if SPLIT:
            high = left.to(right.dtype)
            total = _dot(high, right, total, LENGTH > 0)
            total = _dot((left - high.to(tl.float32)).to(right.dtype), right, total, LENGTH > 0)
        else:
            total = _dot(left, right, total, LENGTH > 0)
    there = (i < m)[:, None] & (j < n)[None, :]
    total = total * tl.load(b + i, mask=i < m, other=0.0)[:, None]
    old = tl.load(W0 + i.to(tl.int64)[:, None] * s_W0_m + j.to(tl.int64)[None, :] * s_W0_n, mask=there, other=0.0).to(tl.float32)
    new = (old + total).to(out.dtype.element_ty)
    tl.store(out + i.to(tl.int64)[:, None] * s_out_m + j.to(tl.int64)[None, :] * s_out_n, new, mask=there)
    # Outside of the matrix both are zero.
    change = new.to(tl.float32) - old
    rest = change - total
    place = sums + (tl.program_id(0).to(tl.int64) * tl.num_programs(1) + tl.program_id(1)) * 3
    tl.store(place, tl.sum(tl.sum(change * total, axis=1), axis=0))
    tl.store(place + 1, tl.sum(tl.sum(total * total, axis=1), axis=0))
    tl.store(place + 2, tl.sum(tl.sum(rest * rest, axis=1), axis=0))


def tile(half: bool) -> dict[str, int]:
    """What a program does, by arithmetic alone so far. half: A and B in half precision, so that the matrix units take part."""
    if half:
        return {"BI": 128, "BJ": 128, "BK": 32, "num_warps": 8, "num_stages": 3}
    return {"BI": 64, "BJ": 64, "BK": 16, "num_warps": 4, "num_stages": 2}


def merge_into(
    out: Tensor, W0: Tensor, A: Tensor, B: Tensor, d: Tensor, b: Tensor, chosen: dict[str, int] | None = None
) -> Tensor:
    """out = W0 + Λ_b B Λ_d A, rounded once. out, W0: (m, n), any strides, may be one  A: (r, n)  B: (m, r)  d: (r,), float32, the
    scale in it  b: (m,), float32.

    Returns (3,) in float64: ⟨out − W0, ΔW⟩, ⟨ΔW, ΔW⟩, ‖out − W0 − ΔW‖², ΔW in float32. A, B in half precision must be exact.
    chosen: another tile than tile()'s.
    """
    check_columns(A=A, B=B, d=d, b=b)
    (m, n), r = out.shape, len(d)
    if not m or not n or not r:
        out.copy_(W0)
        return torch.zeros(3, dtype=torch.float64, device=out.device)
    half = A.dtype != torch.float32
    chosen = chosen or tile(half)
    grid = (triton.cdiv(m, chosen["BI"]), triton.cdiv(n, chosen["BJ"]))
    sums = torch.empty(*grid, 3, device=out.device)
    with torch.cuda.device_of(out):
        _merge[grid](
            out, W0, A, B, d, b, sums, m, n, r, *out.stride(), *W0.stride(), A.stride(0), B.stride(0),
            LENGTH=r if interpreted() else 0, SPLIT=half, **chosen,
        )  # fmt: skip
    return sums.sum((0, 1), dtype=torch.float64)
