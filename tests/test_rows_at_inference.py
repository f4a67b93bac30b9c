"""Mixed rows and single adapters without gradients: what is kept between steps, and where adapters lie in the bank."""

import dataclasses

import pytest
import torch
from torch import nn

import veralib
from veralib import bank, core
from veralib.autograd import UnitSpec, add_delta
from veralib.basis import Basis


@pytest.fixture
def two_chunks(monkeypatch):
    """(model, handle) with adapters "0" to "11" in two chunks of the bank."""
    monkeypatch.setattr(bank, "CHUNK_BYTES", 1)
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(12, 20), nn.Tanh(), nn.Linear(20, 12)).eval()
    vera = veralib.attach(model)
    vera.add(veralib.VeraConfig(rank=4, targets=["0", "2"]), "blank")
    blank = vera.adapter("blank")
    vera.remove("blank")
    for k in range(12):
        vectors = {u: (torch.randn(4), torch.randn(len(b))) for u, (_, b) in blank.vectors.items()}
        vera.load(dataclasses.replace(blank, vectors=vectors), str(k))
    assert len(vera.member("0").bank.chunks) == 2
    return model, vera


@torch.no_grad()
def alone(model, vera, x, names):
    out = []
    for row, name in zip(x, names, strict=True):
        with vera.using(name):
            out.append(model(row[None])[0])
    return torch.stack(out)


@pytest.mark.parametrize("names", [["9", "0", "11", "3"], ["9", "0", "9", "3"], ["9", None, "0", "9"]])
def test_adapters_of_several_chunks_equal_one_by_one(two_chunks, names):
    model, vera = two_chunks
    x = torch.randn(4, 12)
    with torch.no_grad(), vera.rows(names):
        first, second = model(x), model(x)
    with vera.rows(names):
        with_gradients = model(x.clone().requires_grad_())
    right = alone(model, vera, x, names)
    for out in (first, second, with_gradients):
        assert torch.allclose(out, right, atol=1e-5)


def test_a_slot_used_again_is_read_again(two_chunks):
    model, vera = two_chunks
    x, names = torch.randn(2, 12), ["3", "9"]
    with torch.no_grad(), vera.rows(names):
        before = model(x)
    other = vera.adapter("5")
    vera.remove("3")
    vera.load(other, "3")
    with torch.no_grad(), vera.rows(names):
        after = model(x)
    assert torch.allclose(after, alone(model, vera, x, ["5", "9"]), atol=1e-5)
    assert not torch.allclose(before[0], after[0], atol=1e-3)


def test_a_trained_adapter_in_rows_is_read_anew_every_step(two_chunks):
    model, vera = two_chunks
    vera.add(veralib.VeraConfig(rank=4, targets=["0", "2"], b_initial=1.0), "mine")
    x = torch.randn(2, 12)
    with torch.no_grad(), vera.rows(["mine", "9"]):
        before = model(x)
        for u in vera.member("mine").layout.units:
            vera.member("mine").vectors(u.unit)[0].add_(1.0)
        after = model(x)
    assert not torch.allclose(before[0], after[0], atol=1e-3) and torch.equal(before[1], after[1])


@pytest.mark.parametrize("rows", [None, slice(2, 8), torch.tensor([7, 0, 3, 1, 5, 2])], ids=["all", "slice", "spread"])
@pytest.mark.parametrize("tokens", [1, 3, 4, 9])
def test_delta_without_gradients_is_eq2_for_few_tokens_and_many(tokens, rows):
    m, n, r = (8 if rows is None else 6), 5, 4
    basis = Basis(seed=1)
    unit = UnitSpec("l", "l", rows, m, n, r, basis.scale(n, r), basis)
    x, d, b = (torch.randn(*s, dtype=torch.float64) for s in ((tokens, n), (r,), (m,)))
    out = torch.randn(tokens, 8, dtype=torch.float64)
    right = out.clone()
    right[:, slice(None) if rows is None else rows] += core.delta(x, unit.A(x), unit.B(x), d * unit.scale, b)
    add_delta(out, x @ unit.A(x).t(), unit, d, b)
    assert torch.allclose(out, right, rtol=1e-12)
