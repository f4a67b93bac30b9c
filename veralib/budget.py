"""Parameters and bytes of VeRA, LoRA and full fine-tuning, exactly, from shapes alone: no weight is loaded (paper §3.2, Table 1).

A layer is (m, n): m outputs, n inputs. VeRA trains Σ (m + r), LoRA Σ r·(m + n), full every weight. The paper's L·(d_model + r)
is the square case; VeRA's count is linear in r with slope 1 a layer, so even r = 1024 costs less than LoRA of rank 1 there.
"""

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

from .config import VeraConfig
from .errors import ConfigError, need

Shapes = Sequence[tuple[int, int]]
BYTES = {"float32": 4, "bfloat16": 2, "float16": 2}

# Models of Table 1: (blocks, d_model); query and value of each block are square. Known here so that no config is needed.
TABLE_1_MODELS = {"roberta-base": (12, 768), "roberta-large": (24, 1024), "gpt-3": (96, 12288)}


@dataclass(frozen=True)
class Row:
    """One method's cost. base_bytes: what must be stored beside the frozen model; full fine-tuning stores a whole model."""

    method: str
    rank: int | None
    parameters: int
    bytes: int


@dataclass(frozen=True)
class Budget:
    """What vera params prints: the adapted layers, and a row a method."""

    model: str
    layers: Mapping[str, tuple[int, int]]
    model_parameters: int | None
    """Of the whole model; None where only its adapted layers are known."""
    rows: tuple[Row, ...]


def vera_parameters(shapes: Shapes, rank: int | Sequence[int]) -> int:
    """Σ (m + r): b and d of each layer. The seed isn't counted."""
    ranks = [rank] * len(shapes) if isinstance(rank, int) else rank
    return sum(m + r for (m, _), r in zip(shapes, ranks, strict=True))


def lora_parameters(shapes: Shapes, rank: int) -> int:
    """Σ r·(m + n): B and A of each layer."""
    return sum(rank * (m + n) for m, n in shapes)


def weight_parameters(shapes: Shapes) -> int:
    """Σ m·n: the layers' own weights, without biases."""
    return sum(m * n for m, n in shapes)


def basis_parameters(shapes: Shapes, rank: int) -> int:
    """r·(widest n) + (widest m)·r: the shared A and B, which are grown from the seed and never stored."""
    return rank * (max(n for _, n in shapes) + max(m for m, _ in shapes)) if shapes else 0


def table_1_shapes(model: str) -> list[tuple[int, int]]:
    """Query and value of every block of one of Table 1's models."""
    blocks, width = TABLE_1_MODELS[model]
    return [(width, width)] * (2 * blocks)


def budget(
    model: str, config: VeraConfig | None = None, lora_ranks: Sequence[int] = (1, 8, 16), dtype: str = "float32"
) -> Budget:
    """The Budget of one model: a folder, a config.json, a hub id, or a name of Table 1's; its weights are never loaded.

    dtype: of the stored adapters and of the fully fine-tuned model. Errors: ConfigError where the model or targets aren't found.
    """
    config = config or VeraConfig()
    if dtype not in BYTES:
        raise ConfigError(f"dtype is {dtype!r}, expected one of {', '.join(BYTES)}")
    plain = config.targets is None and config.layers is None and isinstance(config.rank, int)
    if plain and model in TABLE_1_MODELS and not Path(model).exists():
        shapes = table_1_shapes(model)
        layers = {f"{i // 2}.{'query' if i % 2 == 0 else 'value'}": s for i, s in enumerate(shapes)}
        ranks, total = [cast(int, config.rank)] * len(shapes), None
    else:
        from .targets import find_targets

        skeleton = meta_model(model)
        targets = find_targets(skeleton, config)
        layers = {t.unit: (t.m, t.n) for t in targets}
        ranks, total = [t.rank for t in targets], sum(p.numel() for p in skeleton.parameters())
    shapes = list(layers.values())
    width = BYTES[dtype]
    both = vera_parameters(shapes, ranks)  # stored, whichever of them train
    trained = {"both": both, "d": sum(ranks), "b": both - sum(ranks)}[config.train]
    counts: list[tuple[str, int | None, int]] = [("lora", r, lora_parameters(shapes, r)) for r in lora_ranks]
    counts += [("full", None, total)] if total is not None else [("these layers", None, weight_parameters(shapes))]
    ours = Row("vera", None if len(set(ranks)) > 1 else ranks[0], trained, both * width)
    return Budget(model, layers, total, (ours, *(Row(method, rank, count, count * width) for method, rank, count in counts)))


def meta_model(model: str, layers: Collection[str] = ()) -> Any:
    """The model of a folder, config.json or hub id, on the meta device: names and shapes without a byte of weights.

    Of the class that its config names; with `layers`, of the first class in which all these modules exist: an adapter of a
    classifier calls them "bert.encoder…", where the BertModel that it was loaded from has "encoder…".
    """
    try:
        import torch
        import transformers
    except ImportError as e:
        raise need("transformers", "cli", "Counting a model's parameters") from e
    path = Path(model).expanduser()
    looks_local = model.startswith((".", "/", "~")) or model.endswith(".json") or model.count("/") > 1
    if looks_local and not path.exists():
        raise ConfigError(f"there is no model folder or config {model}")
    try:
        config = transformers.AutoConfig.from_pretrained(path if path.exists() else model)
    except (OSError, ValueError, KeyError) as e:
        hint = f" Without a connection, Table 1's models are known: {', '.join(TABLE_1_MODELS)}."
        raise ConfigError(f'can\'t read the config of "{model}": {e}{hint}') from e
    classes = [c for name in config.architectures or () if (c := getattr(transformers, name, None)) is not None]
    makers: list[Any] = [c._from_config for c in classes]
    kinds = ("", "ForSequenceClassification", "ForCausalLM", "ForTokenClassification", "ForImageClassification", "ForSeq2SeqLM")
    makers += [getattr(transformers, f"AutoModel{kind}").from_config for kind in kinds]
    first = None
    with torch.device("meta"):
        for make in makers:
            try:
                made = make(config)
            except ValueError:  # this architecture has no such class
                continue
            first = made if first is None else first
            if set(layers) <= {name for name, _ in made.named_modules()}:
                return made
    return first
