"""rows() and tokens(): a batch whose rows have different adapters, against one by one and the plain model."""

import pytest
import torch
from torch import nn

from tests.conftest import randomise, tiny_bert, tiny_llama, tokens
from tests.reference import logits, resident, three_adapters
from veralib import StateError, UnknownName, VeraConfig, attach


@pytest.mark.parametrize("residents", [False, True])
def test_mixed_batch_equals_one_by_one_and_the_base_row_is_the_plain_models(residents):
    plain, model = tiny_llama(), tiny_llama()
    vera = three_adapters(model)
    if residents:
        model = tiny_llama()
        vera = resident(model, vera)
    ids = tokens(6)
    names = ["small", None, "large", "other", "narrow", "small"]
    with vera.rows(names):
        mixed = logits(model, ids)
    for i, name in enumerate(names):
        vera.use(name)
        alone = logits(model, ids[i : i + 1])[0]
        assert (mixed[i] - alone).abs().max() < 1e-5
        if name is not None:
            vera.merge(name)
            assert (mixed[i] - logits(model, ids[i : i + 1])[0]).abs().max() < 1e-5
            vera.unmerge()
    assert torch.equal(mixed[1], logits(plain, ids)[1])
    assert (mixed[0] - mixed[5]).abs().max() > 1e-3


def test_generate_with_beams_and_return_sequences_keeps_each_rows_adapter():
    model = tiny_llama()
    vera = three_adapters(model)
    ids, names = tokens(4), ["small", None, "large", "other"]
    options = dict(max_new_tokens=6, num_beams=3, num_return_sequences=2, do_sample=False, attention_mask=torch.ones(1, 7).long())
    with vera.rows(names):
        mixed = model.generate(ids, **(options | {"attention_mask": torch.ones(4, 7).long()}))
        assert logits(model, ids).shape[0] == 4  # the repeated rows ended with generate
    different = set()
    for i, name in enumerate(names):
        vera.use(name)
        alone = model.generate(ids[i : i + 1], **options)
        assert torch.equal(mixed[2 * i : 2 * i + 2, : alone.shape[1]], alone)
        different.add(tuple(alone[0].tolist()[7:]))
    assert len(different) == 4


def test_tokens_gives_each_token_its_adapter():
    model = tiny_llama()
    vera = three_adapters(model)
    ids = tokens(2, 5)
    names = [["small", None, "large", "large", "other"], ["narrow", "small", None, "other", "large"]]
    flat = [n for row in names for n in row]
    with vera.tokens(flat):
        mixed = logits(model, ids)
    for name in {"small", "large"}:
        vera.use(name)
        # The first token attends to itself alone, so its logits depend on its own adapter only.
        alone = logits(model, ids)
        for row in range(2):
            assert ((mixed[row, 0] - alone[row, 0]).abs().max() < 1e-5) == (names[row][0] == name)
    order = ["small", "large", "other", "narrow"]
    with vera.tokens(torch.tensor([-1 if n is None else order.index(n) for n in flat]), names=order):
        assert torch.equal(logits(model, ids), mixed)


def test_row_gradients_reach_only_their_own_adapter_and_equal_training_alone():
    def train(rows):
        model = tiny_llama().double()
        vera = three_adapters(model)
        ids = tokens(3)
        names = ["small", "large", None]
        out = {}
        if rows:
            with vera.rows(names):
                model(input_ids=ids).logits.square().sum(dim=(1, 2)).sum().backward()
        else:
            for i, name in enumerate(names):
                vera.use(name)
                loss = model(input_ids=ids[i : i + 1]).logits.square().sum()
                if loss.requires_grad:
                    loss.backward()
        for name in vera.names:
            grads = [t.grad for o, d, b in vera.member(name).owners.values() for t in (o._parameters[d], o._parameters[b])]
            out[name] = None if grads[0] is None else torch.cat(grads)
        return out

    alone, mixed = train(False), train(True)
    assert mixed["other"] is None and mixed["narrow"] is None
    for name in ("small", "large"):
        assert (mixed[name] - alone[name]).norm() < 1e-5 * alone[name].norm()  # d and b are float32


@pytest.mark.parametrize("reentrant", [True, False])
def test_checkpointed_backward_after_the_with_recomputes_with_the_rows_of_its_forward(reentrant):
    def gradients(checkpoint):
        model = tiny_llama()
        vera = three_adapters(model)
        if checkpoint:
            model.gradient_checkpointing_enable({"use_reentrant": reentrant})
            model.enable_input_require_grads()
        model.train()
        losses = []
        for names in (["small", "large"], ["large", None]):
            with vera.rows(names):
                losses.append(model(input_ids=tokens(2), labels=tokens(2)).loss)
        vera.use("other")
        for loss in losses:  # two pending forwards with different rows, one backward each
            loss.backward()
        return torch.cat([p.grad for p in model.parameters() if p.requires_grad and p.grad is not None])

    plain = gradients(False)
    assert (gradients(True) - plain).norm() < 1e-5 * plain.norm()


@pytest.mark.parametrize("reentrant", [True, False])
def test_a_checkpointed_backward_over_two_forwards_with_different_rows(reentrant):
    gradients = []
    for checkpointed in (False, True):
        model = tiny_llama()
        vera = three_adapters(model)
        if checkpointed:
            model.gradient_checkpointing_enable({"use_reentrant": reentrant})
        model.train()
        total = 0
        for names in (["small", "large"], ["large", None]):
            with vera.rows(names):
                total = total + model(input_ids=tokens(2), labels=tokens(2)).loss
        vera.use("other")
        total.backward()
        gradients.append({n: p.grad for n, p in model.named_parameters() if p.grad is not None})
    assert gradients[0].keys() == gradients[1].keys() and len(gradients[0]) > 8
    for name, gradient in gradients[0].items():
        torch.testing.assert_close(gradients[1][name], gradient)


def test_inf_in_the_adapter_path_of_one_row_leaves_the_others_alone():
    plain, model = tiny_llama(), tiny_llama()
    vera = three_adapters(model)
    with torch.no_grad():
        for unit in vera.member("large").layout.units:
            vera.member("large").vectors(unit.unit)[1].fill_(float("inf"))
    ids = tokens(3)
    with vera.rows(["large", None, "small"]):
        mixed = logits(model, ids)
    assert not mixed[0].isfinite().all()
    assert torch.equal(mixed[1], logits(plain, ids)[1])
    vera.use("small")
    assert (mixed[2] - logits(model, ids)[2]).abs().max() < 1e-5


def test_head_copies_belong_to_their_adapters_and_rows_mix_them():
    model, ids = tiny_bert(), tokens(4)
    base = logits(model, ids)
    vera = attach(model, VeraConfig(rank=8, train_modules=["classifier"]), name="a")
    vera.add(VeraConfig(rank=8, seed=2), "b")
    for k, name in enumerate(vera.names):
        randomise(vera, name, seed=k)
    with torch.no_grad():
        vera.inside.head("classifier", vera.member("a")).weight.add_(1.0)
    adapter = vera.adapter("a")
    assert set(adapter.modules) == {"classifier"}
    vera.load(adapter, name="resident")
    single = {}
    for name in (*vera.names, None):
        vera.use(name)
        single[name] = logits(model, ids)
    assert torch.equal(single["a"], single["resident"]) and torch.equal(single[None], base)
    names = ["a", "b", None, "resident"]
    with vera.rows(names):
        mixed = logits(model, ids)
    for i, name in enumerate(names):
        assert (mixed[i] - single[name][i]).abs().max() < 1e-5
    groups = {g["name"]: g for g in vera.parameter_groups(lr=1e-2, lr_head=3e-3)}
    assert groups["head"]["lr"] == 3e-3 and {id(p) for p in groups["head"]["params"]} == {
        id(p) for p in vera.inside.head("classifier", vera.member("a")).parameters()
    }
    assert {id(p) for g in groups.values() for p in g["params"]} == {id(p) for p in model.parameters() if p.requires_grad}


def test_changing_x_in_place_between_two_layers_is_seen():
    class InPlace(nn.Module):
        def __init__(self):
            super().__init__()
            self.first, self.second = nn.Linear(4, 4), nn.Linear(4, 4)

        def forward(self, x):
            return self.first(x), self.second(x.add_(1))

    model = InPlace()
    vera = attach(model, VeraConfig(rank=3, targets="all-linear"))
    randomise(vera, "default")
    vera.runtime.plan = "factored"
    with torch.no_grad():
        x = torch.randn(2, 4)
        moved = x + 1
        assert torch.equal(model(x.clone())[1], model.second(moved))


def test_wrong_number_of_rows_names_the_layer_and_unknown_adapters_the_known():
    model = tiny_llama()
    vera = three_adapters(model)
    with vera.rows(["small", "large"]), pytest.raises(StateError, match=r"q_proj.*given 3 rows.*2"):
        model(input_ids=tokens(3))
    with pytest.raises(UnknownName, match='Did you mean "small"'):
        vera.use("smal")
    with pytest.raises(UnknownName), vera.rows(["nobody"]):
        pass
    assert vera.active is None


def test_rows_takes_any_iterable_and_tokens_an_index_of_the_batchs_shape():
    vera, ids = three_adapters(tiny_llama()), tokens(4)
    names = ["small", None, "large", "narrow"]
    with torch.no_grad():
        with vera.rows(names):
            expected = vera.model(input_ids=ids).logits
        with vera.rows(n for n in names):
            assert torch.equal(vera.model(input_ids=ids).logits, expected)
        known = list(vera.names)
        places = torch.tensor([-1 if n is None else known.index(n) for n in names])[:, None].expand(*ids.shape)
        with vera.tokens(places, names=known):
            torch.testing.assert_close(vera.model(input_ids=ids).logits, expected, rtol=1e-4, atol=1e-5)


def test_training_with_dropout_inside_rows_is_refused():
    vera = attach(tiny_llama(), VeraConfig(rank=4, targets=["q_proj"], dropout=0.5))
    vera.model.train()
    with vera.rows(["default", None]):
        with pytest.raises(StateError, match="no dropout"):
            vera.model(input_ids=tokens(2))
        with torch.no_grad():
            vera.model(input_ids=tokens(2))
        vera.model.eval()(input_ids=tokens(2), labels=tokens(2)).loss.backward()


@pytest.mark.parametrize("time_first", ["encoder", "transformer"])
def test_rows_of_a_time_first_model_are_refused_and_tokens_give_what_each_row_gives_alone(time_first):
    """As long a sequence as the batch is wide: nothing in the shapes would say that the first dimension is time."""
    if time_first == "encoder":
        model = nn.Sequential(nn.TransformerEncoder(nn.TransformerEncoderLayer(16, 2, 32), 1, enable_nested_tensor=False)).eval()
        run = model
    else:
        model = nn.Transformer(16, 2, 1, 1, 32).eval()
        run = lambda x: model(x, x)  # noqa: E731
    vera = attach(model)
    for k, name in enumerate("ab"):
        vera.add(VeraConfig(rank=4, targets=["linear1", "linear2"]), name=name)
        randomise(vera, name, seed=k, size=1.0)
    x, names = torch.randn(2, 2, 16), ["a", "b"]
    with torch.no_grad():
        with vera.rows(names), pytest.raises(StateError, match=r'sees \(time, batch, …\), since "[\w.]+" has batch_first=False'):
            run(x)
        with vera.tokens(names * 2):
            mixed = run(x)
        for i, name in enumerate(names):
            vera.use(name)
            assert (mixed[:, i] - run(x[:, i : i + 1])[:, 0]).abs().max() < 1e-5
    assert (mixed[:, 0] - mixed[:, 1]).abs().max() > 1e-2


class Pooled(nn.Module):
    """Batch first, but for an attention of its own that it transposes for."""

    def __init__(self):
        super().__init__()
        self.inner = nn.TransformerEncoderLayer(16, 2, 32, batch_first=True)
        self.attn = self.self_attn = nn.MultiheadAttention(16, 2)
        self.head = nn.Linear(16, 3)

    def forward(self, x):
        t = self.inner(x).transpose(0, 1)
        return self.head(self.attn(t, t, t, need_weights=False)[0].transpose(0, 1).mean(1))


@pytest.mark.parametrize("pooled", [False, True])
def test_rows_take_a_layer_that_says_batch_first(pooled):
    model = (Pooled() if pooled else nn.Sequential(nn.TransformerEncoderLayer(16, 2, 32, batch_first=True))).eval()
    vera = attach(model)
    vera.add(VeraConfig(rank=4, targets=["linear1", "linear2", *(["head"] if pooled else [])]), name="a")
    randomise(vera, "a", size=1.0)
    x = torch.randn(2, 3, 16)
    with torch.no_grad():
        with vera.rows(["a", None]):
            mixed = model(x)
        vera.use("a")
        assert (mixed[0] - model(x[:1])[0]).abs().max() < 1e-5
