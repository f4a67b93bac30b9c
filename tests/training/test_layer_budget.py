"""Ranks by layer: the total is exact, who moves more gets more, and the mapping trains as many parameters as it says."""

import pytest
import yaml
from typer.testing import CliRunner

from veralib.cli import build
from veralib.errors import ConfigError
from veralib.training import Settings, load_settings, train
from veralib.training.layer_budget import allocate, measure, ranks_of


def test_the_total_is_exact_and_proportional():
    assert allocate({"a": 3.0, "b": 1.0, "c": 0.0}, 43, least=1) == {"a": 31, "b": 11, "c": 1}
    for total in range(12, 60):
        ranks = allocate({"a": 0.7, "b": 0.29, "c": 0.011}, total)
        assert sum(ranks.values()) == total and min(ranks.values()) >= 4
    assert allocate({"a": 0.0, "b": 0.0}, 20) == {"a": 10, "b": 10}


@pytest.mark.parametrize(
    ("scores", "total", "said"),
    [({"a": 1.0, "b": 1.0}, 7, "less than 4 each"), ({"a": float("nan")}, 9, "finite"), ({"a": -1.0}, 9, "0 or more")],
)
def test_bad_budgets_are_refused(scores, total, said):
    with pytest.raises(ConfigError, match=said):
        allocate(scores, total)


@pytest.fixture
def settings(bert, rows, tmp_path):
    return Settings(model=bert, data=rows, output=tmp_path / "run", rank=8, lr=2e-2, batch_size=16, max_length=16, plot=False)


def test_scores_are_of_every_layer_and_follow_what_trains(settings):
    change = measure(settings, "change", steps=4)
    gradient = measure(settings, "gradient", steps=4)
    assert len(change) == 4 and change.keys() == gradient.keys() and all(v > 0 for v in [*change.values(), *gradient.values()])
    # b starts at 0, so d's gradient is 0 in the first step, and where b can't move d never does.
    still = measure(settings.replace(options={"train": "b"}), "change", steps=2)
    assert set(still.values()) == {0.0}
    assert set(measure(settings.replace(options={"train": "b"}), "gradient", steps=2).values()) == {0.0}
    with pytest.raises(ConfigError, match="steps is 0"):
        measure(settings, steps=0)
    with pytest.raises(ConfigError, match='method is "lora"'):
        measure(settings.replace(method="lora"))


@pytest.mark.parametrize(("total", "least", "said"), [(15, 4, "less than 4 each"), (40, 0, "least is 0")])
def test_a_budget_that_cant_be_shared_is_refused_before_the_first_step(settings, total, least, said, monkeypatch):
    from veralib.training.trainer import AdapterTrainer

    steps = []
    monkeypatch.setattr(AdapterTrainer, "training_step", lambda self, *args, **kwargs: steps.append(1))
    with pytest.raises(ConfigError, match=said):
        ranks_of(settings, total, least=least)
    assert not steps


@pytest.mark.parametrize("by", ["change", "gradient"])
def test_the_layers_that_matter_get_the_ranks(settings, by, monkeypatch):
    """The last block's query and value read zeros, so their weights have no effect and no gradient."""
    import torch

    from veralib.training import loading

    load = loading.load_base

    def blind(*args):
        base = load(*args)
        for part in ("query", "value"):
            module = base.model.get_submodule(f"bert.encoder.layer.1.attention.self.{part}")
            module.register_forward_pre_hook(lambda module, args: (torch.zeros_like(args[0]),))
        return base

    monkeypatch.setattr(loading, "load_base", blind)
    found = ranks_of(settings.replace(lr=0.1), total=100, by=by, steps=12)
    last = {name: rank for name, rank in found.items() if r"layer\.1\." in name}
    first = {name: rank for name, rank in found.items() if r"layer\.0\." in name}
    assert len(last) == len(first) == 2 and sum(found.values()) == 100
    assert set(last.values()) == {4} and sum(first.values()) == 92


def test_ranks_that_cant_be_written_are_still_shown(settings, tmp_path):
    given = {k: v for k, v in settings.to_dict().items() if k in settings.model_fields_set}
    (tmp_path / "run.yaml").write_text(yaml.safe_dump(given))
    there = tmp_path / "missing" / "ranks.yaml"
    args = ["budget", str(tmp_path / "run.yaml"), "--total", "40", "--steps", "1", "--ranks", str(there)]
    done = CliRunner().invoke(build(), args)
    assert done.exit_code == 1 and "can't write" in done.output and "40 ranks" in done.output


def test_the_command_writes_settings_that_train(settings, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    given = {k: v for k, v in settings.to_dict().items() if k in settings.model_fields_set}
    (tmp_path / "run.yaml").write_text(yaml.safe_dump(given))
    done = CliRunner().invoke(build(), ["budget", "run.yaml", "--total", "40", "--steps", "3", "--by", "gradient"])
    assert done.exit_code == 0, done.output
    chosen = load_settings(tmp_path / "ranks.yaml")
    assert sum(chosen.rank.values()) == 40 and len(chosen.rank) == 4 and len(set(chosen.rank.values())) > 1
    result = train(chosen.replace(epochs=1))
    assert result.adapter_parameters == 4 * 32 + 40
