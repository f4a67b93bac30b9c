"""A grid of recipes: the epoch and the rate are chosen on a tenth of the training rows, the development set is the test."""

import json
import re
from pathlib import Path

import pytest
import yaml
from typer.testing import CliRunner

from veralib.cli import build
from veralib.errors import ConfigError
from veralib.training.grid import read_grid, settings_of

GOOD, BAD = "the cat likes a dog", "a bird eats the blue fish"


@pytest.fixture
def glue(tmp_path, monkeypatch):
    """MRPC in its original files' form."""
    folder = tmp_path / "glue" / "MRPC"
    folder.mkdir(parents=True)
    pairs = [(GOOD, GOOD, 1), (GOOD, BAD, 0), (BAD, BAD, 1), (BAD, GOOD, 0)]
    rows = [f"{same}\t{i}\t{i}\t{a}\t{b}" for i, (a, b, same) in enumerate(pairs * 10)]
    for split, count in (("train", 40), ("dev", 12)):
        (folder / f"{split}.tsv").write_text("\n".join(["Quality\t#1 ID\t#2 ID\t#1 String\t#2 String", *rows[:count]]) + "\n")
    monkeypatch.setenv("VERALIB_DATA", str(tmp_path))
    return tmp_path


def write(folder, **changes):
    raw = {
        "output": str(folder / "out"),
        "common": {"protocol": "honest"},
        "tasks": {"mrpc": {"recipe": "glue-mrpc-base"}},
        "methods": {"VeRA": {"method": "vera", "sweep": {"lr": {"times": [0.3, 1, 3]}}}},
        **changes,
    }
    (folder / "grid.yaml").write_text(yaml.safe_dump(raw))
    return folder / "grid.yaml"


def test_rates_are_swept_around_each_recipes_own(tmp_path, monkeypatch):
    monkeypatch.delenv("VERALIB_DATA", raising=False)
    tasks = {"mrpc": {"recipe": "glue-mrpc-base"}, "rte": {"recipe": "glue-rte-base"}}
    grid = read_grid(
        write(tmp_path, tasks=tasks, methods={"VeRA": {"sweep": {"lr": {"times": [0.3, 1, 3]}}}, "head": {"method": "head"}})
    )
    rates = {task: [c.value for c in grid.cells if c.task == task and c.name == "VeRA"] for task in tasks}
    assert rates == {"mrpc": [3e-3, 1e-2, 3e-2], "rte": [1.2e-3, 4e-3, 1.2e-2]}
    settings = [settings_of(c, "run") for c in grid.cells]
    assert {(s.validation, s.test, s.best) for s in settings} == {("0.1", "validation", True)}
    assert {s.epochs for s in settings} == {30, 160} and {s.rank for s in settings if s.method == "vera"} == {1024}
    assert grid.metrics == {"mrpc": "accuracy", "rte": "accuracy"} and settings[0].recipe == "glue-mrpc-base, honest"


def test_a_rate_that_is_given_stays_beside_a_sweep_of_something_else_and_is_what_times_multiply(tmp_path, monkeypatch):
    monkeypatch.delenv("VERALIB_DATA", raising=False)
    methods = {
        "ranks": {"method": "vera", "lr": 0.03, "sweep": {"rank": [4, 16]}},
        "around": {"method": "vera", "lr": 0.03, "sweep": {"lr": {"times": [0.5, 2]}}},
        "list": {"method": "vera", "lr": 0.03, "sweep": {"lr": [0.1, 0.2]}},
        "alone": {"method": "vera", "lr": 0.03},
    }
    cells = read_grid(write(tmp_path, methods=methods, seeds=[0])).cells
    rates = {name: [settings_of(c, "run").resolved_lr for c in cells if c.name == name] for name in methods}
    assert rates == {"ranks": [0.03, 0.03], "around": [0.015, 0.06], "list": [0.1, 0.2], "alone": [0.03]}
    assert [settings_of(c, "run").rank for c in cells if c.name == "ranks"] == [4, 16]


def test_the_documents_grid_is_one(tmp_path, monkeypatch):
    monkeypatch.delenv("VERALIB_DATA", raising=False)
    (text,) = re.findall(r"```yaml\n(output: results/honest.*?)```", Path("docs/cli.md").read_text(), re.S)
    (tmp_path / "grid.yaml").write_text(text)
    assert len(read_grid(tmp_path / "grid.yaml").cells) == 2 * 2 * 3 * 5


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"tasks": {"mrpc": {"recipe": "glue-mrpc-bse"}}}, "glue-mrpc-base"),
        ({"tasks": {"mrpc": {"model": "m", "data": "d"}}}, "protocol belongs to a recipe"),
        ({"common": {"protocol": "fair"}}, "published or honest"),
        ({"methods": {"VeRA": {"sweep": {"lr": {"times": [0]}}}}}, "numbers above 0"),
        ({"methods": {"VeRA": {"sweep": {"schedule": {"times": [1]}}}}}, "no rate schedule"),
        ({"methods": {"VeRA": {"epochz": 3}}}, "epochs"),
    ],
)
def test_what_a_recipe_cant_be_asked_for_is_said(tmp_path, monkeypatch, changes, said):
    monkeypatch.delenv("VERALIB_DATA", raising=False)
    with pytest.raises(ConfigError, match=said):
        read_grid(write(tmp_path, **changes))


def test_one_command_chooses_epoch_and_rate_on_a_split_of_train(glue, bert):
    small = {"model": str(bert), "epochs": 3, "rank": 4, "max_length": 24, "batch_size": 8, "plot": False}
    methods = {"VeRA": {"method": "vera", "sweep": {"lr": {"times": [1e-6, 3]}}}}
    grid = write(glue, common={"protocol": "honest", **small}, methods=methods)
    done = CliRunner().invoke(build(), ["sweep", str(grid)])
    assert done.exit_code == 0, done.output
    runs = [json.loads(p.read_text()) for p in sorted((glue / "out" / "mrpc").iterdir())]
    assert len(runs) == 2
    for run in runs:
        assert run["rows"] == {"train": 36, "validation": 4, "test": 12}
        assert {"eval_accuracy", "test_accuracy"} <= run["metrics"].keys()
    best = max(sorted(runs, key=lambda r: r["value"]), key=lambda r: r["metrics"]["eval_accuracy"])
    assert f"lr {best['value']:g}" in done.output and f"{100 * best['metrics']['test_accuracy']:.1f}" in done.output
