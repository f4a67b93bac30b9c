"""Checkpoints of transformers' Trainer: the adapter alone, and a resumed run that ends with the same bits."""

import warnings

import pytest
import torch

from tests.conftest import randomise, tiny_bert, tiny_llama, tokens
from tests.trainers import NOT_THE_MODEL, QV, labelled_rows, logits, make_trainer, same, vectors
from veralib import AdapterFileError, AdapterMismatch, StateError, VeraConfig, VeraWarning, attach, handle, load_adapter


def test_checkpoint_is_the_adapter_file_and_nothing_else_of_the_model(tmp_path):
    model = tiny_llama()
    vera = attach(model, QV)
    make_trainer(model, tmp_path, save_strategy="steps", save_steps=4).train()
    checkpoint = tmp_path / "checkpoint-4"
    names = {f.name for f in checkpoint.rglob("*") if f.is_file()}
    assert names - NOT_THE_MODEL == {"model.safetensors"}
    alone = vera.save(tmp_path / "adapter")
    assert (checkpoint / "model.safetensors").read_bytes() == alone.read_bytes()
    # Two moments for each entry of d and b, and pickle's overhead: none for A, B or the base.
    assert (checkpoint / "optimizer.pt").stat().st_size < 2 * 4 * vera.adapter().parameters + 20_000


def test_from_pretrained_refuses_a_checkpoint_and_vera_load_takes_it(tmp_path):
    from transformers import AutoModelForCausalLM

    model = tiny_llama()
    vera = attach(model, QV)
    make_trainer(model, tmp_path, save_strategy="steps", save_steps=4).train()
    checkpoint = tmp_path / "checkpoint-4"
    with pytest.raises((OSError, ValueError)):  # no config.json: no chance of a base model of random weights
        AutoModelForCausalLM.from_pretrained(checkpoint)
    assert load_adapter(checkpoint).config == QV
    other = tiny_llama()
    attach(other).load(checkpoint, name="trained")
    handle(other).use("trained")
    assert torch.equal(logits(other, tokens()), logits(model, tokens())) and vera.names == ("default",)


def test_a_base_models_folder_is_no_adapter(tmp_path):
    tiny_llama().save_pretrained(tmp_path)
    with pytest.raises(AdapterFileError, match=r"model.safetensors .* no veralib adapter"):
        attach(tiny_llama()).load(tmp_path)


def build_classifier():
    model = tiny_bert()
    attach(model, VeraConfig(rank=8, dropout=0.2, train_modules=["classifier"]))
    return model


def test_resumed_run_ends_with_the_bits_of_the_uninterrupted_one(tmp_path):
    whole, resumed = build_classifier(), build_classifier()
    options = dict(data=labelled_rows(), max_steps=6, save_strategy="steps", save_steps=3)
    make_trainer(whole, tmp_path, **options).train()
    make_trainer(resumed, tmp_path, **options).train(resume_from_checkpoint=str(tmp_path / "checkpoint-3"))
    assert same(vectors(whole), vectors(resumed))
    heads = [handle(m).adapter().modules["classifier"] for m in (whole, resumed)]
    assert same(*heads) and not same(heads[0], tiny_bert().classifier.state_dict())
    halfway = load_adapter(tmp_path / "checkpoint-3")
    assert not same(vectors(whole), {unit: torch.cat(pair) for unit, pair in halfway.vectors.items()})
    assert same(load_adapter(tmp_path / "checkpoint-6").modules["classifier"], heads[0])


def test_load_best_model_at_end_brings_the_best_adapter_and_head_back(tmp_path):
    model, scores = build_classifier(), iter([0.1, 0.9, 0.2, 0.3])
    trainer = make_trainer(
        model, tmp_path, data=labelled_rows(), compute_metrics=lambda _: {"score": next(scores)}, eval_strategy="steps",
        eval_steps=1, save_strategy="steps", save_steps=1, load_best_model_at_end=True, metric_for_best_model="score",
    )  # fmt: skip
    trainer.train()
    assert trainer.state.best_model_checkpoint.endswith("checkpoint-2")
    best, last = load_adapter(tmp_path / "checkpoint-2"), load_adapter(tmp_path / "checkpoint-4")
    assert same(vectors(model), {unit: torch.cat(pair) for unit, pair in best.vectors.items()})
    assert not same(vectors(model), {unit: torch.cat(pair) for unit, pair in last.vectors.items()})
    assert same(handle(model).adapter().modules["classifier"], best.modules["classifier"])


@pytest.mark.parametrize(
    ("config", "says"),
    [
        (VeraConfig(rank=8, targets=["q_proj"]), r'has "model.layers.0.self_attn.v_proj.b", .* doesn\'t train'),
        (VeraConfig(rank=8, targets="all-linear"), r'has no "model.layers.0.*", which this model trains'),
        (VeraConfig(rank=4, targets=["q_proj", "v_proj"]), r"shape \[8\], this model's \[4\]"),
    ],
)
def test_resuming_with_other_settings_raises_and_changes_nothing(tmp_path, config, says):
    model = tiny_llama()
    randomise(attach(model, QV), "default")
    model.save_pretrained(tmp_path / "checkpoint-1")
    other = tiny_llama()
    attach(other, config)
    before = vectors(other)
    from safetensors.torch import load_file

    with pytest.raises(AdapterMismatch, match=says):
        other.load_state_dict(load_file(tmp_path / "checkpoint-1" / "model.safetensors"), strict=False)
    assert same(vectors(other), before)


def test_the_bases_own_state_dict_still_loads_and_leaves_the_adapter(tmp_path):
    model, donor = tiny_llama(), tiny_llama(seed=5)
    vera = attach(model, QV)
    randomise(vera, "default")
    kept = vectors(model)
    result = model.load_state_dict(donor.state_dict())
    assert not result.missing_keys and not result.unexpected_keys and same(vectors(model), kept)
    vera.use(None)
    assert torch.equal(logits(model, tokens()), logits(donor, tokens()))


def test_a_state_dict_with_some_of_the_adapters_vectors_isnt_taken_for_whole():
    model = tiny_llama()
    vera = attach(model, QV)
    randomise(vera, "default")
    state = model.state_dict()
    for name, tensor in state.items():
        if "vera_" in name:
            state[name] = tensor * 2
    lost = next(n for n in state if n.endswith("_b"))
    kept = state.pop(lost) / 2
    with pytest.raises(RuntimeError, match=f"Missing key.*{lost}"):
        model.load_state_dict(state)
    assert model.load_state_dict(state, strict=False).missing_keys == [lost]
    for name, tensor in model.state_dict().items():
        assert torch.equal(tensor, kept if name == lost else state[name]), name


class Normed(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.first, self.norm, self.head = torch.nn.Linear(6, 6), torch.nn.BatchNorm1d(6), torch.nn.Linear(6, 2)

    def forward(self, x):
        return self.head(self.norm(self.first(x)))


def warnings_of_a_save(vera, path, name="default"):
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        vera.save(path, name)
    return [str(w.message) for w in caught if issubclass(w.category, VeraWarning)]


@pytest.mark.parametrize("trained", [(), ("head", "norm")])
def test_saving_says_what_else_was_trained_and_stays_behind(trained, tmp_path):
    model = Normed()
    vera = attach(model, VeraConfig(rank=2, targets=["first"], train_modules=trained))
    randomise(vera, "default")
    assert not warnings_of_a_save(vera, tmp_path / "a.safetensors")
    model.train()
    model(torch.randn(5, 6))
    if trained:
        assert not warnings_of_a_save(vera, tmp_path / "a.safetensors")
        return
    model.eval()
    model.head.weight.requires_grad_(True)
    beside, moved = warnings_of_a_save(vera, tmp_path / "a.safetensors")
    assert "head.weight trains beside" in beside and "norm has updated its running statistics" in moved
    vera.load(tmp_path / "a.safetensors", name="resident")
    assert not warnings_of_a_save(vera, tmp_path / "b.safetensors", "resident")
    model.head.weight.requires_grad_(False)
    model.load_state_dict(Normed().state_dict())
    assert not warnings_of_a_save(vera, tmp_path / "a.safetensors")


def two_adapters():
    model = tiny_llama()
    vera = attach(model)
    vera.add(QV, "ann")
    vera.add(VeraConfig(rank=4, seed=3, targets="all-linear"), "ben")
    return model


def rows_trainer():
    from transformers import Trainer

    class RowsTrainer(Trainer):
        """Rows in turn belong to ann and to ben."""

        def compute_loss(self, model, inputs, return_outputs=False, **kwargs):
            with handle(model).rows(["ann", "ben"] * (len(inputs["input_ids"]) // 2)):
                outputs = model(**inputs)
            return (outputs.loss, outputs) if return_outputs else outputs.loss

    return RowsTrainer


def test_a_checkpoint_of_two_trained_adapters_resumes_both_and_says_that_it_is_none_to_load(tmp_path):
    whole, resumed = two_adapters(), two_adapters()
    options = dict(cls=rows_trainer(), save_strategy="steps", save_steps=2)
    make_trainer(whole, tmp_path, **options).train()
    make_trainer(resumed, tmp_path, **options).train(resume_from_checkpoint=str(tmp_path / "checkpoint-2"))
    for name in ("ann", "ben"):
        assert same(vectors(whole, name), vectors(resumed, name))
        assert any(not torch.equal(v, vectors(two_adapters(), name)[unit]) for unit, v in vectors(whole, name).items())
    checkpoint = tmp_path / "checkpoint-2"
    assert {f.name for f in checkpoint.rglob("*") if f.is_file()} - NOT_THE_MODEL == {"model.safetensors"}
    size = sum(handle(whole).save(tmp_path / name, name=name).stat().st_size for name in ("ann", "ben"))
    assert (checkpoint / "model.safetensors").stat().st_size <= 1.1 * size
    with pytest.raises(AdapterFileError, match=r"several adapters \(ann, ben\)"):
        attach(tiny_llama()).load(checkpoint)


def test_residents_beside_the_trained_adapter_are_not_in_its_checkpoint(tmp_path):
    model = tiny_llama()
    vera = attach(model, QV, name="mine")
    randomise(vera, "mine")
    vera.load(vera.adapter("mine"), name="another")
    model.save_pretrained(tmp_path)
    assert (tmp_path / "model.safetensors").read_bytes() == vera.save(tmp_path / "alone", name="mine").read_bytes()


def test_save_pretrained_writes_on_the_main_process_alone_and_pushes_no_adapter(tmp_path):
    model = tiny_llama()
    randomise(attach(model, QV), "default")
    model.save_pretrained(tmp_path / "other_rank", is_main_process=False)
    assert not (tmp_path / "other_rank").exists()
    with pytest.raises(StateError, match=r"vera\.push"):
        model.save_pretrained(tmp_path / "pushed", push_to_hub=True)
    with pytest.raises(StateError, match="no adapter to save"):
        empty = tiny_llama()
        attach(empty)
        empty.save_pretrained(tmp_path / "empty")


def test_trained_and_merged_model_is_one_that_plain_transformers_loads(tmp_path):
    from transformers import AutoModelForCausalLM

    model = tiny_llama()
    vera = attach(model, QV)
    trainer = make_trainer(model, tmp_path / "run")
    trainer.train()
    adapted = logits(model, tokens())
    vera.merge()
    trainer.save_model(str(tmp_path / "merged"))
    plain = AutoModelForCausalLM.from_pretrained(tmp_path / "merged")
    assert type(plain).__module__.startswith("transformers.") and not any("vera" in k for k in plain.state_dict())
    assert torch.equal(logits(plain, tokens()), logits(model, tokens()))
    assert (logits(plain, tokens()) - adapted).abs().max() < 1e-5
