"""Each file in examples/ runs as it stands, with its tiny model, and does what its first line says."""

import contextlib
import io
import math
import re
import runpy
import sys
import warnings
from pathlib import Path

import pytest
import torch

from tests.conftest import randomise
from veralib import VeraConfig, VeraWarning, attach, handle, load_adapter

EXAMPLES = Path(__file__).parent.parent / "examples"
SCRIPTS = sorted(f.stem for f in EXAMPLES.glob("*.py") if f.stem != "tiny")


@pytest.fixture
def run(tmp_path, monkeypatch):
    """run(name): the globals of examples/name.py after it ran, and what it printed."""
    monkeypatch.syspath_prepend(str(EXAMPLES))
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    state = torch.get_rng_state()

    def run(name: str, *arguments: str):
        monkeypatch.setattr(sys, "argv", [name, "--output", str(tmp_path), *arguments])
        printed = io.StringIO()
        with contextlib.redirect_stdout(printed):
            made = runpy.run_path(str(EXAMPLES / f"{name}.py"), run_name="__main__")
        return made, printed.getvalue()

    yield run
    torch.set_rng_state(state)


def losses(trainer) -> list[float]:
    return [float(row["loss"]) for row in trainer.state.log_history if "loss" in row]


def test_every_example_has_a_test():
    tested = {name.removeprefix("test_").removesuffix("_example") for name in globals() if name.endswith("_example")}
    assert set(SCRIPTS) == tested and len(SCRIPTS) == 8


def test_trainer_example(run, tmp_path):
    import tiny

    made, printed = run("trainer")
    assert losses(made["trainer"])[-1] < 0.4 < 0.5 < losses(made["trainer"])[0]
    assert "trainable: 512 in d and b + 130 in fully trained modules" in printed
    checkpoints = list(tmp_path.glob("checkpoint-*"))
    assert len(checkpoints) == 1 and (checkpoints[0] / "model.safetensors").stat().st_size < 6_000
    model = tiny.classifier().eval()  # a fresh process would do the same
    vera = attach(model)
    vera.load(tmp_path / "adapter")
    vera.use("default")
    tokenizer = tiny.tokenizer()
    batch = tokenizer(["the story was clever", "the song was stale"], return_tensors="pt")
    with torch.no_grad():
        assert model(**batch).logits.argmax(-1).tolist() == [1, 0]


def test_sft_example(run, tmp_path):
    made, printed = run("sft")
    assert losses(made["trainer"])[-1] < 0.5 < 2 < losses(made["trainer"])[0]
    assert "what says the duck ? quack" in printed
    assert load_adapter(tmp_path / "adapter").vectors.keys() == handle(made["model"]).adapter().vectors.keys()


def test_dpo_example(run, tmp_path):
    import tiny
    from trl.trainer.utils import add_fused_lm_head

    made, _ = run("dpo")
    trainer, model = made["trainer"], made["model"]
    assert losses(trainer)[0] < math.log(2) + 0.05 and losses(trainer)[-1] < 0.3
    # The reference holds nothing of its own, and answers as a second copy of the untrained base would.
    assert trainer.ref_model is not None and not list(trainer.ref_model.parameters())
    batch = next(iter(trainer.get_train_dataloader()))
    plain = tiny.causal()
    model.eval()
    mine = trainer.compute_ref_log_probs(trainer.ref_model, batch)
    add_fused_lm_head(plain)
    theirs = trainer.compute_ref_log_probs(plain, batch)
    trained = trainer.compute_ref_log_probs(model, batch)
    for a, b, c in zip(mine, theirs, trained, strict=True):
        assert torch.equal(a, b) and (a - c).abs().max() > 0.5
    assert handle(model).active == "default" and load_adapter(tmp_path / "adapter").parameters > 0


def test_mixed_batch_example(run):
    made, printed = run("mixed_batch")
    assert made["said"] | {None: ""} == {"alice": "quack", "bob": "moo", "carol": "woof", None: ""}
    assert printed.count("\n") == 4 and "the base model: " in printed


def test_fleet_example(run):
    made, printed = run("fleet")
    assert made["answers"] == list(made["says"].values()) and printed.startswith("100 of 100 owners' ducks")
    assert load_adapter(made["options"].output + "/owner 0.safetensors").parameters == 1920


def test_four_bit_example(run, tmp_path):
    from tests.test_quantised import skip_without_kernels

    skip_without_kernels()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", VeraWarning)  # it merges into 4 bits on purpose
        made, printed = run("four_bit")
    assert losses(made["trainer"])[-1] < 0.5 < 2 < losses(made["trainer"])[0]
    assert "4-bit base and adapter: quack" in printed and "merged into float32: 100% of ΔW, rounding error 0%" in printed
    assert load_adapter(tmp_path / "adapter").base.quantised == "bnb-nf4"


def test_the_blocks_of_the_guide_run_in_order(tmp_path, monkeypatch):
    from datasets import Dataset

    from tests.test_quantised import skip_without_kernels

    skip_without_kernels()
    monkeypatch.syspath_prepend(str(EXAMPLES))
    monkeypatch.chdir(tmp_path)
    import tiny

    tokenizer = tiny.tokenizer()
    for saved in (tiny.causal(), tokenizer):
        saved.save_pretrained("Qwen3-0.6B")
    guide = (EXAMPLES.parent / "docs" / "from-transformers.md").read_text()
    blocks = re.findall(r"```python\n(.*?)```", guide, flags=re.S)
    rows = [tokenizer("the duck says quack") for _ in range(16)]
    names = {
        "data": [{**row, "labels": row["input_ids"]} for row in rows],
        "questions": Dataset.from_list(tiny.questions()[:8]),
        "preferences": Dataset.from_list(tiny.preferences()[:8]),
    }
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", VeraWarning)
        for block in blocks:
            exec(block.replace("Qwen/Qwen3-0.6B", "Qwen3-0.6B").replace("rank=256", "rank=8"), names)
    assert len(blocks) == 6
    vera, out = names["vera"], names["out"]
    assert vera.names == ("default", "small") and out.shape[0] == 3 and names["report"].error < 1e-3
    assert load_adapter("my-adapter").config.rank == 8 and load_adapter("out/checkpoint-2").parameters > 0
    assert not any("vera" in key for key in tiny.causal("merged").state_dict())


# What TRL asks of a reference, beyond the example


@pytest.fixture
def language_model(monkeypatch):
    monkeypatch.syspath_prepend(str(EXAMPLES))
    import tiny

    model = tiny.causal().train()
    vera = attach(model, VeraConfig(rank=8, targets="all-linear"))
    randomise(vera, "default")
    return tiny, model, vera


def test_reference_is_the_base_however_it_is_called_and_leaves_the_model_as_it_was(language_model):
    tiny, model, vera = language_model
    ids = torch.randint(4, 20, (2, 6), generator=torch.Generator().manual_seed(0))
    plain, reference = tiny.causal().eval(), vera.reference()
    frozen = model.model.layers[0].mlp
    frozen.eval()  # a part that its owner keeps in evaluation mode
    modes = [m.training for m in model.modules()]
    with torch.no_grad():
        assert torch.equal(reference(input_ids=ids).logits, plain(input_ids=ids).logits)
        assert torch.equal(reference.base_model(ids).last_hidden_state, plain.model(ids).last_hidden_state)
        assert not torch.equal(model.model(ids).last_hidden_state, plain.model(ids).last_hidden_state)
    answers = [m.generate(ids, max_new_tokens=3, do_sample=False) for m in (reference, plain, model)]
    assert torch.equal(*answers[:2]) and not torch.equal(*answers[1:])
    assert not reference(input_ids=ids).logits.requires_grad and model(input_ids=ids).logits.requires_grad
    assert [m.training for m in model.modules()] == modes and vera.active == "default"
    assert reference.get_output_embeddings() is model.lm_head and reference.dtype == torch.float32
    # TRL names its cache of reference log-probabilities by a hash of this
    state = reference.state_dict()
    assert state.keys() == plain.state_dict().keys() and all(torch.equal(state[k], v) for k, v in plain.state_dict().items())


def test_dpo_with_precomputed_reference_takes_the_bases_log_probabilities(language_model, tmp_path):
    from datasets import Dataset
    from trl import DPOConfig, DPOTrainer
    from trl.trainer.utils import add_fused_lm_head

    tiny, model, vera = language_model
    settings = dict(precompute_ref_log_probs=True, per_device_train_batch_size=4, use_cpu=True, bf16=False, report_to="none")
    trainer = DPOTrainer(
        model,
        ref_model=vera.reference(),
        args=DPOConfig(str(tmp_path), **settings),
        train_dataset=Dataset.from_list(tiny.preferences()[:4]),
        processing_class=tiny.tokenizer(),
    )
    plain = tiny.causal()
    add_fused_lm_head(plain)
    batch = next(iter(trainer.get_train_dataloader()))
    chosen, rejected = trainer.compute_ref_log_probs(plain, batch)
    assert torch.allclose(batch["ref_chosen_logps"], chosen) and torch.allclose(batch["ref_rejected_logps"], rejected)


@pytest.mark.parametrize(
    "config", [dict(targets=["q_proj", "lm_head"]), dict(targets=["q_proj"], train_modules=["lm_head"])], ids=str
)
def test_an_output_layer_whose_weight_trl_reads_is_warned_about(language_model, config):
    from trl.trainer.utils import add_fused_lm_head

    tiny, _, _ = language_model
    model, ids = tiny.causal().train(), torch.full((1, 4), 5)
    attach(model, VeraConfig(rank=8, **config))
    add_fused_lm_head(model)
    with pytest.warns(VeraWarning, match="do nothing: lm_head"):
        model(input_ids=ids, labels=ids, fused_lm_head=True)


@pytest.mark.slow
def test_two_gateways_example(run):
    pytest.importorskip("openai")
    _, printed = run("two_gateways")
    assert printed.count("the same 4 times: True") == 2 and "by the other, the same: True" in printed


@pytest.mark.slow
def test_personal_model_example(run):
    pytest.importorskip("openai")
    _, printed = run("personal_model")
    assert "Version 1 is live" in printed and "ann: 'The lamp is in the harbour" in printed
