"""Grids: every fault of the file is listed, finished runs aren't repeated, shards add up, nothing holds the machine's paths."""

import json
import os
import signal
import subprocess
import sys
import time
from concurrent.futures import Future
from contextlib import suppress

import pytest
import torch
import yaml

from veralib.errors import ConfigError, TrainingDiverged
from veralib.paper.compare import chosen
from veralib.training import sweep, train
from veralib.training.grid import read_grid, settings_of
from veralib.training.sweep import load_results, run_grid

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


def test_runs_that_another_grid_has_made_are_taken_over_unless_a_setting_or_the_base_differs(grid_file, tmp_path, bert):
    first = tmp_path / "first"
    assert run_grid(read_grid(grid_file, first), only="vera") == []
    raw = yaml.safe_load(grid_file.read_text())
    raw["methods"] = {
        "plain": {"method": "vera", "rank": 4, "sweep": {"lr": [0.02]}},
        "wide": {"method": "vera", "rank": 8, "sweep": {"lr": [0.02]}},
    }
    raw |= {"also": [str(first), str(tmp_path / "nothing")], "seeds": [0, 1, 2]}
    raw["common"]["columns"] = "source,label,mark,sentence"  # the same, spelt otherwise
    del raw["tasks"]["cola"]["columns"]
    second = tmp_path / "second.yaml"
    second.write_text(yaml.safe_dump(raw))
    (first / "cola" / "note.json").write_text('{"title": "no run"}')
    grid = read_grid(second, tmp_path / "out")
    said: list[str] = []
    assert run_grid(grid, only="plain", log=said.append) == []
    assert said[0] == f"also: {(tmp_path / 'nothing').as_posix()} holds no runs yet, so none are taken over from there"
    assert said[1].startswith("2 runs taken over from") and said[2] == "1 of 6 runs to do"
    mine = [json.loads((tmp_path / f"out/cola/plain-lr0.02-seed{seed}.json").read_text()) for seed in (0, 1, 2)]
    theirs = [json.loads((first / f"cola/vera-r4-lr0.02-seed{seed}.json").read_text()) for seed in (0, 1)]
    assert [m["metrics"] for m in mine[:2]] == [t["metrics"] for t in theirs] and "from" not in mine[2]
    assert mine[0]["name"] == "plain" and mine[0]["from"].endswith("vera-r4-lr0.02-seed0.json")
    assert [c.name for c in grid.missing()] == ["wide"] * 3

    for file in first.glob("*/*.json"):
        file.write_text(json.dumps(json.loads(file.read_text()) | {"base": {"name": "tiny", "sha256": "another"}}))
    assert run_grid(read_grid(second, tmp_path / "again"), only="plain", log=said.append) == [] and "3 of 6 runs to do" in said


def test_a_run_that_diverges_is_the_worst_of_its_methods_rates_and_is_not_run_again(grid_file, tmp_path):
    raw = yaml.safe_load(grid_file.read_text())
    raw["common"] |= {"epochs": 3, "metric": "accuracy"}
    raw["methods"] = {"VeRA": {"method": "vera", "rank": 4}, "full": {"method": "full"}}
    for name in raw["methods"]:
        raw["methods"][name]["sweep"] = {"lr": [1.0e-3, 1.0e30]}
    del raw["tasks"]["cola"]["metric"]
    grid_file.write_text(yaml.safe_dump(raw))
    grid = read_grid(grid_file, tmp_path / "out")
    said: list[str] = []
    assert run_grid(grid, log=said.append) == [] == grid.missing()
    assert sum("eval_accuracy nan, test_accuracy nan" in line for line in said) == 4
    lines = chosen(load_results(grid.output), "accuracy")
    assert [(line.name, line.value, sorted(line.scores)) for line in lines] == [("full", 1e-3, [0, 1]), ("VeRA", 1e-3, [0, 1])]

    settings = settings_of(next(c for c in grid.cells if c.value == 1e30), tmp_path / "run")
    with pytest.raises(TrainingDiverged, match=r"lr was 1e\+30"):
        train(settings)
    assert not list((tmp_path / "run").glob("*.safetensors")) and not (tmp_path / "run" / "result.json").exists()
    assert train(settings.model_copy(update={"lr": 1e-3})).metrics["test_accuracy"] > 0  # the folder is free for another rate


def test_shards_add_up_and_a_failed_run_stops_nobody(grid_file, tmp_path, monkeypatch):
    raw = yaml.safe_load(grid_file.read_text())
    raw["methods"]["VeRA r=4"]["targets"] = ["nowhere"]
    grid_file.write_text(yaml.safe_dump(raw))
    grid = read_grid(grid_file, tmp_path / "out")
    failed = [f for part in (1, 2, 3) for f in run_grid(grid, shard=(part, 3), log=lambda line: None)]
    assert len(failed) == 4 and all("nowhere" in f for f in failed)
    assert {c.name for c in grid.missing()} == {"VeRA r=4"} and len(grid.missing()) == 4


@pytest.mark.slow
@pytest.mark.parametrize("how", [signal.SIGINT, signal.SIGKILL])
def test_a_sweep_interrupted_in_the_middle_goes_on_and_repeats_nothing_that_ended(grid_file, tmp_path, how):
    out = tmp_path / "out"
    grid = read_grid(grid_file, out)
    done = lambda: {p.name: p.stat().st_mtime_ns for p in out.glob("cola/*.json")}  # noqa: E731
    command = [sys.executable, "-m", "veralib.cli", "sweep", str(grid_file), "--output", str(out)]
    # A session of its own, so that SIGINT reaches the worker too, as Ctrl-C in a terminal does; and a job in the background is
    # started with SIGINT ignored. SIGKILL reaches the parent alone: communicate() ends only when its workers have, too.
    process = subprocess.Popen(
        command, start_new_session=True, preexec_fn=lambda: signal.signal(signal.SIGINT, signal.default_int_handler),
        stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
    )  # fmt: skip
    try:
        deadline = time.monotonic() + 300
        while len(done()) < 2 and process.poll() is None and time.monotonic() < deadline:
            time.sleep(0.005)
        process.kill() if how == signal.SIGKILL else os.killpg(process.pid, how)
        said, _ = process.communicate(timeout=120)
    finally:
        with suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
    assert process.returncode != 0, said
    before = done()
    assert 2 <= len(before) < 8, said
    assert all(json.loads((out / "cola" / name).read_text())["metrics"] for name in before)  # whole files alone
    missing = {c.file(out).name for c in grid.missing()}
    assert missing.isdisjoint(before) and len(missing) == 8 - len(before)
    lines: list[str] = []
    assert run_grid(grid, log=lines.append) == [] and lines[0] == f"{len(missing)} of 8 runs to do"
    after = done()
    assert {name: after[name] for name in before} == before and len(after) == 8 and grid.missing() == []


@pytest.mark.slow
def test_two_jobs_give_the_results_of_one(grid_file, tmp_path):
    grids = {jobs: read_grid(grid_file, tmp_path / f"jobs{jobs}") for jobs in (1, 2)}
    for jobs, grid in grids.items():
        assert run_grid(grid, jobs, shard=(1, 4), log=lambda line: None) == []
    one, two = ({(r["name"], r["value"], r["seed"]): r["metrics"] for r in load_results(g.output)} for g in grids.values())
    assert one == two and len(one) == 2


def test_jobs_go_round_the_gpus_that_the_process_may_use(grid_file, tmp_path, monkeypatch):
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "2,GPU-5f")
    assert sweep._gpus() == ["2", "GPU-5f"]
    given = []

    class Pool:
        def __init__(self, jobs, mp_context, initializer, initargs):
            assert initializer is sweep._share and initargs[1] == jobs
            given.append([initargs[0].get(timeout=20) for _ in range(jobs)])

        def submit(self, run, cell, output):
            future = Future()
            future.set_result("fine")
            return future

        def shutdown(self, cancel_futures):
            pass

    monkeypatch.setattr(sweep, "ProcessPoolExecutor", Pool)
    for jobs in (1, 3):
        assert run_grid(read_grid(grid_file, tmp_path / "out"), jobs, log=lambda line: None) == []
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES")
    for count in (4, 0):
        monkeypatch.setattr(torch.cuda, "device_count", lambda count=count: count)
        run_grid(read_grid(grid_file, tmp_path / "out"), 2, log=lambda line: None)
    assert given == [["2"], ["2", "GPU-5f", "2"], ["0", "1"], [None, None]]


def test_a_worker_sees_its_gpu_alone_or_has_its_part_of_the_cores(monkeypatch):
    class Numbers:
        def __init__(self, gpu):
            self.gpu = gpu

        def get(self):
            return self.gpu

    threads = []
    monkeypatch.setattr(torch, "set_num_threads", threads.append)
    monkeypatch.setattr(os, "sched_getaffinity", lambda pid: set(range(8)), raising=False)
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "0,1")
    sweep._share(Numbers("1"), 2)
    assert os.environ["CUDA_VISIBLE_DEVICES"] == "1" and threads == []
    for jobs in (2, 16):
        sweep._share(Numbers(None), jobs)
    monkeypatch.setenv("OMP_NUM_THREADS", "3")  # who says so has torch take it
    sweep._share(Numbers(None), 2)
    assert os.environ["CUDA_VISIBLE_DEVICES"] == "1" and threads == [4, 1]


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
    raw = yaml.safe_load(grid_file.read_text())
    raw["methods"]["VeRA r=48"] = {"method": "vera", "rank": 48, "lr": 0.01}
    grid_file.write_text(yaml.safe_dump(raw))
    command = ["sweep", str(grid_file), "--dry-run", "--only"]
    one, both = (CliRunner().invoke(build(), [*command, only]) for only in ("cola/vera r=4", "=4"))
    assert len(one.output.splitlines()) == 4 and "r48" not in one.output and len(both.output.splitlines()) == 6
    none = CliRunner().invoke(build(), ["sweep", str(grid_file), "--only", "rte", "--dry-run"])
    assert none.exit_code == 1 and "cola/head only" in none.output
