"""The CoLA experiment on a toy: every cell runs once, the rate is chosen on held-out rows, no path of the machine is written."""

import json

import pytest

from experiments import cola

from .tiny import sentences


@pytest.fixture
def toy(tmp_path, monkeypatch):
    """A folder like GLUE's CoLA, and a grid of two methods with two rates."""
    pytest.importorskip("peft")
    for name, count in (("train", 60), ("dev", 20)):
        lines = [f"gj04\t{int(r['label'] == 'good')}\t\t{r['text']}\n" for r in sentences(count, seed=count)]
        (tmp_path / f"{name}.tsv").write_text("".join(lines))
    names = ("head only", "VeRA r=256")
    monkeypatch.setattr(cola, "GRID", {n: (*cola.GRID[n][:2], cola.GRID[n][2][:2]) for n in names})
    monkeypatch.setattr(cola, "run_grid", inline_grid)
    return tmp_path


def inline_grid(model, data, epochs, jobs, results, seeds):
    """run_grid in this process: the patched grid wouldn't reach a spawned one."""
    results.mkdir(parents=True, exist_ok=True)
    for name, (_, rate, values) in cola.GRID.items():
        for value in values:
            for seed in seeds:
                cola.run(model, data, epochs, results, name, rate, value, seed)


def test_the_experiment_runs_and_renders_without_paths(toy, bert):
    results = toy / "results"
    cola.main(["--data", str(toy), "--model", str(bert), "--epochs", "1", "--results", str(results), "--seeds", "0", "1"])
    files = sorted(results.glob("*.json"))
    assert len(files) == 2 * 2 * 2
    page = (results / "README.md").read_text()
    assert all(name in page for name in cola.GRID) and page.count("chosen") == 2
    for text in [page, *(f.read_text() for f in files)]:
        assert str(toy) not in text and "/tmp" not in text
    report = json.loads(files[0].read_text())
    assert report["rows"] == {"train": 54, "validation": 6, "test": 20} and "test_matthews" in report["metrics"]


def test_the_rate_is_chosen_on_held_out_rows_and_dev_is_reported():
    def run(value, seed, held_out, dev):
        return {
            **{"name": "head only", "rate": "lr_head", "value": value, "seed": seed, "adapter_parameters": 0, "adapter_bytes": 9},
            "metrics": {"eval_matthews": held_out, "test_matthews": dev, "test_accuracy": dev},
            **{"seconds_per_step": 0.01, "base": {"folder": "b", "sha256": "0" * 64}, "data": {"train/train.tsv": "1" * 64}},
            **{"settings": {"epochs": 3}, "rows": {"train": 9, "validation": 1, "test": 2}, "versions": {"torch": "2"}},
            "hardware": {"processor": "p", "threads": 1},
        }

    runs = [run(0.1, 0, 0.50, 0.10), run(0.1, 1, 0.60, 0.30), run(0.2, 0, 0.40, 0.90), run(0.2, 1, 0.41, 0.90)]
    page = cola.render(runs)
    (row,) = [line for line in page.splitlines() if line.startswith("| head only") and "**" in line]
    assert "lr_head 0.1" in row and "**20.0 ± 14.1**" in row and "55.0 ± 7.1" in row
