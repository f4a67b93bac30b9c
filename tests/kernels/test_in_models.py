"""Whole models with kernels on against the same models with them off."""

import dataclasses

import pytest
import torch

from tests.conftest import randomise, tiny_gpt2, tiny_llama, tokens
from tests.kernels.conftest import error
from veralib import VeraConfig, attach, kernels

MODELS = {"gpt2": (tiny_gpt2, ["c_attn:q", "c_attn:v", "c_fc"]), "llama": (tiny_llama, "all-linear")}


@pytest.fixture(params=list(MODELS))
def served(request, switched_on):
    """(model, handle) with adapters of two ranks and two seeds."""
    make, targets = MODELS[request.param]
    model = make().to(switched_on)
    vera = attach(model)
    for name, rank, seed in (("ann", 4, 0), ("bob", 20, 0), ("cem", 8, 1)):
        vera.add(VeraConfig(rank=rank, seed=seed, targets=targets), name)
        randomise(vera, name, rank)
        adapter = vera.adapter(name)
        vera.remove(name)
        vera.load(dataclasses.replace(adapter), name)
    return model, vera


def both(run, monkeypatch, kernel):
    """The same with kernels off and on. kernel: (module, name of a function) that the second must use and the first mustn't."""
    out, launches, of = [], [], getattr(*kernel)
    monkeypatch.setattr(*kernel, lambda *a, **k: launches.append(1) or of(*a, **k))
    for wanted in (False, True):
        kernels.use(wanted)
        assert not launches
        out.append(run())
    assert launches
    return out


@pytest.mark.parametrize("rows", [["ann", "bob", "cem", "ann"], ["ann", None, "bob", None], ["bob"] * 4])
def test_mixed_rows(served, rows, monkeypatch):
    from veralib.kernels import mixed

    model, vera = served
    ids = tokens(4, 5).to(model.device)

    @torch.no_grad()
    def run():
        with vera.rows(rows):
            return model(input_ids=ids).logits

    plain, fused = both(run, monkeypatch, (mixed, "_launch"))
    with torch.no_grad():
        base = model(input_ids=ids).logits
    assert error(fused, plain) < 1e-5 < error(fused, base)


def test_few_tokens_with_one_adapter(served, monkeypatch):
    from veralib.kernels import mixed

    model, vera = served

    @torch.no_grad()
    def run():
        with vera.using("bob"):
            return model(input_ids=tokens(3, 2).to(model.device)).logits

    plain, fused = both(run, monkeypatch, (mixed, "_launch"))
    assert error(fused, plain) < 1e-5


@pytest.mark.parametrize("name", ["fold", "vector_gradients"])
def test_gradients(served, monkeypatch, name):
    from veralib.kernels import folding

    model, vera = served
    vera.add(VeraConfig(rank=6, targets=MODELS["gpt2" if hasattr(model, "transformer") else "llama"][1]), "new")
    randomise(vera, "new")
    vera.use("new")
    ids = tokens(4, 6).to(model.device)

    def run():
        model.zero_grad()
        model(input_ids=ids, labels=ids).loss.backward()
        return [p.grad.clone() for name, p in model.named_parameters() if "vera_" in name]

    plain, fused = both(run, monkeypatch, (folding, name))
    assert len(plain) > 4 and all(error(x, y) < 1e-5 for x, y in zip(fused, plain, strict=True))


def test_a_part_of_a_wider_output_under_compile_is_changed_in_place(switched_on):
    """torch.compile may pad an output: what comes is then some columns of a wider tensor."""
    from torch import nn

    model = nn.Sequential(nn.Linear(12, 20)).to(switched_on)
    vera = attach(model)
    for name in ("ann", "bob"):
        vera.add(VeraConfig(rank=4, targets=["0"], seed=len(vera.names)), name)
        randomise(vera, name)
    x, wide = torch.randn(3, 12, device=switched_on), torch.zeros(3, 32, device=switched_on)
    with torch.no_grad(), vera.rows(["ann", None, "bob"]):
        right = model(x)
        wide[:, :20] = nn.functional.linear(x, model[0].weight, model[0].bias)
        torch.ops.veralib.adapt_(wide[:, :20], x, model[0]._vera.number)
    assert error(wide[:, :20], right) < 1e-6 and not wide[:, 20:].any()


def test_what_kernels_cannot_take_keeps_the_plain_form(switched_on):
    here = torch.ones(4, 6, device=switched_on)
    assert kernels.on(here) and kernels.on(here[:, 1:3], here[0])
    assert not kernels.on(here.double())
    assert not kernels.on(here.t()) and not kernels.on(here[:, ::2])
    assert not kernels.on(here, torch.ones(2, device="meta"))
    with torch._subclasses.FakeTensorMode():
        assert not kernels.on(torch.ones(2, device=switched_on))
    kernels.use(False)
    assert not kernels.on(here)
