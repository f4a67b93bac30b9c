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


def both(run):
    """The same with kernels off and on."""
    out = []
    for wanted in (False, True):
        kernels.use(wanted)
        out.append(run())
    return out


@pytest.mark.parametrize("rows", [["ann", "bob", "cem", "ann"], ["ann", None, "bob", None], ["bob"] * 4])
def test_mixed_rows(served, rows, monkeypatch):
    from veralib.kernels import mixed

    model, vera = served
    ids, launches = tokens(4, 5).to(model.device), []
    monkeypatch.setattr(mixed, "_launch", lambda *a, launch=mixed._launch: launches.append(1) or launch(*a))

    @torch.no_grad()
    def run():
        with vera.rows(rows):
            return model(input_ids=ids).logits

    plain, fused = both(run)
    with torch.no_grad():
        base = model(input_ids=ids).logits
    assert error(fused, plain) < 1e-5 < error(fused, base) and launches


def test_one_token_with_one_adapter(served):
    model, vera = served

    @torch.no_grad()
    def run():
        with vera.using("bob"):
            return model(input_ids=tokens(1, 1).to(model.device)).logits

    plain, fused = both(run)
    assert error(fused, plain) < 1e-5


def test_gradients(served):
    model, vera = served
    vera.add(VeraConfig(rank=6, targets=MODELS["gpt2" if hasattr(model, "transformer") else "llama"][1]), "new")
    randomise(vera, "new")
    vera.use("new")
    ids = tokens(4, 6).to(model.device)

    def run():
        model.zero_grad()
        model(input_ids=ids, labels=ids).loss.backward()
        return [p.grad.clone() for name, p in model.named_parameters() if "vera_" in name]

    plain, fused = both(run)
    assert len(plain) > 4 and all(error(x, y) < 1e-5 for x, y in zip(fused, plain, strict=True))


def test_what_kernels_cannot_take_keeps_the_plain_form(switched_on):
    assert kernels.on(torch.ones(2, device=switched_on))
    assert not kernels.on(torch.ones(2, dtype=torch.float64, device=switched_on))
    assert not kernels.on(torch.ones(2, device="meta"))
    kernels.use(False)
    assert not kernels.on(torch.ones(2, device=switched_on))
