"""The command `vera`: every command does its work, has help with an example, and answers bad input with one red line."""

import csv
import json
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import veralib
from tests.training import tiny
from veralib.cli import build

typer_testing = pytest.importorskip("typer.testing")
ROOT = Path(__file__).parents[1]
COMMANDS = ("train", "predict", "evaluate", "merge", "convert", "inspect", "params", "demo")


def vera(*arguments, code=0):
    """What `vera …` prints, stdout and stderr, after its exit code was checked."""
    done = typer_testing.CliRunner().invoke(build(), [str(a) for a in arguments])
    if done.exception is not None and not isinstance(done.exception, SystemExit):
        raise done.exception
    assert done.exit_code == code, done.output
    return done.output


def plain(text):
    """Without boxes, colours and line breaks, so that a wide terminal and a narrow one read alike."""
    return " ".join(re.sub(r"[│╭╮╰╯─┃┏┓┗┛━┡┩┳┻╇┴┬└┘├┤┼]|\x1b\[[0-9;]*m", " ", text).split())


@pytest.fixture(scope="module")
def work(tmp_path_factory):
    """bert/, llama/, train.csv, dev.csv and run/, a finished run."""
    folder = tmp_path_factory.mktemp("work")
    tiny.make_bert(folder / "bert")
    tiny.make_llama(folder / "llama")
    for name, seed in (("train", 0), ("dev", 1)):
        with open(folder / f"{name}.csv", "w", newline="") as f:
            writer = csv.DictWriter(f, ["text", "label"])
            writer.writeheader()
            writer.writerows(tiny.sentences(48, seed))
    out = vera(
        *("train", "--model", folder / "bert", "--data", folder / "train.csv", "--validation", folder / "dev.csv"),
        *("--output", folder / "run", "--rank", 4, "--lr", 0.2, "--epochs", 2, "--set", "training.max_grad_norm=0.5"),
    )
    (folder / "train.out").write_text(out)
    return folder


def test_train_prints_progress_and_what_came_out(work):
    out = plain((work / "train.out").read_text())
    result = json.loads((work / "run" / "result.json").read_text())
    assert "training: 6 steps" in out and "step 3: eval" in out and f"{result['adapter_bytes']:,} bytes" in out
    assert f"{result['adapter_parameters']:,} + 66 of the head" in out and "eval accuracy" in out
    assert result["settings"]["training"] == {"max_grad_norm": 0.5} and result["settings"]["lr"] == 0.2
    assert (work / "run" / "plot.png").read_bytes()[:4] == b"\x89PNG"


def test_train_from_yaml_with_flags_that_override(work, tmp_path):
    file = tmp_path / "run.yaml"
    file.write_text(
        f"model: {work / 'bert'}\ndata: {work / 'train.csv'}\nepochs: 9\nrank: 4\nplot: false\ntraining: {{max_steps: 9}}\n"
    )
    vera("train", file, "--epochs", 1, "--output", tmp_path / "out", "--set", "training.max_steps=2", "--method", "head")
    settings = json.loads((tmp_path / "out" / "result.json").read_text())["settings"]
    assert (settings["epochs"], settings["training"], settings["plot"]) == (1.0, {"max_steps": 2}, False)


def test_a_dry_run_counts_what_the_run_trains_and_writes_nothing(work, tmp_path):
    result = json.loads((work / "run" / "result.json").read_text())
    given = ("train", "--model", work / "bert", "--rank", 4, "--output", tmp_path / "out", "--dry-run")
    out = plain(vera(*given, "--data", work / "train.csv"))
    assert f"trained parameters {result['adapter_parameters']:,}" in out and "rank 4" in out
    assert f"of the head, beside them {result['head_parameters']:,} " in out
    assert not (tmp_path / "out").exists()
    assert f"there is no data file {tmp_path / 'no.csv'}" in plain(vera(*given, "--data", tmp_path / "no.csv", code=1))
    wrong = plain(vera(*given, "--data", work / "train.csv", "--targets", "nope", code=1))
    assert 'Error: target "nope" matches no module.' in wrong


def test_the_example_file_is_a_good_one():
    from veralib.training import load_settings

    settings = load_settings(ROOT / "examples" / "run.yaml")
    assert settings.method == "vera" and len(settings.given()) > 10


def test_a_finished_run_is_refused_and_no_resume_starts_anew(work, tmp_path):
    given = (
        "train",
        "--model",
        work / "bert",
        "--data",
        work / "train.csv",
        "--output",
        tmp_path / "o",
        "--epochs",
        0.5,
        "--no-plot",
    )
    vera(*given)
    assert "holds a finished run" in plain(vera(*given, code=1))
    vera(*given, "--no-resume")


@pytest.mark.parametrize("suffix", ["jsonl", "csv", "tsv"])
def test_predict_writes_what_the_suffix_says(work, tmp_path, suffix):
    from veralib.training.rows import read_rows

    out = tmp_path / f"out.{suffix}"
    assert f"48 rows in {out}" in vera("predict", work / "run", work / "dev.csv", "--output", out)
    rows = read_rows(out)
    assert list(rows[0]) == ["text", "label", "prediction", "score"] and len(rows) == 48
    right = sum(r["prediction"] == r["label"] for r in rows) / 48
    assert right == pytest.approx(json.loads((work / "run" / "result.json").read_text())["metrics"]["eval_accuracy"])


def test_predict_prints_json_lines_and_takes_an_adapter_for_each_row(work, tmp_path):
    rows = [{"text": "the cat likes a dog", "who": str(work / "run")}, {"text": "the cat likes a dog", "who": ""}]
    file = tiny.write_jsonl(tmp_path / "rows.jsonl", rows)
    lines = vera("predict", work / "run", file, "--adapter-column", "who").splitlines()
    first, second = (json.loads(line) for line in lines if line.startswith("{"))
    assert first["score"] != second["score"]


def test_merge_writes_a_plain_model_with_the_same_predictions(work, tmp_path):
    from transformers import AutoModelForSequenceClassification, AutoTokenizer

    out = vera("merge", work / "run", tmp_path / "merged")
    assert "merged 4 layers" in out and "100.00% of the change survived" in out
    model = AutoModelForSequenceClassification.from_pretrained(tmp_path / "merged").eval()
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "merged")
    assert not any("vera" in name for name in model.state_dict()) and model.config.id2label == {0: "bad", 1: "good"}
    lines = vera("predict", work / "run", work / "dev.csv").splitlines()
    for row in [json.loads(line) for line in lines if line.startswith("{")][:10]:
        with torch.no_grad():
            score, best = model(**tokenizer(row["text"], return_tensors="pt")).logits.softmax(-1)[0].max(-1)
        assert model.config.id2label[int(best)] == row["prediction"] and float(score) == pytest.approx(row["score"], abs=1e-4)
    assert "isn't empty" in plain(vera("merge", work / "run", tmp_path / "merged", code=1))


def test_convert_there_and_back_keeps_what_the_adapter_does(work, tmp_path):
    vera("convert", work / "run", tmp_path / "peft", "--to", "peft")
    vera("convert", tmp_path / "peft", tmp_path / "back.safetensors", "--to", "veralib", "--model", work / "bert")
    one, two = veralib.load_adapter(work / "run"), veralib.load_adapter(tmp_path / "back.safetensors")
    assert one.vectors.keys() == two.vectors.keys()
    for unit in one.vectors:
        torch.testing.assert_close(one.delta(unit), two.delta(unit), rtol=1e-4, atol=1e-6)


def test_convert_to_lora_is_exact_and_a_cut_reports_its_error(work, tmp_path):
    exact = vera("convert", work / "run", tmp_path / "lora", "--to", "lora")
    assert "rank 4" in exact and "relative error 0\n" in exact
    cut = vera("convert", work / "run", tmp_path / "cut", "--to", "lora", "--rank", 1)
    assert "rank 1" in cut and 0 < float(cut.split("relative error ")[1]) < 1
    assert json.loads((tmp_path / "cut" / "adapter_config.json").read_text())["peft_type"] == "LORA"
    assert "go with --to lora" in plain(vera("convert", work / "run", tmp_path / "x", "--to", "peft", "--rank", 1, code=1))
    assert 'Did you mean "lora"?' in plain(vera("convert", work / "run", tmp_path / "x", "--to", "lroa", code=1))


def test_inspect_shows_config_norms_and_fingerprint(work):
    out = vera("inspect", work / "run" / "adapter_model.safetensors")
    adapter = veralib.load_adapter(work / "run")
    shown = plain(out)
    assert "rank=4" in shown and "classifier" in shown and adapter.basis.fingerprint() in shown.replace(" ", "")
    assert all(unit in shown.replace(" ", "") for unit in adapter.vectors)
    d, b = next(iter(adapter.vectors.values()))
    assert f"{d.norm():.4g}" in shown and f"{b.norm():.4g}" in shown and "4 adapted layers" in shown


def test_params_counts_without_weights(work, tmp_path):
    table1 = plain(vera("params", "--model", "roberta-base", "--rank", 256))
    assert "24,576" in table1 and "294,912" in table1 and "96.0 KiB" in table1
    config = tmp_path / "config.json"
    config.write_bytes((work / "llama" / "config.json").read_bytes())
    counted = plain(vera("params", "--model", config, "--rank", 4, "--targets", "all-linear", "--layers"))
    assert "14 adapted layers" in counted and "model.layers.1.mlp.down_proj" in counted.replace(" ", "")


def test_evaluate_prints_scores_and_writes_the_texts(work, tmp_path, monkeypatch):
    for package in ("sacrebleu", "nltk", "pycocoevalcap.cider"):
        pytest.importorskip(package)
    from veralib.evaluation import meteor

    monkeypatch.setattr(meteor.shutil, "which", lambda name: None)
    rows = [{"prompt": "the cat", "completion": c} for c in (" sees a dog", " eats the blue fish")]
    file = tiny.write_jsonl(tmp_path / "test.jsonl", rows)
    flags = (
        "--task",
        "prompt-completion",
        "--epochs",
        1,
        "--rank",
        4,
        "--no-plot",
        "--set",
        "training.label_smoothing_factor=0.1",
    )
    vera("train", "--model", work / "llama", "--data", file, "--output", tmp_path / "run", *flags)
    out = vera(
        "evaluate", tmp_path / "run", "--data", tmp_path, "--beams", 2, "--max-new-tokens", 5, "--output", tmp_path / "r.json"
    )
    result = json.loads((tmp_path / "r.json").read_text())
    assert all(f"{name} {value:.2f}" in plain(out) for name, value in result["scores"].items()) and len(result["scores"]) == 5
    assert result["decoding"]["beams"] == 2 and result["decoding"]["no_repeat"] == 4 and result["references"] == 2
    assert json.loads((tmp_path / "r.texts.jsonl").read_text())["references"] == ["sees a dog", "eats the blue fish"]
    refused = plain(vera("evaluate", tmp_path / "run", "--data", file, "--beams", 0, code=1))
    assert "beams is 0, expected 1 or more" in refused


@pytest.mark.parametrize("command", COMMANDS)
def test_every_command_has_help_with_an_example(command):
    assert f"vera {command}" in plain(vera(command, "--help"))


def test_help_lists_every_command_and_every_setting():
    from veralib.training.settings import Settings

    out = plain(vera("--help"))
    assert all(command in out for command in COMMANDS)
    flags = vera("train", "--help")
    dicts = {"options", "training"}
    assert [n for n in Settings.model_fields if n not in dicts and f"--{n.replace('_', '-')}" not in flags] == []
    assert vera("--version") == f"veralib {veralib.__version__}\n"


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (("train", "--model", "m"), "data is missing"),
        (("train", "--model", "m", "--data", "d.csv", "--epochs", "many"), "epochs is 'many'"),
        (("train", "--model", "m", "--data", "absent.csv"), "there is no data file absent.csv"),
        (("train", "absent.yaml"), "can't read the settings file"),
        (("train", "--model", "m", "--data", "d.csv", "--set", "lr=1"), "expected training.NAME=VALUE"),
        (("train", "--model", "m", "--data", "d.csv", "--method", "lra"), 'Did you mean "lora"?'),
        (("inspect", "absent.safetensors"), "absent"),
        (("predict", "absent", "rows.csv"), "absent"),
        (("evaluate", "absent", "--data", "e2e.zip", "--output", "x.csv"), "expected a .json file"),
        (("params", "--model", "./absent"), "there is no model folder"),
        (("params", "--model", "roberta-base", "--lora-ranks", "x"), "expected whole numbers"),
    ],
)
def test_bad_input_is_one_error_line_without_a_traceback(tmp_path, monkeypatch, arguments, said):
    monkeypatch.chdir(tmp_path)
    out = vera(*arguments, code=1)
    assert plain(out).startswith("Error: ") and said in plain(out) and "Traceback" not in out


def test_a_damaged_adapter_file_is_one_error_line(work, tmp_path):
    data = bytearray((work / "run" / "adapter_model.safetensors").read_bytes())
    data[-5] ^= 1
    (tmp_path / "bad.safetensors").write_bytes(data)
    assert "is damaged" in plain(vera("inspect", tmp_path / "bad.safetensors", code=1))


@pytest.mark.parametrize("missing", ["typer", "rich", "pydantic"])
def test_a_missing_package_gives_the_command_that_installs_it(missing):
    code = f"import sys; sys.modules[{missing!r}] = None; sys.argv = ['vera', 'params']; from veralib.cli import main; main()"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT)
    assert done.returncode == 1 and "Traceback" not in done.stderr
    assert done.stderr.startswith("Error: ") and "pip install 'veralib[cli]'" in done.stderr and missing in done.stderr


def test_advice_about_a_kernel_that_isnt_used_is_hidden_and_nothing_else():
    code = (
        "import logging, sys; from veralib.cli import main; sys.argv = ['vera', '--version']\n"
        "try: main()\nexcept SystemExit: pass\n"
        "log = logging.getLogger('bitsandbytes.backends.cpu.ops')\n"
        "log.warning('Failed to load CPU gemm_4bit_forward: %s', 1); log.warning('kept')"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT)
    assert done.stderr.split() == ["kept"]


@pytest.mark.parametrize("projections", [True, False])
def test_predict_and_merge_take_a_folder_that_peft_saved(work, tmp_path, projections):
    import peft
    from transformers import AutoModelForCausalLM

    torch.manual_seed(0)
    base = AutoModelForCausalLM.from_pretrained(work / "llama")
    config = peft.VeraConfig(r=8, target_modules=["q_proj", "v_proj"], save_projection=projections)
    model = peft.get_peft_model(base, config).eval()
    with torch.no_grad():
        for name, p in model.named_parameters():
            if "vera_lambda_b" in name:
                p.normal_()
    model.save_pretrained(tmp_path / "peft")
    out = vera("merge", tmp_path / "peft", tmp_path / "merged", "--model", work / "llama", "--task", "causal-lm")
    assert "Error" not in out
    ids = torch.arange(5, 15)[None]
    with torch.no_grad():
        merged = AutoModelForCausalLM.from_pretrained(tmp_path / "merged")(input_ids=ids).logits
        torch.testing.assert_close(merged, model(input_ids=ids).logits, rtol=1e-4, atol=1e-5)
    (tmp_path / "prompts.jsonl").write_text('{"text": "the cat"}\n')
    flags = ("--model", work / "llama", "--task", "causal-lm")
    assert json.loads(vera("predict", tmp_path / "peft", tmp_path / "prompts.jsonl", *flags).splitlines()[-1])


def test_a_wrong_setting_doesnt_lock_the_output_folder(work, tmp_path):
    flags = ("--model", work / "bert", "--data", work / "train.csv", "--output", tmp_path / "run", "--rank", 4, "--epochs", 1)
    assert "qery" in plain(vera("train", *flags, "--targets", "qery", code=1))
    vera("train", *flags, "--targets", "query", "--set", "training.bf16=true")  # on a processor, too
    assert (tmp_path / "run" / "result.json").exists()


def test_params_reads_targets_as_train_does(work):
    flags = ("params", "--model", work / "bert", "--rank", 8, "--targets")
    assert vera(*flags, ".*(query|value)") == vera(*flags, "query,value")
