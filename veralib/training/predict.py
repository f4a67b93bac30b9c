"""predict: what a finished run, or an adapter file, says of new rows; each row may name an adapter of its own."""

import dataclasses
import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..errors import AdapterFileError, ConfigError, DataError
from .chats import chat_columns, conversations
from .data import Row, column_values, read_rows
from .decoding import Decoding, write
from .settings import WITH_HEAD, Settings

if TYPE_CHECKING:
    from ..baselines import Attached
    from ..config import VeraConfig
    from .loading import Base


@dataclass(frozen=True)
class Source:
    """Where predictions come from: a run's folder, or an adapter file or folder with the notes that a run leaves in it."""

    path: Path | str
    settings: Settings
    labels: tuple[str, ...]
    head: bool
    """Whether the adapter brings its own head."""
    told: bool = True
    """Whether the task is known, by a run, the file's notes or the user; else it is guessed from the head."""


def predict(
    adapter: str | Path,
    data: str | Path | Sequence[Row],
    *,
    adapter_column: str | None = None,
    batch_size: int = 32,
    max_new_tokens: int = 64,
    decoding: Decoding | None = None,
    **changes: Any,
) -> Iterator[dict[str, Any]]:
    """Each row of `data` with a prediction: the label and its probability (score), a number, or generated text.

    adapter: a run's folder, an adapter file, a PEFT folder, or a hub id. data: a file, or rows; for images a folder of images
    too, and the image column holds paths, seen from the data file's folder. adapter_column: a column that names an adapter for
    each row, a path seen likewise or from the present folder; empty: the base model (which has no trained head). decoding: how
    text is generated; left out: greedily, max_new_tokens at most. changes: settings that differ from the run's, model and text
    for two.
    Errors: DataError, ConfigError, AdapterFileError, AdapterMismatch; all of them before the first row comes.
    """
    source = find_source(adapter, changes)
    rows, folder = _read(data, source.settings)
    names = column_values(rows, adapter_column, "the data") if adapter_column else None
    model, base, choose = load_source(source, rows, names, folder)
    columns = source.settings.text_columns
    if source.settings.task == "prompt-completion":
        columns = columns[:1]
    elif source.settings.task == "chat":
        chat_columns(rows[0], source.settings.text, "the data", answered=False)
        columns = ()
    for column in columns:
        column_values(rows, column, "the data")
    examples, collate = _examples(source.settings, rows, columns, base, folder)
    decoding = decoding or Decoding(max_new_tokens)
    return _predict(source, rows, model, base.tokenizer, examples, collate, choose, batch_size, decoding)


def _read(data: str | Path | Sequence[Row], settings: Settings) -> tuple[list[Row], Path]:
    """(the rows, the folder that their paths are seen from)."""
    rows: list[Row]
    if not isinstance(data, (str, Path)):
        rows, folder = list(data), Path()
    elif settings.task == "images" and Path(data).is_dir():
        from .images import image_files

        folder = Path(data)
        rows = [{settings.text_columns[0]: str(p.relative_to(folder))} for p in image_files(folder, deep=True)]
    else:
        rows, folder = list(read_rows(data, settings.columns)), Path(data).parent
    if not rows:
        raise DataError("there are no rows to predict")
    return rows, folder


def _examples(settings: Settings, rows: Sequence[Row], columns: Sequence[str], base: "Base", folder: Path) -> tuple[Any, Any]:
    """(one example a row, the function that makes a batch of some); of text to write, (each prompt's tokens, None)."""
    if settings.task == "images":
        from .images import file_picture
        from .pixels import Pixels, collator, preparation

        pictures = [file_picture(folder / str(row[columns[0]])) for row in rows]
        for picture in pictures:
            picture.decode()
        return Pixels(pictures, preparation(base.processor)), collator(base.model.dtype)
    from . import tokens

    pad_id = base.tokenizer.pad_token_id or 0
    if settings.task in WITH_HEAD:
        return tokens.inputs(rows, base.tokenizer, columns, base.max_length, "the data"), tokens.collator(pad_id)
    return _prompts(rows, base.tokenizer, settings, base.max_length), None


def find_source(adapter: str | Path, changes: Mapping[str, Any] | None = None) -> Source:
    """The Source that a path or hub id stands for; `changes` are settings that win over those it was trained with."""
    changes = {k: v for k, v in (changes or {}).items() if v is not None}
    labels = changes.pop("labels", None)
    folder = Path(adapter)
    if (folder / "result.json").is_file():
        from .result import load_result

        result = load_result(folder)
        settings = Settings(**{**result.settings, **changes})
        # The run's output folder may have been moved since.
        return Source(folder, settings, tuple(labels or result.labels), settings.task in WITH_HEAD)
    from .classes import head_outputs

    loaded = read_adapter(adapter)
    notes = loaded.notes
    head = len(loaded.modules) > len(loaded.magnitudes)
    fields: dict[str, Any] = {
        "model": loaded.base.id,
        "data": ("none",),
        "task": notes.get("task") or ("classification" if head else "causal-lm"),
        **({"text": json.loads(notes["text"])} if "text" in notes else {}),
        **({"max_length": int(notes["max_length"])} if "max_length" in notes else {}),
        **({"chat_template": notes["chat_template"]} if "chat_template" in notes else {}),
        **(_method_fields(loaded.config) if loaded.magnitudes else {}),
        **changes,
    }
    if not fields["model"]:
        raise ConfigError(f"{adapter} doesn't say which base model it was trained on: name it with model (--model)")
    labels = tuple(labels or json.loads(notes.get("labels", "[]")))
    told = "task" in notes or "task" in changes
    if fields["task"] in ("classification", "images") and not labels:
        count = head_outputs(loaded)
        if not count and told:
            raise ConfigError(f"{adapter} has no labels in its notes and no head to count them by: give labels (--labels)")
        labels = tuple(str(i) for i in range(count))
    return Source(adapter, Settings(**fields), labels, head, told)


def _method_fields(config: "VeraConfig") -> dict[str, Any]:
    """The settings that DVoRA is attached with as its file says, the heads aside."""
    given = {f.name: getattr(config, f.name) for f in dataclasses.fields(config)}
    rank, seed, targets, _ = (given.pop(name) for name in ("rank", "seed", "targets", "train_modules"))
    return {"method": "dvora", "rank": rank, "basis_seed": seed, "targets": targets, "options": given}


def _local(source: str | Path) -> Path:
    """The path that a name means, fetched where it is a hub id."""
    from ..interop import hub

    path = Path(source)
    return Path(hub.download(str(source))) if hub.is_hub_id(str(source)) and not path.exists() else path


def read_adapter(source: str | Path) -> Any:
    """The Adapter of a veralib file or folder, a folder that PEFT saved, a run's folder, or a hub id."""
    from ..format import load_adapter
    from ..interop.folder import is_peft_folder
    from ..interop.peft import read_peft

    path = _local(source)
    return read_peft(path) if is_peft_folder(path) else load_adapter(path)


def load_source(
    source: Source, rows: Sequence[Row] = (), names: Sequence[Any] | None = None, folder: Path = Path()
) -> tuple[Any, "Base", Any]:
    """(model, base, choose): choose(rows' positions) is the context that gives each row its adapter."""
    import contextlib

    import torch

    from .classes import check_new
    from .loading import load_base
    from .tokens import chat_template

    torch.manual_seed(source.settings.seed)
    base = load_base(source.settings, source.labels)
    if torch.cuda.is_available() and not source.settings.quantise:
        base.model.to("cuda")
    chat_template(source.settings, base.tokenizer, rows)
    if source.settings.method != "vera":
        if names is not None:
            raise ConfigError(_one_method(source))
        return restore(source, base).model, base, lambda positions: contextlib.nullcontext()

    from ..attaching import attach

    vera = attach(base.model)
    if names is None:
        loaded = read_adapter(source.path)
        vera.load(loaded, name="adapter")
        if not source.told:
            advice = (
                "Prediction is for sequence classifiers, regressions, images and texts; vera merge --class writes a plain model."
            )
            check_new(base, loaded, source.path, advice)
        vera.use("adapter")
        return base.model, base, lambda positions: contextlib.nullcontext()
    given = [str(name).strip() or None for name in names]
    for name in dict.fromkeys(n for n in given if n):
        other = find_source(_resolve(name, folder), {"model": source.settings.model})
        if (other.settings.task, other.labels) != (source.settings.task, source.labels):
            raise ConfigError(
                f'the rows\' adapters must share one task and its labels; "{name}" has {other.settings.task} '
                f"{list(other.labels)}, the first one {source.settings.task} {list(source.labels)}. Predict them one by one."
            )
        if other.settings.method != "vera":
            raise ConfigError(_one_method(other))
        vera.load(read_adapter(other.path), name=name)
    return base.model, base, lambda positions: vera.rows([given[i] for i in positions])


def restore(source: Source, base: "Base") -> "Attached":
    """The base model with what another method than VeRA has trained in it."""
    from ..baselines import find_method

    attached = find_method(source.settings.method)(base.model, source.settings, base.head)
    attached.load(_local(source.path))
    return attached


def _one_method(source: Source) -> str:
    return f"an adapter for each row needs VeRA adapters, and {source.path} was trained with {source.settings.method}"


def _resolve(name: str, folder: Path) -> str:
    """The path that a row's name means; a hub id stays what it is."""
    found = next((p for p in (folder / name, Path(name)) if p.exists()), None)
    from ..interop import hub

    if found is None and not hub.is_hub_id(name):
        raise AdapterFileError(
            f'a row names the adapter "{name}", and there is none at {folder / name} or {Path(name).absolute()}'
        )
    return str(found or name)


def _predict(source, rows, model, tokenizer, examples, collate, choose, batch_size, decoding) -> Iterator[dict[str, Any]]:
    import torch

    device = next(model.parameters()).device
    model.eval()
    for start in range(0, len(rows), batch_size):
        positions = range(start, min(start + batch_size, len(rows)))
        chosen = [examples[i] for i in positions]
        with torch.inference_mode(), choose(positions):
            if source.settings.task in WITH_HEAD:
                batch = {k: v.to(device) for k, v in collate(chosen).items()}
                answers = _classes(model(**batch).logits.float(), source)
            else:
                answers = [{"prediction": text} for text in write(model, tokenizer, chosen, decoding)]
        for i, answer in zip(positions, answers, strict=True):
            yield {**rows[i], **answer}


def _classes(logits: Any, source: Source) -> list[dict[str, Any]]:
    if source.settings.task == "regression":
        return [{"prediction": float(v)} for v in logits.reshape(-1)]
    score, best = logits.softmax(-1).max(-1)
    return [{"prediction": source.labels[b], "score": round(float(s), 6)} for b, s in zip(best.tolist(), score, strict=True)]


def _prompts(rows: Sequence[Row], tokenizer: Any, settings: Settings, max_length: int) -> list[list[int]]:
    """Each row's prompt in tokens; of a chat, everything before a last answer. Too long a prompt keeps its end."""
    from .tokens import prompt_ids, render

    if settings.task != "chat":
        return [prompt_ids(tokenizer, str(v))[-max_length:] for v in column_values(rows, settings.text_columns[0], "the data")]
    prompts = []
    for number, messages in enumerate(conversations(rows, settings.text, "the data", answered=False), 1):
        asked = messages[:-1] if messages[-1]["role"] == "assistant" else messages
        prompts.append(render(tokenizer, asked, f"row {number} of the data", add_generation_prompt=True)[-max_length:])
    return prompts
