"""Predictions are the model's own, and each row's are its own adapter's."""

import json
from pathlib import Path

import pytest
import torch

import veralib
from veralib.errors import AdapterFileError, ConfigError, DataError
from veralib.training import Settings, train
from veralib.training.predict import find_source, predict

from .tiny import sentences, write_jsonl

ROWS = [{"text": r["text"]} for r in sentences(7, seed=5)]


def make_run(bert, rows, folder, **fields):
    settings = {
        "model": bert,
        "data": rows,
        "output": folder,
        "rank": 4,
        "lr": 0.2,
        "lr_head": 0.02,
        "epochs": 2,
        "max_length": 16,
    }
    return train(Settings(**{**settings, "plot": False, **fields}))


@pytest.fixture(scope="module")
def runs(bert, rows, tmp_path_factory):
    """Three runs: "one" and "two" of VeRA with different ranks and seeds, "lora"."""
    folder = tmp_path_factory.mktemp("runs")
    make_run(bert, rows, folder / "one")
    make_run(bert, rows, folder / "two", rank=9, seed=1, basis_seed=7)
    make_run(bert, rows, folder / "lora", method="lora", lr=1e-2)
    return folder


def by_hand(bert, run, rows=ROWS):
    """The same predictions through attach, load and transformers alone."""
    from transformers import AutoModelForSequenceClassification, AutoTokenizer

    model = AutoModelForSequenceClassification.from_pretrained(bert, num_labels=2)
    vera = veralib.attach(model)
    vera.load(run / "adapter_model.safetensors", name="x")
    vera.use("x")
    tokenizer = AutoTokenizer.from_pretrained(bert)
    with torch.no_grad():
        scores = [model.eval()(**tokenizer(r["text"], return_tensors="pt")).logits.softmax(-1)[0] for r in rows]
    return [(["bad", "good"][int(s.argmax())], float(s.max())) for s in scores]


def pairs(found):
    return [(f["prediction"], f["score"]) for f in found]


@pytest.mark.parametrize("given", ["", "adapter_model.safetensors"])
def test_a_runs_folder_and_its_file_predict_as_transformers_does(bert, runs, given):
    found = list(predict(runs / "one" / given, ROWS, batch_size=3))
    assert [f["text"] for f in found] == [r["text"] for r in ROWS]
    for (label, score), (expected, probability) in zip(pairs(found), by_hand(bert, runs / "one"), strict=True):
        assert label == expected and score == pytest.approx(probability, abs=2e-6)


def test_a_llamas_score_of_a_row_is_the_same_alone_and_among_longer_rows(llama, rows, tmp_path):
    """Its head reads the last token that isn't padding: the tokenizer has no padding of its own, the config another."""
    import shutil

    from transformers import AutoTokenizer

    base = shutil.copytree(llama, tmp_path / "llama")
    tokenizer = AutoTokenizer.from_pretrained(base)
    tokenizer.pad_token = None
    tokenizer.save_pretrained(base)
    make_run(base, rows, tmp_path / "run", epochs=1)
    texts = [{"text": "the cat"}, {"text": "the cat sees the big red dog and likes it"}]
    alone, together = (pairs(predict(tmp_path / "run", texts, batch_size=size)) for size in (1, 2))
    assert [score for _, score in together] == pytest.approx([score for _, score in alone], abs=2e-6)


def test_each_row_may_use_its_own_adapter_within_one_batch(runs, tmp_path):
    names = ["one", "two/adapter_model.safetensors", "one", "", "two", "", "one"]
    file = write_jsonl(runs / "mixed.jsonl", [{**r, "who": n} for r, n in zip(ROWS, names, strict=True)])
    mixed = list(predict(runs / "one", file, adapter_column="who"))
    alone = {name: list(predict(runs / name, ROWS)) for name in ("one", "two")}
    differ = 0
    for i, name in enumerate(names):
        if name:
            own = alone[name.partition("/")[0]][i]
            assert mixed[i]["prediction"] == own["prediction"] and mixed[i]["score"] == pytest.approx(own["score"], abs=2e-6)
            differ += abs(alone["one"][i]["score"] - alone["two"][i]["score"]) > 1e-3
    assert differ >= 3  # the two adapters say different things, so a mix-up would show


def test_baseline_runs_predict_what_they_evaluated(bert, rows, runs, tmp_path):
    from veralib.training.rows import read_rows

    dev = read_rows(rows / "dev.jsonl")
    for method in ("lora", "head", "full"):
        folder = runs / method
        result = make_run(bert, rows, folder, method=method, resume=False, lr=3e-3)
        found = list(predict(folder, dev))
        accuracy = sum(f["prediction"] == f["label"] for f in found) / len(dev)
        assert accuracy == pytest.approx(result.metrics["eval_accuracy"])
        scores = [f["score"] if f["prediction"] == f["label"] else 1 - f["score"] for f in found]
        loss = -sum(torch.tensor(s).log() for s in scores) / len(dev)
        assert float(loss) == pytest.approx(result.metrics["eval_loss"], abs=1e-4)


def test_adapters_with_other_labels_cannot_share_the_rows(bert, rows, runs, tmp_path):
    other = [{**r, "label": r["label"].upper()} for r in sentences(32)]
    make_run(bert, write_jsonl(tmp_path / "t.jsonl", other), tmp_path / "other", epochs=1)
    data = [{"text": "a cat", "who": str(runs / "one")}, {"text": "a dog", "who": str(tmp_path / "other")}]
    with pytest.raises(ConfigError, match="must share one task and its labels"):
        predict(runs / "one", data, adapter_column="who")


@pytest.mark.parametrize(
    ("data", "fields", "error", "said"),
    [
        ([], {}, DataError, "no rows"),
        ([{"sentence": "x"}], {}, DataError, 'no column "text"'),
        ([{"text": "x"}], {"adapter_column": "who"}, DataError, 'no column "who"'),
        ([{"text": "x", "who": "absent"}], {"adapter_column": "who"}, AdapterFileError, 'names the adapter "absent"'),
        ("absent.csv", {}, DataError, "can't read"),
    ],
)
def test_faults_show_before_the_first_row(runs, data, fields, error, said):
    with pytest.raises(error) as e:
        predict(runs / "one", data, **fields)
    assert said in str(e.value)


def test_an_adapter_for_each_row_needs_vera(runs):
    with pytest.raises(ConfigError, match="was trained with lora"):
        predict(runs / "lora", [{"text": "x", "who": ""}], adapter_column="who")


def test_an_adapter_without_notes_is_understood_by_its_head(bert, runs, tmp_path):
    from dataclasses import replace

    adapter = veralib.load_adapter(runs / "one")
    file = veralib.save_adapter(replace(adapter, notes={}), tmp_path / "bare.safetensors")
    source = find_source(file)
    assert source.labels == ("0", "1") and source.settings.task == "classification" and source.settings.model == str(bert)
    found = list(predict(file, ROWS, labels=["bad", "good"]))
    assert pairs(found) == pairs(predict(runs / "one", ROWS))


def test_a_moved_base_model_is_named_on_the_way(bert, runs, tmp_path):
    moved = tmp_path / "moved"
    moved.symlink_to(bert)
    assert pairs(predict(runs / "one", ROWS, model=moved)) == pairs(predict(runs / "one", ROWS))
    with pytest.raises(ConfigError, match="there is no model folder"):
        predict(runs / "one", ROWS, model=str(tmp_path / "absent"))


@pytest.mark.parametrize("task", ["causal-lm", "prompt-completion", "chat"])
def test_language_adapters_write_what_generate_writes(llama, tmp_path, task):
    row = {
        "causal-lm": {"text": "the cat sees"},
        "prompt-completion": {"prompt": "the cat sees", "completion": " a dog"},
        "chat": {"messages": [{"role": "user", "content": "who sees"}, {"role": "assistant", "content": "the dog"}]},
    }[task]
    file = write_jsonl(tmp_path / "rows.jsonl", [row] * 16)
    fields = {"task": task, "rank": 8, "lr": 0.3, "epochs": 3, "plot": False}
    train(Settings(model=llama, data=file, output=tmp_path / "run", **fields))
    longer = {
        "causal-lm": {"text": "a big red house and the"},
        "prompt-completion": {"prompt": "a big red house and the"},
        "chat": {"messages": [{"role": "user", "content": "who did and who sees the cat"}]},
    }[task]
    found = list(predict(tmp_path / "run", [row, longer], max_new_tokens=6))

    from transformers import AutoModelForCausalLM, AutoTokenizer

    model, tokenizer = AutoModelForCausalLM.from_pretrained(llama).eval(), AutoTokenizer.from_pretrained(llama)
    vera = veralib.attach(model)
    vera.load(tmp_path / "run" / "adapter_model.safetensors", name="x")
    vera.use("x")
    texts = {
        "causal-lm": ["the cat sees", "a big red house and the"],
        "prompt-completion": ["the cat sees", "a big red house and the"],
        "chat": ["<user> who sees <end> <assistant> ", "<user> who did and who sees the cat <end> <assistant> "],
    }[task]
    for answer, text in zip(found, texts, strict=True):
        ids = tokenizer(text, return_tensors="pt", add_special_tokens=task != "chat")["input_ids"]
        made = model.generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=6, do_sample=False, pad_token_id=0)
        assert answer["prediction"] == tokenizer.decode(made[0, ids.shape[1] :], skip_special_tokens=True)
    assert found[0]["prediction"] and "prediction" not in json.dumps(row) and Path(tmp_path / "run").is_dir()
