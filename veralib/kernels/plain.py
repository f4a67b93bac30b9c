"""The plain PyTorch forms of the kernels: what runs where they are off, and what they are measured against.

merge_into alone isn't what runs: merging.py adds ΔW by the same steps, to quantised weights too.
"""

import torch
from torch import Tensor
from torch.nn import functional as F


def fold(B: Tensor, d: Tensor, b: Tensor, scale: float, dtype: torch.dtype) -> Tensor:
    """C = Λ_b B Λ_d with the scale in it, computed in at least float32. B: (m, r)  d: (r,)  b: (m,)  ->  (m, r) in dtype."""
    exact = torch.promote_types(dtype, d.dtype)
    bB = b.to(exact)[:, None] * B
    # Rounded by the product that makes it: on a GPU one pass over (m, r) fewer.
    return torch.mul(bB, d.to(exact) * scale, out=torch.empty(bB.shape, dtype=dtype, device=bB.device))


def vector_gradients(
    P: Tensor, B: Tensor, d: Tensor, b: Tensor, scale: float, needs: tuple[bool, bool] = (True, True)
) -> list[Tensor | None]:
    """∂d (r,) and ∂b (m,) from P = gᵀ u, (m, r): with Q = B ∘ P, ∂b = Q d and ∂d = Qᵀ b, the scale in both."""
    exact = torch.promote_types(P.dtype, d.dtype)
    Q = (P * B) if P.dtype == exact else P.to(exact).mul_(B)
    grad_d = torch.mv(Q.t(), b.to(exact)).mul_(scale).to(d.dtype) if needs[0] else None
    grad_b = torch.mv(Q, d.to(exact)).mul_(scale).to(b.dtype) if needs[1] else None
    return [grad_d, grad_b]


def mixed_add(out: Tensor, u: Tensor, d: Tensor, b: Tensor, index: Tensor | None, B: Tensor, per_row: int = 1) -> Tensor:
    """out += b_i ∘ B(d_i ∘ u), in place, where token t has adapter i = index[t // per_row]; nothing where that isn't 0 to K − 1.

    out: (T, m), may be some columns of a wider tensor  u: (T, r)  d: (K, r), the scale in it  b: (K, m)  B: (m, r). Without an
    index row k has adapter k. Source: paper, Eq. 2.
    """
    rows = torch.arange(len(u), device=u.device) // per_row
    own = rows if index is None else index[rows]
    mine = torch.nonzero((own >= 0) & (own < len(d)))[:, 0]
    left = (u[mine].float() * d[own[mine]].float()).to(u.dtype)
    y = F.linear(left, B.to(u.dtype)).float() * b[own[mine]].float()
    return out.index_copy_(0, mine, (out[mine].float() + y).to(out.dtype))


def merge_into(out: Tensor, W0: Tensor, A: Tensor, B: Tensor, d: Tensor, b: Tensor) -> Tensor:
    """out = W0 + Λ_b B Λ_d A, rounded once. out, W0: (m, n), may be one  A: (r, n)  B: (m, r)  d: (r,)  b: (m,).

    Returns (3,) in float64: ⟨out − W0, ΔW⟩, ⟨ΔW, ΔW⟩, ‖out − W0 − ΔW‖², ΔW in at least float32.
    """
    exact = torch.promote_types(out.dtype, d.dtype)
    delta = (b.to(exact)[:, None] * B.to(exact) * d.to(exact)) @ A.to(exact)
    before = W0.to(exact, copy=True)
    out.copy_(before + delta)
    change = out.to(exact) - before
    products = (change * delta, delta.square(), (change - delta).square())
    return torch.stack([p.sum(dtype=torch.float64) for p in products])
