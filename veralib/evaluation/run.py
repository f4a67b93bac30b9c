"""evaluate: a finished run writes a text for every distinct prompt of a test set, and the texts are scored together."""

import json
import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from ..errors import ConfigError, DataError
from ..training import e2e
from ..training.data import column_values, sha256_file
from ..training.decoding import PUBLISHED, Decoding
from ..training.folder import write_json
from ..training.rows import file_kind, read_rows
from .scores import PACKAGES, check_installed, score


@dataclass(frozen=True)
class Item:
    """One text to write: its prompt, and the texts that people wrote there."""

    prompt: str
    references: tuple[str, ...]


@dataclass(frozen=True)
class Evaluation:
    """The texts of a model for a test set, and their scores."""

    scores: Mapping[str, float]
    texts: Sequence[Mapping[str, Any]]
    """prompt, prediction and references of each."""
    decoding: Decoding
    seconds: float
    """Of generation, loading and scoring left out."""
    about: Mapping[str, Any]
    """What was evaluated: method, settings, data, versions …"""

    def to_dict(self) -> dict[str, Any]:
        """Plain JSON types, without the texts."""
        return {
            "scores": dict(self.scores),
            "texts": len(self.texts),
            "references": sum(len(t["references"]) for t in self.texts),
            "empty": sum(not t["prediction"] for t in self.texts),
            "decoding": asdict(self.decoding),
            "seconds": round(self.seconds, 3),
            **self.about,
        }

    def save(self, path: str | Path) -> Path:
        """Writes the result to `path` (.json) and the texts to a .texts.jsonl beside it, whose path is returned."""
        path = output_path(path)
        texts = path.with_suffix(".texts.jsonl")
        lines = (json.dumps(t, ensure_ascii=False) + "\n" for t in self.texts)
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            texts.write_text("".join(lines), encoding="utf-8")
            write_json(path, {**self.to_dict(), "outputs": texts.name})
        except OSError as e:
            raise ConfigError(f"can't write {path}: {e.strerror or e}") from e
        return texts


def output_path(path: str | Path) -> Path:
    """The path of a result file; ConfigError where it isn't a .json."""
    if Path(path).suffix != ".json":
        raise ConfigError(f"output is {path}, expected a .json file; the texts go into a .texts.jsonl beside it")
    return Path(path)


def evaluate(
    run: str | Path,
    data: str | Path,
    *,
    decoding: Decoding = PUBLISHED,
    split: str = "test",
    limit: int | None = None,
    batch_size: int = 16,
    **changes: Any,
) -> Evaluation:
    """The Evaluation of a finished run (or adapter file) of task prompt-completion.

    data: a file with prompts and references or completions, a folder with a file of the split's name, or the E2E release.
    limit: so many of the prompts, evenly spread. changes: settings that differ from the run's, model for one.
    Errors: ConfigError, DataError, AdapterFileError, AdapterMismatch; MissingPackage before anything is generated.
    """
    from ..training.predict import find_source, predict

    check_installed()
    source = find_source(run, changes)
    if source.settings.task != "prompt-completion":
        raise ConfigError(f"{run} was trained for {source.settings.task}; texts are scored for task prompt-completion alone")
    items, hashes = read_items(data, split, source.settings.text_columns, limit)
    items, column = in_order(items), source.settings.text_columns[0]
    rows = [{column: item.prompt} for item in items]
    found = predict(run, rows, batch_size=batch_size, decoding=decoding, **changes)
    start = time.perf_counter()
    texts = [str(row["prediction"]) for row in found]
    settings = source.settings.to_dict()
    about = {"run": str(run), "method": source.settings.method, "settings": settings, "split": split, "data": hashes}
    return judge(items, texts, decoding, time.perf_counter() - start, about)


def evaluate_base(
    model: Any,
    tokenizer: Any,
    items: Sequence[Item],
    *,
    decoding: Decoding = PUBLISHED,
    batch_size: int = 16,
    max_length: int = 256,
) -> Evaluation:
    """The Evaluation of a causal language model as it is: a base model without an adapter, say."""
    import torch

    from ..training.decoding import write
    from ..training.tokens import prompt_ids

    model.eval()
    ordered = in_order(items)
    prompts = [prompt_ids(tokenizer, item.prompt)[-max_length:] for item in ordered]
    start, texts = time.perf_counter(), []
    with torch.inference_mode():
        for i in range(0, len(prompts), batch_size):
            texts += write(model, tokenizer, prompts[i : i + batch_size], decoding)
    return judge(ordered, texts, decoding, time.perf_counter() - start, {"method": "base"})


def judge(
    items: Sequence[Item], texts: Sequence[str], decoding: Decoding, seconds: float, about: Mapping[str, Any]
) -> Evaluation:
    """The Evaluation of texts that were written for items, in their order."""
    from ..training.result import commit, hardware, versions

    plain = [" ".join(text.split()) for text in texts]
    scores = score(plain, [item.references for item in items])
    rows = [
        {"prompt": item.prompt, "prediction": text, "references": list(item.references)}
        for item, text in zip(items, plain, strict=True)
    ]
    facts = {**about, "versions": versions(PACKAGES), "commit": commit(), "hardware": hardware()}
    return Evaluation(scores, rows, decoding, seconds, facts)


def in_order(items: Sequence[Item]) -> list[Item]:
    """The items by length of their prompts: batches with little padding."""
    return sorted(items, key=lambda item: len(item.prompt))


def read_items(
    data: str | Path, split: str = "test", columns: Sequence[str] = ("prompt", "completion"), limit: int | None = None
) -> tuple[list[Item], dict[str, str]]:
    """(the distinct prompts of a test set with all their references, SHA-256 of the file they come from)."""
    path = Path(data)
    if e2e.is_release(path):
        if split not in e2e.FILES:
            raise DataError(f'the E2E release has no split "{split}", expected {", ".join(e2e.FILES)}')
        rows = e2e.read_e2e(path, split)
        file, columns = path if path.is_file() else path / e2e.FILES[split], ("prompt", "completion")
    else:
        file = _file(path, split)
        rows = read_rows(file)
    if limit is not None and limit < 1:
        raise ConfigError(f"limit is {limit}, expected 1 or more")
    items = _items(rows, columns, str(file))
    if limit is not None and limit < len(items):
        items = [items[i * len(items) // limit] for i in range(limit)]
    return items, {file.name: sha256_file(file)}


def _file(path: Path, split: str) -> Path:
    if not path.is_dir():
        if not path.is_file():
            raise DataError(f"there is no file or folder {path} (now in {Path.cwd()})")
        return path
    found = [p for p in sorted(path.iterdir()) if file_kind(p) and p.name.split(".")[0] == split]
    if len(found) != 1:
        there = ", ".join(sorted(p.name for p in path.iterdir())[:12]) or "nothing"
        raise DataError(f"{path} has {len(found)} files {split}.jsonl, .csv or .tsv, expected one. There: {there}.")
    return found[0]


def _items(rows: Sequence[Mapping[str, Any]], columns: Sequence[str], where: str) -> list[Item]:
    if columns[0] not in rows[0] and "prompt" in rows[0]:  # a run's own names, and a file that has the usual ones
        columns = ("prompt", "completion")
    prompt, completion = columns
    column_values(rows, prompt, where)
    if "references" not in rows[0]:
        column_values(rows, completion, where)
        rows = e2e.grouped(rows, prompt, completion)
    items = []
    for text, references in zip(column_values(rows, prompt, where), column_values(rows, "references", where), strict=True):
        if not isinstance(references, list) or not references or not all(isinstance(r, str) and r.strip() for r in references):
            given = f"the prompt {str(text)[:80]!r} of {where} has references {str(references)[:80]!r}"
            raise DataError(f"{given}, expected a list of texts")
        items.append(Item(str(text), tuple(" ".join(r.split()) for r in references)))
    if len({item.prompt for item in items}) < len(items):
        raise DataError(f"{where} has a prompt twice: give each prompt one row with all its references")
    return items
