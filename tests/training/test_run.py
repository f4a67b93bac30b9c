"""A run: what it writes, that it repeats itself to the bit, and that an interrupted one goes on to the same bits."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

import veralib
from veralib.baselines import METHODS
from veralib.errors import ConfigError, DataError, StateError
from veralib.training import Settings, load_result, train

from .tiny import sentences, write_jsonl

FILES = {
    **dict.fromkeys(("vera", "dvora", "lora", "lora_fa", "adalora"), ("adapter_model.safetensors",)),
    **dict.fromkeys(("adapter_h", "adapter_p", "adapter_l", "adapter_d"), ("adapters.safetensors",)),
    "lora_xs": ("lora_xs.safetensors",),
    "dylora": ("dylora.safetensors",),
    "bitfit": ("biases.safetensors",),
    "head": ("head.safetensors",),
    "full": ("model.safetensors",),
}


@pytest.fixture
def settings(bert, rows, tmp_path):
    """Settings for a run of 12 steps, with dropout (BERT's 0.1) and a checkpoint every 2 steps."""
    return Settings(
        model=bert,
        data=rows,
        output=tmp_path / "run",
        rank=4,
        epochs=2,
        batch_size=16,
        max_length=16,
        save_every=2,
        plot=False,
    )


class Interrupt(BaseException):
    """No Exception: nothing in between may catch it."""


def interrupted(settings, step):
    """Runs until the end of a step, then stops as abruptly as one process can inside itself."""
    from transformers import TrainerCallback

    class Stop(TrainerCallback):
        def on_step_end(self, args, state, control, **kwargs):
            if state.global_step == step:
                raise Interrupt

    with pytest.raises(Interrupt):
        train(settings, callbacks=[Stop()])


def tensors(settings):
    return load_file(f"{settings.output}/{FILES[settings.method][0]}")


def assert_same_bits(one, two):
    a, b = tensors(one), tensors(two)
    assert a.keys() == b.keys() and len(a) > 0
    assert [k for k in a if not torch.equal(a[k], b[k])] == []


@pytest.mark.parametrize("method", METHODS)
def test_every_method_trains_and_writes_its_result(settings, method):
    if method in ("lora", "lora_fa", "adalora"):
        pytest.importorskip("peft")
    options = {"drop": 1} if method == "adapter_d" else {}
    result = train(settings.replace(method=method, plot=method == "vera", lr=None, options=options))
    folder = Path(result.output)
    assert tuple(result.files) == FILES[method]
    assert result.adapter_bytes == sum((folder / name).stat().st_size for name in FILES[method])
    assert load_result(folder).to_dict() == json.loads(json.dumps(result.to_dict()))
    assert result.steps == 12 and result.rows == {"train": 96, "validation": 40} and result.resumed == 0
    assert set(result.metrics) == {"eval_loss", "eval_accuracy", "eval_matthews", "eval_f1"}
    assert result.labels == ("bad", "good") and set(result.data) == {"train/train.jsonl", "validation/dev.jsonl"}
    assert result.versions["torch"] == torch.__version__ and result.hardware["cores"] > 0
    assert 0 < result.train_seconds < result.seconds and result.peak_memory_bytes > 10**7
    # BERT's query and value of 2 layers, (32, 32) each, and a head of 2 × 32 + 2; the checkpoint has no other gaps.
    counts = {"vera": 4 * (32 + 4), "dvora": 4 * (32 + 4 + 32), "lora": 4 * 4 * 64, "dylora": 4 * 4 * 64, "head": 0}
    counts |= {"lora_fa": 4 * 4 * 32, "lora_xs": 4 * 4 * 4, "adapter_p": 2 * (4 * 64 + 36), "adapter_h": 4 * (4 * 64 + 36)}
    assert result.adapter_parameters == counts.get(method, result.adapter_parameters) and result.head_parameters == 66
    there = {p.name for p in Path(folder).iterdir()}
    assert "checkpoints" not in there and ("plot.png" in there) == (method == "vera")


def test_a_run_repeats_itself_to_the_bit_and_another_seed_does_not(settings, tmp_path):
    again, other = settings.replace(output=tmp_path / "again"), settings.replace(output=tmp_path / "other", seed=1)
    for s in (settings, again, other):
        train(s)
    assert_same_bits(settings, again)
    a, b = tensors(settings), tensors(other)
    assert any(not torch.equal(a[k], b[k]) for k in a)


@pytest.mark.parametrize("step", [1, 2, 5, 6, 7, 12])
def test_an_interrupted_run_ends_with_the_same_bits(settings, tmp_path, step):
    """Before the first checkpoint, on one, within an epoch, at an epoch's end (step 6), and after the last step."""
    whole = settings.replace(output=tmp_path / "whole")
    expected = train(whole)
    interrupted(settings, step)
    result = train(settings)
    assert_same_bits(settings, whole)
    assert (result.resumed, result.steps) == (1, 12)
    assert result.metrics == expected.metrics


def first_step(settings, **fields):
    """The loss and the gradient's norm that a run's first step logs; the rate moves nothing."""
    fields |= {"lr": 1e-9, "lr_head": 1e-9, "epochs": 1, "evaluate_every": "never", "save_every": "never", "warmup": 0}
    changed = settings.replace(**fields, training={"max_steps": 1, "logging_steps": 1, **fields.pop("training", {})})
    found = next(h for h in train(changed).history if "loss" in h)
    return found["loss"], found["grad_norm"]


@pytest.mark.parametrize("task", ["classification", "regression"])
@pytest.mark.parametrize("base", ["bert", "llama"])
def test_accumulated_batches_have_the_loss_and_gradient_of_one(settings, request, tmp_path, task, base):
    """Models with heads take the mean of the rows that they see, and Trainer must know it."""
    sentences = [{"text": f"the {w} dog sees a cat", "label": i % 2} for i, w in enumerate(["big", "red", "small", "old"] * 4)]
    fields = {"model": request.getfixturevalue(base), "data": write_jsonl(tmp_path / "r.jsonl", sentences), "task": task}
    one = first_step(settings, **fields, batch_size=16, output=tmp_path / "one")
    four = first_step(settings, **fields, batch_size=4, accumulation=4, output=tmp_path / "four")
    assert four == pytest.approx(one, rel=0.5 if base == "bert" else 1e-3)  # BERT has dropout; undivided: four times as large


@pytest.mark.parametrize("step", [17, 22, 28])
def test_an_interrupted_adalora_goes_on_with_its_sensitivities_and_ranks(settings, tmp_path, step):
    """30 steps: ranks are pruned from step 3 to step 21."""
    pytest.importorskip("peft")
    settings = settings.replace(method="adalora", rank=2, lr=1e-3, epochs=5, save_every=5)
    whole = settings.replace(output=tmp_path / "whole")
    expected = train(whole)
    interrupted(settings, step)
    result = train(settings)
    assert (result.resumed, result.steps, result.metrics) == (1, 30, expected.metrics)
    assert_same_bits(settings, whole)
    assert result.adapter_parameters == expected.adapter_parameters


@pytest.mark.parametrize(
    "fields",
    [
        {"method": "lora", "lr": 1e-3},
        {"method": "full", "accumulation": 2, "batch_size": 8},
        {"group_by_length": True},
        {"schedule": "cosine", "weight_decay": 0.1, "training": {"max_grad_norm": 0.1, "optim": "adamw_torch"}},
        {"training": {"dataloader_drop_last": True}, "batch_size": 20},
    ],
)
def test_an_interrupted_run_of_other_settings_ends_with_the_same_bits(settings, tmp_path, fields):
    settings = settings.replace(**{"save_every": 3, **fields})
    whole = settings.replace(output=tmp_path / "whole")
    train(whole)
    interrupted(settings, 4)
    interrupted(settings, 8 if "dataloader_drop_last" not in str(fields) else 7)
    assert train(settings).resumed == 2
    assert_same_bits(settings, whole)


def test_the_best_weights_and_patience_survive_an_interruption(settings, tmp_path):
    fields = {"best": True, "patience": 2, "evaluate_every": 2, "epochs": 20, "method": "full", "lr": 3e-2, "metric": "loss"}
    settings, whole = settings.replace(**fields), settings.replace(**fields, output=tmp_path / "whole")
    expected = train(whole)
    scores = [h["eval_loss"] for h in expected.history if "eval_loss" in h]
    assert expected.steps < 120 and min(scores) == scores[-3] == expected.metrics["eval_loss"]  # stopped early, kept the best
    for step in (expected.steps - 3, expected.steps - 1):
        interrupted(settings, step)
    result = train(settings)
    assert_same_bits(settings, whole)
    assert (result.steps, result.metrics) == (expected.steps, expected.metrics)


@pytest.mark.parametrize("more", [{}, {"best": True}, {"patience": 1, "epochs": 20, "method": "full", "lr": 3e-2}])
def test_a_run_killed_between_training_and_result_only_writes_it(settings, tmp_path, monkeypatch, more):
    fields = {"evaluate_every": 2, "save_every": 2, **more}
    settings, whole = settings.replace(**fields), settings.replace(**fields, output=tmp_path / "whole")
    expected = train(whole)

    from veralib.training import run

    def stop(*_):
        raise Interrupt

    with monkeypatch.context() as m:
        m.setattr(run, "_notes", stop)
        with pytest.raises(Interrupt):
            train(settings)
    with monkeypatch.context() as m:
        from veralib.training.trainer import AdapterTrainer

        m.setattr(AdapterTrainer, "training_step", stop)
        result = train(settings)
    assert_same_bits(settings, whole)
    assert (result.steps, result.metrics) == (expected.steps, expected.metrics)


def test_only_the_last_checkpoint_is_kept_and_it_holds_the_adapter_alone(settings):
    interrupted(settings, 7)
    (path,) = Path(settings.output, "checkpoints").iterdir()
    assert path.name == "checkpoint-6"
    names = {p.name for p in path.iterdir()}
    assert not any("model" in n for n in names)
    state = load_file(path / "trained.safetensors")
    assert sum(t.numel() for t in state.values()) == 4 * (32 + 4) + 66


def test_a_finished_run_is_not_overwritten_unasked(settings):
    train(settings.replace(epochs=0.2))
    with pytest.raises(StateError, match="holds a finished run"):
        train(settings)
    assert train(settings.replace(epochs=0.5, resume=False)).settings["epochs"] == 0.5


def test_an_interrupted_run_of_other_settings_is_refused_by_name(settings):
    interrupted(settings, 3)
    with pytest.raises(StateError, match=r"settings: rank was 4, now 8"):
        train(settings.replace(rank=8))
    result = train(settings.replace(rank=8, resume=False, epochs=0.2))
    assert result.resumed == 0 and result.adapter_parameters == 4 * (32 + 8)


def test_changed_data_are_refused_on_resume(settings, tmp_path):
    file = write_jsonl(tmp_path / "train.jsonl", sentences(96))
    settings = settings.replace(data=file, validation=None)
    interrupted(settings, 3)
    write_jsonl(file, sentences(96, seed=9))
    with pytest.raises(StateError, match=r"data: train/train.jsonl was"):
        train(settings)


def test_resume_without_an_interrupted_run_says_so(settings):
    with pytest.raises(StateError, match="no interrupted run"):
        train(settings.replace(resume=True))


@pytest.mark.parametrize(
    ("fields", "error", "said"),
    [
        ({"model": "/absent/model"}, ConfigError, "there is no model folder /absent/model"),
        ({"metric": "acuracy"}, ConfigError, 'Did you mean "accuracy"'),
        ({"best": True, "data": "TRAIN", "save_every": "epoch"}, ConfigError, "need validation data"),
        ({"schedule": "linaer"}, ConfigError, "linaer"),
        ({"targets": "quarry"}, ConfigError, "quarry"),
        ({"label": "text"}, DataError, "labels that training has never seen"),
        ({"task": "chat", "text": "text"}, DataError, "has no chat template"),
    ],
)
def test_faults_show_before_training(settings, rows, fields, error, said):
    if fields.get("data") == "TRAIN":
        fields = {**fields, "data": rows / "train.jsonl"}
    with pytest.raises(error) as e:
        train(settings.replace(**fields))
    assert said in str(e.value)


def test_an_unwritable_output_folder_shows_before_training(settings, tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(ConfigError, match="can't write to the output folder"):
        train(settings.replace(output=tmp_path / "file" / "run"))


def test_the_adapter_file_says_how_to_predict_with_it(settings):
    train(settings)
    adapter = veralib.load_adapter(settings.output)
    assert json.loads(adapter.notes["labels"]) == ["bad", "good"]
    assert adapter.notes["task"] == "classification" and json.loads(adapter.notes["text"]) == ["text"]
    assert adapter.base.id == settings.model and list(adapter.modules) == ["classifier"]
    assert any(b.abs().max() > 0 for _, b in adapter.vectors.values())


def test_regression_learns_numbers(bert, tmp_path):
    rows = [{**r, "label": float(len(r["text"].split()))} for r in sentences(200)]
    file = write_jsonl(tmp_path / "r.jsonl", rows)
    fields = {"task": "regression", "method": "full", "lr": 3e-3, "lr_head": 3e-3, "epochs": 20, "plot": False}
    result = train(Settings(model=bert, data=file, validation="0.2", output=tmp_path / "run", **fields))
    assert result.labels == () and result.metrics["eval_pearson"] > 0.5
    assert {"eval_spearman", "eval_mse"} <= set(result.metrics)


LANGUAGE = {
    "causal-lm": {"text": "the cat sees a dog and the dog sees a cat"},
    "prompt-completion": {"prompt": "the cat sees", "completion": " a big red house"},
    "chat": {"messages": [{"role": "user", "content": "who sees the cat"}, {"role": "assistant", "content": "the dog"}]},
}


@pytest.mark.parametrize("task", LANGUAGE)
def test_language_tasks_learn_their_answers(llama, tmp_path, task):
    file = write_jsonl(tmp_path / "rows.jsonl", [LANGUAGE[task]] * 64)
    fields = {"task": task, "rank": 8, "lr": 0.3, "epochs": 4, "targets": "all-linear", "plot": False}
    result = train(Settings(model=llama, data=file, validation="0.1", output=tmp_path / "run", **fields))
    scores = [h["eval_loss"] for h in result.history if "eval_loss" in h]
    assert len(scores) == 4 and scores[-1] < scores[0] - 0.1
    assert result.metrics["eval_perplexity"] == pytest.approx(2.718281828 ** result.metrics["eval_loss"], rel=1e-5)
    assert result.head_parameters == 0


def test_the_reported_language_loss_is_that_of_the_counted_tokens(llama, tmp_path):
    """Also where rows differ in length, so that a mean over batches would be wrong."""
    from transformers import AutoModelForCausalLM, AutoTokenizer

    from veralib.training.tokens import encode

    rows = [{"prompt": "the", "completion": " cat" * n} for n in (1, 2, 9, 20)]
    file = write_jsonl(tmp_path / "rows.jsonl", rows)
    fields = {"task": "prompt-completion", "batch_size": 3, "epochs": 1, "lr": 1e-9, "plot": False}
    settings = Settings(model=llama, data=file, validation=str(file), output=tmp_path / "run", **fields)
    result = train(settings)
    model, tokenizer = AutoModelForCausalLM.from_pretrained(llama).eval(), AutoTokenizer.from_pretrained(llama)
    losses = []
    for e in encode(rows, tokenizer, settings, (), 64, "rows"):
        ids, labels = torch.tensor([e["input_ids"]]), torch.tensor([e["labels"]])
        with torch.no_grad():
            logits = model(ids).logits
        losses.append(torch.nn.functional.cross_entropy(logits[0, :-1], labels[0, 1:], reduction="none")[labels[0, 1:] != -100])
    assert result.metrics["eval_loss"] == pytest.approx(float(torch.cat(losses).mean()), rel=1e-4)


@pytest.mark.slow
def test_a_run_killed_with_kill_9_again_and_again_ends_with_the_same_bits(settings, tmp_path):
    """A checkpoint after every step, so that many kills fall into the writing of one."""
    settings = settings.replace(save_every=1, epochs=8)
    whole = settings.replace(output=tmp_path / "whole")
    train(whole)
    done = run_script("killer.py", json.dumps(settings.to_dict()))
    kills, broken = (int(n) for n in done.stdout.split()[-2:])
    print(f"{kills} kills, {broken} of them in the middle of a checkpoint")
    result = load_result(settings.output)
    assert kills >= 5 and result.resumed == kills, done.stdout
    assert_same_bits(settings, whole)
    assert (result.steps, result.metrics) == (48, load_result(whole.output).metrics)


def run_script(name, *arguments, launcher=()):
    """A Python script beside this file, in a process of its own."""
    root = Path(__file__).parents[2]
    command = [sys.executable, *launcher, str(Path(__file__).with_name(name)), *arguments]
    environment = {**os.environ, "PYTHONPATH": str(root), "OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, capture_output=True, text=True, timeout=400, env=environment, cwd=root)
    assert done.returncode == 0, done.stdout + done.stderr
    return done


@pytest.mark.slow
def test_two_processes_train_one_adapter_and_one_of_them_writes_it(settings):
    settings = settings.replace(batch_size=8, training={"use_cpu": True})
    done = run_script(
        "worker.py",
        json.dumps(settings.to_dict()),
        launcher=("-m", "torch.distributed.run", "--nproc-per-node", "2", "--standalone"),
    )
    result = load_result(settings.output)
    assert done.stdout.count("finished") == 2
    # Means of what each process saw, averaged: a logged loss is one process's size, not two's.
    assert next(h["loss"] for h in result.history if "loss" in h) < 1
    assert result.hardware["processes"] == 2 and result.steps == 12 and result.rows["train"] == 96
    assert result.metrics["eval_loss"] > 0 and not Path(settings.output, "checkpoints").exists()
    assert any(b.abs().max() > 0 for _, b in veralib.load_adapter(settings.output).vectors.values())


@pytest.mark.slow
@pytest.mark.parametrize("method", ["vera", "lora"])
def test_a_4_bit_base_trains(llama, tmp_path, method):
    pytest.importorskip("bitsandbytes")
    file = write_jsonl(tmp_path / "rows.jsonl", [LANGUAGE["prompt-completion"]] * 32)
    fields = {"task": "prompt-completion", "method": method, "quantise": "4bit", "rank": 8, "lr": 0.1, "epochs": 2, "plot": False}
    result = train(Settings(model=llama, data=file, output=tmp_path / "run", **fields))
    losses = [h["loss"] for h in result.history if "loss" in h]
    assert losses[-1] < losses[0]
    if method == "vera":
        assert veralib.load_adapter(tmp_path / "run").base.quantised == "bnb-nf4"


@pytest.mark.slow
@pytest.mark.parametrize("quantise", ["4bit", "8bit"])
def test_a_quantised_base_keeps_its_new_head_whole(bert, rows, tmp_path, quantise):
    pytest.importorskip("bitsandbytes")
    fields = {"quantise": quantise, "rank": 8, "lr": 0.1, "lr_head": 0.01, "epochs": 2, "plot": False}
    result = train(Settings(model=bert, data=rows, output=tmp_path / "run", **fields))
    head = veralib.load_adapter(tmp_path / "run").modules["classifier"]
    assert head["weight"].dtype == torch.float32 and head["weight"].shape == (2, 32) and result.steps > 0
