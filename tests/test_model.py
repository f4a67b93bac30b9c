"""attach and the handle, against a plain reference, a merged model and the untouched base."""

import copy
import dataclasses
import io
import pickle

import numpy as np
import pytest
import torch
from torch import nn

import veralib
from tests.conftest import randomise, tiny_bert, tiny_gpt2, tiny_llama, tokens
from tests.reference import QV, by_hand, logits
from veralib import StateError, VeraConfig, VeraWarning, attach, handle


@pytest.mark.parametrize(
    ("make", "targets"),
    [
        (tiny_llama, ["q_proj", "v_proj"]),
        (tiny_llama, "all-linear"),
        (tiny_gpt2, ["c_attn:q", "c_attn:v"]),
        (tiny_gpt2, "all-linear"),
        (tiny_bert, None),
    ],
)
@pytest.mark.parametrize("basis", ["philox-u8", "peft"])
def test_adapted_logits_equal_a_model_with_delta_added_by_hand(make, targets, basis):
    model, ids = make(), tokens()
    before = logits(model, ids)
    vera = attach(model, VeraConfig(rank=40, targets=targets, basis=basis, seed=3))
    assert torch.equal(logits(model, ids), before) or (logits(model, ids) - before).abs().max() < 1e-6  # b is 0
    randomise(vera, "default")
    right = by_hand(model, vera, "default", ids)
    error = (logits(model, ids) - right).abs().max()
    assert error < 2e-5 * right.abs().max() and error < 0.02 * (right - before).abs().max()


@pytest.mark.parametrize("plan", ["factored", "merged-tokens", "merged-weights", "apart-tokens", "apart-weights"])
def test_every_plan_trains_alike(plan):
    def gradients(plan):
        model = tiny_llama()
        vera = attach(model, VeraConfig(rank=8, targets="all-linear"))
        randomise(vera, "default", size=0.1)
        vera.runtime.plan = plan
        model.train()(input_ids=tokens(), labels=tokens()).loss.backward()
        return torch.cat([p.grad for p in model.parameters() if p.requires_grad])

    reference = gradients("factored")
    assert reference.norm() > 0
    assert (gradients(plan) - reference).norm() < 1e-4 * reference.norm()


def test_attach_renames_no_module_and_no_key_and_detach_gives_the_model_back():
    model = tiny_bert()
    model.bert.encoder.layer[0].requires_grad_(False)
    keys, bits = list(model.state_dict()), {k: v.clone() for k, v in model.state_dict().items()}
    names, classes = [n for n, _ in model.named_modules()], [type(m) for m in model.modules()]
    flags = [p.requires_grad for p in model.parameters()]
    vera = attach(model, VeraConfig(rank=8, train_modules=["classifier"]))
    vera.add(VeraConfig(rank=4, targets=["dense"], seed=1), "other")
    assert [k for k in model.state_dict() if "vera_" not in k] == keys
    assert [n for n, _ in model.named_modules() if "vera_" not in n] == names
    assert all(isinstance(m, c) for m, c in zip([m for n, m in model.named_modules() if "vera_" not in n], classes, strict=True))
    assert not any("default" in k or "other" in k for k in model.state_dict())
    randomise(vera, "default")
    vera.merge("default")
    vera.unmerge()
    assert vera.detach() is model
    assert list(model.state_dict()) == keys and [type(m) for m in model.modules()] == classes
    assert all(torch.equal(v, bits[k]) for k, v in model.state_dict().items())
    assert [p.requires_grad for p in model.parameters()] == flags
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in model.modules())


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_vectors_stay_float32_when_the_model_is_cast(dtype):
    model = tiny_llama()
    vera = attach(model, QV)
    randomise(vera, "default", size=1e-6)
    values = [p.clone() for p in model.parameters() if p.requires_grad]
    model.to(dtype)
    assert {p.dtype for p in model.parameters() if p.requires_grad} == {torch.float32}
    assert model.lm_head.weight.dtype == dtype
    model.train()(input_ids=tokens(), labels=tokens()).loss.backward()
    grads = [p.grad for p in model.parameters() if p.requires_grad]
    assert {g.dtype for g in grads} == {torch.float32} and sum(float(g.norm()) for g in grads) > 0
    before = [g.clone() for g in grads]
    model.half()
    trained = [p for p in model.parameters() if p.requires_grad]
    assert {p.grad.dtype for p in trained} == {torch.float32}
    assert all(torch.equal(p, value) for p, value in zip(trained, values, strict=True))
    assert all(torch.equal(p.grad, g) for p, g in zip(trained, before, strict=True))
    assert vera.names == ("default",)


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16], ids=str)
def test_vectors_are_float32_whatever_torchs_default_dtype(dtype):
    model = tiny_llama()
    vera = attach(model, QV)
    randomise(vera, "default")
    adapter = vera.adapter()
    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        vera.add(QV, "more")
        vera.load(adapter, "resident")
    finally:
        torch.set_default_dtype(before)
    for name in ("more", "resident"):
        assert {t.dtype for pair in vera.adapter(name).vectors.values() for t in pair} == {torch.float32}
    for unit, pair in vera.adapter("resident").vectors.items():
        assert all(torch.equal(one, other) for one, other in zip(pair, adapter.vectors[unit], strict=True))


def test_bf16_gradient_with_fp32_weights_under_autocast():
    def gradients(autocast, inside):
        model = tiny_llama()
        vera = attach(model, VeraConfig(rank=16, targets="all-linear"))
        randomise(vera, "default", size=0.1)
        with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
            loss = model.train()(input_ids=tokens(), labels=tokens()).loss
            if inside:
                loss.backward()
        if not inside:
            loss.backward()
        grads = [p.grad for p in model.parameters() if p.requires_grad]
        assert {g.dtype for g in grads} == {torch.float32}
        return torch.cat(grads)

    exact = gradients(False, False)
    for inside in (False, True):
        assert (gradients(True, inside) - exact).norm() < 0.05 * exact.norm()


def test_deepcopy_and_pickle_have_their_own_adapters_and_share_A_and_B():
    model, ids = tiny_llama(), tokens()
    vera = attach(model, QV)
    randomise(vera, "default")
    vera.load(vera.adapter(), name="fixed")
    want = logits(model, ids)
    buffer = io.BytesIO()
    torch.save(model, buffer)
    buffer.seek(0)
    for other in (copy.deepcopy(model), pickle.loads(pickle.dumps(model)), torch.load(buffer, weights_only=False)):
        theirs = handle(other)
        assert theirs is not vera and theirs.model is other
        assert torch.equal(logits(other, ids), want)
        randomise(theirs, "default", seed=9)
        assert not torch.equal(logits(other, ids), want)
        theirs.use("fixed")
        assert torch.equal(logits(other, ids), want)
        theirs.remove("fixed")
        unit = vera.member("default").layout.units[0]
        mine, copied = unit.A(ids.float()), theirs.member("default").layout.units[0].A(ids.float())
        assert mine.data_ptr() == copied.data_ptr()
    assert torch.equal(logits(model, ids), want) and vera.names == ("default", "fixed")


def test_torch_encoder_layers_fast_path_is_off_while_adapted():
    torch.manual_seed(0)
    layer = nn.TransformerEncoderLayer(16, 2, 32, dropout=0.0, batch_first=True)
    model, x = nn.Sequential(nn.TransformerEncoder(layer, 2, enable_nested_tensor=False)).eval(), torch.randn(2, 5, 16)
    vera = attach(model, VeraConfig(rank=4, targets=["linear1", "linear2"]))
    with torch.no_grad():
        base = model(x)
        randomise(vera, "default")
        assert (model(x) - base).abs().max() > 1e-2
        vera.use(None)
        assert torch.allclose(model(x), base)


def test_multihead_attentions_out_proj_is_refused_and_skipped_by_all_linear():
    model = nn.Sequential(nn.TransformerEncoderLayer(16, 2, 32, batch_first=True))
    with pytest.raises(veralib.VeraError, match="MultiheadAttention"):
        attach(model, VeraConfig(rank=4, targets=["out_proj"]))
    vera = attach(model, VeraConfig(rank=4, targets="all-linear"))
    assert set(vera.member("default").layout.by_layer) == {"0.linear1", "0.linear2"}


class Idle(nn.Module):
    def __init__(self):
        super().__init__()
        self.used, self.idle = nn.Linear(4, 4), nn.Linear(4, 4)

    def forward(self, x):
        return self.used(x) + x @ self.idle.weight


def test_layers_the_first_forward_never_called_are_named_once():
    model = Idle()
    attach(model, VeraConfig(rank=2, targets="all-linear"))
    with pytest.warns(VeraWarning, match="idle"):
        model(torch.ones(1, 4))


def test_offloaded_base_with_accelerate_hooks_on_the_meta_device():
    from accelerate import cpu_offload

    ids = tokens()
    model = tiny_llama()
    reference = attach(model, QV)
    randomise(reference, "default")
    want = logits(model, ids)
    adapter = reference.adapter()
    offloaded = cpu_offload(tiny_llama(), execution_device=torch.device("cpu"))
    assert offloaded.model.layers[0].self_attn.q_proj.weight.device.type == "meta"
    before = logits(offloaded, ids)
    vera = attach(offloaded)
    vera.load(adapter, name="a", allow_other_base=True)
    vera.use("a")
    assert (logits(offloaded, ids) - want).abs().max() < 1e-5
    vera.detach()
    assert torch.equal(logits(offloaded, ids), before)


def test_one_module_under_two_parents_is_adapted_once():
    shared = nn.Linear(4, 4)
    model = nn.ModuleDict({"one": nn.Sequential(shared), "two": nn.Sequential(shared)})
    vera = attach(model, VeraConfig(rank=3, targets="all-linear"))
    assert len(vera.member("default").layout.units) == 1
    randomise(vera, "default")
    x = torch.randn(2, 4)
    assert torch.equal(model["one"](x), model["two"](x)) and not torch.allclose(
        model["one"](x), nn.functional.linear(x, shared.weight, shared.bias)
    )


def test_unique_bases_differ_by_layer():
    model, ids = tiny_llama(), tokens()
    vera = attach(model, VeraConfig(rank=8, targets=["q_proj"], sharing="unique"))
    randomise(vera, "default")
    units = vera.member("default").layout.units
    assert len({u.basis for u in units}) == len(units) and not torch.equal(*(u.A(ids.float()) for u in units[:2]))
    right = by_hand(model, vera, "default", ids)
    assert (logits(model, ids) - right).abs().max() < 2e-5 * right.abs().max()


@pytest.mark.parametrize(("train", "moving", "still"), [("d", "d", "b"), ("b", "b", "d")])
def test_ablations_train_one_vector_and_leave_the_other_at_its_constant(train, moving, still):
    model = tiny_llama()
    vera = attach(model, VeraConfig(rank=8, targets=["q_proj"], train=train))
    base = logits(tiny_llama(), tokens())
    assert torch.allclose(logits(model, tokens()), base, atol=1e-6)
    optimizer = torch.optim.SGD(vera.parameter_groups(lr=1.0))
    model.train()(input_ids=tokens(), labels=tokens()).loss.backward()
    optimizer.step()
    for unit in vera.member("default").layout.units:
        vectors = dict(zip("db", vera.member("default").vectors(unit.unit), strict=True))
        assert torch.equal(vectors[still], torch.ones_like(vectors[still]))
        assert vectors[moving].abs().sum() > 0


def test_dropout_acts_in_training_alone():
    model, ids = tiny_llama(), tokens()
    vera = attach(model, VeraConfig(rank=8, targets=["q_proj"], dropout=0.5))
    randomise(vera, "default", size=1.0)
    assert torch.equal(logits(model, ids), logits(model, ids))
    model.train()
    assert not torch.equal(logits(model, ids), logits(model, ids))


@pytest.mark.parametrize("tokens_of_x", [2, 4000])
def test_an_adapters_bias_of_another_dtype_is_added_whatever_the_plan(tokens_of_x):
    model, x = nn.Sequential(nn.Linear(16, 16)), torch.randn(tokens_of_x, 16)
    vera = attach(model, VeraConfig(rank=4, targets=["0"]))
    randomise(vera, "default")
    bias = torch.randn(16).bfloat16()
    expected = model(x) - model[0].bias + bias.float()
    vera.load(dataclasses.replace(vera.adapter(), biases={"0": bias}), "biased")
    vera.use("biased")
    torch.testing.assert_close(model(x), expected, rtol=1e-4, atol=1e-4)


def test_an_adapters_bias_under_autocast_leaves_the_output_in_its_dtype():
    model, x = nn.Sequential(nn.Linear(16, 16)), torch.randn(2, 3, 16)
    vera = attach(model, VeraConfig(rank=4, targets=["0"]))
    randomise(vera, "default")
    vera.load(dataclasses.replace(vera.adapter(), biases={"0": torch.randn(16)}), "biased")
    vera.use("biased")
    expected = model(x)
    with torch.autocast("cpu", torch.bfloat16):
        one = model(x)
        with vera.rows(["biased", "default"]):
            mixed = model(x)
    assert one.dtype == mixed.dtype == torch.bfloat16
    torch.testing.assert_close(one.float(), expected, rtol=0.03, atol=0.03)
    torch.testing.assert_close(mixed[0].float(), expected[0], rtol=0.03, atol=0.03)
    assert (mixed[1].float() - expected[1]).abs().max() > 0.3


@pytest.mark.parametrize("loaded", [False, True], ids=["trained", "resident"])
@pytest.mark.parametrize("plan", [None, "factored", "merged-tokens", "merged-weights", "apart-tokens", "apart-weights"])
def test_a_trained_bias_of_an_adapted_linear_gets_its_gradient(plan, loaded):
    for rows in (3, 40):
        torch.manual_seed(0)
        model, x = nn.Sequential(nn.Linear(8, 8), nn.Tanh(), nn.Linear(8, 8)), torch.randn(rows, 8)
        vera = attach(model, VeraConfig(rank=4, targets=["0", "2"]))
        randomise(vera, "default")
        if loaded:
            vera.load(vera.adapter(), "resident")
            vera.use("resident")
        vera.runtime.plan = plan
        biases = [model[0].bias.requires_grad_(), model[2].bias.requires_grad_()]
        plain = copy.deepcopy(model)
        plain.eval()
        handle(plain).merge()
        expected = torch.autograd.grad(plain(x).square().sum(), [plain[0].bias, plain[2].bias])
        for bias, grad in zip(torch.autograd.grad(model(x).square().sum(), biases), expected, strict=True):
            torch.testing.assert_close(bias, grad)


def test_a_model_called_by_parts_sees_what_numpy_wrote_into_x():
    class TwoLinears(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.a, self.b = torch.nn.Linear(32, 16), torch.nn.Linear(32, 16)

        def encode(self, x):
            return self.a(x) * self.b(x)

    model = TwoLinears()
    vera = attach(model, VeraConfig(rank=4, targets=["a", "b"]))
    randomise(vera, "default")
    for plan in (None, "factored"):
        vera.runtime.plan = plan
        buffer = np.random.default_rng(0).standard_normal((2, 32), np.float32)
        x = torch.from_numpy(buffer)  # numpy's writes leave no trace in it
        with torch.no_grad():
            model.encode(x)
            buffer[:] = 1 - buffer
            assert torch.equal(model.encode(x), model.encode(x.clone()))
            with vera.rows(["default", None]):
                model.encode(x)
                buffer[:] = 1 - buffer
                assert torch.equal(model.encode(x), model.encode(x.clone()))


def test_layers_that_read_the_same_x_share_one_product_with_A():
    model = tiny_llama()
    vera = attach(model, VeraConfig(rank=8, targets=["q_proj", "k_proj", "v_proj", "gate_proj", "up_proj"]))
    vera.runtime.plan = "factored"
    made = []
    original = vera.runtime.rank_space
    kept = []

    def spy(x, flat, unit, rows=None):
        u = original(x, flat, unit, rows)
        kept.append(u)
        made.append(id(u))
        return u

    vera.runtime.rank_space = spy
    model.train()(input_ids=tokens(), labels=tokens()).loss.backward()
    assert len(made) == 10 and len(set(made)) == 4  # per block: one for q, k, v and one for gate, up


def test_state_errors_leave_everything_as_it_was():
    model = tiny_llama()
    vera = attach(model, QV)
    randomise(vera, "default")
    with pytest.raises(StateError, match="attached already"):
        attach(model, QV)
    with pytest.raises(StateError, match="already"):
        vera.add(QV, "default")
    vera.merge()
    merged = logits(model, tokens())
    for wrong in (
        lambda: vera.merge(),
        lambda: vera.use(None),
        lambda: vera.rows([None]),
        lambda: vera.add(QV, "x"),
        lambda: vera.detach(),
        lambda: vera.remove("default"),
    ):
        with pytest.raises(StateError):
            wrong()
    with pytest.raises(StateError, match="unmerge"):
        model.train()(input_ids=tokens())
    assert torch.equal(logits(model.eval(), tokens()), merged)
    vera.unmerge()
    with pytest.raises(StateError, match="nothing"):
        vera.unmerge()


def test_failed_attach_changes_nothing():
    model = tiny_llama()
    flags, classes = [p.requires_grad for p in model.parameters()], [type(m) for m in model.modules()]
    for config in (VeraConfig(targets=["nothing_like_it"]), VeraConfig(targets=["q_proj"], train_modules=["classifier"])):
        with pytest.raises(veralib.VeraError):
            attach(model, config)
        assert [p.requires_grad for p in model.parameters()] == flags and [type(m) for m in model.modules()] == classes
    model.lm_head.to("meta")
    keys = list(model.state_dict())
    with pytest.raises(veralib.ConfigError, match=r'"lm_head".*offloaded.*one device'):
        attach(model, VeraConfig(targets=["q_proj"], train_modules=["lm_head"]))
    assert list(model.state_dict()) == keys and [type(m) for m in model.modules()] == classes
    with pytest.raises(StateError, match="no adapters"):
        handle(model)


def test_slow_learning_rate_is_warned_about_once():
    model = tiny_llama()
    vera = attach(model, QV)
    optimizer = torch.optim.AdamW(vera.parameter_groups(lr=1e-5))
    model.train()(input_ids=tokens(), labels=tokens()).loss.backward()
    with pytest.warns(VeraWarning, match="learning rate of 1e-05"):
        optimizer.step()
    with pytest.warns() as caught:
        optimizer.step()
        import warnings

        warnings.warn("the only one")
    assert len(caught) == 1


def test_reference_is_the_base_without_a_copy():
    model, ids = tiny_llama(), tokens()
    base = logits(model, ids)
    vera = attach(model, QV)
    randomise(vera, "default")
    reference = vera.reference()
    assert not list(reference.parameters())
    assert torch.equal(reference(input_ids=ids).logits, base)
    assert not torch.equal(logits(model, ids), base)
