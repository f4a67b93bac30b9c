"""Recipes: the published values reach the run, local files in their original form train, and what they can't do is said."""

import json

import pytest

from tests.training.tiny import make_bert
from veralib.baselines import METHODS
from veralib.commands.train import resolve
from veralib.errors import ConfigError, DataError, UnknownName
from veralib.recipes import RECIPES, find_recipe, remarks, settings_of
from veralib.training import train
from veralib.training.data import load_data
from veralib.training.plan import plan

GOOD, BAD = "a fine and lovely day", "an awful dull evening"


def test_every_recipe_and_method_resolves_to_valid_settings(monkeypatch):
    monkeypatch.delenv("VERALIB_DATA", raising=False)
    seen = 0
    for name, recipe in RECIPES.items():
        for method in (*recipe.methods, "dvora"):
            settings = settings_of(name, method)
            assert settings.method == method and "/" in settings.data[0] and settings.model == recipe.model
            assert remarks(name, method)
            seen += 1
    assert seen >= 2 * 6 * 4 + 2 * 4 * 5


# Typed from the paper's Tables 8, 9, 10 and 11, and Hu et al.'s Tables 9 and 11, apart from the recipes.
@pytest.mark.parametrize(
    ("name", "method", "printed"),
    [
        (
            "glue-rte-base",
            "vera",
            {"rank": 1024, "epochs": 160, "lr": 4e-3, "lr_head": 1e-2, "batch_size": 64, "max_length": 512},
        ),
        ("glue-mrpc-base", "vera", {"epochs": 30, "lr": 1e-2, "lr_head": 4e-3, "warmup": 0.06, "schedule": "linear"}),
        (
            "glue-sst2-large",
            "vera",
            {"rank": 256, "epochs": 10, "lr": 1e-2, "lr_head": 6e-3, "batch_size": 32, "accumulation": 4},
        ),
        ("glue-qnli-large", "vera", {"epochs": 20, "lr": 1e-2, "lr_head": 2e-4, "max_length": 128}),
        ("glue-stsb-large", "vera", {"epochs": 20, "lr": 2e-2, "lr_head": 2e-3, "metric": "pearson", "task": "regression"}),
        ("glue-cola-base", "lora", {"rank": 8, "epochs": 80, "lr": 4e-4, "batch_size": 32, "metric": "matthews"}),
        ("glue-rte-large", "lora", {"epochs": 20, "lr": 4e-4, "batch_size": 4, "accumulation": 1}),
        (
            "instruct-llama2-13b",
            "vera",
            {"rank": 1024, "lr": 4e-3, "batch_size": 4, "accumulation": 4, "warmup": 0.1, "epochs": 1},
        ),
        (
            "instruct-llama-7b",
            "lora",
            {"rank": 64, "lr": 4e-4, "schedule": "cosine", "quantise": "4bit", "targets": "all-linear"},
        ),
        ("e2e-medium", "vera", {"rank": 1024, "lr": 1e-1, "epochs": 5, "batch_size": 8, "warmup": 500, "weight_decay": 0.01}),
        (
            "images-resisc45-base",
            "vera",
            {"rank": 256, "lr": 7e-2, "lr_head": 5e-3, "epochs": 10, "shots": 10, "weight_decay": 0.01},
        ),
        ("images-flowers102-large", "full", {"lr": 4e-5, "lr_head": 8e-3}),
        ("images-food101-base", "full", {"lr": 4e-5, "lr_head": 4e-2}),
        ("images-cifar100-large", "head", {"lr_head": 4e-4}),
        ("images-resisc45-large", "lora", {"rank": 8, "lr": 4e-3, "lr_head": 4e-4}),
        ("e2e-large", "vera", {"lr": 2e-2, "training": {"label_smoothing_factor": 0.1}}),
    ],
)
def test_the_published_values_are_in_the_settings(name, method, printed, monkeypatch):
    monkeypatch.delenv("WORLD_SIZE", raising=False)
    settings = settings_of(name, method)
    assert {k: getattr(settings, k) for k in printed} == printed


BODIES = {
    "glue-rte-base": {"model_type": "roberta", "vocab_size": 50265, "max_position_embeddings": 514},
    "glue-rte-large": {
        **{"model_type": "roberta", "vocab_size": 50265, "max_position_embeddings": 514, "hidden_size": 1024},
        **{"num_hidden_layers": 24, "num_attention_heads": 16, "intermediate_size": 4096},
    },
    "e2e-medium": {"model_type": "gpt2", "n_embd": 1024, "n_layer": 24, "n_head": 16},
    "e2e-large": {"model_type": "gpt2", "n_embd": 1280, "n_layer": 36, "n_head": 20},
}


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("name", BODIES)
def test_every_method_can_be_attached_to_the_models_of_the_tables(name, method, tmp_path):
    if method == "head" and name.startswith("e2e"):
        pytest.skip("a language model has no head")
    (tmp_path / "config.json").write_text(json.dumps(BODIES[name]))
    settings = settings_of(name, method, model=tmp_path, **({"rank": 4} if method in ("dylora", "adalora") else {}))
    found = plan(settings)
    exact = {  # docs/PAPER.md; DyLoRA: Table 3's 0.39M; LoRA-FA: B alone of LoRA's row
        **{("glue-rte-base", "vera"): 43_008, ("glue-rte-base", "dvora"): 43_008 + 24 * 768, ("glue-rte-base", "lora"): 294_912},
        **{("glue-rte-large", "lora_fa"): 48 * 8 * 1024, ("glue-rte-base", "bitfit"): 102_144},
        **{("e2e-medium", "vera"): 98_304, ("e2e-large", "vera"): 165_888, ("e2e-medium", "dylora"): 393_216},
        **{("e2e-medium", "full"): 354_823_168, ("e2e-large", "lora"): 737_280},
    }
    assert found.adapter_parameters == exact.get((name, method), found.adapter_parameters)
    assert found.adapter_parameters > 0 or method == "head"


def test_a_method_without_a_row_has_the_tasks_epochs_and_says_whose_row_it_takes(monkeypatch):
    monkeypatch.delenv("WORLD_SIZE", raising=False)
    for method in METHODS.keys() - {"lora", "lora_fa"}:
        assert settings_of("glue-rte-base", method).epochs == 160, method
    fa, lora = (settings_of("glue-mrpc-large", m).given() for m in ("lora_fa", "lora"))
    assert {k for k in fa if fa[k] != lora[k]} == {"method", "output"} and fa["epochs"] == 20
    assert any("takes that of lora, which is our choice" in note for note in remarks("glue-mrpc-large", "lora_fa"))
    assert settings_of("glue-rte-large", "dvora").lr == 2e-2 and settings_of("glue-rte-large", "dvora").rank == 256
    assert any("our own rates" in note for note in remarks("glue-rte-base", "bitfit"))
    assert not any("our choice" in note or "our own" in note for note in remarks("glue-rte-base", "vera"))


def test_the_large_models_four_gpus_become_accumulation(monkeypatch):
    for processes, accumulation in ((1, 4), (2, 2), (4, 1)):
        monkeypatch.setenv("WORLD_SIZE", str(processes))
        assert settings_of("glue-cola-large").accumulation == accumulation
    for processes in (3, 8):
        monkeypatch.setenv("WORLD_SIZE", str(processes))
        with pytest.raises(ConfigError, match="batches of 128"):
            settings_of("glue-cola-large")
        assert settings_of("glue-cola-large", batch_size=16, accumulation=1).accumulation == 1
    with pytest.raises(ConfigError, match="batches of 4, which 8"):
        settings_of("glue-cola-large", "lora")
    monkeypatch.setenv("WORLD_SIZE", "2")
    assert settings_of("instruct-llama-7b").accumulation == 2


def test_a_key_of_training_or_options_joins_the_recipes_own(monkeypatch):
    monkeypatch.delenv("WORLD_SIZE", raising=False)
    ten = settings_of("instruct-llama-7b-10k", training={"logging_steps": 5})
    assert ten.training == {"bf16": True, "max_steps": 625, "logging_steps": 5}
    lora = settings_of("e2e-medium", "lora", options={"lora_dropout": 0.0})
    assert lora.options == {"lora_alpha": 32, "lora_dropout": 0.0}


def test_alpaca_is_read_below_veralib_data(tmp_path, monkeypatch):
    monkeypatch.setenv("VERALIB_DATA", str(tmp_path))
    assert settings_of("instruct-llama-7b").data == ("yahma/alpaca-cleaned",)
    (tmp_path / "alpaca").mkdir()
    file = tmp_path / "alpaca" / "alpaca_data_cleaned.json"
    file.write_text('[{"instruction": "Say a word.", "input": "", "output": "Word."}]')
    assert len(load_data(settings_of("instruct-llama-7b")).train) == 1


@pytest.fixture(scope="module")
def bert(tmp_path_factory):
    return make_bert(tmp_path_factory.mktemp("bert"))


@pytest.fixture
def glue(tmp_path):
    """MRPC, CoLA and STS-B in their original files' form, made up."""
    texts = [(GOOD, GOOD, 1), (GOOD, BAD, 0), (BAD, BAD, 1), (BAD, GOOD, 0)]
    mrpc = ["Quality\t#1 ID\t#2 ID\t#1 String\t#2 String"]
    mrpc += [f"{same}\t{i}\t{i + 9}\t{a} {i}\t{b}" for i, (a, b, same) in enumerate(texts * 6)]
    cola = [f"gj04\t{i % 2}\t{'*' if i % 2 else ''}\t{(GOOD, BAD)[i % 2]} {i}" for i in range(24)]
    stsb = ["index\tgenre\tfilename\tyear\told_index\tsource1\tsource2\tsentence1\tsentence2\tscore"]
    stsb += [f"{i}\tm\tf\t2012\t{i}\tnone\tnone\t{a}\t{b}\t{5.0 * same:.3f}" for i, (a, b, same) in enumerate(texts * 6)]
    for name, rows in {"MRPC": mrpc, "CoLA": cola, "STS-B": stsb}.items():
        folder = tmp_path / "glue" / name
        folder.mkdir(parents=True)
        for split in ("train", "dev"):
            text = "\n".join(rows) + "\n"
            (folder / f"{split}.tsv").write_text("\ufeff" + text if name == "MRPC" else text)
    return tmp_path


@pytest.mark.parametrize(("task", "metric"), [("mrpc", "accuracy"), ("cola", "matthews"), ("stsb", "pearson")])
@pytest.mark.parametrize("protocol", ["published", "honest"])
def test_the_original_files_train_by_either_protocol(task, metric, protocol, glue, bert, tmp_path, monkeypatch):
    monkeypatch.setenv("VERALIB_DATA", str(glue))
    small = {"model": bert, "epochs": 2, "rank": 4, "max_length": 24, "batch_size": 8, "plot": False, "output": tmp_path / "run"}
    result = train(settings_of(f"glue-{task}-base", protocol=protocol, **small))
    scored = "eval" if protocol == "published" else "test"
    assert f"{scored}_{metric}" in result.metrics and result.rows[{"eval": "validation"}.get(scored, scored)] == 24
    assert result.rows["train"] == (24 if protocol == "published" else 22)
    assert {"published": 1, "honest": 2}[protocol] == len(result.rows) - 1
    assert result.settings["recipe"] == f"glue-{task}-base, {protocol}"


def test_bad_input_is_answered_in_words(glue, bert, monkeypatch):
    with pytest.raises(UnknownName, match=r"glue-rte-base"):
        find_recipe("glue-rte-bse")
    with pytest.raises(ConfigError, match="published or honest"):
        settings_of("glue-rte-base", protocol="fair")
    with pytest.raises(ConfigError, match="chooses nothing"):
        settings_of("images-cifar100-base", protocol="honest")
    with pytest.raises(ConfigError, match="bettr"):
        settings_of("glue-rte-base", method="bettr")
    monkeypatch.setenv("VERALIB_DATA", str(glue))
    folder = glue / "glue" / "CoLA"
    (folder / "dev.tsv").rename(folder / "held.tsv")
    with pytest.raises(DataError, match="dev"):
        train(settings_of("glue-cola-base", model=bert, output=glue / "run"))
    (folder / "dev.tsv").write_text("index\tsentence\n0\tNo labels here.\n")  # what GLUE's test files look like
    with pytest.raises(DataError, match="2 fields, expected 4"):
        train(settings_of("glue-cola-base", model=bert, output=glue / "run"))


def test_the_command_line_resolves_recipes_files_and_flags(tmp_path, monkeypatch):
    monkeypatch.delenv("VERALIB_DATA", raising=False)
    settings, notes = resolve("glue-rte-base", ["training.bf16=true"], "honest", {"method": "lora", "epochs": "3"})
    assert (settings.method, settings.epochs, settings.validation, settings.test) == ("lora", 3, "0.1", "validation")
    assert settings.training == {"bf16": True} and any("honest" in n for n in notes)
    with pytest.raises(UnknownName, match="glue-rte-large"):
        resolve("glue-rte-larg", [], None, {})
    with pytest.raises(ConfigError, match="belongs to a recipe"):
        resolve(None, [], "honest", {"model": "m", "data": "d"})


@pytest.mark.parametrize(("method", "rank", "count"), [("vera", 1024, 43_008), ("lora", 8, 294_912), ("head", None, 0)])
def test_a_plan_counts_without_weights(method, rank, count, tmp_path):
    config = {"model_type": "roberta", "vocab_size": 50265, "max_position_embeddings": 514, "type_vocab_size": 1}
    (tmp_path / "config.json").write_text(json.dumps(config))
    settings = settings_of("glue-rte-base", method, model=tmp_path, data="nyu-mll/glue")
    found = plan(settings)
    assert (found.adapter_parameters, found.head_parameters) == (count, 768 * 768 + 768 + 2 * 768 + 2)
    assert found.base_parameters == 124_055_040  # RobertaModel without its pooler, at its config's defaults
    assert found.weights_bytes == 4 * (found.base_parameters + found.head_parameters)
    assert found.training_bytes == 16 * (count + found.head_parameters)
    llama = {"model_type": "llama", "vocab_size": 1000, "hidden_size": 64, "num_hidden_layers": 1, "num_attention_heads": 4}
    (tmp_path / "config.json").write_text(json.dumps({**llama, "intermediate_size": 96}))
    chat = plan(settings_of("instruct-llama-7b", method if method != "head" else "vera", model=tmp_path))
    linears, rest = 4 * 64 * 64 + 3 * 64 * 96, 2 * 1000 * 64 + 3 * 64  # of the rest, the output embedding stays in 16 bits too
    assert chat.weights_bytes == int(linears * 0.516 + rest * 2) and chat.base_parameters == linears + rest
    (tmp_path / "config.json").write_text(json.dumps(config))
    # Half as long rows: half the activations; and at 4 bits the linears' weights shrink, not the embeddings.
    assert plan(settings.replace(max_length=256)).activations_bytes * 2 == found.activations_bytes
    assert 0.4 < plan(settings.replace(quantise="4bit")).weights_bytes / found.weights_bytes < 0.5
