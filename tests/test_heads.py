"""Modules trained in full: each adapter's copy is its own, whatever else adapts the model."""

import torch
from torch import nn

from tests.conftest import randomise, tiny_bert
from veralib import VeraConfig, attach


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
