"""Settings: every fault at once, unknown names with the nearest, YAML with overrides."""

import pytest

from veralib.baselines import METHODS
from veralib.errors import ConfigError
from veralib.training.settings import DEFAULT_LR_HEAD, Settings, load_settings

GIVEN = {"model": "m", "data": "d.csv"}


def test_every_fault_is_listed_at_once():
    with pytest.raises(ConfigError) as e:
        Settings(modle="m", data="d.csv", epochs=-1, batch_size="many", task="clasification")
    text = str(e.value)
    assert 'there is no setting "modle". Did you mean "model"?' in text
    assert "model is missing" in text
    assert "epochs is -1" in text
    assert "batch_size is 'many'" in text
    assert "task is 'clasification'" in text and "'prompt-completion'" in text


@pytest.mark.parametrize(
    ("fields", "said"),
    [
        ({"method": "lroa"}, 'no method "lroa". Did you mean "lora"?'),
        ({"data": ""}, "data is empty"),
        ({"method": "head", "task": "causal-lm"}, "has none"),
        ({"text": "a,b,c"}, "text names 3 columns"),
        ({"task": "prompt-completion", "text": "a"}, "reads 2"),
        ({"lr": float("nan")}, "lr is nan"),
        ({"evaluate_every": 0}, "evaluate_every is 0"),
        ({"best": True, "evaluate_every": "never"}, "best needs evaluations"),
        ({"best": True, "evaluate_every": 5}, "set save_every to 5"),
        ({"patience": 2, "evaluate_every": "never"}, "patience needs evaluations"),
        ({"validation": "1.5"}, "validation is 1.5"),
        ({"rank": 0}, "rank is 0"),
        ({"options": {"d_inital": 1}}, 'no field "d_inital". Did you mean "d_initial"?'),
        ({"options": {"r": 8}}, "here it is rank"),
        ({"training": {"bf61": True}}, 'no field of training: "bf61". Did you mean "bf16"?'),
        ({"training": {"learning_rate": 1}}, "training.learning_rate is set by lr"),
        ({"seed": -1}, "seed is -1"),
        ({"task": "images", "augment": True, "training": {"dataloader_persistent_workers": True}}, "the first one's views"),
    ],
)
def test_a_wrong_setting_is_named(fields, said):
    with pytest.raises(ConfigError) as e:
        Settings(**{**GIVEN, **fields})
    assert said in str(e.value)


def test_several_faults_of_meaning_are_listed_at_once():
    with pytest.raises(ConfigError) as e:
        Settings(**GIVEN, method="x", training={"bf61": 1}, rank=-1)
    assert all(part in str(e.value) for part in ('"x"', '"bf61"'))


def test_text_from_a_command_line_is_understood():
    s = Settings(
        model="m",
        data="a.csv, b.csv",
        text="one,two",
        rank="16",
        lr="1e-3",
        validation=0.25,
        best="yes",
        evaluate_every="5",
        save_every=5,
    )
    assert s.data == ("a.csv", "b.csv") and s.text_columns == ("one", "two")
    assert (s.rank, s.lr, s.share, s.best, s.evaluate_every) == (16, 1e-3, 0.25, True, 5)


@pytest.mark.parametrize(
    ("given", "meant"),
    [
        ("q_proj", ("q_proj",)),
        ("q_proj,v_proj", ("q_proj", "v_proj")),
        ("c_attn:q, c_attn:v", ("c_attn:q", "c_attn:v")),
        ("all-linear", "all-linear"),
        (r".*\.(q|v)_proj", r".*\.(q|v)_proj"),
        (["query"], ("query",)),
    ],
)
def test_targets_are_names_or_one_expression(given, meant):
    assert Settings(**GIVEN, targets=given).targets == meant


def test_every_setting_has_help():
    assert len(Settings.model_fields) > 30
    assert [name for name, field in Settings.model_fields.items() if not field.description] == []


def test_every_method_has_a_head_rate():
    assert set(DEFAULT_LR_HEAD) == set(METHODS)


def test_settings_survive_json():
    s = Settings(**GIVEN, rank={"query": 4, "value": 8}, training={"max_steps": 3}, targets="query")
    assert Settings(**s.to_dict()) == s


def test_replace_checks_again():
    s = Settings(**GIVEN)
    assert s.replace(epochs=9).epochs == 9 and s.epochs == 3
    with pytest.raises(ConfigError):
        s.replace(epochs=0)


def test_yaml_is_overridden_by_flags_and_dicts_are_merged(tmp_path):
    file = tmp_path / "run.yaml"
    file.write_text("model: m\ndata: [a.csv]\nbatch-size: 8\ntraining: {max_steps: 5, bf16: false}\n")
    s = load_settings(file, epochs="7", training={"bf16": True})
    assert (s.batch_size, s.epochs, s.training) == (8, 7.0, {"max_steps": 5, "bf16": True})


@pytest.mark.parametrize(
    ("content", "said"),
    [(None, "can't read"), ("- a\n- b\n", "holds a list"), ("a: [", "no YAML"), ("modle: m\n", 'mean "model"')],
)
def test_a_bad_yaml_file_is_named(tmp_path, content, said):
    file = tmp_path / "run.yaml"
    if content is not None:
        file.write_text(content)
    with pytest.raises(ConfigError) as e:
        load_settings(file)
    assert said in str(e.value)
