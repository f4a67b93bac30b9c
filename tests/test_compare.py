"""Tables of quality: the rate is chosen on held-out rows, differences are paired, cells come from result files."""

import itertools
import json
import math
import zipfile
from pathlib import Path

import pytest
import yaml

from tests.conftest import tiny_bert, tiny_gpt2
from veralib.baselines import METHODS, find_method
from veralib.commands.reproduce import _whole
from veralib.commands.train import resolve
from veralib.evaluation import read_items
from veralib.paper import cells, fig4, grid, weights
from veralib.paper.compare import chosen, interval, over_tasks, paired, verdict
from veralib.paper.published import TABLES, TASKS
from veralib.recipes import settings_of
from veralib.training import e2e
from veralib.training.data import load_data
from veralib.training.grid import read_grid
from veralib.training.grid import settings_of as grid_settings

EXPERIMENTS = Path(__file__).parents[1] / "experiments"


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


def test_of_loss_the_lowest_is_chosen_and_lower_is_better():
    runs = [
        {**run("x", rate, seed, 0, 0), "metrics": {"eval_loss": loss + seed / 10, "test_loss": loss}}
        for rate, loss in ((1e-3, 2.0), (1e-2, 1.0), (1.0, math.inf))
        for seed in range(3)
    ]
    (line,) = chosen(runs, "loss")
    assert line.value == 1e-2 and line.lower and line.scores == {0: 100.0, 1: 100.0, 2: 100.0}
    assert not chosen([run("x", 0.1, 0, 0.5, 0.1)], "matthews")[0].lower
    assert [verdict(ends, lower=True) for ends in ((-5, -2), (2, 5), (-5, 2), (-0.5, 0.9))] == [
        "better", "worse", "undecided", "on par"
    ]  # fmt: skip


def test_the_mean_of_the_tasks_is_over_those_that_all_methods_ran_seed_by_seed():
    tasks = {
        "cola": {"a": (0.1, 0.2, 0.3), "b": (0.4, 0.4, 0.4)},
        "mrpc": {"a": (0.5, 0.6, 0.9), "b": (0.8, 0.8)},
        "sst2": {"a": (0.9,)},
    }
    by_task = {
        task: [chosen([run(name, 1, s, 0, t) for s, t in enumerate(tests)], "matthews")[0] for name, tests in methods.items()]
        for task, methods in tasks.items()
    }
    a, b = over_tasks(by_task, ["a", "b"])
    assert a.task == b.task == "cola, mrpc" and a.scores == pytest.approx({0: 30, 1: 40, 2: 60})
    assert b.scores == pytest.approx({0: 60, 1: 60})  # the third seed ran on one of the tasks
    assert paired(a, b)[0] == pytest.approx(-25) and not over_tasks(by_task, ["a", "b", "c"])
    assert [line.task for line in over_tasks(by_task, ["a"])] == ["cola, mrpc, sst2"]
    loss = chosen([{**run("a", 1, 0, 0, 0), "metrics": {"eval_loss": 1, "test_loss": 1}}], "loss")
    assert not over_tasks({"cola": by_task["cola"], "text": loss}, ["a"])  # one is better high, the other low


def test_an_interval_is_students():
    # n = 3, mean 2, standard deviation 1: ± 4.302653 / √3, from a printed t table (0.975, 2 degrees).
    low, high = interval([1.0, 2.0, 3.0])
    assert (low, high) == pytest.approx((2 - 4.302653 / math.sqrt(3), 2 + 4.302653 / math.sqrt(3)), abs=1e-5)
    assert interval([1.0]) is None and interval([1.0, 1.0]) is None
    one = chosen([run("a", 1, s, 0, t) for s, t in ((0, 0.5), (1, 0.7), (2, 0.9), (3, 0.5))], "matthews")[0]
    other = chosen([run("b", 1, s, 0, t) for s, t in ((1, 0.6), (2, 0.7), (3, 0.35), (4, 0.1))], "matthews")[0]
    middle, ends, seeds = paired(one, other)
    assert (middle, seeds) == (pytest.approx(15.0), 3) and ends[0] < 15 < ends[1]


@pytest.mark.parametrize(
    ("ends", "says"),
    [
        ((-0.9, 0.9), "on par"),
        ((0.1, 5), "better"),
        ((-5, -0.1), "worse"),
        ((-2, 2), "undecided"),
        (None, "fewer than three seeds say nothing"),
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
    assert ours[0]["spread"] == pytest.approx(math.sqrt(13))  # 78, 80, 85: mean 81, squares 9 + 1 + 16 over 2
    cells.make("table2", tmp_path, tmp_path)
    assert "78.7 ± 0.7 · **80.00** ± 3.61 (+1.30, 3 seeds)" in (tmp_path / "table2.md").read_text()
    checked = 0
    for name in TABLES:
        for cell in cells.table(name, tmp_path)["cells"]:
            assert cell["command"] or cell["ours"] is not None or cell["column"] == "Avg."
            if cell["command"] and cell["command"].startswith("vera train "):
                words = cell["command"].partition(" && ")[0].split()
                flags = dict(zip(words[3::2], words[4::2], strict=True))
                sets = [flags.pop("--set")] if "--set" in flags else []
                protocol = flags.pop("--protocol", None)
                settings, _ = resolve(words[2], sets, protocol, {k[2:]: v for k, v in flags.items()})
                assert settings.method == flags["--method"] and settings.output.startswith("results/runs/" + words[2])
                checked += 1
    assert checked > 100


def test_every_method_of_table_3_can_be_attached():
    """By its cells' flags: DyLoRA, say, takes no part of GPT-2's fused linear."""
    for row in TABLES["table3"].rows:
        flags = row.flags.split()
        settings = settings_of("e2e-medium", row.method, **dict(zip([f[2:] for f in flags[::2]], flags[1::2], strict=True)))
        made = find_method(row.method)(tiny_gpt2(), settings, ())
        assert made.adapter_parameters > 0


def test_a_score_of_another_metric_stands_beside_and_fills_nothing(tmp_path):
    place = tmp_path / "e2e-medium" / "vera-seed0"
    place.mkdir(parents=True)
    (place / "result.json").write_text('{"metrics": {"test_loss": 2.0}}')
    (place / "scores.json").write_text('{"scores": {"BLEU": 69.0, "METEOR (exact+stem)": 41.25}}')
    found = {c["column"]: c for c in cells.make("table3", tmp_path, tmp_path)["cells"] if c["parameters"] == "0.098M"}
    assert found["BLEU"]["ours"] == 69.0 and found["METEOR"]["ours"] is None
    assert found["METEOR"]["beside"] == {"METEOR (exact+stem)": 41.25}
    text = (tmp_path / "table3.md").read_text()
    assert "46.6 · – [METEOR (exact+stem): 41.25]" in text and "doesn't compare with the printed one" in text
    again = found["METEOR"]["command"]  # the run is there: only its texts are scored again
    assert again.startswith("vera evaluate results/runs/e2e-medium/vera-seed0 ") and "vera train" not in again


def test_table_3_trains_and_evaluates_on_the_same_prompts(tmp_path, monkeypatch):
    monkeypatch.delenv("VERALIB_DATA", raising=False)
    monkeypatch.chdir(tmp_path)
    with zipfile.ZipFile("e2e-dataset.zip", "w") as archive:
        for name in e2e.FILES.values():
            archive.writestr(name, 'mr,ref\n"name[The Vaults], eatType[pub]",The Vaults is a pub.\n')
    commands = {c["command"] for c in cells.table("table3", tmp_path)["cells"]}
    for line in commands:
        halves = [half.split() for half in line.split(" && ")]
        train, score = ({w: v for w, v in itertools.pairwise(words) if w.startswith("--")} for words in halves)
        settings, _ = resolve(halves[0][2], [], None, {"data": train["--data"], "method": train["--method"]})
        trained = load_data(settings)
        tested, _ = read_items(score["--data"], columns=settings.text_columns)
        column, _ = settings.text_columns
        assert {row[column] for row in trained.train} == {item.prompt for item in tested} == {"name : The Vaults | Type : pub||"}
        assert halves[1][2] == train["--output"]
    assert len(commands) == len(TABLES["table3"].rows)


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
    assert "mean of the tasks" not in page
    (out / "mrpc").mkdir()
    for file in (out / "cola").iterdir():
        result = json.loads(file.read_text())
        result["metrics"]["test_matthews"] -= 0.2
        (out / "mrpc" / file.name).write_text(json.dumps({**result, "task": "mrpc"}))
    found = grid.make("glue", tmp_path / "grid.yaml", tmp_path, out)
    page = (out / "README.md").read_text()
    assert [line["mean"] for line in found["mean of the tasks"]] == pytest.approx([41, 61, 51])
    assert "| VeRA | 7 | 61.0 ± 1.0 | 41.0 ± 1.0 | **51.0 ± 1.0** |" in page
    assert page.index("mean of the tasks: minus LoRA r=8") < page.index("cola: minus LoRA r=8")


def test_a_diverged_seed_is_shown_and_stops_no_page(tmp_path):
    methods = {n: {"method": "vera", "sweep": {"lr": [0.1]}} for n in ("LoRA r=1", "VeRA")}
    raw = {"title": "A grid", "common": {"model": "m", "data": "d", "metric": "matthews"}, "methods": methods}
    (tmp_path / "grid.yaml").write_text(yaml.safe_dump({**raw, "tasks": {"cola": {}}, "seeds": [0, 1, 2]}))
    out = tmp_path / "results"
    (out / "cola").mkdir(parents=True)
    for name in methods:
        for seed in range(3):
            score = math.nan if (name, seed) == ("VeRA", 1) else 0.5 + seed / 100
            (out / "cola" / f"{name}{seed}.json".replace(" ", "-")).write_text(json.dumps(run(name, 0.1, seed, 0.5, score)))
    grid.make("glue", tmp_path / "grid.yaml", tmp_path, out)
    page = (out / "README.md").read_text()
    assert "| 50.0 ± 0.0 | **nan ± nan** | 3 |" in page and "| **51.0 ± 1.0** | 3 |" in page
    task, key = next(iter(zip(TASKS, TABLES["table2"].keys, strict=True)))
    for seed, score in enumerate((0.5, math.nan, 0.6)):
        place = tmp_path / "runs" / f"glue-{task}-base" / f"vera-seed{seed}"
        place.mkdir(parents=True)
        (place / "result.json").write_text(json.dumps({"metrics": {key: score}}))
    (cell,) = [c for c in cells.table("table2", tmp_path / "runs")["cells"] if c["seeds"] == 3 and c["column"] != "Avg."]
    assert math.isnan(cell["ours"]) and math.isnan(cell["spread"])


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
    assert fig4.make(tmp_path, tmp_path, tmp_path / "no-grid")["missing"] == 0
    nothing = fig4.make(tmp_path, tmp_path / "nothing", tmp_path / "no-grid")
    assert nothing["lines"] == [] and nothing["missing"] == 1 and "vera sweep" in (tmp_path / "fig4.md").read_text()
    low, high = {(b["method"], b["parameters"]): b["baseline"] for b in nothing["published"]}["LoRA", "0.8M"]
    assert (low, high) == (pytest.approx(100 * 85.2 / (0.185 * 800)), pytest.approx(100 * 85.2 / (0.175 * 800)))


def test_figure_4_isnt_whole_while_its_grid_lacks_runs(tmp_path):
    common = {"model": "m", "data": "d"}
    methods = {n: {"method": "vera", "sweep": {"lr": [0.1]}} for n in ("head only", "VeRA")}
    raw = {"common": common, "methods": methods, "tasks": {"cola": {}, "stsb": {"task": "regression"}}, "seeds": [0, 1]}
    (tmp_path / "grid.yaml").write_text(yaml.safe_dump(raw))
    (tmp_path / "cola").mkdir()
    for cell in read_grid(tmp_path / "grid.yaml", tmp_path).cells:
        if cell.task == "cola" and (cell.name, cell.seed) != ("VeRA", 1):
            scores = {"eval_accuracy": 0.5, "test_accuracy": 0.6}
            text = run(cell.name, 0.1, cell.seed, 0, 0, adapter_parameters=8000, metrics=scores, settings=cell.settings)
            cell.file(tmp_path).write_text(json.dumps(text))
    found = fig4.make(tmp_path, tmp_path, tmp_path / "grid.yaml")
    assert found["missing"] == 1 and _whole(found) == "1 run is missing"  # the regression has no accuracy


def test_the_plot_says_what_it_is_over_and_averages_as_its_page(tmp_path, monkeypatch):
    from matplotlib.axes import Axes

    methods = {"VeRA": {"method": "vera", "sweep": {"lr": [0.1]}}}
    raw = {"common": {"model": "m", "data": "d", "metric": "matthews"}, "methods": methods, "tasks": {"cola": {}}}
    (tmp_path / "out/cola").mkdir(parents=True)
    for seed, score in enumerate((0.1, 0.2, 0.9)):
        (tmp_path / "out/cola" / f"{seed}.json").write_text(json.dumps(run("VeRA", 0.1, seed, 0.5, score)))
    drawn, labels = [], []
    bars, texts = Axes.errorbar, Axes.set
    monkeypatch.setattr(Axes, "errorbar", lambda self, x, y, **more: drawn.append((x, y)) or bars(self, x, y, **more))
    monkeypatch.setattr(Axes, "set", lambda self, **given: labels.append(given["xlabel"]) or texts(self, **given))
    for over, average, x, y in (("bytes", "mean", 9, 40), ("parameters", "median", 7, 20)):
        (tmp_path / "grid.yaml").write_text(yaml.safe_dump({**raw, "over": over, "seeds": [0, 1, 2]}))
        found = grid.make("x", tmp_path / "grid.yaml", tmp_path, tmp_path / "out", average=average)
        assert drawn.pop() == (x, pytest.approx(y)) and over in labels.pop().replace("trained ", "")
        assert found["tasks"]["cola"][0][average] == pytest.approx(y)
        assert f"**{y}.0 ± 43.6**" in (tmp_path / "x.md").read_text()


def test_figure_2s_grid_is_the_papers():
    found = read_grid(EXPERIMENTS / "ranks.yaml")
    ranks = {m: sorted({c.settings["rank"] for c in found.cells if c.settings["method"] == m}) for m in ("vera", "lora")}
    assert ranks == {"vera": [1, 4, 16, 64, 256, 1024], "lora": [1, 2, 4, 8, 16, 32, 64]}
    assert found.over == "parameters" and {c.seed for c in found.cells} == set(range(5))
    assert set(read_grid(EXPERIMENTS / "ablations.yaml").metrics) == {"cola", "mrpc", "stsb"}


def test_the_second_glue_grid_has_every_other_method_and_shows_them_missing_beside_lora_and_vera(tmp_path):
    first, more = (yaml.safe_load((EXPERIMENTS / f"{n}.yaml").read_text()) for n in ("glue", "glue_more"))
    assert all(first[key] == more[key] for key in ("common", "tasks", "seeds"))  # else they wouldn't compare
    assert not first["methods"].keys() & more["methods"].keys()
    there = {m["method"] for m in (*first["methods"].values(), *more["methods"].values())}
    assert there >= METHODS.keys() | {f"peft:{n}" for n in ("randlora", "tinylora", "pvera", "fourierft", "unilora", "vblora")}
    (tmp_path / "glue/cola").mkdir(parents=True)
    (tmp_path / "glue/cola/a.json").write_text(json.dumps(run("LoRA r=1", 0.1, 0, 0.5, 0.5)))
    (tmp_path / "glue/cola/b.json").write_text(json.dumps(run("VeRA r=256", 0.1, 0, 0.5, 0.5)))
    (tmp_path / "glue/cola/c.json").write_text(json.dumps(run("VB-LoRA", 0.1, 0, 0.5, 0.5)))  # not what this grid compares with
    grid.make("glue_more", EXPERIMENTS / "glue_more.yaml", tmp_path, tmp_path / "more", beside=tmp_path / "glue")
    page = (tmp_path / "glue_more.md").read_text()
    assert "| LoRA r=1 | 7 | 9 |" in page and "| VeRA r=256 | 7 | 9 |" in page and "VB-LoRA |" not in page
    assert "- mrpc, BitFit: 9" in page
    assert "504 of 504 runs are missing" in page
    assert "![" not in page and not (tmp_path / "more/quality.png").exists()  # there is nothing of its own to see


def test_every_method_of_the_second_glue_grid_can_be_attached():
    cells_of = {c.name: c for c in read_grid(EXPERIMENTS / "glue_more.yaml").cells}
    assert len(cells_of) == 14
    counted = {}
    for name, cell in cells_of.items():
        model = tiny_bert(hidden_size=384, num_hidden_layers=6, num_attention_heads=12, intermediate_size=1536)
        made = find_method(cell.settings["method"])(model, grid_settings(cell, "x"), ("classifier",))
        counted[name] = made.adapter_parameters
    assert counted["LoRA-FA r=8"] == 12 * 8 * 384 and counted["FourierFT"] == 7680 and counted["LoRA-XS r=25"] == 7500
    assert counted["Adpt^D m=16 3 blocks"] == 3 * (2 * 384 * 16 + 16 + 384) and all(counted.values()), counted


def test_the_weights_figures_are_drawn_from_the_experiments_file(tmp_path):
    layers = [f"encoder.layer.{i}.attention.self.{part}" for i in range(2) for part in ("query", "value")]
    one = {"lr": 0.03, "score": 0.25, "metrics": {}, "adapter_parameters": 5, "seconds_per_step": 0.2, "peak_memory_bytes": 2**21}
    runs = {"full": one, "LoRA r=64": {**one, "seconds_per_step": 0.1}, "LoRA r=1": one, "VeRA r=64": one}
    found = {
        **{
            "task": "cola",
            "model": "m",
            "epochs": 1,
            "metric": "matthews",
            "runs": runs,
            "d_norms": {n: 0.5 + i for i, n in enumerate(layers)},
        },
        "cosines": {
            name: {n: 0.25 for n in layers if n.endswith("query")} for name in ("VeRA r=64", "LoRA r=1", "full", "random")
        },
        "intruders": {name: dict.fromkeys(layers, 3) for name in runs},
        "change": {name: dict.fromkeys(layers, 0.125) for name in runs},
        **{"rank": 64, "blocks": 2, "hidden": 8},
        **{"top": 10, "near": 0.5, "hardware": {"processor": "p"}},
    }
    source = tmp_path / "weights.json"
    for name, make in weights.MAKES.items():
        assert (
            make(tmp_path, source) == {"missing": 1} and "python -m experiments.weights" in (tmp_path / f"{name}.md").read_text()
        )
    assert "| VeRA | 578 | 1.02 | 21.69 |" in (tmp_path / "table12.md").read_text()
    source.write_text(json.dumps(found))
    for make in weights.MAKES.values():
        make(tmp_path, source)
    assert "| 1 | 2.500 | 3.500 |" in (tmp_path / "fig3.md").read_text() and (tmp_path / "fig3.png").stat().st_size > 1000
    assert "| VeRA r=64 | +0.2500 | +0.2500 | +0.2500 |" in (tmp_path / "fig5.md").read_text()
    assert "| full | 0.03 | 25.0 | 12 of 40 | 12.5 % |" in (tmp_path / "intruders.md").read_text()
    assert "| full | 5 | 200 | 2.00 | 2 |" in (tmp_path / "table12.md").read_text()
