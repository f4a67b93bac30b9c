"""VeraConfig: every fault said at once, PEFT's names translated, and the same config back from JSON, pickle and copies."""

import copy
import dataclasses
import inspect
import json
import pickle

import pytest

from veralib.config import PEFT_FIELDS, VeraConfig, rank_of
from veralib.errors import ConfigError, VeraError

CONFIGS = [
    VeraConfig(),
    VeraConfig(64, 7, ["q_proj", "v_proj"]),
    VeraConfig(rank={"q_proj": 8, ".": 4}, seed=2**64 - 1, targets=r".*\.(q|v)_proj", layers=range(2, 5)),
    VeraConfig(targets="all-linear", basis="peft", seed=2**63 - 1, d_initial=1e-7, dropout=0.5, scale=-2),
    VeraConfig(targets=["c_attn:q"], levels="rademacher", sharing="unique", train="b", b_initial=0.1, train_modules="score"),
]


def fault(**fields):
    with pytest.raises(ConfigError) as caught:
        VeraConfig(**fields)
    return str(caught.value)


def test_the_defaults_are_the_papers():
    config = VeraConfig()
    assert (config.rank, config.seed, config.scale, config.dropout) == (256, 0, 1.0, 0.0)
    assert (config.d_start, config.b_start, config.train) == (0.1, 0.0, "both")
    assert (config.basis, config.levels, config.sharing) == ("philox-u8", "kaiming_uniform", "shared")


@pytest.mark.parametrize(
    ("fields", "starts"),
    [
        ({}, (0.1, 0.0)),
        ({"train": "d"}, (0.0, 1.0)),
        ({"train": "b"}, (1.0, 0.0)),
        ({"train": "d", "d_initial": 0.5, "b_initial": 1.0}, (0.5, 1.0)),
        ({"train": "b", "d_initial": 0.2, "b_initial": 0.3}, (0.2, 0.3)),
        ({"d_initial": 0.0}, (0.0, 0.0)),
    ],
)
def test_vectors_start_where_the_ablation_says(fields, starts):
    config = VeraConfig(**fields)
    assert (config.d_start, config.b_start) == starts


def test_all_faults_are_listed_together():
    text = fault(rank=0, seed=-1, levels="normal", dropout=1, targets=(), scale=0)
    assert text.startswith("VeraConfig: ") and text.endswith(".")
    for part in ("rank is 0", "seed is -1", "levels is 'normal'", "dropout is 1", "targets is empty", "scale is 0"):
        assert part in text


@pytest.mark.parametrize(
    ("fields", "said"),
    [
        ({"rank": -3}, "rank is -3, expected a whole number above 0"),
        ({"rank": 2.0}, "rank is 2.0, expected a whole number"),
        ({"rank": True}, "rank is True, expected a whole number"),
        ({"rank": {}}, "rank is an empty mapping"),
        ({"rank": {"q": 0}}, "rank for 'q' is 0"),
        ({"rank": {"(": 4}}, "rank's pattern '(' is no regular expression"),
        ({"rank": {"(" * 9999 + ")" * 9999: 4}}, "is no regular expression"),
        ({"rank": {3: 4}}, "rank's pattern 3 is no regular expression"),
        ({"seed": 2**64}, "expected a whole number from 0 to 2**64 - 1"),
        ({"seed": "0"}, "seed is '0'"),
        ({"basis": "peft", "seed": 2**63}, "takes seeds below 2**63"),
        ({"targets": 3}, "targets is 3"),
        ({"targets": ["q", ""]}, "targets is ('q', '')"),
        ({"targets": ""}, "targets is ''"),
        ({"layers": [-1]}, "layers is (-1,)"),
        ({"layers": 3}, "layers is 3"),
        ({"d_initial": float("nan")}, "d_initial is nan, expected a finite number"),
        ({"b_initial": float("inf")}, "b_initial is inf"),
        ({"b_initial": None}, "b_initial is None"),
        ({"scale": 10**400}, "expected a finite number"),
        ({"scale": True}, "scale is True"),
        ({"dropout": -0.1}, "dropout is -0.1"),
        ({"train_modules": ["", "a"]}, "train_modules is ('', 'a')"),
        ({"basis": "peft", "sharing": "unique"}, "PEFT always shares A and B"),
        ({"basis": "peft", "levels": "uniform"}, "PEFT's is always kaiming_uniform"),
        ({"train": "d", "b_initial": 0.5}, "with train='d' b stays 1"),
    ],
    ids=str,
)  # fmt: skip
def test_a_fault_says_what_was_found_and_what_was_expected(fields, said):
    assert said in fault(**fields)


@pytest.mark.parametrize(
    ("field", "wrong", "near"),
    [
        ("levels", "kaiming_unifrom", "kaiming_uniform"),
        ("levels", "radmacher", "rademacher"),
        ("basis", "philox", "philox-u8"),
        ("sharing", "uniqe", "unique"),
        ("train", "boht", "both"),
    ],
)
def test_an_unknown_choice_lists_the_known_and_the_nearest(field, wrong, near):
    text = fault(**{field: wrong})
    assert f"{field} is '{wrong}'" in text and f'Did you mean "{near}"?' in text and "Expected one of " in text


def test_pefts_names_are_answered_with_ours():
    from peft import VeraConfig as Peft

    text = fault(r=8, target_modules=["q"], projection_prng_key=3)
    for peft, ours in (("r", "rank"), ("target_modules", "targets"), ("projection_prng_key", "seed, with basis='peft'")):
        assert f'"{peft}" is PEFT\'s name; here it is {ours}' in text
    theirs = {f.name for f in dataclasses.fields(Peft)}
    assert theirs & set(PEFT_FIELDS) == set(PEFT_FIELDS) - {"lora_alpha"}
    ours = {f.name for f in dataclasses.fields(VeraConfig)}
    assert not ours & set(PEFT_FIELDS)
    own = {"r", "target_modules", "projection_prng_key", "save_projection", "vera_dropout", "bias", "modules_to_save"}
    assert own <= theirs & set(PEFT_FIELDS)


def test_an_unknown_field_lists_the_known_and_the_nearest():
    text = fault(ranks=8)
    assert 'there is no field "ranks". Did you mean "rank"?' in text and "train_modules" in text


def test_faults_are_config_errors_value_errors_and_veralibs():
    assert issubclass(ConfigError, ValueError) and issubclass(ConfigError, VeraError)


@pytest.mark.parametrize("config", CONFIGS, ids=range(len(CONFIGS)))
def test_a_config_comes_back_from_json_pickle_and_copies(config):
    text = json.dumps(config.to_dict())
    backs = [
        VeraConfig.from_dict(json.loads(text)),
        VeraConfig.from_dict(json.loads(json.dumps(config.to_dict(), sort_keys=True))),
        pickle.loads(pickle.dumps(config)),
        copy.copy(config),
        copy.deepcopy(config),
        config.replace(),
        eval(repr(config)),
    ]
    for back in backs:
        assert back == config and hash(back) == hash(config) and json.dumps(back.to_dict()) == text
    assert config.replace(dropout=0.25) != config


def test_the_order_of_rank_patterns_survives_json():
    """The first that matches counts, and JSON objects have no order."""
    config = VeraConfig(rank={"q_proj": 8, ".": 4})
    back = VeraConfig.from_dict(json.loads(json.dumps(config.to_dict(), sort_keys=True)))
    assert list(back.rank) == ["q_proj", "."] and rank_of(back, "h.0.q_proj") == 8 and rank_of(back, "h.0.v_proj") == 4


def test_from_dict_refuses_what_to_dict_never_wrote():
    for fields in (
        {"rank": [1]},
        {"rank": [["a", 1, 2]]},
        {"seed": "-1"},
        {"seed": "1" * 5000},
        {"seed": "1.0"},
        {"magnitude": True},
    ):
        with pytest.raises(ConfigError):
            VeraConfig.from_dict(fields)
    assert VeraConfig.from_dict({"rank": {"a": 1}, "seed": 5}) == VeraConfig(rank={"a": 1}, seed=5)


def test_the_seed_is_text_in_json_for_readers_with_53_bits():
    assert VeraConfig(seed=2**64 - 1).to_dict()["seed"] == "18446744073709551615"


def test_equal_configs_hash_alike_whatever_their_numbers_types():
    assert VeraConfig(scale=2) == VeraConfig(scale=2.0) and hash(VeraConfig(scale=2)) == hash(VeraConfig(scale=2.0))
    one, other = VeraConfig(rank={"a": 1, "b": 2}), VeraConfig(rank={"b": 2, "a": 1})
    assert one == other and hash(one) == hash(other)


def test_a_config_is_frozen_and_keeps_no_list_of_the_callers():
    names, ranks = ["q_proj"], {"q": 4}
    config = VeraConfig(rank=ranks, targets=names)
    names.append("v_proj")
    ranks["v"] = 3
    assert config.targets == ("q_proj",) and config.rank == {"q": 4}
    with pytest.raises(dataclasses.FrozenInstanceError):
        config.seed = 1


def test_the_signature_shows_the_fields():
    parameters = inspect.signature(VeraConfig).parameters
    assert list(parameters) == [f.name for f in dataclasses.fields(VeraConfig)]
    assert parameters["rank"].default == 256 and inspect.signature(VeraConfig).bind(8, targets=["q"]).arguments["rank"] == 8


def test_the_first_pattern_that_matches_gives_the_rank():
    config = VeraConfig(rank={r"\.q_proj$": 8, "layers.1": 4, "_proj": 2})
    assert [rank_of(config, f"layers.{i}.{n}") for i, n in ((1, "q_proj"), (1, "v_proj"), (2, "v_proj"))] == [8, 4, 2]
    assert rank_of(config, "lm_head") is None and rank_of(VeraConfig(rank=5), "lm_head") == 5
