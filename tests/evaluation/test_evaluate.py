"""vera evaluate: the texts are the run's own, each distinct prompt once, scored against all its references."""

import json

import pytest

from tests.training import tiny
from veralib.errors import ConfigError, DataError
from veralib.evaluation import Item, evaluate, evaluate_base, meteor, read_items, score
from veralib.training import Settings, train
from veralib.training.decoding import Decoding
from veralib.training.predict import predict

pytest.importorskip("sacrebleu")
pytest.importorskip("pycocoevalcap.cider")
pytest.importorskip("nltk")

ROWS = [
    {"prompt": "the cat sees", "completion": " a dog and a bird"},
    {"prompt": "the cat sees", "completion": " the dog and a fish"},
    {"prompt": "who did", "completion": " the big red dog"},
    {"prompt": "a big red house and the tree", "completion": " not the small blue house"},
]
QUICK = Decoding(max_new_tokens=6, beams=3, length_penalty=0.8, no_repeat=4)


@pytest.fixture(autouse=True)
def without_java(monkeypatch):
    monkeypatch.setattr(meteor.shutil, "which", lambda name: None)


@pytest.fixture(scope="module")
def llama(tmp_path_factory):
    return tiny.make_llama(tmp_path_factory.mktemp("llama"))


@pytest.fixture(scope="module")
def work(llama, tmp_path_factory):
    """A folder with test.jsonl and run/, a run that has learnt its rows."""
    folder = tmp_path_factory.mktemp("work")
    tiny.write_jsonl(folder / "test.jsonl", ROWS)
    train_file = tiny.write_jsonl(folder / "train.jsonl", ROWS * 8)
    fields = {"task": "prompt-completion", "rank": 8, "lr": 0.3, "epochs": 2, "plot": False, "targets": "all-linear"}
    train(Settings(model=llama, data=train_file, output=folder / "run", **fields))
    return folder


def test_evaluate_scores_what_the_run_writes(work):
    found = evaluate(work / "run", work, decoding=QUICK, batch_size=2)
    prompts = {row["prompt"] for row in ROWS}
    assert [t["prompt"] for t in found.texts] == sorted(prompts, key=len) and len(prompts) == 3
    alone = {p: next(predict(work / "run", [{"prompt": p}], decoding=QUICK))["prediction"].strip() for p in prompts}
    assert {t["prompt"]: t["prediction"] for t in found.texts} == alone
    references = [[r["completion"].strip() for r in ROWS if r["prompt"] == t["prompt"]] for t in found.texts]
    assert found.scores == score([t["prediction"] for t in found.texts], references) and found.scores["ROUGE-L"] > 0
    assert found.to_dict()["references"] == 4 and found.about["method"] == "vera" and "sacrebleu" in found.about["versions"]


def test_a_base_model_is_evaluated_without_an_adapter(work, llama):
    from transformers import AutoModelForCausalLM, AutoTokenizer

    model, tokenizer = AutoModelForCausalLM.from_pretrained(llama), AutoTokenizer.from_pretrained(llama)
    items, hashes = read_items(work)
    found = evaluate_base(model, tokenizer, items, decoding=QUICK)
    ids = tokenizer(found.texts[0]["prompt"], return_tensors="pt")["input_ids"]
    made = model.generate(
        ids, max_new_tokens=6, num_beams=3, length_penalty=0.8, early_stopping="never", do_sample=False, pad_token_id=0
    )
    assert found.texts[0]["prediction"] == " ".join(tokenizer.decode(made[0, ids.shape[1] :], skip_special_tokens=True).split())
    assert found.texts != evaluate(work / "run", work, decoding=QUICK).texts and list(hashes) == ["test.jsonl"]


def test_the_result_file_says_everything_and_the_texts_lie_beside_it(work, tmp_path):
    found = evaluate(work / "run", work / "test.jsonl", decoding=QUICK)
    texts = found.save(tmp_path / "new" / "result.json")
    result = json.loads((tmp_path / "new" / "result.json").read_text())
    assert result["scores"] == found.scores and result["texts"] == 3 and result["outputs"] == texts.name == "result.texts.jsonl"
    assert result["decoding"] == {"max_new_tokens": 6, "beams": 3, "length_penalty": 0.8, "no_repeat": 4}
    assert {"versions", "hardware", "commit", "data", "settings", "method", "seconds"} <= result.keys()
    assert [json.loads(line) for line in texts.read_text().splitlines()] == list(found.texts)
    with pytest.raises(ConfigError, match=r"expected a \.json file"):
        found.save(tmp_path / "result.txt")


def test_references_come_as_a_list_or_as_rows_and_limit_takes_them_evenly(work, tmp_path):
    items, _ = read_items(work / "test.jsonl")
    assert items[0] == Item("the cat sees", ("a dog and a bird", "the dog and a fish")) and len(items) == 3
    rows = [{"prompt": i.prompt, "references": list(i.references)} for i in items]
    assert read_items(tiny.write_jsonl(tmp_path / "r.jsonl", rows))[0] == items
    many = [{"prompt": f"p{i}", "completion": "x"} for i in range(10)]
    kept, _ = read_items(tiny.write_jsonl(tmp_path / "m.jsonl", many), limit=4)
    assert [item.prompt for item in kept] == ["p0", "p2", "p5", "p7"]


@pytest.mark.parametrize(
    ("rows", "said"),
    [
        ([{"text": "x", "completion": "y"}], 'no column "prompt"'),
        ([{"prompt": "x"}], 'no column "completion"'),
        ([{"prompt": "x", "references": []}], "expected a list of texts"),
        ([{"prompt": "x", "references": "y"}], "expected a list of texts"),
        ([{"prompt": "x", "references": ["y"]}] * 2, "a prompt twice"),
    ],
)
def test_rows_that_cannot_be_scored_are_refused(tmp_path, rows, said):
    with pytest.raises(DataError, match=said):
        read_items(tiny.write_jsonl(tmp_path / "rows.jsonl", rows))


def test_what_is_no_test_set_is_refused_by_name(work, tmp_path):
    for given, said in ((tmp_path / "absent.jsonl", "no file or folder"), (tmp_path, "0 files test.jsonl")):
        with pytest.raises(DataError, match=said):
            read_items(given)
    with pytest.raises(ConfigError, match="limit is 0"):
        read_items(work, limit=0)


def test_a_run_of_another_task_is_refused(llama, tmp_path):
    file = tiny.write_jsonl(tmp_path / "t.jsonl", [{"text": "the cat sees a dog"}] * 4)
    fields = {"task": "causal-lm", "rank": 4, "epochs": 1, "plot": False}
    train(Settings(model=llama, data=file, output=tmp_path / "run", **fields))
    with pytest.raises(ConfigError, match="was trained for causal-lm"):
        evaluate(tmp_path / "run", file)
