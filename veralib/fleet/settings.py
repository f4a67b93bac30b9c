"""FleetSettings: one `vera fleet train`, from flags, a YAML file or Python."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError, field_validator

from ..config import VeraConfig
from ..errors import ConfigError, VeraError, unknown_text
from ..training.settings import Settings
from .optimizer import SCHEDULES


class FleetSettings(BaseModel):
    """One run of `vera fleet train`. Frozen; ConfigError lists every fault."""

    model_config = ConfigDict(extra="forbid", frozen=True, protected_namespaces=())

    model: str = Field(description="Base model: hub id or folder.")
    data: tuple[str, ...] = Field(
        description="Rows of all owners: csv, tsv or jsonl files with an owner column, a hub id, or a folder, a file an owner."
    )
    output: str = Field("fleet", description="Folder for the store, fleet.json, the shared start and plot.png.")
    owner: str = Field("owner", description="Column that names the owner of a row.")
    task: Literal["causal-lm", "prompt-completion", "chat", "classification", "regression"] = Field(
        "causal-lm", description="What is learned."
    )
    text: tuple[str, ...] = Field(
        (), description="Text column, or two for pairs; the prompt and completion columns; the messages column."
    )
    label: str = Field("label", description="Label column (classification, regression).")
    split: str = Field("train", description="Split of a hub data set.")
    data_config: str | None = Field(None, description="Configuration of a hub data set.")
    max_length: int = Field(256, gt=1, description="Tokens a row at most.")
    chat_template: str | None = Field(None, description='A Jinja file, or "alpaca", where the tokenizer has no chat template.')
    held_out: float = Field(0.2, ge=0, lt=1, description="Share of each owner's rows that only measures; 0: none.")
    held_out_column: str | None = Field(
        None, description="Column that marks rows that only measure, with true or 1; nothing is drawn from who has such rows."
    )

    revision: str | None = Field(None, description="Revision of a hub model.")
    dtype: Literal["float32", "bfloat16", "float16", "auto"] = Field("float32", description="Type of the base's weights.")
    quantise: Literal["4bit", "8bit"] | None = Field(None, description="Load the base quantised (bitsandbytes).")

    rank: int | dict[str, int] = Field(64, description="Rank r.")
    targets: str | tuple[str, ...] = Field("all-linear", description='Linears to adapt: names, or "all-linear".')
    basis_seed: int = Field(0, ge=0, lt=2**64, description="A and B grow from it.")
    options: dict[str, Any] = Field(default_factory=dict, description="More fields of VeraConfig.")

    seed: int = Field(0, ge=0, lt=2**32, description="Each owner's data order, and which of its rows are held out.")
    epochs: float = Field(3.0, gt=0, description="Passes over each owner's rows.")
    owner_rows: int = Field(4, gt=0, description="Rows of one owner's step.")
    batch_rows: int = Field(64, gt=0, description="Rows of a mixed batch, at most.")
    slots: int = Field(256, gt=0, description="Owners that train at a time; who ends frees a slot for the next.")
    lr: float = Field(1e-2, gt=0, description="Learning rate of d and b.")
    lr_head: float | None = Field(None, gt=0, description="Learning rate of heads; left out: a tenth of lr.")
    head_per_owner: bool = Field(
        False, description="Each owner trains a classification head of its own; else all use the shared start's, frozen."
    )
    weight_decay: float = Field(0.0, ge=0, description="AdamW's.")
    max_norm: float | None = Field(1.0, gt=0, description="Each owner's gradient is clipped to it.")
    schedule: str = Field("linear", description="constant, linear or cosine, over each owner's own steps.")
    warmup: float = Field(0.1, ge=0, lt=1, description="Share of an owner's steps that warm up.")
    patience: int | None = Field(None, gt=0, description="An owner stops after so many epochs without a better held-out loss.")

    shared_epochs: float = Field(
        0.0, ge=0, description="First one adapter on everybody's rows for so many passes; each owner starts from it. 0: none."
    )
    shared_examples: int = Field(100_000, gt=0, description="Examples that the shared start reads at most, an even draw of all.")
    shared_lr: float | None = Field(None, gt=0, description="Learning rate of the shared start; left out: lr.")
    start_from: str | None = Field(
        None, description="Store in which an owner's current adapter is what it begins from; who isn't in it begins anew."
    )
    store: str | None = Field(None, description="Store to put the adapters in; left out: OUTPUT/store.")
    store_kind: Literal["folder", "packed"] = Field("folder", description="Form of a new store.")
    precision: Literal["float32", "bfloat16", "int8"] = Field("float32", description="Of d and b in a new store.")
    keep_data: bool = Field(True, description="Keep each owner's rows in OUTPUT/data, for updates and base upgrades.")
    plot: bool = Field(True, description="Draw plot.png (matplotlib).")
    progress_seconds: float | None = Field(
        None, ge=0, description="So often a line in OUTPUT/progress-*.jsonl says where each owner stands; left out: never."
    )

    def __init__(self, **values: Any) -> None:
        fields = type(self).model_fields
        faults = [unknown_text("setting", name, fields) for name in values if name not in fields]
        try:
            super().__init__(**{k: v for k, v in values.items() if k in fields})
        except ValidationError as e:
            for error in e.errors():
                name = str(error["loc"][0])
                message = error["msg"].replace("Input should be", "expected")
                if error["type"] == "missing":
                    faults.append(f"{name} is missing: {fields[name].description}")
                else:
                    faults.append(f"{name} is {error['input']!r}, {message[0].lower() + message[1:]}")
        else:
            faults += list(_faults(self))
        if faults:
            raise ConfigError("Fleet settings: " + "\n  ".join([""] * (len(faults) > 1) + faults))

    @field_validator("data", "text", "targets", mode="before")
    @classmethod
    def _split(cls, value: Any, info: Any) -> Any:
        return Settings._split(value, info)

    @field_validator("model", "output", "store", "start_from", mode="before")
    @classmethod
    def _text(cls, value: Any) -> Any:
        return str(value) if isinstance(value, Path) else value

    def vera_config(self) -> VeraConfig:
        """What every owner's adapter is."""
        return VeraConfig(rank=self.rank, targets=self.targets, seed=self.basis_seed, **self.options)

    def row_settings(self) -> Settings:
        """The same rows and base as a single run's settings: what reads, loads and tokenises them."""
        data = ("data", "task", "text", "label", "split", "data_config", "max_length", "chat_template")
        same = {name: getattr(self, name) for name in (*data, "model", "revision", "dtype", "quantise")}
        return Settings(**same)

    def to_dict(self) -> dict[str, Any]:
        """Every setting as plain JSON types."""
        return self.model_dump(mode="json")


def _faults(s: FleetSettings) -> Iterator[str]:
    if s.schedule not in SCHEDULES:
        yield unknown_text("schedule", s.schedule, SCHEDULES)
    if s.owner_rows > s.batch_rows:
        yield f"owner_rows is {s.owner_rows}, expected at most batch_rows, {s.batch_rows}"
    if s.patience is not None and not s.held_out:
        yield "patience goes by the held-out loss, and held_out is 0"
    if s.task in ("classification", "regression") and not s.head_per_owner and not s.shared_epochs:
        yield (
            f"a new head for {s.task} starts at random: train one on everybody's rows, which all owners then use frozen "
            "(shared_epochs), or one for each owner (head_per_owner)"
        )
    if s.start_from and s.task in ("classification", "regression") and not s.head_per_owner:
        yield "start_from gives each owner its own adapter to begin from, and its head with it: set head_per_owner"
    for name in ("seed", "rank", "targets"):
        if name in s.options:
            yield f"options.{name} is set by {'basis_seed' if name == 'seed' else name}"
    try:
        if not {"seed", "rank", "targets"} & s.options.keys():
            s.vera_config()
        s.row_settings()
    except (VeraError, TypeError) as e:
        yield str(e)
