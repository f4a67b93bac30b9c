"""vera reproduce: each number against another way to it."""

import dataclasses
import itertools
import json
from pathlib import Path

import numpy as np
import pytest
from typer.testing import CliRunner

from veralib.cli import build
from veralib.commands import reproduce
from veralib.errors import UnknownName
from veralib.paper import ITEMS, counts, fig6, hyperparameters, make, page_name, table1
from veralib.recipes import RECIPES, find_recipe

ROOT = Path(__file__).parents[1]


def test_table_1_is_the_formulas_and_its_misprints_are_explained(tmp_path):
    rows = make("table1", tmp_path)["rows"]
    for row in rows:
        layers, width = {"roberta-base": (24, 768), "roberta-large": (48, 1024), "gpt-3": (192, 12288)}[row["model"]]
        r = row["rank"]
        assert row["lora"] == 2 * layers * width * r and row["vera"] == layers * (width + r)
        if row["model"] == "gpt-3":  # what the paper prints there
            assert row["with_basis"] == layers * width + 2 * width * r
            assert f"{row['with_basis'] / 1e6:.1f}M" == row["printed"][2]
    assert len(rows) == 9 and "misprint" not in (tmp_path / "table1.md").read_text()
    assert table1.kib(4 * 61_440) == "240 KiB" and table1.kib(4 * 75_497_472) == "288 MiB"


EXACT = {
    ("roberta-base", "vera", 1024): 43_008,
    ("roberta-large", "vera", 256): 61_440,
    ("gpt2-medium", "vera", 1024): 98_304,
    ("gpt2-large", "vera", 1024): 165_888,
    ("llama-7b", "vera", 1024): 1_589_248,
    ("llama-13b", "vera", 1024): 2_416_640,
    ("llama-7b", "vera", 256): 1_417_216,
    ("llama-7b", "lora", 64): 159_907_840,
    ("llama-13b", "lora", 64): 250_347_520,
    ("vit-base", "vera", 256): 24_576,
    ("vit-large", "vera", 256): 61_440,
    ("roberta-large", "lora", 8): 786_432,
    ("roberta-base", "full", None): 124_055_040,
    ("roberta-base", "bitfit", None): 102_144,
    ("roberta-base", "adapter_d", 16): 304_320,
    ("roberta-large", "adapter_p", 16): 811_392,
    ("roberta-large", "adapter_h", 8): 835_968,
    ("gpt2-medium", "adapter_h", 112): 11_064_576,
    ("gpt2-medium", "adapter_l", 224): 11_089_152,
    ("gpt2-large", "adapter_l", 248): 23_002_848,
    ("gpt2-medium", "dylora", 4): 393_216,
    ("gpt2-medium", "adalora", 4): 393_312,
    ("vit-base", "lora", 8): 294_912,
    ("vit-large", "lora", 8): 786_432,
}

PROMISED = [*(f"table{n}" for n in range(1, 14)), *(f"figure{n}" for n in range(2, 7))]


@pytest.mark.slow
def test_every_table_and_figure_is_drawn_by_its_name_where_nothing_was_run(tmp_path, monkeypatch):
    """In a clone without results: each page is there, and where ours is missing it has a command."""
    monkeypatch.setattr(fig6, "MATRICES", 2)
    monkeypatch.setattr(fig6, "ROUNDS", 2)
    (tmp_path / "experiments").symlink_to(ROOT / "experiments")
    monkeypatch.chdir(tmp_path)
    whole = []
    for name in PROMISED:
        done = CliRunner().invoke(build(), ["reproduce", name, "--out", "out"])
        assert done.exit_code == 0, f"{name}: {done.output}"
        page = (tmp_path / "out" / f"{page_name(name)}.md").read_text()
        assert done.output.strip() == page.strip()
        what = name.replace("table", "Table ").replace("figure", "Figure ")
        assert page.startswith(f"# {what}")
        found = json.loads((tmp_path / "out" / f"{page_name(name)}.json").read_text())
        if reproduce._whole(found) == "whole":
            whole.append(name)
        else:
            assert "vera train" in page or "vera sweep experiments" in page or "experiments.weights" in page, name
    assert whole == ["table1", "table8", "table9", "table10", "table11", "figure6"]
    assert (tmp_path / "out/fig4.png").stat().st_size > 1000  # the paper's bars


@pytest.mark.parametrize("name", [*(f"table{n}" for n in range(1, 14)), "fig3", "fig4", "fig5", "intruders"])
def test_a_committed_page_is_what_its_command_writes(tmp_path, monkeypatch, name):
    monkeypatch.chdir(ROOT)
    make(name, tmp_path)
    committed = (ROOT / "results" / "paper" / f"{name}.md").read_text(encoding="utf-8")
    assert (tmp_path / f"{name}.md").read_text(encoding="utf-8") == committed, f"write it anew: vera reproduce {name}"


def test_hyperparameters_are_the_printed_ones_and_a_difference_would_show(tmp_path, monkeypatch):
    counted = {}
    for name in hyperparameters.PRINTED:
        cells = make(name, tmp_path)["cells"]
        counted[name] = len(cells)
        assert [c for c in cells if c["difference"] != 0] == []
    # 12 lines of 6 tasks twice; 9 of 2 four times; 10 of 2; images: 6 + 1, 6 + 2, 7 + 2 and 7 + 2 lines of 4 twice.
    assert counted == {"table8": 144, "table9": 72, "table10": 20, "table11": 264}
    rte = find_recipe("glue-rte-large")
    wrong = dataclasses.replace(rte, methods={**rte.methods, "vera": {**rte.methods["vera"], "lr": 1e-2}})
    monkeypatch.setitem(RECIPES, "glue-rte-large", wrong)
    (other,) = [c for c in make("table8", tmp_path)["cells"] if c["difference"] != 0]
    assert (other["block"], other["column"], other["what"], other["difference"]) == ("RoBERTa large", "rte", "rate", -0.01)
    assert "| rte: -0.01 |" in (tmp_path / "table8.md").read_text()


@pytest.mark.slow
def test_counts_are_those_recomputed_by_hand(tmp_path):
    rows = make("counts", tmp_path)["rows"]
    found = {(r["model"], r["method"], r["rank"]): r["parameters"] for r in rows}
    assert {key: found[key] for key in EXACT} == EXACT
    full = {r["model"]: r["parameters"] for r in rows if r["method"] == "full"}
    assert f"{full['gpt2-medium'] / 1e6:.2f}M {full['gpt2-large'] / 1e6:.2f}M" == "354.82M 774.03M"
    assert f"{full['vit-base'] / 1e6:.1f}M {full['vit-large'] / 1e6:.1f}M" == "85.8M 303.3M"
    assert [r["parameters"] for r in rows] == [r["exact"] for r in rows]  # the attached models against the formulas
    assert len(rows) == len(counts.ROWS) == 38 and "| printed | exact | ours |" in (tmp_path / "counts.md").read_text()


def test_lora_s_fit_is_the_best_and_vera_s_a_stationary_point():
    rng = np.random.default_rng(1)
    W = rng.standard_normal((10, 10))
    U, S, V = np.linalg.svd(W)
    assert fig6.lora_error(W, 3) == pytest.approx(((W - (U[:, :3] * S[:3]) @ V[:3]) ** 2).mean())
    errors = [fig6.vera_error(W, 30, np.random.default_rng(2), rounds) for rounds in (1, 5, 50, 500)]
    assert all(a >= b for a, b in itertools.pairwise(errors)) and errors[-2] - errors[-1] < 0.02
    assert fig6.vera_error(W, 100, np.random.default_rng(2), 1) < 1e-20  # d alone spans all matrices


def test_figure_6_agrees_with_an_independent_recomputation():
    """Mean squared errors that others found by the same method: LoRA and VeRA at 60 parameters."""
    rng = np.random.default_rng(3)
    targets = [rng.standard_normal((10, 10)) for _ in range(24)]
    assert np.mean([fig6.lora_error(W, 3) for W in targets]) == pytest.approx(0.292, abs=0.04)
    assert np.mean([fig6.vera_error(W, 50, rng, 100) for W in targets]) == pytest.approx(0.224, abs=0.05)


def test_the_command_writes_and_prints(tmp_path):
    run = lambda *words: CliRunner().invoke(build(), ["reproduce", *words])  # noqa: E731
    assert all(name in run().output for name in ITEMS)
    done = run("table1", "--out", str(tmp_path / "new"))
    assert done.exit_code == 0 and "1,207,959,552" in done.output
    assert len(json.loads((tmp_path / "new/table1.json").read_text())["rows"]) == 9
    fig6.make(tmp_path, matrices=2, rounds=3)
    assert (tmp_path / "fig6.png").read_bytes().startswith(b"\x89PNG") and "VeRA" in (tmp_path / "fig6.md").read_text()
    with pytest.raises(UnknownName, match="table1"):
        make("tabel1", tmp_path)
