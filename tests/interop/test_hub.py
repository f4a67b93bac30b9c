import json
import sys
from pathlib import Path

import pytest
import torch
import yaml

from tests.conftest import randomise, tiny_bert, tiny_llama
from tests.interop.folders import TOLERANCE, VARIANTS, distance, logits, make
from veralib import VeraConfig, attach, load_adapter
from veralib.errors import AdapterFileError, ConfigError, MissingPackage
from veralib.interop import hub
from veralib.interop.peft import read_peft, write_peft

pytestmark = pytest.mark.filterwarnings("ignore:adapter .* doesn't say which model")


@pytest.fixture
def fake_hub(tmp_path, monkeypatch):
    """huggingface_hub with its network replaced by folders: <root>/<user>/<repo>."""
    import huggingface_hub

    root = tmp_path / "hub"
    calls = []

    class Api:
        def __init__(self, token=None):
            calls.append(("token", token))

        def create_repo(self, repo_id, private=None, exist_ok=False):
            calls.append(("create_repo", repo_id, private, exist_ok))
            (root / repo_id).mkdir(parents=True, exist_ok=exist_ok)

        def upload_folder(self, *, repo_id, folder_path, revision, commit_message, delete_patterns):
            calls.append(("upload_folder", repo_id, revision, commit_message))
            for pattern in delete_patterns:
                (root / repo_id / pattern).unlink(missing_ok=True)
            for file in Path(folder_path).iterdir():
                (root / repo_id / file.name).write_bytes(file.read_bytes())
            return f"https://hub/{repo_id}/commit/1"

    def snapshot_download(repo_id, *, revision=None, allow_patterns=None, token=None):
        calls.append(("snapshot_download", repo_id, revision, tuple(allow_patterns)))
        if not (root / repo_id).is_dir():
            raise OSError(f"Repository Not Found for {repo_id}\n\nlong text")
        return str(root / repo_id)

    monkeypatch.setattr(huggingface_hub, "HfApi", Api)
    monkeypatch.setattr(huggingface_hub, "snapshot_download", snapshot_download)
    return root, calls


def trained_vera(base=tiny_llama, **settings):
    vera = attach(base(), VeraConfig(**(dict(rank=4, targets=["q_proj"]) | settings)))
    randomise(vera, "default")
    return vera


def test_pushed_adapter_loads_from_its_id_with_equal_logits(fake_hub):
    root, calls = fake_hub
    vera = trained_vera()
    expected = logits(vera.model)
    address = vera.push("user/repo", name="default", metrics={"accuracy": 0.5}, private=True)
    assert address == "https://hub/user/repo/commit/1"
    assert sorted(p.name for p in (root / "user/repo").iterdir()) == ["README.md", "adapter_model.safetensors"]
    assert ("create_repo", "user/repo", True, True) in calls
    model = tiny_llama()
    other = attach(model)
    other.load("user/repo", name="bob", revision="v1")
    other.use("bob")
    assert distance(logits(model), expected) < TOLERANCE
    assert any(c[:3] == ("snapshot_download", "user/repo", "v1") for c in calls)


def test_peft_s_repository_loads_by_id(fake_hub):
    root, _ = fake_hub
    expected = make(VARIANTS["projections not saved"], root / "user/peft")
    model = tiny_llama()
    vera = attach(model)
    vera.load("user/peft", name="a")
    vera.use("a")
    assert distance(logits(model), expected) < TOLERANCE


def test_push_over_a_peft_adapter_takes_its_config_away(fake_hub):
    root, _ = fake_hub
    vera = trained_vera()
    write_peft(vera.adapter(), root / "user/repo")
    vera.push("user/repo")
    assert load_adapter(hub.download("user/repo")).parameters == vera.adapter().parameters
    with pytest.raises(AdapterFileError, match="no folder that PEFT saved"):
        read_peft(hub.download("user/repo"))


def test_download_errors_are_ours(fake_hub):
    root, _ = fake_hub
    with pytest.raises(AdapterFileError, match=r'"user/none" at revision x .*OSError: Repository Not Found for user/none\. '):
        hub.download("user/none", "x")
    (root / "user/empty").mkdir(parents=True)
    with pytest.raises(AdapterFileError, match=r"holds neither adapter_model.safetensors nor"):
        hub.download("user/empty")


def test_refused_push_is_an_error_of_ours(fake_hub, monkeypatch):
    import huggingface_hub

    def refuse(self, *args, **kwargs):
        raise RuntimeError("403 Forbidden")

    monkeypatch.setattr(huggingface_hub.HfApi, "create_repo", refuse)
    with pytest.raises(AdapterFileError, match=r"403 Forbidden.*hf auth login"):
        hub.push(trained_vera().adapter(), "user/repo")


def test_missing_package_is_answered_with_its_command(monkeypatch):
    monkeypatch.setitem(sys.modules, "huggingface_hub", None)
    with pytest.raises(MissingPackage, match=r"pip install 'veralib\[hub\]'"):
        hub.download("user/repo")


@pytest.mark.parametrize(
    ("path", "is_id"),
    [
        ("user/repo", True),
        ("my-org/llama-2.vera_x", True),
        ("repo", False),
        ("./user/repo", False),
        ("/user/repo", False),
        ("user/repo/file", False),
        ("~/repo", False),
        ("user/adapter.safetensors", False),
        ("user/..", False),
        ("", False),
        (Path("user/repo"), False),
        (None, False),
    ],
)
def test_is_hub_id(path, is_id):
    assert hub.is_hub_id(path) is is_id


def test_folder_that_is_here_is_no_hub_id(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert hub.is_hub_id("user/repo")
    Path("user/repo").mkdir(parents=True)
    assert not hub.is_hub_id("user/repo")


# The card


def front_matter(text):
    _, yaml_text, body = text.split("---\n", 2)
    return yaml.safe_load(yaml_text), body


def on_the_hub(adapter, base_id="user/base"):
    import dataclasses

    return dataclasses.replace(adapter, base=dataclasses.replace(adapter.base, id=base_id))


def test_card_says_base_metrics_and_how_to_load():
    adapter = on_the_hub(trained_vera(tiny_bert, targets=["query"], train_modules=["classifier"]).adapter())
    metrics = {"accuracy": 0.91, "loss": 1e-7}
    text = hub.card(adapter, metrics, dataset="user/data", task="text-classification", repo_id="me/it")
    front, body = front_matter(text)
    assert front["base_model"] == "user/base" and front["library_name"] == "veralib" and "vera" in front["tags"]
    assert front["datasets"] == ["user/data"] and front["metrics"] == ["accuracy", "loss"]
    assert 'vera.load("me/it"' in body and "| accuracy | 0.91 |" in body and "classifier" in body
    assert f"{adapter.parameters:,}" in body and adapter.basis.fingerprint()[:16] in body


def test_card_s_results_are_read_by_the_hub_s_own_parser(tmp_path):
    from huggingface_hub import ModelCard

    text = hub.card(
        on_the_hub(trained_vera().adapter()), {"accuracy": 0.91}, dataset="user/data", task="text-classification", repo_id="me/it"
    )
    (tmp_path / "README.md").write_text(text)
    data = ModelCard.load(tmp_path / "README.md").data
    [result] = data.eval_results
    assert (result.metric_type, result.metric_value, result.dataset_type) == ("accuracy", 0.91, "user/data")
    assert data.base_model == "user/base"


def test_card_without_dataset_or_public_base_claims_neither():
    front, body = front_matter(hub.card(on_the_hub(trained_vera().adapter(), "/home/me/model"), {"f1": 0.5}))
    assert "base_model" not in front and "model-index" not in front and "datasets" not in front
    assert "/home/me" not in body and "| f1 | 0.5 |" in body


def test_card_s_strings_are_never_misread():
    front, _ = front_matter(
        hub.card(on_the_hub(trained_vera().adapter(), "a/no"), {"yes: no": 1.0, "2020-01-01": 2}, dataset="#x")
    )
    assert front["metrics"] == ["yes: no", "2020-01-01"] and front["base_model"] == "a/no"
    assert front["model-index"][0]["results"][0]["dataset"]["name"] == "#x"


def test_metric_that_is_no_number_is_refused():
    with pytest.raises(ConfigError, match="metric 'a' is 'high'"):
        hub.card(trained_vera().adapter(), {"a": "high"})


def test_card_of_an_adapter_read_from_peft_without_its_model(tmp_path):
    make(VARIANTS["projections not saved"], tmp_path)
    assert "| basis | peft |" in hub.card(read_peft(tmp_path))


def test_hub_folder_is_the_adapter_and_its_card(tmp_path):
    adapter = trained_vera().adapter()
    hub.write_hub_folder(adapter, tmp_path, {"accuracy": 1})
    again = load_adapter(tmp_path)
    assert all(torch.equal(a, b) for k in adapter.vectors for a, b in zip(adapter.vectors[k], again.vectors[k], strict=True))
    assert json.dumps("accuracy") in (tmp_path / "README.md").read_text()
