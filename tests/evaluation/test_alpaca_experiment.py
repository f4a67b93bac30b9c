"""The Alpaca experiment on a toy: each best rate is scored on rows that chose nothing, and the path to the judge runs."""

import json

import pytest

from experiments import alpaca
from tests.training import tiny

pytest.importorskip("peft")
pytest.importorskip("httpx2")


def test_the_experiment_trains_scores_and_shows_the_judges_path(tmp_path, monkeypatch):
    monkeypatch.setattr(alpaca, "GRID", {n: (f, r[:2]) for n, (f, r) in alpaca.GRID.items() if n != "LoRA r=8"})
    tiny.make_llama(tmp_path / "llama")
    animals = [f"{a} {b}" for a in ("red", "blue", "small") for b in ("cat", "dog")]
    rows = [{"instruction": f"the {a} sees a {c}", "input": "", "output": f"a {c}"} for a in animals for c in ("house", "tree")]
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(r) + "\n" for r in rows))
    questions = [{"question_id": i, "category": "writing", "turns": ["the red cat", "a tree"]} for i in (1, 2, 3)]
    (tmp_path / "question.jsonl").write_text("".join(json.dumps(q) + "\n" for q in questions))
    given = [
        "--model",
        tmp_path / "llama",
        "--rows",
        8,
        "--questions",
        tmp_path / "question.jsonl",
        "--results",
        tmp_path / "out",
    ]
    alpaca.main([str(a) for a in (tmp_path / "rows.jsonl", *given)])
    found = json.loads((tmp_path / "out" / "alpaca.json").read_text())
    assert found["rows"] == {"train": 8, "validation": 2, "test": 2}
    assert [m["method"] for m in found["methods"]] == ["LoRA r=1", "VeRA r=256"]
    for m in found["methods"]:
        assert len(m["tried"]) == 2 and m["lr"] == min(m["tried"], key=lambda t: t["validation_loss"])["lr"]
    assert found["plumbing"] == {"answers": 2, "reviews": 4, "scores": [5.0] * 4}
    page = (tmp_path / "out" / "README.md").read_text()
    assert "| base | 0 | 0 |" in page and "plumbing" in page.lower() and str(tmp_path) not in page


def test_the_bases_loss_is_transformers_own(tmp_path):
    """Token-weighted over batches: equal to one batch of all rows."""
    import torch

    from veralib.training import Settings
    from veralib.training.data import load_data
    from veralib.training.loading import load_base
    from veralib.training.tokens import chat_template, collator, encode

    tiny.make_llama(tmp_path / "llama")
    rows = [{"instruction": f"the {'red ' * i}cat", "input": "", "output": "a house " * (1 + i)} for i in range(20)]
    for name in ("train", "test"):
        (tmp_path / f"{name}.jsonl").write_text("".join(json.dumps(r) + "\n" for r in rows))
    settings = Settings(**alpaca.COMMON, model=tmp_path / "llama", data=tmp_path)
    base = load_base(settings)
    chat_template(settings, base.tokenizer)
    examples = encode(load_data(settings).test, base.tokenizer, settings, (), base.max_length, "the test data")
    with torch.inference_mode():
        whole = base.model.eval()(**collator(base.tokenizer.pad_token_id or 0)(examples)).loss.item()
    assert alpaca.base_loss(settings) == pytest.approx(whole, rel=1e-5)
