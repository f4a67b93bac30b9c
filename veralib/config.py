"""VeraConfig: what to adapt and how. Checked when it is made; every fault is listed at once."""

import dataclasses
import inspect
import re
import sys
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal, get_args

from .errors import ConfigError, nearest

BasisKind = Literal["philox-u8", "peft"]
Levels = Literal["kaiming_uniform", "kaiming_normal", "uniform", "rademacher"]
Sharing = Literal["shared", "unique"]
Train = Literal["both", "d", "b"]

# PEFT's field -> ours, said in the error for whoever types PEFT's.
PEFT_FIELDS = {
    "r": "rank",
    "target_modules": "targets",
    "projection_prng_key": "seed, with basis='peft'",
    "save_projection": "nothing: A and B grow from the seed and are never saved",
    "vera_dropout": "dropout",
    "layers_to_transform": "layers",
    "layers_pattern": "nothing: layers= finds the indices in the module names",
    "modules_to_save": "train_modules",
    "bias": "nothing: biases aren't trained; a PEFT folder with bias='vera_only' still loads",
    "fan_in_fan_out": "nothing: Conv1D is recognised",
    "init_weights": "d_initial and b_initial",
    "task_type": "nothing: the model class says it",
    "inference_mode": "trainable=False in vera.load",
    "lora_alpha": "scale",
}


@dataclass(frozen=True)
class VeraConfig:
    """One adapter's settings. The defaults are the paper's (§3.3, §4.1), targets aside, which follow the architecture."""

    rank: int | Mapping[str, int] = 256
    """r: length of d. Or {pattern: rank}: the first pattern that matches a layer's name, by re.search, gives its rank."""
    seed: int = 0
    """A and B grow from it; 0 ≤ seed < 2⁶⁴. Adapters with one seed share A and B in memory."""
    targets: str | tuple[str, ...] | None = None
    """Module names or their endings, parts of fused linears ("c_attn:q"), one regular expression for the whole name, or
    "all-linear" (every linear but the output head). None: query and value projections, as in the paper."""
    layers: tuple[int, ...] | None = None
    """Only these block indices, counted from 0 (the first number in a module's name)."""
    d_initial: float | None = None
    """d's start. None: 0.1 (paper §4.1); 0 with train="d"; 1 with train="b"."""
    b_initial: float = 0.0
    """b's start; 0 leaves the base model unchanged at first."""
    scale: float = 1.0
    """Multiplies ΔW. The paper's is 1, with learning rates of 1e-3 to 1e-1; a larger one lets LoRA's rates work."""
    basis: BasisKind = "philox-u8"
    """Where A and B come from: veralib's own generator, or PEFT's matrices, bit for bit."""
    levels: Levels = "kaiming_uniform"
    """Distribution of A's and B's entries (Table 6b; rademacher is ours)."""
    sharing: Sharing = "shared"
    """One pair A, B for all layers, or a pair of its own for each (Table 7)."""
    train: Train = "both"
    """Which vectors train (Table 6a): with "d", b stays 1; with "b", d stays d_initial."""
    dropout: float = 0.0
    """On the adapter's input while training."""
    train_modules: tuple[str, ...] = ()
    """Modules trained in full and saved with the adapter, a classification head for one."""

    def __new__(cls, *args: Any, **fields: Any) -> "VeraConfig":
        # A dataclass answers an unknown keyword with a bare TypeError; PEFT's users deserve the translation.
        known = {f.name for f in dataclasses.fields(cls)}
        if unknown := [name for name in fields if name not in known]:
            raise ConfigError("VeraConfig: " + "; ".join(_unknown_field(u, known) for u in unknown) + ".")
        return super().__new__(cls)

    def __post_init__(self) -> None:
        _freeze(self, "targets", self.targets)
        _freeze(self, "layers", self.layers)
        _freeze(self, "train_modules", self.train_modules)
        if isinstance(self.rank, Mapping):
            object.__setattr__(self, "rank", dict(self.rank))
        faults = list(_faults(self))
        if faults:
            raise ConfigError("VeraConfig: " + "; ".join(faults) + ".")

    def __hash__(self) -> int:
        values = (getattr(self, f.name) for f in dataclasses.fields(self))
        return hash(tuple(frozenset(v.items()) if isinstance(v, Mapping) else v for v in values))

    @property
    def d_start(self) -> float:
        """The number that d starts from, the default resolved."""
        if self.d_initial is not None:
            return self.d_initial
        return {"both": 0.1, "d": 0.0, "b": 1.0}[self.train]

    @property
    def b_start(self) -> float:
        """The number that b starts from: 1 where only d trains."""
        return 1.0 if self.train == "d" else self.b_initial

    def to_dict(self) -> dict[str, Any]:
        """Plain JSON types; the seed as a decimal string, since JSON numbers aren't safe beyond 2⁵³, and a rank mapping as
        [[pattern, rank], …], since its order counts and JSON objects have none."""
        out = {f.name: getattr(self, f.name) for f in dataclasses.fields(self)}
        out["seed"] = str(self.seed)
        if isinstance(self.rank, Mapping):
            out["rank"] = [list(item) for item in self.rank.items()]
        return {k: list(v) if isinstance(v, tuple) else v for k, v in out.items()}

    @classmethod
    def from_dict(cls, fields: Mapping[str, Any]) -> "VeraConfig":
        """The config that to_dict() wrote; ConfigError on unknown fields or faults."""
        values = dict(fields)
        if isinstance(values.get("seed"), str) and re.fullmatch("[0-9]{1,20}", values["seed"]):
            values["seed"] = int(values["seed"])
        if isinstance(values.get("rank"), list):
            try:
                values["rank"] = dict(values["rank"])
            except (TypeError, ValueError):
                raise ConfigError(f"VeraConfig: rank is {values['rank']!r}, expected [[pattern, rank], …].") from None
        return cls(**values)

    def replace(self, **changes: Any) -> "VeraConfig":
        """A copy with some fields changed."""
        return dataclasses.replace(self, **changes)


# __new__ takes anything, to answer it; what is right stays visible to help(), editors and inspect.
VeraConfig.__signature__ = inspect.Signature(list(inspect.signature(VeraConfig.__init__).parameters.values())[1:])  # type: ignore[attr-defined]


def rank_of(config: VeraConfig, layer: str) -> int | None:
    """The rank of one layer, or None where no pattern of a rank mapping matches it."""
    if isinstance(config.rank, int):
        return config.rank
    return next((r for pattern, r in config.rank.items() if re.search(pattern, layer)), None)


def _unknown_field(name: str, known: set[str]) -> str:
    if name in PEFT_FIELDS:
        return f'"{name}" is PEFT\'s name; here it is {PEFT_FIELDS[name]}'
    return f'there is no field "{name}".{nearest(name, known)} Known: {", ".join(sorted(known))}'


def _freeze(config: VeraConfig, name: str, value: Any) -> None:
    if isinstance(value, (list, set, range)):
        object.__setattr__(config, name, tuple(value))
    elif name == "train_modules" and isinstance(value, str):
        object.__setattr__(config, name, (value,))


def _number(value: Any) -> bool:
    # Not math.isfinite, which overflows on a whole number of 400 digits.
    return isinstance(value, (int, float)) and not isinstance(value, bool) and abs(value) <= sys.float_info.max


def _whole(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)


def _strings(value: Any) -> bool:
    return isinstance(value, tuple) and all(isinstance(v, str) and v for v in value)


def _faults(c: VeraConfig):
    ranks = c.rank.items() if isinstance(c.rank, Mapping) else [(None, c.rank)]
    if not ranks:
        yield "rank is an empty mapping, expected at least one {pattern: rank}"
    for pattern, rank in ranks:
        where = "" if pattern is None else f" for {pattern!r}"
        if not _whole(rank) or rank <= 0:
            yield f"rank{where} is {rank!r}, expected a whole number above 0"
        if pattern is not None:
            try:
                re.compile(pattern)
            except (re.error, TypeError, RecursionError, OverflowError) as e:
                yield f"rank's pattern {pattern!r} is no regular expression: {e}"
    if not _whole(c.seed) or not 0 <= c.seed < 2**64:
        yield f"seed is {c.seed!r}, expected a whole number from 0 to 2**64 - 1"
    if c.basis == "peft" and _whole(c.seed) and c.seed >= 2**63:
        yield f"seed is {c.seed}, and torch's generator, which PEFT's basis uses, takes seeds below 2**63"
    if c.targets is not None and not (isinstance(c.targets, str) and c.targets) and not _strings(c.targets):
        yield f"targets is {c.targets!r}, expected names, one regular expression, or 'all-linear'"
    if c.targets == ():
        yield "targets is empty: name at least one module, or leave it out"
    if c.layers is not None and not (isinstance(c.layers, tuple) and all(_whole(i) and i >= 0 for i in c.layers)):
        yield f"layers is {c.layers!r}, expected block indices from 0 on"
    for name, value in (("d_initial", c.d_initial), ("b_initial", c.b_initial), ("scale", c.scale)):
        if not (name == "d_initial" and value is None) and not _number(value):
            yield f"{name} is {value!r}, expected a finite number"
    if _number(c.scale) and c.scale == 0:
        yield "scale is 0, which switches the adapter off for good; expected another number"
    if not _number(c.dropout) or not 0 <= c.dropout < 1:
        yield f"dropout is {c.dropout!r}, expected a number from 0 up to, not including, 1"
    if not _strings(c.train_modules):
        yield f"train_modules is {c.train_modules!r}, expected module names"
    for name, kind in (("basis", BasisKind), ("levels", Levels), ("sharing", Sharing), ("train", Train)):
        value = getattr(c, name)
        if value not in get_args(kind):
            yield f"{name} is {value!r}.{nearest(value, get_args(kind))} Expected one of {', '.join(get_args(kind))}"
    if c.basis == "peft" and c.sharing == "unique":
        yield "sharing='unique' exists for basis='philox-u8' alone: PEFT always shares A and B"
    if c.basis == "peft" and c.levels != "kaiming_uniform":
        yield f"levels={c.levels!r} exists for basis='philox-u8' alone: PEFT's is always kaiming_uniform"
    if c.train == "d" and c.b_initial not in (0.0, 1.0):
        yield f"b_initial is {c.b_initial!r}, but with train='d' b stays 1"


def as_config(config: Any, name: str, model: Any = None) -> VeraConfig | None:
    """config as a veralib.VeraConfig: a peft.VeraConfig is converted (for the model, where one is given). ConfigError for
    anything else, and for a name that is none."""
    if not isinstance(name, str) or not name:
        raise ConfigError(f"an adapter's name is {name!r}, expected a string that isn't empty.")
    if config is None or isinstance(config, VeraConfig):
        return config
    if type(config).__name__ == "VeraConfig" and type(config).__module__.startswith("peft."):
        from .interop.peft import config_from_peft

        return config_from_peft(config, model)
    raise ConfigError(f"config is a {type(config).__name__}, expected a veralib.VeraConfig or a peft.VeraConfig.")
