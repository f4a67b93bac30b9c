"""The trained op: Eq. 2 with a frozen W0, in the plans of core.py, saving x or u = A x for backward and nothing else.

Matrices are (m, n) views; x and gradients are flattened to (T, ·). Every function takes `units`, the static facts of the
adapted parts of one linear, and their d, b interleaved at the end of its arguments. d and b are float32 leaves; C = Λ_b B Λ_d
is folded in float32 and cast to the matmuls' dtype; ∂d and ∂b are reduced in float32.
"""

import functools
import threading
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.autograd import Function
from torch.autograd.function import once_differentiable
from torch.nn import functional as F

from . import kernels
from .basis import Basis
from .products import add_product, product


@dataclass(frozen=True)
class UnitSpec:
    """One adapted linear, or one part of a fused one: the static facts of Eq. 2 there."""

    unit: str
    layer: str
    rows: slice | Tensor | None  # the outputs of the linear that this part owns; None: all
    m: int
    n: int
    r: int
    scale: float  # config.scale · s_A · s_B, multiplied into d
    basis: Basis

    def __hash__(self) -> int:
        return hash((self.unit, self.m, self.n, self.r, self.scale, self.basis))

    def A(self, like: Tensor, dtype: torch.dtype | None = None) -> Tensor:
        return self.basis.A(self.r, self.n, like.device, dtype or like.dtype)

    def B(self, like: Tensor, dtype: torch.dtype | None = None) -> Tensor:
        return self.basis.B(self.m, self.r, like.device, dtype or like.dtype)

    def C(self, d: Tensor, b: Tensor, like: Tensor, dtype: torch.dtype | None = None) -> Tensor:
        """Λ_b B Λ_d with the scale folded in, (m, r), in the matmuls' dtype; computed in at least float32."""
        dtype = dtype or like.dtype
        return kernels.fold(self.B(like, dtype), d, b, self.scale, dtype)


def _take(g: Tensor, rows: slice | Tensor | None) -> Tensor:
    if rows is None:
        return g
    return g[:, rows] if isinstance(rows, slice) else g.index_select(1, rows.to(g.device))


def _add_product(out: Tensor, rows: slice | Tensor | None, left: Tensor, right: Tensor) -> None:
    """out[:, rows] += left @ right, in place."""
    if rows is None:
        add_product(out, left, right)
    elif isinstance(rows, slice):
        add_product(out[:, rows], left, right)
    else:
        out.index_add_(1, rows.to(out.device), product(left, right))


def add_delta(out: Tensor, u: Tensor, unit: UnitSpec, d: Tensor, b: Tensor) -> None:
    """out[:, rows] += ΔW x, in place, without gradients. u = A x: (T, r), in the matmul's dtype.

    Folding C makes some five passes over (m, r), and saves about four over (T, m): with fewer tokens than ranks, one token
    of a decode step above all, Eq. 2 is taken in its own order.
    """
    if u.shape[0] >= unit.r:
        return _add_into(out, unit.rows, u, unit.C(d, b, u).t())
    if out.dtype == u.dtype and not isinstance(unit.rows, Tensor) and kernels.on(out, u, d, b):
        from .kernels.mixed import mixed_add

        mixed_add(out if unit.rows is None else out[:, unit.rows], u, (d * unit.scale)[None], b[None], None, unit.B(u), len(u))
        return None
    y = F.linear((u * (d * unit.scale)).to(u.dtype), unit.B(u))
    if isinstance(unit.rows, Tensor):
        out.index_add_(1, unit.rows.to(out.device), y.mul_(b).to(out.dtype))
    else:
        (out if unit.rows is None else out[:, unit.rows]).addcmul_(y.to(out.dtype), b.to(out.dtype))


def merged_weight(W: Tensor, units: tuple[UnitSpec, ...], vectors: tuple[Tensor, ...]) -> Tensor:
    """W0 + ΔW as a new tensor, (m, n). Only for float32 and float64: see core.choose_plan."""
    if len(units) == 1 and units[0].rows is None:
        return torch.addmm(W, units[0].C(vectors[0], vectors[1], W), units[0].A(W))
    out = W.clone(memory_format=torch.contiguous_format)
    for k, unit in enumerate(units):
        _add_delta(out, unit, vectors[2 * k], vectors[2 * k + 1])
    return out


def _add_delta(out: Tensor, unit: UnitSpec, d: Tensor, b: Tensor) -> None:
    C, A = unit.C(d, b, out), unit.A(out)
    if unit.rows is None:
        out.addmm_(C, A)
    elif isinstance(unit.rows, slice):
        out[unit.rows].addmm_(C, A)
    else:
        out.index_add_(0, unit.rows.to(out.device), C @ A)


def _vector_gradients(unit: UnitSpec, P: Tensor, d: Tensor, b: Tensor, needs: tuple[bool, bool]) -> list[Tensor | None]:
    """∂d and ∂b of one unit from P = gᵀ u, (m, r)."""
    return kernels.vector_gradients(P, unit.B(P), d, b, unit.scale, needs)


def _full_precision(backward: Callable) -> Callable:
    """Runs a backward without autocast: a user may call loss.backward() inside it, and the reductions must stay float32."""

    @functools.wraps(backward)
    def run(ctx: Any, g: Tensor) -> tuple:
        if not torch.is_autocast_enabled(g.device.type):
            return backward(ctx, g)
        with torch.autocast(g.device.type, enabled=False):
            return backward(ctx, g)

    return once_differentiable(run)


def _base(h: Tensor | None, x: Tensor | None, W: Tensor | None, bias: Tensor | None, dtype: torch.dtype) -> Tensor:
    """W0 x + bias, or a copy of the base's own output h where W0 isn't ours to multiply by."""
    if h is not None:
        return h.clone()
    return F.linear(x, W.to(dtype), None if bias is None else bias.to(dtype))  # type: ignore[arg-type, union-attr]


def _base_gradient(ctx: Any, g: Tensor, W: Tensor | None, x_at: int) -> Tensor | None:
    return product(g, W.to(g.dtype)).to(ctx.x_dtype) if W is not None and ctx.needs_input_grad[x_at] else None


def _add_into(out: Tensor, rows: slice | Tensor | None, left: Tensor, right: Tensor) -> None:
    """_add_product where out may be of another dtype than the matmul's."""
    if left.dtype == out.dtype:
        _add_product(out, rows, left, right)
    else:
        out[:, slice(None) if rows is None else rows] += product(left, right).to(out.dtype)


class Factored(Function):
    """W0 x + bias + C u for each unit. Saves u; x and h only receive the gradient that W0 passes on.

    Either h, the base's own output, or x, W0 and the bias are given. us: the distinct A x; which[k]: the one that unit k reads.
    """

    @staticmethod
    def forward(
        ctx: Any,
        h: Tensor | None,
        x: Tensor | None,
        W: Tensor | None,
        bias: Tensor | None,
        units: tuple[UnitSpec, ...],
        which: tuple[int, ...],
        *tensors: Tensor,
    ) -> Tensor:
        n_us = max(which) + 1
        us, vectors = tensors[:n_us], tensors[n_us:]
        out = _base(h, x, W, bias, us[0].dtype)
        for k, unit in enumerate(units):
            _add_into(out, unit.rows, us[which[k]], unit.C(vectors[2 * k], vectors[2 * k + 1], us[0]).t())
        ctx.save_for_backward(W, *tensors)
        ctx.units, ctx.which, ctx.n_us, ctx.x_dtype = units, which, n_us, None if x is None else x.dtype
        return out

    @staticmethod
    @_full_precision
    def backward(ctx: Any, g: Tensor) -> tuple:
        W, *tensors = ctx.saved_tensors
        n_us, low = ctx.n_us, g.to(tensors[0].dtype)
        gx = _base_gradient(ctx, low, W, x_at=1)
        needs = ctx.needs_input_grad[6:]
        grads = _factored_backward(ctx.units, ctx.which, tensors, n_us, low, needs[0], needs[n_us:])
        return (g if ctx.needs_input_grad[0] else None, gx, None, None, None, None, *grads)


def _factored_backward(units, which, tensors, n_us, g, needs_u, needs) -> list[Tensor | None]:
    us, vectors = tensors[:n_us], tensors[n_us:]
    grad_us: list[Tensor | None] = [None] * n_us
    grads: list[Tensor | None] = []
    for k, unit in enumerate(units):
        d, b = vectors[2 * k], vectors[2 * k + 1]
        gp, u = _take(g, unit.rows), us[which[k]]
        if needs_u:
            C = unit.C(d, b, gp)
            grad_us[which[k]] = product(gp, C) if grad_us[which[k]] is None else add_product(grad_us[which[k]], gp, C)
        unit_needs = (needs[2 * k], needs[2 * k + 1])
        grads += _vector_gradients(unit, product(gp.t(), u), d, b, unit_needs) if any(unit_needs) else [None, None]
    return grad_us + grads


def _dense_backward(units, vectors, x, g, tokens_first, needs) -> list[Tensor | None]:
    """∂d, ∂b of every unit from the saved x: P = gᵀ (x Aᵀ), or (gᵀ x) Aᵀ, whichever is cheaper."""
    grads: list[Tensor | None] = []
    for k, unit in enumerate(units):
        unit_needs = (needs[2 * k], needs[2 * k + 1])
        if not any(unit_needs):
            grads += [None, None]
            continue
        gp = _take(g, unit.rows)
        P = product(gp.t(), _rank_space(x, unit)) if tokens_first else product(product(gp.t(), x), unit.A(x).t())
        grads += _vector_gradients(unit, P, vectors[2 * k], vectors[2 * k + 1], unit_needs)
    return grads


class _BackwardMemo(threading.local):
    """The last A x that a backward computed: q, k and v saved the same x, and their backwards follow one another."""

    def __init__(self) -> None:
        self.last: dict[Any, Any] = {}


_memo = _BackwardMemo()


def _rank_space(x: Tensor, unit: UnitSpec) -> Tensor:
    last = _memo.last  # held by the callback too: CUDA's backward runs in another thread than its end
    known = last.get("x")
    place = (x.data_ptr(), x.shape, x.stride(), x.dtype, x._version)
    if known is None or last["place"] != place:
        if known is None and torch._C._current_graph_task_id() >= 0:
            torch.autograd.Variable._execution_engine.queue_callback(last.clear)  # type: ignore[attr-defined]
        last.clear()
        last["x"], last["place"] = x, place  # holding x keeps its memory from being another tensor's
    key = (unit.basis, unit.r, x.dtype)
    if key not in last:
        last[key] = product(x, unit.A(x).t())
    return last[key]


class Merged(Function):
    """(W0 + ΔW) x + bias: one matmul over the tokens each way, nearly independent of the rank. Saves x; float32, float64 only."""

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        W: Tensor,
        bias: Tensor | None,
        units: tuple[UnitSpec, ...],
        tokens_first: bool,
        *vectors: Tensor,
    ) -> Tensor:
        ctx.save_for_backward(x, W, *vectors)
        ctx.units, ctx.tokens_first = units, tokens_first
        return F.linear(x, merged_weight(W, units, vectors), bias)

    @staticmethod
    @_full_precision
    def backward(ctx: Any, g: Tensor) -> tuple:
        x, W, *vectors = ctx.saved_tensors
        gx = g @ merged_weight(W, ctx.units, tuple(vectors)) if ctx.needs_input_grad[0] else None
        grads = _dense_backward(ctx.units, vectors, x, g, ctx.tokens_first, ctx.needs_input_grad[5:])
        return (gx, None, None, None, None, *grads)


class Apart(Function):
    """W0 x + bias + ΔW x with ΔW formed but never added to W0, which in bf16 would round it away. Saves x.

    Either h, the base's own output, or W0 and the bias are given beside x.
    """

    @staticmethod
    def forward(
        ctx: Any,
        h: Tensor | None,
        x: Tensor,
        W: Tensor | None,
        bias: Tensor | None,
        units: tuple[UnitSpec, ...],
        tokens_first: bool,
        *vectors: Tensor,
    ) -> Tensor:
        out = _base(h, x, W, bias, x.dtype)
        for k, unit in enumerate(units):
            _add_into(out, unit.rows, x, _delta(unit, vectors, k, x).t())
        ctx.save_for_backward(x, W, *vectors)
        ctx.units, ctx.tokens_first, ctx.x_dtype = units, tokens_first, x.dtype
        return out

    @staticmethod
    @_full_precision
    def backward(ctx: Any, g: Tensor) -> tuple:
        x, W, *vectors = ctx.saved_tensors
        low = g.to(x.dtype)
        gx = _base_gradient(ctx, low, W, x_at=1)
        if ctx.needs_input_grad[1]:
            for k, unit in enumerate(ctx.units):
                gp, dW = _take(low, unit.rows), _delta(unit, vectors, k, x)
                gx = product(gp, dW) if gx is None else add_product(gx, gp, dW)
        grads = _dense_backward(ctx.units, vectors, x, low, ctx.tokens_first, ctx.needs_input_grad[6:])
        return (g if ctx.needs_input_grad[0] else None, gx, None, None, None, None, *grads)


def _delta(unit: UnitSpec, vectors: Sequence[Tensor], k: int, like: Tensor) -> Tensor:
    return product(unit.C(vectors[2 * k], vectors[2 * k + 1], like), unit.A(like))


class MixedDelta(Function):
    """h + b_i ∘ B(d_i ∘ u), where row k of the batch has adapter i = index[k]; without h the second term alone. Saves u, the
    index and the K adapters' vectors, and y = B(d_i ∘ u) unless `recompute` computes it anew in backward, for ∂b.

    h: (R, t, m) or None  u: (R, t, r)  d: (K, r), the scale already in it  b: (K, m)  index: (R,)  ->  (R, t, m).
    """

    @staticmethod
    def forward(
        ctx: Any, h: Tensor | None, u: Tensor, d: Tensor, b: Tensor, index: Tensor, B: Tensor, recompute: bool = True
    ) -> Tensor:
        y = product(u * d[index].to(u.dtype)[:, None], B.t())
        ctx.save_for_backward(u, d, b, index, B, None if recompute else y)
        b_rows = b[index].to(u.dtype)[:, None]
        if h is not None:
            return torch.addcmul(h, y, b_rows)
        return y.mul_(b_rows) if recompute else y * b_rows

    @staticmethod
    @_full_precision
    def backward(ctx: Any, g: Tensor) -> tuple:
        u, d, b, index, B, y = ctx.saved_tensors
        grad_h, g = g, g.to(u.dtype)
        d_rows, b_rows = d[index].to(u.dtype)[:, None], b[index].to(u.dtype)[:, None]
        gu = gd = gb = None
        if ctx.needs_input_grad[1] or ctx.needs_input_grad[2]:
            gdu = product(g * b_rows, B)
            if ctx.needs_input_grad[2]:
                gd = torch.zeros_like(d).index_add_(0, index, (gdu * u).sum(1, dtype=d.dtype))
            gu = gdu.mul_(d_rows) if ctx.needs_input_grad[1] else None
        if ctx.needs_input_grad[3]:
            gy = product(u * d_rows, B.t()).mul_(g) if y is None else y * g
            gb = torch.zeros_like(b).index_add_(0, index, gy.sum(1, dtype=b.dtype))
        return grad_h if ctx.needs_input_grad[0] else None, gu, gd, gb, None, None, None
