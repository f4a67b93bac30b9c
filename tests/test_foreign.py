"""Linears that are no nn.Linear: packed as GPTQ packs them, a user's own, and HQQ's, against a model of their weights."""

import copy
import pickle

import pytest
import torch
from torch import nn

from tests.conftest import randomise, tiny_llama, tokens
from tests.trainers import logits, make_trainer, same, vectors
from veralib import AdapterMismatch, ConfigError, StateError, VeraConfig, VeraWarning, attach
from veralib.foreign import is_foreign
from veralib.linears import is_linear

ALL = VeraConfig(rank=8, targets="all-linear")


class PackedLinear(nn.Module):
    """As GPTQ's and AWQ's layers: whole numbers and scales in buffers, no weight."""

    def __init__(self, plain: nn.Linear) -> None:
        super().__init__()
        self.in_features, self.out_features = plain.in_features, plain.out_features
        scale = plain.weight.detach().abs().amax(1, keepdim=True) / 127
        self.register_buffer("qweight", (plain.weight.detach() / scale).round().to(torch.int8))
        self.register_buffer("scales", scale)
        self.register_buffer("bias", None if plain.bias is None else plain.bias.detach())

    def dequantize(self) -> torch.Tensor:
        return self.qweight * self.scales

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return nn.functional.linear(x, self.dequantize(), self.bias)


class NoGradientLinear(PackedLinear):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return super().forward(x.detach())


class CustomLinear(nn.Module):
    """A user's own, with a weight of floating point, (inputs, outputs)."""

    def __init__(self, plain: nn.Linear) -> None:
        super().__init__()
        self.in_features, self.out_features = plain.in_features, plain.out_features
        self.weight = nn.Parameter(plain.weight.detach().t().contiguous(), requires_grad=False)

    def dequantize(self) -> torch.Tensor:
        return self.weight.t()

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x @ self.weight


def hqq(plain: nn.Linear) -> nn.Module:
    found = pytest.importorskip("hqq.core.quantize")
    how = found.BaseQuantizeConfig(nbits=4, group_size=16)
    return found.HQQLinear(copy.deepcopy(plain), how, compute_dtype=torch.float32, device="cpu")


KINDS = {"packed": PackedLinear, "custom": CustomLinear, "hqq": hqq}


def replaced(model: nn.Module, make) -> tuple[nn.Module, nn.Module]:
    """(the model with other linears in its blocks, the model with their weights in plain ones)."""
    other = copy.deepcopy(model)
    for name, module in model.model.named_modules():
        if isinstance(module, nn.Linear):
            path, _, last = name.rpartition(".")
            new = make(module)
            setattr(other.model.get_submodule(path), last, new)
            module.weight.data.copy_(new.dequantize())
    return other, model


@pytest.fixture(params=KINDS)
def pair(request):
    return replaced(tiny_llama(), KINDS[request.param])


def test_outputs_gradients_and_rows_are_those_over_plain_weights(pair):
    ids, found = tokens(), []
    for model in pair:
        before = logits(model, ids)
        vera = attach(model, ALL)
        assert torch.equal(logits(model, ids), before)
        vera.add(VeraConfig(rank=4, targets=("q_proj", "down_proj")), "second")
        for seed, name in enumerate(("default", "second")):
            randomise(vera, name, seed, size=0.1)
        vera.use("default")
        one = logits(model, ids)
        with vera.rows(["second", None, "default", "second"]):
            mixed = logits(model, ids)
        model.train()(input_ids=ids, labels=ids).loss.backward()
        gradients = {n: p.grad for n, p in model.named_parameters() if p.grad is not None}
        found.append((one, mixed, torch.cat([g for n, g in gradients.items()])))
        assert (one - before).abs().max() > 1e-2 and len(gradients) == 2 * 14
    for mine, plain in zip(*found, strict=True):
        assert (mine - plain).norm() < 1e-5 * plain.norm()


def test_an_adapter_goes_to_a_file_and_onto_the_same_base_again(pair, tmp_path):
    model, plain = pair
    fresh = copy.deepcopy(model)
    vera = attach(model, ALL)
    randomise(vera, "default")
    wanted = logits(model, tokens())
    vera.save(tmp_path / "a.safetensors")
    kind = vera.adapter().base.quantised
    assert kind and not kind.startswith("Vera") and not vera.adapter().base.hashes
    with pytest.warns(VeraWarning):  # no weights to compare
        attach(fresh).load(tmp_path / "a.safetensors").use("default")
    assert torch.equal(logits(fresh, tokens()), wanted)
    for other in (copy.deepcopy(fresh), pickle.loads(pickle.dumps(fresh)) if "hqq" not in kind.lower() else fresh):
        assert torch.equal(logits(other, tokens()), wanted)
    with pytest.warns(VeraWarning, match="quantised"):
        attach(plain).load(tmp_path / "a.safetensors").use("default")
    assert (logits(plain, tokens()) - wanted).norm() < 1e-5 * wanted.norm()


def test_merging_is_refused_and_detaching_leaves_the_plain_class(pair):
    model, _ = pair
    before, kind = logits(model, tokens()), type(model.model.layers[0].mlp.up_proj)
    vera = attach(model, ALL)
    randomise(vera, "default")
    with pytest.raises(ConfigError, match=f"the weight of a {kind.__name__} .*without this quantisation to merge"):
        vera.merge()
    vera.detach()
    assert type(model.model.layers[0].mlp.up_proj) is kind and torch.equal(logits(model, tokens()), before)


def test_hqq_trains_under_the_trainer_and_goes_on_from_its_checkpoint(tmp_path):
    whole, cut = (replaced(tiny_llama(), hqq)[0] for _ in range(2))
    for model in (whole, cut):
        attach(model, ALL)
    fields = dict(logging_strategy="steps", logging_steps=4, save_strategy="steps", save_steps=4, max_steps=8)
    trainer = make_trainer(whole, tmp_path / "whole", **fields)
    trainer.train()
    losses = [line["loss"] for line in trainer.state.log_history if "loss" in line]
    assert losses[-1] < losses[0] and trainer.state.global_step == 8
    make_trainer(cut, tmp_path / "cut", **fields).train(resume_from_checkpoint=str(tmp_path / "whole" / "checkpoint-4"))
    assert same(vectors(whole), vectors(cut))


def test_a_layer_that_gives_no_gradient_is_refused_in_training_and_serves():
    model, plain = replaced(tiny_llama(), NoGradientLinear)
    vera = attach(model, ALL)
    randomise(vera, "default")
    over = attach(plain, ALL)
    randomise(over, "default")
    assert (logits(model, tokens()) - logits(plain, tokens())).abs().max() < 1e-4
    with pytest.raises(StateError, match=r"the NoGradientLinear at model\.layers\.\d\.\w+\.\w+ gives its input no gradient"):
        model.train()(input_ids=tokens(), labels=tokens())
    vera.add(ALL, "second")
    with vera.rows(["default", "second"] * 2), pytest.raises(StateError, match="gives its input no gradient"):
        model(input_ids=tokens(), labels=tokens())


def test_what_only_looks_like_a_linear_is_none():
    plain = nn.Linear(8, 8)

    class TwoInputsLinear(PackedLinear):
        def forward(self, x, group):
            return x

    class ParentLinear(PackedLinear):
        def __init__(self, plain):
            super().__init__(plain)
            self.inside = plain

    class Product(PackedLinear):
        pass

    class DictsLinear(PackedLinear):
        def __init__(self, plain):
            super().__init__(plain)
            self.in_features = {"default": 8}

    class BilinearUpsample(PackedLinear):
        pass

    class NonLinearity(PackedLinear):
        pass

    class WQLinear_GEMM(PackedLinear):
        pass

    assert is_foreign(WQLinear_GEMM(plain)) and not is_foreign(BilinearUpsample(plain)) and not is_foreign(NonLinearity(plain))
    assert is_foreign(PackedLinear(plain)) and is_linear(CustomLinear(plain)) and not is_foreign(plain)
    assert not any(is_linear(kind(plain)) for kind in (TwoInputsLinear, ParentLinear, Product, DictsLinear))
    model, _ = replaced(tiny_llama(), Product)
    with pytest.raises(ConfigError, match=r'"model\.layers\.0\.self_attn\.q_proj", a Product; veralib adapts nn\.Linear'):
        attach(model, VeraConfig(rank=8, targets=("q_proj",)))
    adapted = replaced(tiny_llama(), PackedLinear)[0]
    vera = attach(adapted, ALL)
    randomise(vera, "default")
    adapter = vera.adapter()
    with pytest.raises(AdapterMismatch, match=r"is a Product"):
        attach(model, VeraConfig(rank=8, targets=("lm_head",))).load(adapter, name="other")
