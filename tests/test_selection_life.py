"""What is kept between forwards (selections, vectors, A x, records) is never another call's."""

import pytest
import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

from tests.conftest import randomise, tiny_llama, tokens
from veralib import VeraConfig, attach


def two(model=None, targets="all-linear"):
    vera = attach(model or tiny_llama())
    for seed, name in enumerate("ab"):
        vera.add(VeraConfig(rank=4, targets=targets, seed=seed), name=name)
        randomise(vera, name, seed)
    return vera


def test_inference_mode_before_training():
    vera = two()
    ids = tokens(2)
    with torch.inference_mode(), vera.rows(["a", "b"]):
        vera.model(input_ids=ids)
    with vera.rows(["a", "b"]):
        vera.model(input_ids=ids, labels=ids).loss.backward()
    file = vera.adapter("a")
    with torch.inference_mode():
        vera.load(file, name="inside")
    vera.load(file, name="outside")
    assert torch.equal(
        vera.adapter("inside").vectors["model.layers.0.mlp.up_proj"][1], file.vectors["model.layers.0.mlp.up_proj"][1]
    )


def test_rows_see_a_state_that_was_loaded_into_residents():
    source = two()
    vera = attach(tiny_llama())
    vera.load(source.adapter("a"), name="a")
    ids = tokens(2)
    with torch.no_grad(), vera.rows(["a", None]):
        before = vera.model(input_ids=ids).logits
        state = {f"{u}.{k}": t * 2 for u, pair in source.adapter("a").vectors.items() for k, t in zip("db", pair, strict=True)}
        vera.model.load_state_dict(state)
        after = vera.model(input_ids=ids).logits
    vera.use("a")
    with torch.no_grad():
        torch.testing.assert_close(after[0], vera.model(input_ids=ids).logits[0], rtol=1e-4, atol=1e-5)
    assert not torch.equal(before[0], after[0]) and torch.equal(before[1], after[1])


@pytest.mark.parametrize("plan", ["merged-tokens", "apart-tokens", "merged-weights", "apart-weights"])
def test_a_transposed_x_isnt_taken_for_x(plan):
    torch.manual_seed(0)
    x = torch.randn(6, 6)
    grads = {}
    for which in (plan, "factored"):
        torch.manual_seed(1)
        model = nn.ModuleDict({"a": nn.Linear(6, 6), "b": nn.Linear(6, 6)})
        vera = attach(model, VeraConfig(rank=3, targets=["a", "b"]))
        randomise(vera, "default")
        vera.runtime.plan = which
        (model["a"](x).square().sum() + model["b"](x.t()).pow(3).sum()).backward()
        grads[which] = [p.grad for n, p in sorted(model.named_parameters()) if p.grad is not None]
    for one, other in zip(grads[plan], grads["factored"], strict=True):
        torch.testing.assert_close(one, other, rtol=1e-3, atol=1e-3)


class Checkpointed(nn.Module):
    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.first, self.backbone = nn.Linear(6, 6), nn.Sequential(nn.Linear(6, 6), nn.Tanh(), nn.Linear(6, 6))

    def inner(self, x):
        return checkpoint(self.backbone, x, use_reentrant=False)

    def forward(self, x):
        return self.inner(self.first(x))


def test_a_record_ends_with_its_backward():
    vera = two(Checkpointed())
    model, x = vera.model, torch.randn(3, 6)
    gradients = []
    for before in (False, True):
        model.zero_grad()
        if before:
            vera.use("a")
            model(x).sum().backward()
            model.zero_grad()
        vera.use("b")
        model.inner(x.clone().requires_grad_()).square().sum().backward()
        gradients.append([p.grad.clone() for p in vera.parameter_groups(name="b")[0]["params"] if p.grad is not None])
    assert gradients[0] and all(torch.equal(one, other) for one, other in zip(*gradients, strict=True))


def test_banks_of_adapters_that_left_are_freed():
    vera = attach(tiny_llama())
    for seed in range(12):
        other = attach(tiny_llama(), VeraConfig(rank=4, targets=["q_proj"], seed=seed)).adapter()
        vera.load(other, name="x")
        vera.remove("x")
    assert len(vera.inside.banks) <= 4 and len(vera.inside.layouts) <= 8
