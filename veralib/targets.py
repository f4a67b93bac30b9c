"""Which linears of a model an adapter sits on: find_targets turns VeraConfig's targets into a list of Target."""

import re
import warnings
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

from torch import nn

from .config import VeraConfig, rank_of
from .errors import ConfigError, VeraWarning, nearest, unknown_text
from .fused import Parts, Rows, part_rows, parts_of
from .linears import is_linear, shape, unfit

ALL_LINEAR = "all-linear"

# Siblings that project to queries and values, by the ends of their names in transformers' modeling files.
QUERY_VALUE = (
    ("q_proj", "v_proj"),  # Llama and most decoders, BART, CLIP, Whisper, Wav2Vec2
    ("query", "value"),  # BERT, RoBERTa, ViT
    ("q_lin", "v_lin"),  # DistilBERT, XLM
    ("q", "v"),  # T5
    ("query_proj", "value_proj"),  # DeBERTa-v2 and v3
    ("to_q", "to_v"),  # Perceiver resamplers
    ("to_q", "to_kv:v"),
    ("Wq", "Wv"),  # CTRL
    ("wq", "wv"),
    ("linear_q", "linear_v"),  # Conformers
    ("q_linear", "v_linear"),
    ("q_head", "v_head"),  # Funnel
    ("project_q", "project_v"),  # CPM-Ant
    ("projection_query", "projection_value"),  # CvT
    ("q_proj.linear", "v_proj.linear"),  # Moshi, Gemma 4's encoders
    ("q_b_proj", "kv_b_proj:v"),  # DeepSeek: latent attention
    ("q_proj", "kv_b_proj:v"),
    ("q_b_proj", "kv_proj"),  # DeepSeek V4: the key is the value
    ("q_attn", "c_attn:v"),  # GPT-2's cross attention
)

# Output heads of models that don't say (get_output_embeddings, base_model): children of the model by these names.
_HEAD_CHILDREN = {"classifier", "classification_head", "score", "qa_outputs", "cls", "head", "heads", "fc", "proj_out"}
_HEAD_CHILDREN |= {"embed_out", "output_projection", "ctc_head"}
_HEADS_ANYWHERE = {"lm_head", "lm_heads"}


@dataclass(frozen=True)
class Target:
    """One place for an adapter: a linear, or a part of a fused one."""

    unit: str
    """The module's name, or name:part."""
    layer: str
    """The module's name."""
    module: nn.Module
    part: str
    """"" for the whole linear."""
    rows: Rows | None
    """The rows of W0 that the part owns; None for the whole linear."""
    m: int
    """Outputs, of the part."""
    n: int
    """Inputs."""
    rank: int


def find_targets(model: nn.Module, config: VeraConfig) -> list[Target]:
    """Every place that config.targets names, in the model's order; a module under two parents counts once.

    ConfigError says which target matches nothing, no linear, or a part that isn't there.
    """
    view = _View(model, config.train_modules)
    wanted = default_targets(model) if config.targets is None else config.targets
    if wanted in (ALL_LINEAR, (ALL_LINEAR,)):
        chosen = {(name, "") for name in view.linears if name not in view.heads and name not in view.trained}
        _warn_of_experts(model, view)
    elif isinstance(wanted, str):
        chosen = view.by_expression(wanted)
    else:
        chosen = view.by_names(wanted)
    if config.layers is not None:
        if not config.layers:
            raise ConfigError("layers is empty: name the blocks to adapt, or leave it None for all of them.")
        chosen = _in_layers(chosen, config.layers)
    if not chosen:
        raise ConfigError(
            f"targets leave no linear of {type(model).__name__} to adapt: what they name is an output head "
            f"({_quoted(sorted(view.heads))}) or within train_modules ({_quoted(sorted(view.trained & set(view.linears)))})."
        )
    whole = {name for name, part in chosen if not part}
    if both := sorted(name for name, part in chosen if part and name in whole):
        raise ConfigError(f'targets name "{both[0]}" both whole and in parts; an output row has one b. Leave one of the two out.')
    return [_target(view, name, part, config) for name, part in sorted(chosen, key=view.order)]


def default_targets(model: nn.Module) -> tuple[str, ...]:
    """The endings of the query and value projections (paper §4.1), parts of fused ones included.

    ConfigError, with the endings of all linears, where none is known.
    """
    view = _View(model, ())
    names = {name: None for name in view.linears if name not in view.heads}  # a set that keeps the order
    found: dict[str, None] = {}
    for name in names:
        last = name.rpartition(".")[2]
        if {"q", "v"} <= set(view.parts(name)):
            found |= dict.fromkeys((f"{last}:q", f"{last}:v"))
        for query, value in QUERY_VALUE:
            if not _ends(name, query):
                continue
            sibling, _, part = value.partition(":")
            other = name.removesuffix(query) + sibling
            if other in names and (not part or part in view.parts(other)):
                found |= dict.fromkeys((query, value))
    if not found:
        raise ConfigError(
            f"no query and value projections are known for {type(model).__name__}. Name the targets: "
            f"targets='all-linear', or some of {_quoted(view.endings)}."
        )
    return tuple(found)


def whole_targets(model: nn.Module) -> tuple[str, ...]:
    """default_targets for a method that adapts whole linears: a fused one that holds query and value stands for its parts."""
    return tuple(dict.fromkeys(name.partition(":")[0] for name in default_targets(model)))


class _View:
    """The linears of a model by name, and what find_targets asks about them."""

    def __init__(self, model: nn.Module, train_modules: Iterable[str]) -> None:
        self.model = model
        self.modules = dict(model.named_modules())
        # Endings are matched against every name of a module, the unit is called after the first.
        first = {id(module): name for name, module in self.modules.items()}
        self.names = {name: first[id(m)] for name, m in model.named_modules(remove_duplicate=False)}
        self.linears = {name: m for name, m in self.modules.items() if name and is_linear(m) and not unfit(m)}
        self.trained = {self.names[n] for n in self.names if any(_within(n, t) for t in train_modules)}
        self.heads = _heads(model, self)
        self._order = {name: i for i, name in enumerate(self.modules)}
        self._parts: dict[str, Parts] = {}

    @property
    def endings(self) -> list[str]:
        """The distinct last components of the linears' names."""
        return list(dict.fromkeys(name.rpartition(".")[2] for name in self.linears))

    def order(self, unit: tuple[str, str]) -> tuple[int, int]:
        name, part = unit
        return self._order[name], list(self.parts(name)).index(part) if part else -1

    def parts(self, name: str) -> Parts:
        if name not in self._parts:
            self._parts[name] = parts_of(self.model, name)
        return self._parts[name]

    def by_names(self, targets: Iterable[str]) -> set[tuple[str, str]]:
        """The units of all targets; the faults of all of them in one ConfigError."""
        units: set[tuple[str, str]] = set()
        faults = []
        for target in targets:
            try:
                units |= self.by_name(target)
            except ConfigError as e:
                faults.append(str(e))
        if faults:
            raise ConfigError("\n".join(faults))
        return units

    def by_name(self, target: str) -> set[tuple[str, str]]:
        """The units that one target, a name or an ending with or without :part, stands for."""
        ending, colon, part = target.partition(":")
        matched = {first for name, first in self.names.items() if name and _ends(name, ending)}
        linears = sorted(matched & self.linears.keys(), key=lambda name: self._order[name])
        if not linears:
            raise ConfigError(self._no_linear(ending, matched))
        if not colon:
            return {(name, "") for name in linears if name not in self.trained}
        having = [name for name in linears if part in self.parts(name)]
        if not having:
            if not (known := self.parts(linears[0])):
                raise ConfigError(
                    f'target "{target}" asks for a part, but "{linears[0]}" has no parts that veralib knows: '
                    f'name it whole, "{ending}".'
                )
            raise ConfigError(f'target "{target}": ' + unknown_text("part", part, known))
        return {(name, part) for name in having if name not in self.trained}

    def by_expression(self, pattern: str) -> set[tuple[str, str]]:
        """The units whose module name, or else name:part, the expression matches in full."""
        try:
            expression = re.compile(pattern)
        except re.error as e:
            raise ConfigError(f"targets {pattern!r} is no regular expression: {e}. A list names modules.") from e
        matched = {first for name, first in self.names.items() if expression.fullmatch(name)}
        units = {(name, "") for name in matched if name in self.linears}
        units |= {
            (name, part)
            for name in self.linears
            if name not in matched
            for part in self.parts(name)
            if expression.fullmatch(f"{name}:{part}")
        }
        if not units:
            hint = nearest(pattern, [ALL_LINEAR])
            if any(_ends(name, pattern.partition(":")[0]) for name in self.linears):
                hint = f' For every linear of that name write a list: targets=["{pattern}"].'
            raise ConfigError(
                f"targets {pattern!r} is a regular expression for whole module names, and it matches no linear.{hint} "
                f'The linears\' names end in {_quoted(self.endings)}; one in full is "{next(iter(self.linears), "")}".'
            )
        return {unit for unit in units if unit[0] not in self.trained}

    def _no_linear(self, target: str, matched: set[str]) -> str:
        if not matched:
            close = nearest(target.rpartition(".")[2], self.endings)
            return f'target "{target}" matches no module.{close} The linears\' names end in {_quoted(self.endings)}.'
        name = min(matched, key=lambda n: self._order[n])
        module = self.modules[name]
        if is_linear(module):
            return f'target "{name}" is {unfit(module)}. Leave it out.'
        inside = [n for n in self.linears if n.startswith(name + ".")]
        more = f" Linears inside it: {_quoted(n[len(name) + 1 :] for n in inside)}." if inside else ""
        return (
            f'target "{target}" matches "{name}", a {type(module).__name__}; veralib adapts nn.Linear, '
            f"transformers' Conv1D and quantised linears.{more}"
        )


def _heads(model: nn.Module, view: _View) -> set[str]:
    """Names of linears that are, or lie within, an output head."""
    heads = {n for n in view.linears if n.split(".")[0] in _HEAD_CHILDREN or _HEADS_ANYWHERE.intersection(n.split("."))}
    base = getattr(model, "base_model", model)
    if isinstance(base, nn.Module) and base is not model:
        inside = {id(m) for m in base.modules()}
        # A head beside the base model is a few layers; what holds a list of blocks is another tower.
        towers = {n for n, child in model.named_children() if any(isinstance(m, nn.ModuleList) for m in child.modules())}
        heads |= {n for n, m in view.linears.items() if id(m) not in inside and n.split(".")[0] not in towers}
    outputs = {id(_output_embeddings(m)) for m in view.modules.values()}
    tied = {id(m.weight) for m in view.modules.values() if isinstance(m, nn.Embedding)}
    return heads | {n for n, m in view.linears.items() if id(m) in outputs or id(getattr(m, "weight", None)) in tied}


def _output_embeddings(module: nn.Module) -> Any:
    """What get_output_embeddings() says of a model or of a model within one; None where it has nothing to say."""
    getter = getattr(module, "get_output_embeddings", None)
    try:
        return getter() if callable(getter) else None
    except (NotImplementedError, AttributeError):
        return None


def _target(view: _View, name: str, part: str, config: VeraConfig) -> Target:
    unit = f"{name}:{part}" if part else name
    rank = rank_of(config, unit)
    if rank is None:
        raise ConfigError(
            f'rank has no pattern that matches "{unit}": patterns are {_quoted(config.rank)}. '  # type: ignore[arg-type]
            f'Add {{".": 256}} as the last for all others, or leave the layer out of targets.'
        )
    m, n = shape(view.linears[name])
    rows = view.parts(name)[part] if part else None
    return Target(unit, name, view.linears[name], part, rows, m if rows is None else part_rows(rows), n, rank)


def layer_index(name: str) -> int | None:
    """The first number among the components of a module's name, its block's index; None where there is none."""
    return next((int(c) for c in name.split(".") if c.isdecimal()), None)


def _in_layers(chosen: set[tuple[str, str]], layers: tuple[int, ...]) -> set[tuple[str, str]]:
    present = {layer_index(name) for name, _ in chosen} - {None}
    if missing := [i for i in layers if i not in present]:
        have = f"from {min(present)} to {max(present)}" if present else "none at all"  # type: ignore[type-var]
        raise ConfigError(f"layers names block {missing[0]}, but the blocks with targets are {have}, counted from 0.")
    return {unit for unit in chosen if layer_index(unit[0]) in layers}


_NO_STACK = re.compile(r"pos|embed|conv|token|bias|norm|head|A_log")


def _warn_of_experts(model: nn.Module, view: _View) -> None:
    """Says which stacks of matrices (mixture-of-experts weights as 3-D parameters) all-linear can't reach."""
    stacks: dict[str, list[int]] = {}
    for name, module in view.modules.items():
        if type(module).__module__.startswith("torch.nn") or name in view.trained:
            continue
        for key, p in module.named_parameters(name, recurse=False):
            if p.dim() == 3 and min(p.shape) > 1 and not _NO_STACK.search(key):
                stacks.setdefault(re.sub(r"(^|\.)\d+(?=\.|$)", r"\1*", key), []).append(p.numel())
    if stacks:
        listed = ", ".join(f"{key} ({len(n)} of them, {sum(n):,} parameters)" for key, n in stacks.items())
        warnings.warn(
            f"all-linear skips 3-D parameters, stacks of matrices that are no linear modules: {listed}. "
            f"The adapter leaves them as they are.",
            VeraWarning,
            stacklevel=3,
        )


def _ends(name: str, ending: str) -> bool:
    return name == ending or name.endswith("." + ending)


def _within(name: str, ancestor: str) -> bool:
    """Whether a module is, or lies within, one whose name ends in `ancestor`."""
    return f".{ancestor}." in f".{name}."


def _quoted(names: Iterable[str] | Mapping[str, Any]) -> str:
    names = list(names)
    shown = ", ".join(f'"{n}"' for n in names[:16])
    return (shown or "none") + (f" and {len(names) - 16} more" if len(names) > 16 else "")
