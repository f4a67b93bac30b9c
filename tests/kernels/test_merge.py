"""W0 + ΔW in one pass, against float64; whole models merged and switched with kernels on."""

import pytest
import torch

from tests.conftest import randomise, tiny_gpt2, tiny_llama, tokens
from tests.kernels.conftest import DTYPES, INTERPRET, any_seed, draw, error
from tests.reference import logits
from veralib import VeraConfig, attach, kernels
from veralib.basis import Basis
from veralib.kernels import plain

# Of ΔW, where d ∘ B is two numbers of half precision. The interpreter cuts both off after 8 bits: 2^-7 of 2^-7 is left away.
SPLIT = 2**-14


def operands(m, n, r, device, half):
    low = torch.bfloat16 if half else torch.float32
    basis = Basis(seed=any_seed())
    A, B = basis.A(r, n, device, low), basis.B(m, r, device, low)
    d, b = draw(r, device=device), draw(m, device=device)
    exact = (b.double()[:, None] * B.double() * d.double()) @ A.double()
    return A, B, d, b, exact


def stored(numbers, dtype):
    """Rounded once; the interpreter cuts bf16 off."""
    if INTERPRET and dtype == torch.bfloat16:
        return (numbers.float().view(torch.int32) & ~0xFFFF).view(torch.float32).to(dtype)
    return numbers.to(dtype)


@pytest.mark.parametrize("half", [True, False])
@pytest.mark.parametrize("m, n, r", [(1, 1, 1), (70, 33, 5), (37, 150, 40), (130, 200, 16)])
def test_delta_itself(device, m, n, r, half):
    """Into float32 zeros, so that no rounding of a weight hides an error; outside of the matrix nothing is written."""
    from veralib.kernels.merge import merge_into

    A, B, d, b, exact = operands(m, n, r, device, half)
    wide = torch.full((m + 1, n + 3), torch.nan, device=device)
    out, W0 = wide[:m, :n], torch.zeros(m, n, device=device)
    sums = merge_into(out, W0, A, B, d, b)
    bound = SPLIT if half else 2e-6
    assert error(out, exact) < bound and wide[m:].isnan().all() and wide[:, n:].isnan().all()
    assert sums.dtype == torch.float64 and error(sums[:2], exact.square().sum().expand(2)) < 3 * bound
    assert sums[2] <= bound**2 * sums[1]
    right = plain.merge_into(out, W0, A, B, d, b)
    assert error(out, exact) < 2e-6 and error(right[:2], exact.square().sum().expand(2)) < 1e-5


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("way", ["in place", "from elsewhere", "transposed", "rows"])
def test_a_weight_is_rounded_once_and_the_sums_say_what_that_did(device, dtype, way):
    from veralib.kernels.merge import merge_into

    m, n, r = 70, 90, 24
    A, B, d, b, exact = operands(m, n, r, device, dtype != torch.float32)
    W0 = draw(m, n, dtype=dtype, device=device) * 20
    if way == "transposed":
        out = W0.t().contiguous().t()
    elif way == "rows":
        out = torch.cat([W0, W0])[m : 2 * m]
    else:
        out = torch.full_like(W0, torch.nan) if way == "from elsewhere" else W0.clone()
    found = merge_into(out, W0 if way == "from elsewhere" else out, A, B, d, b)
    best = stored(W0.double() + exact, dtype)
    # Where ΔW's own error moves a sum over the middle between two neighbours, the other neighbour is taken: seldom.
    assert (out != best).float().mean() < (0.5 if dtype == torch.float32 else 0.02)
    assert error(out, best) < {torch.float32: 1e-7, torch.float16: 2e-4, torch.bfloat16: 1e-3}[dtype]
    change = best.double() - W0.double()
    right = torch.stack([(change * exact).sum(), exact.square().sum(), (change - exact).square().sum()])
    assert error(found[:2], right[:2]) < 1e-4
    assert abs(float(found[2] / right[2]) - 1) < (0.5 if dtype == torch.float32 else 1e-2)
    plainly = plain.merge_into(out, W0, A, B, d, b)
    assert error(out, W0.double() + exact) < {torch.float32: 1e-7, torch.float16: 4e-4, torch.bfloat16: 3e-3}[dtype]
    assert dtype == torch.bfloat16 or error(plainly[:2], right[:2]) < 1e-4


@pytest.mark.parametrize("m, n, r", [(0, 4, 2), (4, 0, 2), (4, 4, 0)])
def test_nothing_to_add(device, m, n, r):
    from veralib.kernels.merge import merge_into

    A, B, d, b, _ = operands(m, n, r, device, half=False)
    W0, out = draw(m, n, device=device), torch.full((m, n), torch.nan, device=device)
    assert merge_into(out, W0, A, B, d, b).tolist() == [0, 0, 0] and torch.equal(out, W0)


@pytest.mark.parametrize("dtype", [torch.float16, torch.float32])
@pytest.mark.parametrize("keep", ["cpu", "device", "disk"])
@pytest.mark.parametrize(("make", "targets"), [(tiny_llama, "all-linear"), (tiny_gpt2, ["c_attn:q", "c_attn:v", "c_fc"])])
def test_whole_models_merge_switch_and_come_back(switched_on, monkeypatch, make, targets, keep, dtype):
    from veralib.kernels import merge

    model = make().to(switched_on, dtype)
    vera = attach(model, VeraConfig(rank=12, targets=targets), name="a")
    vera.add(VeraConfig(rank=5, targets=targets, seed=1), "b")
    vera.add(VeraConfig(rank=4, targets=targets, basis="peft"), "p")
    for k, name in enumerate("abp"):
        randomise(vera, name, k)
    before = {k: v.clone() for k, v in model.state_dict().items()}
    launches, real = [], merge.merge_into
    monkeypatch.setattr(merge, "merge_into", lambda *a: launches.append(a) or real(*a))

    def tour():
        weights, reports = [], []
        for name, call in (("a", lambda n: vera.merge(n, keep)), ("b", vera.switch_merged), ("p", vera.switch_merged)):
            reports.append(call(name))
            weights.append(torch.cat([p.detach().flatten() for p in model.parameters()]).clone())
        vera.unmerge()
        assert all(torch.equal(v, before[k]) for k, v in model.state_dict().items())
        return weights, reports

    kernels.use(False)
    plainly, said = tour()
    assert not launches
    kernels.use()
    fused, also = tour()
    assert len(launches) == 3 * len(vera.member("a").layout.units)
    for x, y in zip(plainly, fused, strict=True):
        assert error(y, x) < (1e-6 if dtype == torch.float32 else 2e-4)
    for x, y in zip(said, also, strict=True):
        assert y.layers == x.layers and y.surviving == pytest.approx(x.surviving, abs=1e-3)
        assert y.error == pytest.approx(x.error, rel=0.5 if dtype == torch.float32 else 2e-2)
    assert logits(model, tokens().to(switched_on)).isfinite().all()
