"""Eq. 2 of the paper, h = W0 x + Λ_b B Λ_d A x, in its forms, and the cost model that chooses between them.

T tokens; W0 (m, n); A (r, n), B (m, r), d (r,), b (m,). The scales s_A·s_B and config.scale are already in d. Plain PyTorch,
no state: autograd.py holds the same forms as trained ops, and the tests hold those to these.
"""

from dataclasses import dataclass
from typing import Literal

from torch import Tensor
from torch.nn import functional as F

Plan = Literal["factored", "merged-tokens", "merged-weights", "apart-tokens", "apart-weights"]


def delta(x: Tensor, A: Tensor, B: Tensor, d: Tensor, b: Tensor) -> Tensor:
    """ΔW x = b ∘ B(d ∘ A x), what the adapter adds. x: (..., n) -> (..., m). Source: paper, Eq. 2."""
    return b * F.linear(d * F.linear(x, A), B)


def delta_mixed(x: Tensor, A: Tensor, B: Tensor, d: Tensor, b: Tensor, index: Tensor) -> Tensor:
    """ΔW x where each row of x has an adapter of its own: two matmuls for all of them, two row gathers.

    x: (R, t, n); d: (K, r) and b: (K, m), one row an adapter; index: (R,), the adapter of each row -> (R, t, m).
    """
    return b[index][:, None] * F.linear(d[index][:, None] * F.linear(x, A), B)


def folded_B(B: Tensor, d: Tensor, b: Tensor) -> Tensor:
    """C = Λ_b B Λ_d, (m, r): then ΔW = C A, and no elementwise pass over the tokens is left."""
    return b[:, None] * B * d


def delta_weight(A: Tensor, B: Tensor, d: Tensor, b: Tensor) -> Tensor:
    """ΔW = Λ_b B Λ_d A of one layer, the matrix that merge adds.

    A: (r, n)  B: (m, r)  d: (r,)  b: (m,)  ->  (m, n), in A's dtype. Source: paper, Eq. 2.
    """
    return folded_B(B, d, b) @ A


@dataclass(frozen=True)
class Shape:
    """What the cost model looks at. exact: W0 is a plain dense tensor and its matmul true fp32 or fp64."""

    tokens: int
    m: int
    n: int
    r: int
    exact: bool = True
    dense: bool = True
    training: bool = True
    x_needs_grad: bool = True
    sharers: int = 1
    """How many adapted layers read this very x (q, k, v: 3): A x and its gradient are made once for all."""


def flops(plan: Plan, s: Shape) -> float:
    """Floating-point operations that the adapter adds to the frozen linear's, forward and backward (docs/PAPER.md, "Plans").

    2·(a·b·c) for each product of (a, b) and (b, c). Elementwise work is counted where it is as large as a matrix.
    """
    T, m, n, r = s.tokens, s.m, s.n, s.r
    tokens_to_rank, rank_to_out, form = 2 * T * n * r / s.sharers, 2 * T * m * r, 2 * m * n * r
    if plan == "factored":
        forward = tokens_to_rank + rank_to_out + T * m
        if not s.training:
            return forward
        gx = rank_to_out + (tokens_to_rank if s.x_needs_grad else 0)
        return forward + gx + rank_to_out
    way, _, first = plan.partition("-")
    apart = way == "apart"
    forward = form + 2 * m * n + (2 * T * m * n + T * m if apart else 0)
    if not s.training:
        return forward
    gx = (form + (2 * T * m * n if apart else 0)) if s.x_needs_grad else 0
    vectors = (tokens_to_rank + rank_to_out) if first == "tokens" else 2 * T * m * n + form
    return forward + gx + vectors


def choose_plan(s: Shape) -> Plan:
    """The plan with the fewest operations among those that are exact for this base weight.

    merged adds ΔW to W0 and needs true fp32 or fp64: on bf16's grid half of a ΔW a thousandth of W0's size is rounded away.
    Without a dense weight in reach (quantised, offloaded, sharded) it can't run at all.
    """
    plans: list[Plan] = ["factored", "apart-tokens", "apart-weights"]
    if s.dense and s.exact:
        plans += ["merged-tokens", "merged-weights"]
    return min(plans, key=lambda plan: flops(plan, s))
