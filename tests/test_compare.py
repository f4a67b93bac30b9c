"""Tables of quality: the rate is chosen on held-out rows, differences are paired, cells come from result files."""

import json
import math

import pytest
import yaml

from veralib.commands.train import resolve
from veralib.errors import DataError
from veralib.paper import cells, fig4, grid, weights
from veralib.paper.compare import chosen, interval, paired, verdict
from veralib.paper.published import TABLES, TASKS


def run(name, value, seed, held_out, test, **more):
    return {
        **{"task": "cola", "name": name, "rate": "lr", "value": value, "seed": seed, "adapter_parameters": 7, "adapter_bytes": 9},
        "metrics": {"eval_matthews": held_out, "test_matthews": test},
        **{"seconds_per_step": 0.01, "base": {"name": "b", "sha256": "0"}, "versions": {"torch": "2"}},
        **{"hardware": {"processor": "p", "threads": 1}, **more},
    }


def test_the_rate_is_chosen_on_held_out_rows_of_the_seeds_that_all_rates_share():
    runs = [run("x", 0.1, 0, 0.50, 0.10), run("x", 0.1, 1, 0.60, 0.30)]
    runs += [run("x", 0.2, 0, 0.40, 0.90), run("x", 0.2, 1, 0.41, 0.90), run("x", 0.2, 2, 0.99, 0.99)]
    runs += [run("x", 0.3, 0, math.nan, 0.99), run("x", 0.3, 1, 0.99, 0.99)]
    (line,) = chosen(runs, "matthews")
    assert line.value == 0.1 and line.scores == pytest.approx({0: 10.0, 1: 30.0})
    assert line.held_out == pytest.approx({0: 50.0, 1: 60.0})


def test_an_interval_is_students():
    # n = 3, mean 2, standard deviation 1: ± 4.302653 / √3, from a printed t table (0.975, 2 degrees).
    low, high = interval([1.0, 2.0, 3.0])
    assert (low, high) == pytest.approx((2 - 4.302653 / math.sqrt(3), 2 + 4.302653 / math.sqrt(3)), abs=1e-5)
    assert interval([1.0]) is None
    one = chosen([run("a", 1, s, 0, t) for s, t in ((0, 0.5), (1, 0.7), (2, 0.9))], "matthews")[0]
    other = chosen([run("b", 1, s, 0, t) for s, t in ((1, 0.6), (2, 0.7), (3, 0.1))], "matthews")[0]
    middle, ends, seeds = paired(one, other)
    assert (middle, seeds) == (pytest.approx(15.0), 2) and ends[0] < 15 < ends[1]


@pytest.mark.parametrize(
    ("ends", "says"),
    [
        ((-0.9, 0.9), "on par"),
        ((0.1, 5), "better"),
        ((-5, -0.1), "worse"),
        ((-2, 2), "undecided"),
        (None, "one seed says nothing"),
    ],
)
def test_what_an_interval_says(ends, says):
    assert verdict(ends) == says


def test_a_cell_is_the_median_of_its_runs_or_a_command_that_runs(tmp_path, monkeypatch):
    monkeypatch.delenv("VERALIB_DATA", raising=False)
    for seed, score in enumerate((0.78, 0.80, 0.85)):
        place = tmp_path / "glue-rte-base" / f"vera-seed{seed}"
        place.mkdir(parents=True)
        (place / "result.json").write_text(json.dumps({"metrics": {"eval_accuracy": score}}))
    found = cells.table("table2", tmp_path)["cells"]
    ours = [c for c in found if c["ours"] is not None]
    assert len(found) == 13 * 7 and len(ours) == 1
    assert (ours[0]["printed"], ours[0]["ours"], ours[0]["seeds"]) == (78.7, pytest.approx(80.0), 3)
    assert ours[0]["difference"] == pytest.approx(1.3) and ours[0]["command"] is None
    checked = 0
    for name in TABLES:
        for cell in cells.table(name, tmp_path)["cells"]:
            if cell["command"]:
                words = cell["command"].partition(" && vera evaluate ")[0].split()
                flags = dict(zip(words[3::2], words[4::2], strict=True))
                sets = [flags.pop("--set")] if "--set" in flags else []
                protocol = flags.pop("--protocol", None)
                settings, _ = resolve(words[2], sets, protocol, {k[2:]: v for k, v in flags.items()})
                assert settings.method == flags["--method"] and settings.output.startswith("results/runs/" + words[2])
                checked += 1
    assert checked > 100


def test_each_table_is_written_and_names_its_missing_cells(tmp_path):
    for name, table in TABLES.items():
        found = cells.make(name, tmp_path, tmp_path / "runs")
        text = (tmp_path / f"{name}.md").read_text()
        assert len(found["cells"]) == len(table.rows) * (len(table.columns) + (table.rows[0].mean is not None))
        assert table.title in text and "vera train" in text and str(tmp_path) not in text


def test_the_average_column_is_the_mean_of_its_row(tmp_path):
    for row in TABLES["table2"].rows:
        assert abs(sum(row.values) / 6 - row.mean) <= 0.0501, row  # printed with one decimal
    for task, key in zip(TASKS, TABLES["table2"].keys, strict=True):
        place = tmp_path / f"glue-{task}-base" / "vera-seed0"
        place.mkdir(parents=True)
        (place / "result.json").write_text(json.dumps({"metrics": {key: 0.5 if task == "rte" else 0.8}}))
    (mean,) = [c for c in cells.table("table2", tmp_path)["cells"] if c["column"] == "Avg." and c["ours"]]
    assert mean["ours"] == pytest.approx(75) and mean["difference"] == pytest.approx(75 - 85.2) and mean["method"] == "VeRA"


def test_a_grids_page_is_rendered_from_its_files(tmp_path):
    methods = {n: {"method": "vera", "sweep": {"lr": [0.1]}} for n in ("LoRA r=1", "LoRA r=8", "VeRA")}
    raw = {"title": "A grid", "common": {"model": "m", "data": "d", "metric": "matthews"}, "methods": methods}
    (tmp_path / "grid.yaml").write_text(yaml.safe_dump({**raw, "tasks": {"cola": {}, "mrpc": {}}, "seeds": [0, 1, 2]}))
    out = tmp_path / "results"
    empty = grid.make("glue", tmp_path / "grid.yaml", tmp_path, out)
    assert empty["missing"] == 18 and "18 of 18 runs are missing" in (out / "README.md").read_text()
    (out / "cola").mkdir(parents=True)
    for name, base in (("LoRA r=1", 0.5), ("LoRA r=8", 0.7), ("VeRA", 0.6)):
        for seed in range(3):
            (out / "cola" / f"{name}{seed}.json".replace(" ", "-")).write_text(
                json.dumps(run(name, 0.1, seed, 0.5, base + seed / 100))
            )
    found = grid.make("glue", tmp_path / "grid.yaml", tmp_path, out)
    page = (out / "README.md").read_text()
    assert [line["mean"] for line in found["tasks"]["cola"]] == pytest.approx([51, 71, 61]) and found["tasks"]["mrpc"] == []
    assert "| VeRA | 7 | 9 | lr 0.1 | 50.0 ± 0.0 | **61.0 ± 1.0** | 3 |" in page
    assert "| VeRA | +10.0 | +10.0 to +10.0 | better |" in page and "| VeRA | -10.0 | -10.0 to -10.0 | worse |" in page
    assert (out / "quality.png").stat().st_size > 1000 and "runs are missing" in page and "- mrpc, VeRA: 3" in page
    assert "(results/quality.png)" in (tmp_path / "glue.md").read_text() and json.loads((tmp_path / "glue.json").read_text())


def test_figure_4_has_the_printed_formula_and_the_gain(tmp_path):
    (tmp_path / "cola").mkdir()
    for name, parameters, accuracy in (("head only", 0, 0.5), ("VeRA", 8000, 0.6), ("LoRA r=1", 16000, 0.7)):
        text = run(name, 0.1, 0, 0, 0, adapter_parameters=parameters, metrics={"eval_accuracy": 0.5, "test_accuracy": accuracy})
        (tmp_path / "cola" / f"{parameters}.json").write_text(json.dumps(text))
    found = {line["method"]: line for line in fig4.make(tmp_path, tmp_path)["lines"]}
    # VeRA: 100 · (60 / 50) / 8 = 15, (60 - 50) / 8 = 1.25; LoRA: 100 · (70 / 50) / 16 = 8.75, 20 / 16 = 1.25.
    assert [(found[n]["formula"], found[n]["gain"]) for n in ("VeRA", "LoRA r=1")] == [
        (pytest.approx(15), pytest.approx(1.25)),
        (pytest.approx(8.75), pytest.approx(1.25)),
    ]
    with pytest.raises(DataError, match="vera sweep"):
        fig4.make(tmp_path, tmp_path / "nothing")


def test_the_weights_figures_are_drawn_from_the_experiments_file(tmp_path):
    layers = [f"encoder.layer.{i}.attention.self.{part}" for i in range(2) for part in ("query", "value")]
    one = {"metrics": {}, "adapter_parameters": 5, "seconds_per_step": 0.2, "peak_memory_bytes": 2**21}
    runs = {"full": one, "LoRA r=64": {**one, "seconds_per_step": 0.1}, "LoRA r=1": one, "VeRA r=64": one}
    found = {
        **{"task": "cola", "model": "m", "epochs": 1, "runs": runs, "d_norms": {n: 0.5 + i for i, n in enumerate(layers)}},
        "cosines": {
            name: {n: 0.25 for n in layers if n.endswith("query")} for name in ("VeRA r=64", "LoRA r=1", "full", "random")
        },
        "intruders": {name: dict.fromkeys(layers, 3) for name in runs},
        "change": {name: dict.fromkeys(layers, 0.125) for name in runs},
        **{"rank": 64, "blocks": 2, "hidden": 8},
        **{"top": 10, "near": 0.5, "hardware": {"processor": "p"}},
    }
    source = tmp_path / "weights.json"
    with pytest.raises(DataError, match=r"experiments\.weights"):
        weights.fig3(tmp_path, source)
    source.write_text(json.dumps(found))
    for make in weights.MAKES.values():
        make(tmp_path, source)
    assert "| 1 | 2.500 | 3.500 |" in (tmp_path / "fig3.md").read_text() and (tmp_path / "fig3.png").stat().st_size > 1000
    assert "| VeRA r=64 | +0.2500 | +0.2500 | +0.2500 |" in (tmp_path / "fig5.md").read_text()
    assert "| full | 12 of 40 | 12.5 % |" in (tmp_path / "intruders.md").read_text()
    assert "| full | 5 | 200 | 2.00 | 2 |" in (tmp_path / "table12.md").read_text()
