"""What an adapted model is compared with: plain logits, and ΔW added by hand; and a model with several adapters."""

import copy

import torch
from torch import nn

from tests.conftest import randomise
from veralib import VeraConfig, attach, handle

QV = VeraConfig(rank=8, targets=["q_proj", "v_proj"])


def logits(model, ids):
    with torch.no_grad():
        return model(input_ids=ids).logits


def by_hand(model, vera, name, ids):
    """The logits of a deep copy of the base with ΔW of the adapter added to its weights in float64."""
    adapter = vera.adapter(name)
    plain = copy.deepcopy(model)
    handle(plain).detach()
    plain = plain.double()
    for unit in adapter.vectors:
        layer, _, part = unit.partition(":")
        module = plain.get_submodule(layer)
        W = module.weight.data if isinstance(module, nn.Linear) else module.weight.data.t()
        delta = adapter.delta(unit, torch.float64)
        if part:
            third = W.shape[0] // 3
            start = "qkv".index(part) * third
            W[start : start + third] += delta
        else:
            W += delta
    return logits(plain, ids)


def three_adapters(model):
    vera = attach(model)
    vera.add(VeraConfig(rank=8, seed=0, targets=["q_proj", "v_proj"]), "small")
    vera.add(VeraConfig(rank=40, seed=5, targets="all-linear"), "large")
    vera.add(VeraConfig(rank=16, seed=0, targets=["q_proj", "o_proj"], levels="kaiming_normal"), "other")
    vera.add(VeraConfig(rank=6, seed=0, targets=["q_proj"]), "narrow")
    for k, name in enumerate(vera.names):
        randomise(vera, name, seed=k)
    return vera


def resident(model, trained):
    """The same adapters as residents of another copy of the base."""
    vera = attach(model)
    for name in trained.names:
        vera.load(trained.adapter(name), name=name)
    return vera
