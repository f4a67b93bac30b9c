"""merge against the unmerged model, unmerge against the old bits."""

import copy

import pytest
import torch
from torch import nn

from tests.conftest import randomise, tiny_bert, tiny_gpt2, tiny_llama, tokens
from tests.reference import logits
from veralib import StateError, VeraConfig, VeraWarning, attach


def bits(model):
    return {k: v.clone() for k, v in model.state_dict().items()}


@pytest.mark.parametrize("keep", ["cpu", "device", "disk"])
@pytest.mark.parametrize(("make", "targets"), [(tiny_llama, "all-linear"), (tiny_gpt2, ["c_attn:q", "c_attn:v", "c_proj"])])
def test_merged_equals_unmerged_and_unmerge_gives_the_bits_back(make, targets, keep):
    model, ids = make(), tokens()
    vera = attach(model, VeraConfig(rank=16, targets=targets))
    randomise(vera, "default")
    before, apart = bits(model), logits(model, ids)
    report = vera.merge(keep=keep)
    assert report.surviving == pytest.approx(1.0, abs=1e-4) and report.layers == len(vera.member("default").layout.by_layer)
    assert (logits(model, ids) - apart).abs().max() < 1e-5
    vera.unmerge()
    assert all(torch.equal(v, before[k]) for k, v in model.state_dict().items())
    assert torch.equal(logits(model, ids), apart)


def test_switch_merged_ends_with_the_other_adapter_and_the_old_bits_underneath():
    model, ids = tiny_llama(), tokens()
    vera = attach(model, VeraConfig(rank=16, targets="all-linear"), name="a")
    vera.add(VeraConfig(rank=4, targets=["q_proj"], seed=1), "b")
    randomise(vera, "a")
    randomise(vera, "b", seed=1)
    before = bits(model)
    vera.use("b")
    want = logits(model, ids)
    vera.merge("a")
    vera.switch_merged("b")
    assert vera.merged == "b" and (logits(model, ids) - want).abs().max() < 1e-5
    vera.unmerge()
    assert all(torch.equal(v, before[k]) for k, v in model.state_dict().items())


def classifiers():
    """A BERT with three adapters: other layers each, one with a bias of its own and one with a trained head."""
    import dataclasses

    model = tiny_bert()
    vera = attach(model)
    vera.add(VeraConfig(rank=8, targets=["query", "value"]), "a")
    vera.add(VeraConfig(rank=4, targets=["value", "key"], seed=1, train_modules=["classifier"]), "b")
    vera.add(VeraConfig(rank=6, targets=["query", "dense"]), "plain c")
    for k, name in enumerate(vera.names):
        randomise(vera, name, seed=k)
    c = vera.adapter("plain c")
    layer = next(n for n in c.base.layers if n.endswith("query"))
    vera.load(dataclasses.replace(c, biases={layer: torch.randn(32, generator=torch.Generator().manual_seed(9))}), "c")
    return model, vera


@pytest.mark.parametrize("keep", ["cpu", "device", "disk"])
@pytest.mark.parametrize(("one", "other"), [("a", "b"), ("b", "a"), ("b", "c"), ("c", "a"), ("c", "c")])
def test_a_switch_is_a_fresh_merge_and_one_that_fails_anywhere_changes_nothing(monkeypatch, keep, one, other):
    from veralib import merging

    model, vera = classifiers()
    before = bits(model)
    vera.merge(other)
    fresh = bits(model)
    vera.unmerge()
    vera.merge(one, keep)
    merged = bits(model)
    real = merging._merge_layer
    for last in range(1, 4):

        def fails(tally, module, member, *rest, last=last):
            if member.name == other and len(tally.sums) == last:
                raise MemoryError
            real(tally, module, member, *rest)

        if one != other:  # it would fail on the way back too
            monkeypatch.setattr(merging, "_merge_layer", fails)
            with pytest.raises(MemoryError):
                vera.switch_merged(other)
            assert vera.merged == one and all(torch.equal(v, merged[k]) for k, v in model.state_dict().items())
    monkeypatch.setattr(merging, "_merge_layer", real)
    vera.switch_merged(other)
    assert vera.merged == other and all(torch.equal(v, fresh[k]) for k, v in model.state_dict().items())
    vera.unmerge()
    assert all(torch.equal(v, before[k]) for k, v in model.state_dict().items())


def test_a_merge_of_nan_says_so():
    model = tiny_llama()
    vera = attach(model, VeraConfig(rank=4, targets=["q_proj"]))
    randomise(vera, "default")
    with torch.no_grad():
        vera.member("default").vectors("model.layers.1.self_attn.q_proj")[0][2] = torch.nan
    with pytest.warns(VeraWarning, match="isn't finite"):
        report = vera.merge()
    assert report.surviving != report.surviving  # NaN
    vera.unmerge()


def test_low_precision_merge_reports_the_lost_share_of_delta():
    model = tiny_llama().bfloat16()
    vera = attach(model, VeraConfig(rank=16, targets="all-linear"))
    randomise(vera, "default", size=1e-3)
    before = bits(model)
    with pytest.warns(VeraWarning, match="rounded away"):
        report = vera.merge()
    assert report.surviving < 0.9
    vera.unmerge()
    assert all(torch.equal(v, before[k]) for k, v in model.state_dict().items())


def test_keep_none_merges_for_good():
    model = tiny_llama()
    vera = attach(model, VeraConfig(rank=4, targets=["q_proj"]))
    randomise(vera, "default")
    vera.merge(keep=None)
    with pytest.raises(StateError, match="keep=None"):
        vera.unmerge()


def test_tied_weight_is_refused_and_nothing_is_written():
    model = tiny_gpt2()
    vera = attach(model, VeraConfig(rank=4, targets=["c_proj", "lm_head"]))
    randomise(vera, "default")
    before = bits(model)
    with pytest.raises(StateError, match="tied"):
        vera.merge()
    assert all(torch.equal(v, before[k]) for k, v in model.state_dict().items())
    unmerged = logits(model, tokens())  # unmerged it works
    vera.use(None)
    assert not torch.allclose(unmerged, logits(model, tokens()))


def test_head_is_merged_with_its_adapter():
    model, ids = tiny_bert(), tokens()
    vera = attach(model, VeraConfig(rank=8, train_modules=["classifier"]))
    randomise(vera, "default")
    with torch.no_grad():
        vera.inside.head("classifier", vera.member("default")).weight.add_(0.5)
    before, apart = bits(model), logits(model, ids)
    vera.merge()
    assert (logits(model, ids) - apart).abs().max() < 1e-5
    vera.unmerge()
    assert all(torch.equal(v, before[k]) for k, v in model.state_dict().items())


def test_merged_model_saves_as_a_plain_one_that_transformers_loads(tmp_path):
    from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification

    for make, auto, heads in (
        (tiny_llama, AutoModelForCausalLM, ()),
        (tiny_bert, AutoModelForSequenceClassification, ("classifier",)),
    ):
        model, ids = make(), tokens()
        keys = set(model.state_dict())
        vera = attach(model, VeraConfig(rank=8, train_modules=heads))
        randomise(vera, "default")
        vera.merge()
        folder = tmp_path / make.__name__
        model.save_pretrained(folder)
        loaded = auto.from_pretrained(folder)
        assert set(loaded.state_dict()) == keys and type(loaded).__mro__[0].__module__.startswith("transformers.")
        assert torch.equal(logits(loaded.eval(), ids), logits(model, ids))
        assert len(vera.names) == 1 and any(p.requires_grad for p in model.parameters())


def test_a_failing_merge_puts_back_what_it_wrote(monkeypatch):
    import veralib.merge_report as merge_report

    model = tiny_llama()
    vera = attach(model, VeraConfig(rank=8, targets="all-linear"))
    randomise(vera, "default")
    before = bits(model)
    real, calls = merge_report.write_weight, []

    def fails(module, W):
        calls.append(1)
        if len(calls) == 4:
            raise RuntimeError("out of memory")
        real(module, W)

    monkeypatch.setattr(merge_report, "write_weight", fails)
    with pytest.raises(RuntimeError, match="out of memory"):
        vera.merge()
    assert vera.merged is None and all(torch.equal(v, before[k]) for k, v in model.state_dict().items())


def test_a_merged_copy_is_independent():
    model = tiny_llama()
    vera = attach(model, VeraConfig(rank=8, targets=["q_proj"]))
    randomise(vera, "default")
    other = copy.deepcopy(model)
    before = model.model.layers[0].self_attn.q_proj.weight.clone()
    vera.merge()
    from veralib import handle

    assert handle(other).merged is None and torch.equal(other.model.layers[0].self_attn.q_proj.weight, before)
    assert not torch.equal(model.model.layers[0].self_attn.q_proj.weight, before)


def test_a_full_disk_while_merging_to_disk_changes_nothing(monkeypatch, tmp_path):
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    model = tiny_llama()
    vera = attach(model, VeraConfig(rank=8, targets="all-linear"))
    randomise(vera, "default")
    before = {k: v.clone() for k, v in model.state_dict().items()}
    calls = []

    def full(*_):
        calls.append(1)
        if len(calls) == 5:
            raise OSError(28, "No space left on device")

    with monkeypatch.context() as m:
        m.setattr(torch, "save", full)
        with pytest.raises(StateError, match="Nothing was merged"):
            vera.merge(keep="disk")
    assert vera.merged is None and not list(tmp_path.iterdir())
    assert all(torch.equal(v, before[k]) for k, v in model.state_dict().items())
    vera.merge(keep="disk")
    twin = copy.deepcopy(model)
    for each in (model, twin):  # each has the old weights, whoever asks first
        handle_of(each).unmerge()
        assert all(torch.equal(v, before[k]) for k, v in each.state_dict().items())
    assert not list(tmp_path.iterdir())


def handle_of(model):
    from veralib import handle

    return handle(model)


class Autoencoder(nn.Module):
    def __init__(self, tie):
        super().__init__()
        self.enc, self.dec = nn.Linear(24, 16), nn.Linear(16, 24)
        both = torch.randn(768)
        if tie == "transposed":
            self.dec.weight.data = self.enc.weight.data.t()
        elif tie == "slices of one":
            self.enc.weight.data, self.dec.weight.data = both[:384].view(16, 24), both[384:].view(24, 16)

    def forward(self, x):
        return self.dec(torch.relu(self.enc(x)))


@pytest.mark.parametrize("targets", [["enc"], ["dec"], ["enc", "dec"]])
def test_weights_that_share_memory_without_being_one_parameter_are_refused(targets):
    model = Autoencoder("transposed")
    before = bits(model)
    vera = attach(model, VeraConfig(rank=4, targets=targets))
    randomise(vera, "default")
    with pytest.raises(StateError, match="same memory"):
        vera.merge()
    vera.detach()
    assert all(torch.equal(v, before[k]) for k, v in model.state_dict().items())
    model, x = Autoencoder("slices of one"), torch.randn(3, 24)
    vera = attach(model, VeraConfig(rank=4, targets=targets))
    randomise(vera, "default")
    with torch.no_grad():
        unmerged = model(x)
        vera.merge()
        torch.testing.assert_close(model(x), unmerged, rtol=1e-4, atol=1e-4)


def test_weights_that_are_computed_are_not_merged_into():
    from torch.nn.utils import parametrizations, prune

    for compute in (lambda m: prune.l1_unstructured(m, "weight", 0.5), parametrizations.weight_norm, parametrizations.orthogonal):
        model, x = Autoencoder("no"), torch.randn(3, 24)
        compute(model.enc)
        vera = attach(model, VeraConfig(rank=4, targets=["enc", "dec"]))
        randomise(vera, "default")
        with torch.no_grad():
            adapted = model(x)
            with pytest.raises(StateError, match="weight of enc: it is computed"):
                vera.merge()
            assert torch.equal(model(x), adapted)  # nothing was written
            vera.use(None)
            assert not torch.allclose(model(x), adapted)


def test_merging_a_tied_head_is_refused():
    model = tiny_gpt2()
    vera = attach(model, VeraConfig(rank=4, targets=["c_fc"], train_modules=["lm_head"]))
    with torch.no_grad():
        vera.inside.head("lm_head", vera.member("default")).weight.add_(1.0)
    with pytest.raises(StateError, match="tied"):
        vera.merge()


def test_no_merge_and_no_removal_while_rows_run():
    model = tiny_llama()
    vera = attach(model, VeraConfig(rank=4, targets=["q_proj"]), name="a")
    vera.add(VeraConfig(rank=4, targets=["q_proj"]), name="b")
    with vera.rows(["a", None]):
        with pytest.raises(StateError, match="hasn't ended"):
            vera.merge("b")
        with pytest.raises(StateError, match="hasn't ended"):
            vera.remove("a")
        vera.remove("b")
    vera.remove("a")


def test_a_switch_that_fails_keeps_what_was_merged(monkeypatch):
    from veralib import merging

    model = tiny_llama()
    vera = attach(model, VeraConfig(rank=4, targets=["q_proj"]), name="a")
    vera.add(VeraConfig(rank=4, targets=["q_proj"], seed=1), name="b")
    for name in "ab":
        randomise(vera, name)
    vera.merge("a")
    merged = model.model.layers[0].self_attn.q_proj.weight.clone()
    delta = merging._delta

    def broken(module, member, name):
        if member.name == "b":
            raise MemoryError
        return delta(module, member, name)

    monkeypatch.setattr(merging, "_delta", broken)
    with pytest.raises(MemoryError):
        vera.switch_merged("b")
    assert vera.merged == "a" and torch.equal(model.model.layers[0].self_attn.q_proj.weight, merged)


def test_merged_for_good_detaches_to_the_plain_merged_model():
    model = tiny_llama()
    vera = attach(model, VeraConfig(rank=8, targets="all-linear"))
    randomise(vera, "default")
    ids = tokens()
    unmerged = model(input_ids=ids).logits.detach()
    vera.merge("default", keep=None)
    with pytest.raises(StateError, match="merged for good"):
        vera.use(None)
    plain = vera.detach()
    assert type(plain) is type(tiny_llama()) and plain.state_dict().keys() == tiny_llama().state_dict().keys()
    torch.testing.assert_close(plain(input_ids=ids).logits, unmerged, rtol=1e-4, atol=1e-5)
