"""Grids: every fault of the file is listed, finished runs aren't repeated, shards add up, nothing holds the machine's paths."""

import json

import pytest
import yaml

from veralib.errors import ConfigError
from veralib.training.sweep import load_results, read_grid, run_grid

from .tiny import sentences


@pytest.fixture
def grid_file(bert, tmp_path, monkeypatch):
    """Two methods × two rates × two seeds on a folder like GLUE's CoLA, found below VERALIB_DATA."""
    home = tmp_path / "home"
    (home / "cola").mkdir(parents=True)
    for name, count in (("train", 60), ("dev", 20)):
        lines = [f"gj04\t{int(r['label'] == 'good')}\t\t{r['text']}\n" for r in sentences(count, seed=count)]
        (home / "cola" / f"{name}.tsv").write_text("".join(lines))
    monkeypatch.setenv("VERALIB_DATA", str(home))
    common = {"model": str(bert), "validation": "0.1", "test": "dev", "epochs": 1, "max_length": 16, "plot": False}
    common |= {"evaluate_every": "never", "save_every": "never"}
    task = {"data": "cola", "columns": ["source", "label", "mark", "sentence"], "text": "sentence", "metric": "matthews"}
    methods = {
        "head only": {"method": "head", "sweep": {"lr_head": [0.1, 0.2]}},
        "VeRA r=4": {"method": "vera", "rank": 4, "sweep": {"lr": [0.01, 0.02]}},
    }
    path = tmp_path / "grid.yaml"
    path.write_text(yaml.safe_dump({"common": common, "tasks": {"cola": task}, "methods": methods, "seeds": [0, 1]}))
    return path


def test_a_grid_runs_once_and_its_files_hold_no_path_of_the_machine(grid_file, tmp_path):
    grid = read_grid(grid_file, tmp_path / "out")
    assert len(grid.cells) == len(grid.missing()) == 8 and grid.metrics == {"cola": "matthews"}
    assert [c.seed for c in grid.missing()] == [0] * 4 + [1] * 4
    said: list[str] = []
    assert run_grid(grid, log=said.append) == []
    assert said[0] == "8 of 8 runs to do" and len(said) == 9 and all("test_matthews" in line for line in said[1:])
    files = sorted((tmp_path / "out" / "cola").glob("*.json"))
    assert [f.name for f in files][:2] == ["head-only-lr_head0.1-seed0.json", "head-only-lr_head0.1-seed1.json"]
    times = [f.stat().st_mtime_ns for f in files]
    assert len(files) == 8 and all("/" not in json.loads(f.read_text())["base"]["name"] for f in files)
    assert not any(str(tmp_path) in f.read_text() for f in files)
    again = read_grid(grid_file, tmp_path / "out")
    assert again.missing() == [] and run_grid(again, log=said.append) == [] and said[-1] == "0 of 8 runs to do"
    assert times == [f.stat().st_mtime_ns for f in files]
    found = load_results(tmp_path / "out", ["VeRA r=4", "head only"])
    assert [r["name"] for r in found] == ["VeRA r=4"] * 4 + ["head only"] * 4
    assert found[0]["rows"] == {"train": 54, "validation": 6, "test": 20} and found[0]["settings"]["basis_seed"] == 0


def test_shards_add_up_and_a_failed_run_stops_nobody(grid_file, tmp_path, monkeypatch):
    raw = yaml.safe_load(grid_file.read_text())
    raw["methods"]["VeRA r=4"]["targets"] = ["nowhere"]
    grid_file.write_text(yaml.safe_dump(raw))
    grid = read_grid(grid_file, tmp_path / "out")
    failed = [f for part in (1, 2, 3) for f in run_grid(grid, shard=(part, 3), log=lambda line: None)]
    assert len(failed) == 4 and all("nowhere" in f for f in failed)
    assert {c.name for c in grid.missing()} == {"VeRA r=4"} and len(grid.missing()) == 4


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"method": {}}, 'no key of a grid "method". Did you mean "methods"'),
        ({"methods": {}}, "methods is missing"),
        ({"methods": {"x": {"method": "vra", "lr": 0.1}}}, "vera"),
        ({"methods": {"x": {"method": "vera", "sweep": {"lr": [0.1], "rank": [1]}}}}, "expected one setting"),
        ({"methods": {"x": {"method": "vera", "rnk": 4, "lr": 0.1}}}, "rank"),
    ],
)
def test_a_grids_faults_are_listed_before_anything_runs(grid_file, change, said):
    raw = {**yaml.safe_load(grid_file.read_text()), **change}
    grid_file.write_text(yaml.safe_dump(raw))
    with pytest.raises(ConfigError, match=said):
        read_grid(grid_file)


def test_the_shards_flag_is_checked(grid_file):
    from typer.testing import CliRunner

    from veralib.cli import build

    for shard in ("3", "0/4", "5/4"):
        done = CliRunner().invoke(build(), ["sweep", str(grid_file), "--shard", shard])
        assert done.exit_code == 1 and "shard" in done.output
    listed = CliRunner().invoke(build(), ["sweep", str(grid_file), "--shard", "1/2", "--dry-run"])
    assert listed.exit_code == 0 and len(listed.output.splitlines()) == 4
    some = CliRunner().invoke(build(), ["sweep", str(grid_file), "--only", "cola/vera", "--dry-run"])
    assert len(some.output.splitlines()) == 4 and "head" not in some.output
    none = CliRunner().invoke(build(), ["sweep", str(grid_file), "--only", "rte", "--dry-run"])
    assert none.exit_code == 1 and "cola/head only" in none.output
