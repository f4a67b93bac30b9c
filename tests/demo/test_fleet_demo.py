"""The demo's second part: its rule for rows, its comparison against plain measurements, its report."""

import copy
import math
import random

import pytest
import torch
from scipy.stats import binomtest

from tests.training import tiny
from veralib import attach
from veralib.demo import child, fleet, fleet_report, model, owners, show
from veralib.demo.comparison import COLUMNS, Comparison, Recipe, shares, wilson
from veralib.errors import ConfigError, DataError

SIZES = {"ann": 12, "bob": 9, "cid": 20, "dee": 5}


def write_package(folder, name, strings):
    (folder / name).mkdir(parents=True, exist_ok=True)
    body = "".join(f'def f{k}():\n    """{text}"""\n' for k, text in enumerate(strings))
    (folder / name / "__init__.py").write_text(body)


def sentence(word, k):
    return f"Gives back the {word} that was asked for in the {'n' * k} place, or raises an error where it isn't."


@pytest.fixture
def sources(tmp_path):
    """Six packages with 12 to 17 strings, and what the rule leaves out: few, private, shared, short ones, tests."""
    for n, name in enumerate("abcdef"):
        write_package(tmp_path, name, [sentence(name * 3, k) for k in range(1, 13 + n)])
    write_package(tmp_path, "few", [sentence("few", k) for k in range(1, 12)])
    write_package(tmp_path, "_hidden", [sentence("hidden", k) for k in range(1, 30)])
    write_package(tmp_path, "a/tests", [sentence("test", k) for k in range(1, 30)])
    write_package(tmp_path, "a/sub", [sentence("shared", 5), "Short."])
    write_package(tmp_path, "b/sub", [sentence("shared", 5)])
    return {"": tmp_path}


def test_owners_follow_the_rule(sources):
    texts = owners.load_texts(sources, owners=6)
    assert list(texts.train) == list(texts.held_out) == list("abcdef")
    for n, name in enumerate("abcdef"):
        mine = [*texts.train[name], *texts.held_out[name]]
        assert sorted(mine) == sorted(sentence(name * 3, k) for k in range(1, 13 + n))
        assert len(texts.held_out[name]) == round(len(mine) / 4)
    again = owners.load_texts(sources, owners=6)
    assert again.hash == texts.hash and again == texts
    assert set(owners.load_texts(sources, owners=3).train) < set("abcdef")


def test_too_few_owners_is_an_error_that_counts_them(sources):
    with pytest.raises(DataError, match=r"6 packages have 12 .* expected 7"):
        owners.load_texts(sources, owners=7)


def test_this_python_has_64_owners():
    texts = owners.load_texts()
    assert len(texts.train) == 64
    seen = [t for part in (texts.train, texts.held_out) for rows in part.values() for t in rows]
    assert len(set(seen)) == len(seen)
    assert all(9 <= len(rows) <= 60 for rows in texts.train.values())


@pytest.fixture(scope="module")
def comparison(tmp_path_factory):
    """Trained: four owners who each speak of another animal."""
    from transformers import AutoModelForCausalLM, AutoTokenizer

    folder = tiny.make_llama(tmp_path_factory.mktemp("llama"))
    chooser = random.Random(0)

    def rows(name, count):
        animal = ["cat", "dog", "bird", "fish"][list(SIZES).index(name)]
        return [" ".join(["the", animal, "likes", "the", chooser.choice(["red", "blue"]), "house"]) for _ in range(count)]

    train, held_out = ({n: rows(n, c) for n, c in SIZES.items()} for _ in range(2))
    base = AutoModelForCausalLM.from_pretrained(folder)
    said = []
    recipe = Recipe(rank=8, length=16, lr=0.1, shared_lr=0.1, further_lr=0.1, epochs=20, shared_epochs=20, further_epochs=10)
    made = Comparison(base, AutoTokenizer.from_pretrained(folder), train, held_out, recipe, lambda *what: said.append(what))
    made.said = said
    made.result = made.run("the", timed=2)
    return made


def test_losses_are_those_of_a_merged_model(comparison):
    """Every column of every owner, measured again one owner at a time on a model with the adapter merged into it."""
    result, names = comparison.result, list(SIZES)
    adapter = {
        "base": lambda n: None,
        "shared": lambda n: comparison.adapters["shared"]["everybody"],
        "own": lambda n: comparison.adapters["own"][n],
        "own_from_shared": lambda n: comparison.adapters["own_from_shared"][n],
        "another": lambda n: comparison.adapters["own"][names[names.index(n) - 1]],
    }
    assert adapter.keys() == COLUMNS.keys()
    for name in names:
        for key, of in adapter.items():
            plain = copy.deepcopy(comparison.plain).eval()
            if (mine := of(name)) is not None:
                vera = attach(plain)
                vera.load(mine, name="it")
                vera.merge("it")
            total, count = 0.0, 0
            for row in comparison.held_out[name]:
                ids = torch.tensor([row["input_ids"]])
                with torch.no_grad():
                    total += float(plain(input_ids=ids, labels=ids).loss) * (ids.shape[1] - 1)
                count += ids.shape[1] - 1
            assert result["owners"][name][key] == pytest.approx(total / count, rel=1e-4), (name, key)


def test_learning_shows_in_the_right_columns(comparison):
    for owner in comparison.result["owners"].values():
        assert owner["own"] < owner["another"] and owner["shared"] < owner["base"]
        assert owner["own_from_shared"] < owner["shared"]
    assert comparison.result["shares"]["own_from_shared"][0]["better"] == len(SIZES)


def test_the_rivals_learn_the_same_rows(comparison):
    for rival in comparison.result["rivals"]:
        assert rival["extrapolated_seconds"] == pytest.approx(sum(rival["seconds"]) / 2 * len(SIZES))
        for name, loss in rival["losses"].items():
            assert loss < comparison.result["owners"][name]["base"] - 0.1
    one, eight = (r["parameters"] for r in comparison.result["rivals"])
    assert eight == 8 * one


def test_progress_ends_at_the_last_step(comparison):
    steps = [what for what in comparison.said if len(what) == 3]
    phases = {what[0] for what in steps}
    assert len(phases) == 3
    for phase in phases:
        mine = [what[1:] for what in steps if what[0] == phase]
        assert mine == sorted(mine) and mine[-1][0] == mine[-1][1], phase


def test_nothing_is_left_in_the_model(comparison):
    assert comparison.vera.names == ()


@pytest.mark.parametrize("good, of", [(0, 10), (8, 10), (64, 64), (20, 64)])
def test_the_interval_is_wilsons(good, of):
    expected = binomtest(good, of).proportion_ci(method="wilson")
    assert wilson(good, of) == pytest.approx((expected.low, expected.high), abs=2e-5)


def test_shares_count_whom_the_own_adapter_helps():
    losses = {f"o{k}": {"shared": 1.0, "own": 0.9 if k % 2 else 1.2} for k in range(6)}
    whole, *thirds = shares(losses, {f"o{k}": k + 1 for k in range(6)}, "own")
    assert (whole["better"], whole["owners"], whole["examples"]) == (3, 6, [1, 6])
    assert whole["mean_gain"] == pytest.approx(-0.05)
    assert [t["examples"] for t in thirds] == [[1, 2], [3, 4], [5, 6]] and all(t["better"] == 1 for t in thirds)


def test_the_report_shows_the_numbers_of_the_result(comparison, tmp_path):
    about = {
        "data": "ab" * 32,
        "model": "tiny",
        "versions": dict.fromkeys(("python", "veralib", "torch", "transformers", "peft"), "1"),
    }
    result = {**comparison.result, "about": {**about, "hardware": {"processor": "a processor"}}}
    fleet_report.write(result, tmp_path)
    text = (tmp_path / "fleet.md").read_text()
    mean = sum(o["own"] for o in result["owners"].values()) / len(SIZES)
    assert f"| own adapter | {mean:.3f} |" in text and "LoRA r=1" in text and "extrapolated from 2" in text
    assert f"takes {result['batch']['ratio']:.2f} times as long" in text
    assert math.isfinite(result["batch"]["ratio"]) and (tmp_path / "fleet.png").read_bytes().startswith(b"\x89PNG")
    readme = fleet_report.in_readme("before\n<!-- fleet -->\nold\n<!-- /fleet -->\nafter\n", result)
    assert (
        readme.startswith("before\n<!-- fleet -->\n| rows read")
        and "old" not in readme
        and readme.endswith("<!-- /fleet -->\nafter\n")
    )
    with pytest.raises(ConfigError, match="fleet"):
        fleet_report.in_readme("no marks", result)
    assert set(result["continuations"]["texts"]) <= {"base model", *SIZES}


def test_the_child_sends_what_it_does_and_its_result(comparison, monkeypatch, capsys):
    class Pipe:
        def __init__(self):
            self.sent = []

        send = property(lambda self: self.sent.append)

        def close(self):
            self.sent.append("closed")

    def compare(folder, say, store):
        assert store == "store"
        say("a phase")
        say("steps", 3, 3)
        if folder == "broken":
            raise DataError("no data")
        return {"done": True}

    monkeypatch.setattr(fleet, "compare", compare)
    for folder, end in {"good": ("done", {"done": True}), "broken": ("failed", "no data")}.items():
        pipe = Pipe()
        child.compare_here((folder, "store"), pipe)
        assert pipe.sent == [("step", "a phase", None, None), ("step", "steps", 3, 3), end, "closed"]
    screen = show.Screen()
    with screen.phases() as say:
        say("a phase")
        say("steps", 1, 3)
        say("steps", 2, 3)
        say("steps", 3, 3)
    assert capsys.readouterr().out.splitlines() == ["a phase", "steps", "steps: step 3 of 3"]


def test_without_a_language_model_the_error_says_where_it_looked(tmp_path, monkeypatch):
    monkeypatch.setenv("VERALIB_LM", str(tmp_path))
    with pytest.raises(DataError, match="VERALIB_LM") as e:
        model.find_language_model()
    assert str(tmp_path) in str(e.value)


def test_tuning_owners_are_others_than_the_demos(sources):
    first, rest = owners.load_texts(sources, owners=4), owners.load_texts(sources, owners=2, skip=4)
    assert set(first.train) | set(rest.train) == set("abcdef") and len(rest.train) == 2
    with pytest.raises(DataError, match="expected 8"):
        owners.load_texts(sources, owners=4, skip=4)
