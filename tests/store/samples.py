"""Adapters to store, and whether two are the same."""

import torch

from tests.conftest import randomise, tiny_llama
from veralib import VeraConfig, attach

KINDS = ("folder", "packed", "memory")


def trained(config=None, build=tiny_llama, seed=0):
    vera = attach(build(), config or VeraConfig(rank=8, targets="all-linear"))
    randomise(vera, "default", seed)
    return vera.adapter()


def equal(a, b) -> bool:
    same = a.config == b.config and a.basis == b.basis and a.base == b.base and dict(a.layer_ids) == dict(b.layer_ids)
    pairs = [(x, y) for u in a.vectors for x, y in zip(a.vectors[u], b.vectors[u], strict=True)]
    pairs += [(a.biases[n], b.biases[n]) for n in a.biases]
    pairs += [(t, b.modules[n][k]) for n, state in a.modules.items() for k, t in state.items()]
    return same and list(a.vectors) == list(b.vectors) and all(torch.equal(x, y) for x, y in pairs)
