"""Settings: one run, from flags, a YAML file or Python. All faults are listed at once; the descriptions are the CLI's help."""

import math
import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, Literal

from ..errors import ConfigError, VeraError, need, unknown_text

try:
    from pydantic import BaseModel, ConfigDict, Field, ValidationError, field_validator
except ImportError as e:
    raise need("pydantic", "cli", "Training from settings") from e

Task = Literal["classification", "regression", "images", "causal-lm", "prompt-completion", "chat"]
WITH_HEAD = ("classification", "regression", "images")
"""Tasks whose model has a head of its own, trained in full."""
Every = Literal["epoch", "never"] | int

# What a method starts from where `lr`, `lr_head` and `rank` are left out; results/glue shows how each does there.
DEFAULT_RANK = {
    **{"vera": 256, "dvora": 256, "lora": 8, "lora_fa": 8, "lora_xs": 16, "dylora": 8, "adalora": 8},
    **dict.fromkeys(("adapter_h", "adapter_p", "adapter_l", "adapter_d"), 16),
}
DEFAULT_LR = {"vera": 2e-2, "dvora": 2e-2, "lora": 1e-3, "full": 5e-5}
DEFAULT_LR_HEAD = {
    **{"vera": 2e-3, "dvora": 2e-3, "full": 5e-5, "head": 2e-3},
    **dict.fromkeys(("lora", "lora_fa", "lora_xs", "dylora", "adalora", "bitfit"), 1e-3),
    **dict.fromkeys(("adapter_h", "adapter_p", "adapter_l", "adapter_d"), 1e-3),
}
DEFAULT_TEXT = {
    "classification": ("text",),
    "regression": ("text",),
    "images": ("image",),
    "causal-lm": ("text",),
    "prompt-completion": ("prompt", "completion"),
    "chat": (),  # whichever of the published columns the rows have: see chats.py
}
# A TrainingArguments field -> the setting that owns it.
OWNED = {
    "output_dir": "output",
    "num_train_epochs": "epochs",
    "per_device_train_batch_size": "batch_size",
    "per_device_eval_batch_size": "batch_size",
    "gradient_accumulation_steps": "accumulation",
    "learning_rate": "lr",
    "weight_decay": "weight_decay",
    "lr_scheduler_type": "schedule",
    "warmup_steps": "warmup",
    "warmup_ratio": "warmup",
    "seed": "seed",
    "data_seed": "seed",
    "eval_strategy": "evaluate_every",
    "eval_steps": "evaluate_every",
    "save_strategy": "save_every",
    "save_steps": "save_every",
    "metric_for_best_model": "metric",
    "load_best_model_at_end": "best",
    "resume_from_checkpoint": "resume",
    "train_sampling_strategy": "group_by_length",
    "remove_unused_columns": "nothing: the loader keeps what the model reads",
    "save_total_limit": "nothing: the last checkpoint and the best are kept",
}


class Settings(BaseModel):
    """One run of `vera train`. Frozen; ConfigError lists every fault, with the nearest known name for an unknown one."""

    model_config = ConfigDict(extra="forbid", frozen=True, protected_namespaces=())

    model: str = Field(description="Base model: hub id or folder.")
    data: tuple[str, ...] = Field(
        description="Training data: csv, tsv, jsonl or txt files, a folder with train.* in it, or a hub id. Images: a folder "
        "with train/CLASS/*.jpg, an .npz file, or a hub id."
    )
    recipe: str | None = Field(None, description="Where the settings come from, for the record: a recipe and its protocol.")
    output: str = Field("run", description="Folder for the adapter, result.json and plot.png.")
    task: Task = Field("classification", description="What is learned.")
    method: str = Field(
        "vera",
        description="vera, or what it is compared with: dvora, lora, lora_fa, lora_xs, dylora, adalora, adapter_h, _p, _l, _d, "
        "bitfit, head, full, or peft:TYPE.",
    )

    text: tuple[str, ...] = Field(
        (),
        description="Text columns: one, or two for pairs; the prompt and completion columns; the messages column, or a chat's "
        "instruction, input and output; a hub data set's image column.",
    )
    label: str = Field("label", description="Label column (classification, regression, images).")
    columns: tuple[str, ...] = Field((), description="Column names of a csv or tsv file without a header.")
    data_config: str | None = Field(None, description='Configuration of a hub data set, "cola" of "nyu-mll/glue".')
    split: str = Field("train", description="Training split of a folder or hub data set.")
    validation: str | None = Field(
        None,
        description='Validation data: a file, a split\'s name, or a share of the training rows such as "0.1". '
        "Left out: the folder's or data set's own validation split, if it has one.",
    )
    test: str | None = Field(
        None, description='Test data, scored once at the end: a file, a split\'s name, or "rest", the rows that shots leave.'
    )
    split_seed: int = Field(0, ge=0, description="Draws the rows of a validation share, and the shots.")
    shots: int | None = Field(
        None, gt=0, description="Training rows of each class (classification, images); left out: all. Drawn after validation."
    )
    augment: bool = Field(False, description="Crop and flip the training images at random, anew in each epoch.")
    max_length: int = Field(256, gt=1, description="Tokens a row at most.")
    chat_template: str | None = Field(None, description='A Jinja file, or "alpaca", where the tokenizer has no chat template.')

    revision: str | None = Field(None, description="Revision of a hub model.")
    dtype: Literal["float32", "bfloat16", "float16", "auto"] = Field("float32", description="Type of the base's weights.")
    quantise: Literal["4bit", "8bit"] | None = Field(None, description="Load the base quantised (bitsandbytes).")

    rank: int | dict[str, int] | None = Field(
        None, description="Rank r, or a bottleneck's width; left out: 256 for vera, 8 for lora."
    )
    targets: str | tuple[str, ...] | None = Field(
        None, description='Linears to adapt: names, or "all-linear"; left out: query and value.'
    )
    basis_seed: int = Field(0, ge=0, lt=2**64, description="VeRA's A and B grow from it; equal ones share memory.")
    options: dict[str, Any] = Field(
        default_factory=dict, description="More fields of the method's config: VeraConfig (d_initial, scale …), LoraConfig."
    )

    seed: int = Field(0, ge=0, lt=2**32, description="Data order, dropout and the head's start.")
    epochs: float = Field(3.0, gt=0, description="Passes over the training data.")
    batch_size: int = Field(16, gt=0, description="Rows a step and process.")
    accumulation: int = Field(1, gt=0, description="Batches a step (gradient accumulation).")
    lr: float | None = Field(None, gt=0, description="Learning rate of the adapter: d and b; LoRA's matrices; all weights.")
    lr_head: float | None = Field(None, gt=0, description="Learning rate of the classification head.")
    weight_decay: float = Field(0.0, ge=0, description="AdamW's, biases and norms aside.")
    schedule: str = Field("linear", description="Learning-rate schedule, by transformers' names.")
    warmup: float = Field(0.06, ge=0, description="Warm-up steps, or below 1 their share of all steps.")
    group_by_length: bool = Field(False, description="Batches of rows of like length: less padding.")

    evaluate_every: Every = Field("epoch", description='"epoch", "never" or a number of steps.')
    save_every: Every = Field("epoch", description='Checkpoints to resume from: "epoch", "never" or a number of steps.')
    metric: str | None = Field(
        None, description="The metric that best and patience go by; left out: accuracy, pearson or loss, by task."
    )
    best: bool = Field(False, description="Keep the best evaluation's weights instead of the last.")
    patience: int | None = Field(None, gt=0, description="Stop after so many evaluations without a better metric.")
    resume: bool | None = Field(
        None, description="Go on with the interrupted run in the output folder; left out: where there is one. no: start anew."
    )
    keep_checkpoints: bool = Field(False, description="Keep the checkpoints after the run is done.")
    plot: bool = Field(True, description="Draw plot.png (matplotlib).")
    training: dict[str, Any] = Field(
        default_factory=dict, description="Any other field of transformers' TrainingArguments: bf16, max_steps …"
    )

    def __init__(self, **values: Any) -> None:
        faults = [
            unknown_text("setting", name, type(self).model_fields) for name in values if name not in type(self).model_fields
        ]
        known = {k: v for k, v in values.items() if k in type(self).model_fields}
        try:
            super().__init__(**known)
        except ValidationError as e:
            faults += [_fault(error) for error in e.errors()]
        else:
            faults += list(_faults(self))
        if faults:
            raise ConfigError("Settings: " + "\n  ".join([""] * (len(faults) > 1) + faults))

    @field_validator("data", "text", "columns", "targets", mode="before")
    @classmethod
    def _split(cls, value: Any, info: Any) -> Any:
        # One string is a list by commas, as typed on the command line; of targets it may also be one regular expression.
        if isinstance(value, (str, Path)):
            text = str(value)
            if info.field_name == "targets" and (text == "all-linear" or not re.fullmatch(r"[\w.:, -]+", text)):
                return text
            return tuple(p.strip() for p in text.split(",") if p.strip())
        return tuple(str(v) for v in value) if isinstance(value, (list, tuple)) else value

    @field_validator("model", "output", "validation", "test", mode="before")
    @classmethod
    def _text(cls, value: Any) -> Any:
        return str(value) if isinstance(value, (Path, float, int)) and not isinstance(value, bool) else value

    @property
    def text_columns(self) -> tuple[str, ...]:
        """The text columns, the task's default resolved."""
        return self.text or DEFAULT_TEXT[self.task]

    @property
    def resolved_rank(self) -> int | dict[str, int] | None:
        """The rank, the method's default resolved; None for methods without one."""
        return self.rank if self.rank is not None else DEFAULT_RANK.get(self.method)

    @property
    def resolved_lr(self) -> float:
        """The adapter's learning rate, the method's default resolved."""
        return self.lr or DEFAULT_LR.get(self.method, 1e-3)

    @property
    def resolved_lr_head(self) -> float:
        """The head's learning rate, the method's default resolved."""
        return self.lr_head or DEFAULT_LR_HEAD.get(self.method, 1e-3)

    @property
    def resolved_metric(self) -> str:
        """The metric that best and patience go by."""
        return self.metric or {"classification": "accuracy", "images": "accuracy", "regression": "pearson"}.get(self.task, "loss")

    @property
    def share(self) -> float | None:
        """validation as a share of the training rows, or None where it names a file or split."""
        try:
            return float(self.validation) if self.validation is not None else None
        except ValueError:
            return None

    def replace(self, **changes: Any) -> "Settings":
        """A copy with some settings changed, checked again."""
        return type(self)(**{**self.given(), **changes})

    def given(self) -> dict[str, Any]:
        """The settings that were given, defaults left out."""
        return {name: getattr(self, name) for name in self.model_fields_set}

    def to_dict(self) -> dict[str, Any]:
        """Every setting as plain JSON types."""
        return self.model_dump(mode="json")


def load_settings(path: str | Path, **overrides: Any) -> Settings:
    """The Settings of a YAML file; overrides win, and dicts among them (training, options) are merged key by key.

    Errors: ConfigError where the file is missing, no mapping, or a setting is wrong.
    """
    import yaml

    try:
        values = yaml.safe_load(Path(path).read_text(encoding="utf-8")) or {}
    except OSError as e:
        raise ConfigError(f"can't read the settings file {path}: {e.strerror}") from e
    except (yaml.YAMLError, UnicodeDecodeError) as e:
        raise ConfigError(f"{path} is no YAML file: {e}") from e
    if not isinstance(values, Mapping):
        raise ConfigError(f"{path} holds a {type(values).__name__}, expected settings as `name: value` lines")
    return Settings(**merge({str(k).replace("-", "_"): v for k, v in values.items()}, overrides))


def merge(values: Mapping[str, Any], overrides: Mapping[str, Any]) -> dict[str, Any]:
    """The values with the overrides, mappings among them (training, options) key by key."""
    merged = dict(values)
    for name, value in overrides.items():
        both = isinstance(value, Mapping) and isinstance(merged.get(name), Mapping)
        merged[name] = {**merged[name], **value} if both else value
    return merged


def _fault(error: Mapping[str, Any]) -> str:
    """One of pydantic's errors, as we word them."""
    # A union's branches are part of pydantic's location; the setting's own name says where, the rest is noise.
    name = ".".join(str(part) for part in error["loc"][:1])
    if error["type"] == "missing":
        return f"{name} is missing: {Settings.model_fields[name].description}"
    message = error["msg"].replace("Input should be", "expected")
    return f"{name} is {error['input']!r}, {message[0].lower() + message[1:]}"


def _faults(s: Settings) -> Iterator[str]:
    from ..baselines import find_method

    try:
        find_method(s.method)
    except VeraError as e:
        yield str(e)
    if not s.data:
        yield "data is empty: name a file, a folder or a hub id"
    if s.method == "head" and s.task not in WITH_HEAD:
        yield f'method "head" trains a classification head, and task "{s.task}" has none; use vera, lora or full'
    widths = {"classification": (1, 2), "regression": (1, 2), "prompt-completion": (2,), "chat": (1, 2, 3)}.get(s.task, (1,))
    if s.text and len(s.text) not in widths:
        yield f"text names {len(s.text)} columns, and task {s.task} reads {' or '.join(map(str, widths))}"
    if s.shots and s.task not in ("classification", "images"):
        yield f"shots is {s.shots}, rows of each class, and task {s.task} has no classes; leave it out"
    if s.augment and s.task != "images":
        yield f"augment crops and flips images, and task {s.task} has none; leave it out"
    if s.augment and s.training.get("dataloader_persistent_workers"):
        yield "with dataloader_persistent_workers every epoch would have the first one's views; leave it out, or augment"
    if s.group_by_length and s.task == "images":
        yield "group_by_length is for texts: images of one model all have one size; leave it out"
    for name in ("lr", "lr_head", "epochs", "warmup", "weight_decay"):
        value = getattr(s, name)
        if value is not None and not math.isfinite(value):
            yield f"{name} is {value!r}, expected a finite number"
    for name in ("evaluate_every", "save_every"):
        value = getattr(s, name)
        if isinstance(value, int) and value <= 0:
            yield f'{name} is {value}, expected a number of steps above 0, "epoch" or "never"'
    if s.best or s.patience:
        what = "best" if s.best else "patience"
        if s.evaluate_every == "never":
            yield f'{what} needs evaluations, and evaluate_every is "never"'
        elif s.best and s.save_every != s.evaluate_every:
            yield f"best needs a checkpoint at every evaluation: set save_every to {s.evaluate_every!r} too"
    share = s.share
    if share is not None and not 0 < share < 1:
        yield f"validation is {share:g}, expected a share between 0 and 1, a file or a split's name"
    yield from _option_faults(s)
    yield from _training_faults(s)


def _option_faults(s: Settings) -> Iterator[str]:
    if s.method not in ("vera", "dvora"):
        return  # peft checks its own fields when the config is made
    from ..baselines.vera import vera_config

    try:
        vera_config(s, ())
    except VeraError as e:
        yield str(e)


def _training_faults(s: Settings) -> Iterator[str]:
    if not s.training:
        return
    import dataclasses

    from transformers import TrainingArguments

    known = [f.name for f in dataclasses.fields(TrainingArguments) if f.init]
    for name in s.training:
        if name in OWNED:
            yield f"training.{name} is set by {OWNED[name]}"
        elif name not in known:
            yield unknown_text("field of training:", name, known)
