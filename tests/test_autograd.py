"""Every plan of the trained op against the plain formula of the paper in float64."""

import itertools

import pytest
import torch
from torch.nn import functional as F

from veralib import core
from veralib.autograd import Apart, Factored, Merged, MixedDelta, UnitSpec
from veralib.basis import Basis

PLANS = ["factored", "merged-tokens", "merged-weights", "apart-tokens", "apart-weights"]
TOLERANCE = {torch.float64: 1e-12, torch.float32: 2e-5, torch.bfloat16: 3e-2, torch.float16: 4e-3}


def unit(m=6, n=5, r=4, rows=None, seed=0, name="layer"):
    basis = Basis(seed=seed)
    return UnitSpec(name, "layer", rows, m, n, r, basis.scale(n, r), basis)


def run(plan, x, W, bias, units, vectors, h=None):
    if plan == "factored":
        us = [F.linear(x, u.A(x)) for u in units]
        return Factored.apply(h, None if W is None else x, W, bias, units, tuple(range(len(units))), *us, *vectors)
    if plan.startswith("merged"):
        return Merged.apply(x, W, bias, units, plan.endswith("tokens"), *vectors)
    return Apart.apply(h, x, W, bias, units, plan.endswith("tokens"), *vectors)


def reference(x, W, bias, units, vectors):
    out = F.linear(x, W, bias)
    for k, u in enumerate(units):
        d, b = vectors[2 * k], vectors[2 * k + 1]
        y = core.delta(x, u.A(x), u.B(x), d * u.scale, b)
        out = out + (y if u.rows is None else torch.zeros_like(out).index_add(1, torch.arange(out.shape[1])[u.rows], y))
    return out


def case(units, T=7, m=6, n=5, dtype=torch.float64, seed=0):
    g = torch.Generator().manual_seed(seed)
    x, W, bias = (torch.randn(*s, generator=g, dtype=torch.float64) for s in ((T, n), (m, n), (m,)))
    vectors = [torch.randn(k, generator=g, dtype=torch.float64) for u in units for k in (u.r, u.m)]
    low = dtype if dtype.itemsize < 8 else torch.float64
    vectors = [v.to(torch.float32 if dtype.itemsize < 8 else dtype) for v in vectors]
    return x.to(low), W.to(low), bias.to(low), vectors


FUSED = (unit(m=2, rows=slice(0, 2), name="layer:q"), unit(m=3, rows=torch.tensor([2, 5, 3]), seed=1, name="layer:v"))


@pytest.mark.parametrize(
    "units", [(unit(),), (unit(r=9),), FUSED], ids=["whole", "rank above both sides", "parts of a fused linear"]
)
@pytest.mark.parametrize("plan", PLANS)
def test_plan_passes_gradcheck_and_equals_eq2(plan, units):
    x, W, bias, vectors = case(units)
    x.requires_grad_()
    vectors = [v.requires_grad_() for v in vectors]
    assert torch.allclose(run(plan, x, W, bias, units, vectors), reference(x, W, bias, units, vectors), rtol=1e-12, atol=1e-12)
    assert torch.autograd.gradcheck(lambda x, *v: run(plan, x, W, bias, units, v), (x, *vectors))


@pytest.mark.parametrize("plan", ["factored", "apart-tokens", "apart-weights"])
def test_plan_on_the_bases_own_output_passes_gradcheck(plan):
    units = (unit(),)
    x, W, bias, vectors = case(units)
    x.requires_grad_()
    vectors = [v.requires_grad_() for v in vectors]
    own = lambda x, *v: run(plan, x, None, None, units, v, h=F.linear(x, W, bias))  # noqa: E731
    assert torch.allclose(own(x, *vectors), reference(x, W, bias, units, vectors), rtol=1e-12, atol=1e-12)
    assert torch.autograd.gradcheck(own, (x, *vectors))


LOW = [(plan, dtype) for plan in PLANS for dtype in TOLERANCE if dtype == torch.float32 or not plan.startswith("merged")]


@pytest.mark.parametrize(("plan", "dtype"), [case for case in LOW if case[1] != torch.float64], ids=str)
def test_low_precision_gradients_are_float32_and_near_float64(plan, dtype):
    units = (unit(m=48, n=40, r=32),)
    x, W, bias, vectors = case(units, T=64, m=48, n=40, dtype=dtype)
    exact = [t.double().detach().requires_grad_() for t in (x, *vectors)]
    x, vectors = x.requires_grad_(), [v.requires_grad_() for v in vectors]
    out = run(plan, x, W, bias, units, vectors)
    true = reference(exact[0], W.double(), bias.double(), units, exact[1:])
    g = torch.randn(true.shape, generator=torch.Generator().manual_seed(1), dtype=torch.float64).to(dtype)
    out.backward(g)
    true.backward(g.double())
    assert [v.grad.dtype for v in vectors] == [torch.float32, torch.float32]
    for ours, right in [(out, true), *((t.grad, e.grad) for t, e in zip((x, *vectors), exact, strict=True))]:
        error = (ours.double() - right).norm() / right.norm()
        assert error < TOLERANCE[dtype], error


@pytest.mark.parametrize(("which", "want"), [(0, "x"), (1, "d"), (2, "b")])
@pytest.mark.parametrize("plan", PLANS)
def test_only_the_gradients_asked_for_are_made(plan, which, want):
    units = (unit(),)
    x, W, bias, vectors = case(units)
    leaves = [x, *vectors]
    leaves[which].requires_grad_()
    run(plan, leaves[0], W, bias, units, leaves[1:]).sum().backward()
    assert [t.grad is not None for t in leaves] == [k == which for k in range(3)]


def test_mixed_delta_passes_gradcheck_and_equals_the_formula():
    u = unit()
    g = torch.Generator().manual_seed(0)
    x = torch.randn(5, 3, 5, generator=g, dtype=torch.float64, requires_grad=True)
    d = torch.randn(3, 4, generator=g, dtype=torch.float64, requires_grad=True)
    b = torch.randn(3, 6, generator=g, dtype=torch.float64, requires_grad=True)
    index = torch.tensor([2, 0, 0, 1, 2])
    ours = lambda x, d, b: MixedDelta.apply(None, F.linear(x, u.A(x)), d, b, index, u.B(x))  # noqa: E731
    assert torch.allclose(ours(x, d, b), core.delta_mixed(x, u.A(x), u.B(x), d, b, index), rtol=1e-12)
    assert torch.allclose(ours(x, d, b)[3], core.delta(x[3], u.A(x), u.B(x), d[1], b[1]), rtol=1e-12)
    assert torch.autograd.gradcheck(ours, (x, d, b))
    h = torch.randn(5, 3, 6, generator=g, dtype=torch.float64, requires_grad=True)
    added = lambda h, x, d, b: MixedDelta.apply(h, F.linear(x, u.A(x)), d, b, index, u.B(x))  # noqa: E731
    assert torch.allclose(added(h, x, d, b), h + ours(x, d, b), rtol=1e-12)
    assert torch.autograd.gradcheck(added, (h, x, d, b))


@pytest.mark.parametrize("plan", PLANS)
def test_backward_saves_x_or_its_rank_r_image_and_nothing_else(plan):
    units = (unit(m=48, n=40, r=8),)
    x, W, bias, vectors = case(units, T=64, m=48, n=40, dtype=torch.float32)
    x.requires_grad_()
    vectors = [v.requires_grad_() for v in vectors]
    known = {t.untyped_storage().data_ptr() for t in (W, bias, *vectors, units[0].A(x), units[0].B(x))}
    saved = {}

    def pack(t):
        if t.untyped_storage().data_ptr() not in known:
            saved[t.untyped_storage().data_ptr()] = tuple(t.shape)
        return t

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
        out = run(plan, x, W, bias, units, vectors)
    assert list(saved.values()) == [(64, 8)] if plan == "factored" else list(saved) == [x.untyped_storage().data_ptr()]
    assert out.requires_grad


def test_delta_weight_is_the_matrix_of_delta():
    u = unit(m=6, n=5, r=9)
    x, _, _, (d, b) = case((u,))
    A, B = u.A(x), u.B(x)
    assert torch.allclose(core.delta(x, A, B, d, b), x @ core.delta_weight(A, B, d, b).t(), rtol=1e-12)


def test_cost_model_never_merges_into_an_inexact_weight():
    shapes = itertools.product((1, 64, 4096), (64, 512), (64, 512), (1, 64, 1024), (True, False), (True, False))
    for T, m, n, r, dense, training in shapes:
        plan = core.choose_plan(core.Shape(T, m, n, r, exact=False, dense=dense, training=training))
        assert not plan.startswith("merged")
        assert core.flops(plan, core.Shape(T, m, n, r, exact=False, training=training)) > 0
    assert core.choose_plan(core.Shape(4096, 512, 512, 1024)).startswith("merged")
    assert core.choose_plan(core.Shape(1, 512, 512, 64, training=False)) == "factored"
