"""Adapters on the Hugging Face hub: a folder with the adapter file and a README card."""

import json
import re
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from ..adapter import Adapter
from ..errors import AdapterFileError, ConfigError, need
from .folder import CONFIG_FILE, PICKLE_FILE, WEIGHTS_FILE

CARD_FILE = "README.md"
_ID = re.compile(r"[A-Za-z0-9][\w.-]{0,95}/[A-Za-z0-9][\w.-]{0,95}")


def is_hub_id(path: Any) -> bool:
    """Whether it reads as "user/repo" and no such file or folder is here."""
    if not isinstance(path, str) or not _ID.fullmatch(path) or path.endswith((".safetensors", ".bin", ".json")):
        return False
    return "--" not in path and ".." not in path and not Path(path).exists()


def download(repo_id: str, revision: str | None = None, *, token: str | None = None) -> Path:
    """A local folder with the repository's adapter: a veralib file, or PEFT's two files. Cached by huggingface_hub.

    Only the adapter and its card are fetched. AdapterFileError: no such repository or revision, no network, no adapter in it.
    """
    hub = _hub("loading an adapter from the hub")
    wanted = [WEIGHTS_FILE, CONFIG_FILE, PICKLE_FILE, CARD_FILE]
    try:
        folder = Path(hub.snapshot_download(repo_id, revision=revision, allow_patterns=wanted, token=token))
    except Exception as e:  # hub, http, OS and validation errors share no base class
        raise AdapterFileError(
            f'can\'t fetch "{repo_id}"{f" at revision {revision}" if revision else ""} from the hub: {_first_line(e)}. Check the '
            "id and the network; for a private repository log in first (hf auth login)."
        ) from e
    if not (folder / WEIGHTS_FILE).is_file() and not (folder / CONFIG_FILE).is_file():
        raise AdapterFileError(
            f'the hub repository "{repo_id}" holds neither {WEIGHTS_FILE} nor {CONFIG_FILE}, so no adapter of veralib or PEFT.'
        )
    return folder


def push(
    adapter: Adapter,
    repo_id: str,
    *,
    metrics: Mapping[str, float] | None = None,
    dataset: str = "",
    task: str = "",
    private: bool | None = None,
    revision: str | None = None,
    commit_message: str = "Upload VeRA adapter",
    token: str | None = None,
) -> str:
    """The address of the commit that uploaded the adapter: adapter_model.safetensors and a README card.

    The repository is made where there is none. metrics, dataset and task (a hub task such as "text-classification") go on
    the card. AdapterFileError where the hub refuses.
    """
    hub = _hub("pushing to the hub")
    with tempfile.TemporaryDirectory() as scratch:
        write_hub_folder(adapter, scratch, metrics, dataset=dataset, task=task, repo_id=repo_id)
        try:
            api = hub.HfApi(token=token)
            api.create_repo(repo_id, private=private, exist_ok=True)
            commit = api.upload_folder(
                repo_id=repo_id,
                folder_path=scratch,
                revision=revision,
                commit_message=commit_message,
                delete_patterns=[CONFIG_FILE, PICKLE_FILE],  # of a PEFT adapter that was here before: readers go by them
            )
        except Exception as e:
            raise AdapterFileError(
                f'can\'t push to "{repo_id}": {_first_line(e)}. Log in with a token that may write (hf auth login).'
            ) from e
    return str(getattr(commit, "commit_url", commit))


def write_hub_folder(
    adapter: Adapter,
    folder: str | Path,
    metrics: Mapping[str, float] | None = None,
    *,
    dataset: str = "",
    task: str = "",
    repo_id: str = "",
) -> Path:
    """The folder, holding what push uploads: the adapter's file and its card."""
    from ..format import save_adapter

    folder = Path(folder)
    text = card(adapter, metrics, dataset=dataset, task=task, repo_id=repo_id)
    folder.mkdir(parents=True, exist_ok=True)
    save_adapter(adapter, folder / WEIGHTS_FILE)
    (folder / CARD_FILE).write_text(text, encoding="utf-8")
    return folder


def card(
    adapter: Adapter,
    metrics: Mapping[str, float] | None = None,
    *,
    dataset: str = "",
    task: str = "",
    repo_id: str = "",
) -> str:
    """README.md as text: YAML front matter that the hub reads (base_model, tags, metrics, model-index), then a card.

    The hub shows results (model-index) only with the dataset they were measured on, so without one they stay a table.
    """
    metrics = dict(metrics or {})
    for name, value in metrics.items():
        if isinstance(value, bool) or not isinstance(value, (int, float)):
            raise ConfigError(f"metric {name!r} is {value!r}, expected a number.")
    config, base = adapter.config, adapter.base
    name = (repo_id or "veralib-adapter").rpartition("/")[2]
    front: dict[str, Any] = {}
    if _ID.fullmatch(base.id):  # a folder on somebody's machine is of no use to others, and not theirs to publish
        front["base_model"] = base.id
        front["base_model_relation"] = "adapter"
    front |= {"library_name": "veralib", "tags": ["vera", "veralib", "adapter"]}
    if task:
        front["pipeline_tag"] = task
    if dataset and _ID.fullmatch(dataset):
        front["datasets"] = [dataset]
    if metrics:
        front["metrics"] = list(metrics)
    if metrics and dataset:
        result = {
            "task": {"type": task or "other"},
            "dataset": {"name": dataset, "type": dataset},
            "metrics": [{"type": key, "value": value, "name": key} for key, value in metrics.items()],
        }
        front["model-index"] = [{"name": name, "results": [result]}]
    model = front.get("base_model", "its base model")
    ranks = sorted({d.numel() for d, _ in adapter.vectors.values()})
    rows = {
        "base model": front.get("base_model", "(not on the hub)") + (f" at {base.revision}" if base.revision else ""),
        "rank": ", ".join(map(str, ranks)),
        "seed": config.seed,
        "basis": adapter.basis.kind + _fingerprint(adapter),
        "adapted linears": len({unit.partition(":")[0] for unit in adapter.vectors}),
        "trained numbers (d and b)": f"{adapter.parameters:,}",
        "modules trained in full": ", ".join(adapter.modules) or "none",
        "bytes of all tensors": f"{adapter.bytes:,}",
    }
    lines = ["---", *_yaml(front), "---", "", f"# {name}", ""]
    lines += [
        f"A VeRA adapter ([paper](https://openreview.net/forum?id=NjNfLdxr3A)) for {model}: a seed, and two small vectors for "
        "each adapted linear.",
        "",
        "```python",
        "from veralib import attach",
        "",
        "vera = attach(model)  # the base model, loaded as usual",
        f'vera.load("{repo_id or "this/repository"}", name="{name}")',
        f'vera.use("{name}")',
        "```",
        "",
        *_table(("", ""), rows.items()),
    ]
    if metrics:
        lines += ["", f"## Results{f' on {dataset}' if dataset else ''}", "", *_table(("metric", "value"), metrics.items())]
    return "\n".join(lines) + "\n"


def _fingerprint(adapter: Adapter) -> str:
    """ ", fingerprint …", or "" for a PEFT folder read without its model, whose A and B aren't settled yet."""
    settled = adapter.basis.kind != "peft" or adapter.basis.max_in > 0
    return f", fingerprint {adapter.basis.fingerprint()[:16]}" if settled else ""


def _table(head: tuple[str, str], rows: Any) -> list[str]:
    return [f"| {head[0]} | {head[1]} |", "|---|---|", *(f"| {k} | {v} |" for k, v in rows)]


def _yaml(value: Any, indent: str = "") -> list[str]:
    """Block YAML of nested dicts and lists; scalars as JSON, which is YAML, so nothing is misread as a date or a number."""
    out: list[str] = []
    items = value.items() if isinstance(value, dict) else ((None, v) for v in value)
    for key, item in items:
        lead = f"{indent}{key}:" if key is not None else f"{indent}-"
        if isinstance(item, (dict, list)):
            inner = _yaml(item, indent + "  ")
            if key is None:  # "- key: …" on one line
                out += [f"{lead} {inner[0].lstrip()}", *inner[1:]]
            else:
                out += [lead, *inner]
        else:
            out.append(f"{lead} {json.dumps(item, ensure_ascii=False)}")
    return out


def _hub(what: str) -> Any:
    try:
        import huggingface_hub
    except ImportError as e:
        raise need("huggingface_hub", "hub", what) from e
    return huggingface_hub


def _first_line(error: Exception) -> str:
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return f"{type(error).__name__}: {lines[0]}" if lines else type(error).__name__
