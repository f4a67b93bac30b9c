"""The 4-bit experiment on a toy: trained on the quantised base, served on every other, merged, without a path of the machine."""

import json
import math

import pytest

from experiments import four_bit
from tests.training.tiny import make_llama, sentences


def test_adapters_trained_on_four_bits_are_measured_on_every_base(tmp_path, monkeypatch, capsys):
    pytest.importorskip("bitsandbytes")
    monkeypatch.setattr(four_bit, "METHODS", {"VeRA r=256": {"method": "vera", "rank": 32, "lr": 2e-1}})
    monkeypatch.setattr(four_bit, "LENGTH", 16)
    model = make_llama(tmp_path / "llama")
    text = tmp_path / "text.txt"
    text.write_text(" ".join(row["text"] for row in sentences(400, seed=0)))
    four_bit.main([str(text), "--model", str(model), "--steps", "40", "--results", str(tmp_path / "results")])
    found = json.loads((tmp_path / "results" / "four_bit.json").read_text())
    page = (tmp_path / "results" / "README.md").read_text()
    assert [r["trained_on"] for r in found["rows"]] == ["4-bit", "float32"] and str(tmp_path) not in json.dumps(found) + page
    for row in found["rows"]:
        assert list(row["losses"]) == ["float32", "bfloat16", "8-bit", "4-bit"]
        assert all(math.isfinite(v) and v < found["before"][base] - 0.02 for base, v in row["losses"].items())
        assert 0 < row["merged_into_4_bits"]["surviving"] < 1.2
    assert found["bytes"]["4-bit"] < found["bytes"]["8-bit"] < found["bytes"]["float32"]
    assert page.count("| VeRA r=256 | ") == 2
