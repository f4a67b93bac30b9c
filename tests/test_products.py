"""bf16 and fp16 on a processor that can't: products in float32, rounded once, and the trained op on top of them."""

import pytest
import torch

from veralib import VeraConfig, attach, products

LOW = [torch.bfloat16, torch.float16]


@pytest.fixture(params=[True, False], ids=["emulated", "native"])
def emulated(request, monkeypatch):
    monkeypatch.setattr(products, "_emulated", lambda dtype: request.param and dtype in LOW)
    return request.param


@pytest.mark.parametrize("dtype", LOW)
@pytest.mark.parametrize("shape", [(5, 7, 3), (1, 64, 1), (0, 4, 2), (33, 17, 129)])
def test_rounded_once_from_the_exact_sum(dtype, shape, monkeypatch):
    monkeypatch.setattr(products, "_emulated", lambda dtype: dtype in LOW)
    a, b, c = shape
    left, right = torch.randn(a, b).to(dtype), torch.randn(c, b).to(dtype)
    exact = left.double() @ right.double().t()
    for got in (products.product(left, right.t()), products.apply_frozen(left, right)):
        assert got.dtype == dtype
        # Half a unit in the last place, and what float32 loses in the sum.
        torch.testing.assert_close(got.double(), exact, rtol=torch.finfo(dtype).eps / 2, atol=1e-5 * b**0.5)
    out = torch.randn(a, c).to(dtype)
    torch.testing.assert_close(
        products.add_product(out.clone(), left, right.t()).double(), out.double() + exact, rtol=torch.finfo(dtype).eps, atol=1e-4
    )


@pytest.mark.parametrize("dtype", LOW)
def test_a_frozen_product_has_the_gradient_of_a_plain_one(emulated, dtype):
    x, W = torch.randn(2, 5, 8).to(dtype).requires_grad_(), torch.randn(3, 8).to(dtype)
    g = torch.randn(2, 5, 3).to(dtype)
    products.apply_frozen(x, W).backward(g)
    torch.testing.assert_close(x.grad.double(), g.double() @ W.double(), rtol=torch.finfo(dtype).eps, atol=1e-2)


@pytest.mark.parametrize("plan", ["factored", "apart-tokens", "apart-weights", "mixed"])
@pytest.mark.parametrize("autocast", [False, True])
def test_training_in_bf16_is_as_near_to_float64_either_way(emulated, plan, autocast):
    """Each plan's gradients of d, b and x: within bf16's rounding of a float64 model's, emulated or not."""

    def run(model, dtype, cast):
        vera = attach(model, VeraConfig(rank=6, b_initial=0.3, targets="all-linear"))
        vera.runtime.plan = None if plan == "mixed" else plan
        x = data.to(dtype).requires_grad_()
        with torch.autocast("cpu", torch.bfloat16, enabled=cast):
            if plan == "mixed":
                with vera.rows(["default"] * len(data)):
                    y = model(x)
            else:
                y = model(x)
        y.double().backward(g)
        return [x.grad.double(), *(p.grad.double() for p in model.parameters() if p.requires_grad)]

    torch.manual_seed(0)
    data, g = torch.randn(4, 9, 16), torch.randn(4, 9, 8, dtype=torch.float64)
    weights = {k: v.bfloat16().float() for k, v in _model().state_dict().items()}
    exact_model, low_model = _model(), _model()
    exact_model.load_state_dict(weights)
    low_model.load_state_dict(weights)
    data = data.bfloat16()
    exact = run(exact_model.double(), torch.float64, False)
    low = run(low_model if autocast else low_model.bfloat16(), torch.float32 if autocast else torch.bfloat16, autocast)
    assert len(low) == len(exact) == 5
    for found, expected in zip(low, exact, strict=True):
        assert (found - expected).norm() <= 0.02 * expected.norm()


def _model():
    torch.manual_seed(1)
    return torch.nn.Sequential(torch.nn.Linear(16, 12), torch.nn.Tanh(), torch.nn.Linear(12, 8))
