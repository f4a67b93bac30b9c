"""Modules trained in full: each adapter's copy is its own, whatever else adapts the model."""

import warnings

import pytest
import torch
from torch import nn

from tests.conftest import randomise, tiny_bert, tokens
from veralib import VeraConfig, VeraWarning, attach


class Head(nn.Module):
    def __init__(self):
        super().__init__()
        self.dense, self.drop, self.out = nn.Linear(8, 8), nn.Dropout(0.5), nn.Linear(8, 3)

    def forward(self, x):
        return self.out(self.drop(torch.tanh(self.dense(x))))


class Small(nn.Module):
    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.body, self.classifier = nn.Linear(8, 8), Head()

    def forward(self, x):
        return self.classifier(self.body(x))


def test_resident_heads_follow_train_and_eval():
    source = attach(Small(), VeraConfig(rank=2, targets=["body"], train_modules=["classifier"])).adapter()
    model = Small().train()
    vera = attach(model)
    vera.load(source, name="r")
    model.eval()
    vera.use("r")
    x = torch.randn(4, 8)
    assert torch.equal(model(x), model(x))
    model.train()
    assert not torch.equal(model(x), model(x))


def test_a_head_whose_linear_another_adapter_adapts_stays_its_own():
    a = attach(Small(), VeraConfig(rank=2, targets=["body"], train_modules=["classifier"]))
    randomise(a, "default", seed=1)
    with torch.no_grad():
        a.inside.head("classifier", a.member("default")).out.weight.add_(0.5)
    first = a.adapter()
    b = attach(Small(), VeraConfig(rank=2, targets=["dense"]))
    randomise(b, "default", seed=2)
    second = b.adapter()
    x = torch.randn(4, 8)
    expected = {}
    for name, adapter in (("a", first), ("b", second)):
        vera = attach(Small().eval())
        vera.load(adapter, name=name)
        vera.use(name)
        expected[name] = vera.model(x).detach()
    for order in (("a", "b"), ("b", "a")):
        for trainable in (False, True):
            vera = attach(Small().eval())
            for name in order:
                if order[0] == name and trainable:
                    vera.load({"a": first, "b": second}[name], name=name, trainable=name == "b")
                else:
                    vera.load({"a": first, "b": second}[name], name=name)
            for name in "ab":
                vera.use(name)
                torch.testing.assert_close(vera.model(x).detach(), expected[name])


def test_heads_of_hooked_modules_are_used():
    from accelerate.hooks import ModelHook, add_hook_to_module

    trained = attach(tiny_bert(), VeraConfig(rank=4, targets=["query"], train_modules=["classifier"]))
    with torch.no_grad():
        trained.inside.head("classifier", trained.member("default")).weight.add_(1.0)
    ids = torch.arange(5, 15)[None]
    expected = trained.model(input_ids=ids).logits
    model = tiny_bert()
    add_hook_to_module(model.classifier, ModelHook())
    vera = attach(model)
    vera.load(trained.adapter(), name="a")
    vera.use("a")
    torch.testing.assert_close(model(input_ids=ids).logits, expected)
    vera.detach()
    torch.testing.assert_close(model(input_ids=ids).logits, tiny_bert()(input_ids=ids).logits)


class Hands(nn.ModuleList):
    def forward(self, x):
        for module in self.children():
            x = module(x)
        return x


@pytest.mark.parametrize("head", [nn.Sequential, lambda *modules: Hands(modules)], ids=["Sequential", "ModuleList"])
def test_a_head_that_runs_all_its_children_runs_no_copy(head):
    torch.manual_seed(0)
    model, x = Small(), torch.randn(4, 8)
    model.classifier = head(nn.Linear(8, 8), nn.Tanh())
    base = model(x).detach()
    vera = attach(model, VeraConfig(rank=2, targets=["body"], train_modules=["classifier"]))
    randomise(vera, "default")
    copied = vera.inside.head("classifier", vera.member("default"))
    with torch.no_grad():
        copied[0].weight.mul_(2.0)
        expected = copied(model.body(x))
        assert torch.equal(model(x), expected) and not torch.allclose(expected, base)
        vera.add(VeraConfig(rank=2, targets=["body"], train_modules=["classifier"]), name="other")
        assert torch.equal(vera.inside.head("classifier", vera.member("other"))(x), model.classifier[1](model.classifier[0](x)))
        with vera.using(None):
            assert torch.equal(model(x), base)
        assert torch.equal(vera.reference()(x), base)
        with vera.rows(["default", None, None, "default"]):
            rows = model(x)
        torch.testing.assert_close(rows, torch.stack([expected[0], base[1], base[2], expected[3]]))
        vera.merge("default")
        torch.testing.assert_close(model(x), expected)
        vera.unmerge()
        vera.load(vera.adapter("default"), name="resident")
        vera.use("resident")
        torch.testing.assert_close(model(x), expected)
    model.train()
    vera.use("default")
    model(x).sum().backward()
    assert all(p.grad is not None for p in copied.parameters()) and "classifier.vera_0.0.weight" in model.state_dict()
    assert torch.equal(vera.detach()(x), base)


def test_the_reference_leaves_every_copy_of_a_head_in_its_mode():
    model = Small()
    vera = attach(model, VeraConfig(rank=2, targets=["body"], train_modules=["classifier"]))
    vera.load(vera.adapter(), name="resident")
    fleet = vera.fleet(VeraConfig(rank=2, targets=["body"], train_modules=["classifier"]), 2)
    fleet.add(["ann", "bob"])
    model.train()
    vera.reference()(torch.randn(4, 8))
    site = model.classifier._vera_head
    assert len(site.resident) == 2
    assert all(m.training for copied in (model, *site.resident.values()) for m in copied.modules())
    model.eval()
    vera.reference()(torch.randn(4, 8))
    assert not any(m.training for copied in (model, *site.resident.values()) for m in copied.modules())


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_a_head_in_float16_is_warned_of_which_adamw_makes_nan_of(dtype):
    model = tiny_bert().to(dtype)
    config = VeraConfig(rank=4, targets=["query"], train_modules=["classifier"])
    if dtype == torch.bfloat16:
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            vera = attach(model, config)
    else:
        with pytest.warns(VeraWarning, match='"classifier" is to train in full and is float16'):
            vera = attach(model, config)
    optimizer = torch.optim.AdamW(vera.parameter_groups(lr=1e-3))
    model.train()(input_ids=tokens(), labels=torch.tensor([0, 1, 2, 0])).loss.backward()
    optimizer.step()
    assert all(p.isfinite().all() for p in model.classifier.vera_0.parameters()) == (dtype == torch.bfloat16)
