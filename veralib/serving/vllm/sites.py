"""Where adapters go in vLLM's model: which linear takes which unit's rows, whole or a tensor-parallel shard of it.

vLLM fuses q, k, v into one linear and gate, up into another; an adapter names the linears of transformers. A piece is a run of
rows of one vLLM linear that belongs to one unit.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from torch import nn

from ...fused import parts


@dataclass(frozen=True)
class Piece:
    """Rows [out, out + width) of a linear's output here are rows [start, start + width) of a unit's b and of B."""

    unit: str
    out: int
    start: int
    width: int


@dataclass(frozen=True)
class Place:
    """One linear of vLLM's model on this worker. inputs and outputs: of the whole linear; columns of A: [first, last)."""

    name: str
    inputs: int
    first: int
    last: int
    pieces: tuple[Piece, ...]
    outputs: Mapping[str, int]
    """unit -> how many rows b must have, over all workers."""


@dataclass(frozen=True)
class _Slice:
    """One part of a fused linear: its rows over all workers, and the run of them that lies here."""

    total: int
    here: int
    index: int


def places(model: nn.Module, model_config: Any, packed: Mapping[str, list[str]]) -> dict[str, tuple[nn.Module, Place]]:
    """Every linear of the model that can take an adapter, by name; output heads and expert stacks can't."""
    from vllm.model_executor.layers.linear import LinearBase

    found: dict[str, tuple[nn.Module, Place]] = {}
    seen: set[int] = set()
    for name, module in model.named_modules():
        if not isinstance(module, LinearBase) or id(module) in seen or name.rpartition(".")[2] in ("lm_head", "embed_tokens"):
            continue
        seen.add(id(module))
        place = _place(name, module, model_config, packed.get(name.rpartition(".")[2], []))
        if place is not None:
            found[name] = (module, place)
    return found


def _place(name: str, module: Any, config: Any, packed: list[str]) -> Place | None:
    from vllm.model_executor.layers.linear import ColumnParallelLinear, ReplicatedLinear, RowParallelLinear

    if type(module).forward not in (ColumnParallelLinear.forward, RowParallelLinear.forward, ReplicatedLinear.forward):
        return None  # one that computes in a way of its own
    rank = module.tp_rank
    inputs, first, last = module.input_size, 0, module.input_size
    if isinstance(module, RowParallelLinear):
        width = module.input_size_per_partition
        first, last = rank * width, (rank + 1) * width
    slices = _slices(module, rank)
    if sum(s.here for s in slices) != _outputs_here(module):
        return None  # sharded in a way that isn't known
    pieces, outputs = _pieces(name, slices, config, packed, inputs)
    return Place(name, inputs, first, last, tuple(pieces), outputs) if pieces else None


def _outputs_here(module: Any) -> int:
    return getattr(module, "output_size_per_partition", module.output_size)


def _slices(module: Any, rank: int) -> list[_Slice]:
    from vllm.model_executor.layers.linear import ColumnParallelLinear, MergedColumnParallelLinear, QKVParallelLinear

    if isinstance(module, QKVParallelLinear):
        value = getattr(module, "v_head_size", module.head_size)
        kv = rank // module.num_kv_head_replicas
        return [
            _Slice(module.total_num_heads * module.head_size, module.num_heads * module.head_size, rank),
            _Slice(module.total_num_kv_heads * module.head_size, module.num_kv_heads * module.head_size, kv),
            _Slice(module.total_num_kv_heads * value, module.num_kv_heads * value, kv),
        ]
    if isinstance(module, MergedColumnParallelLinear):
        return [_Slice(size, size // module.tp_size, rank) for size in module.output_sizes]
    if isinstance(module, ColumnParallelLinear):
        return [_Slice(module.output_size, module.output_size_per_partition, rank)]
    return [_Slice(module.output_size, module.output_size, 0)]


def _pieces(name: str, slices: list[_Slice], config: Any, packed: list[str], inputs: int) -> tuple[list[Piece], dict[str, int]]:
    parent, dot, _ = name.rpartition(".")
    here = [sum(s.here for s in slices[:i]) for i in range(len(slices))]
    if len(packed) == len(slices) and len(slices) > 1:  # several linears of transformers, fused by vLLM
        units = [f"{parent}{dot}{child}" for child in packed]
        whole: list[Piece] = []
    elif len(slices) == 1:
        units, whole = [name], []
    else:  # fused in transformers too: an adapter may take it whole or by its parts
        total = sum(s.total for s in slices)
        known = parts(name, _Shape(total, inputs), config)
        starts = [sum(s.total for s in slices[:i]) for i in range(len(slices))]
        in_order = [rows.start if isinstance(rows, slice) else None for rows in known.values()] == starts
        whole = [Piece(name, out, start + s.index * s.here, s.here) for s, out, start in zip(slices, here, starts, strict=True)]
        whole = whole if in_order else []  # vLLM keeps the rows in another order than transformers does, or nobody knows
        units = [f"{name}:{part}" for part in known] if len(known) == len(slices) else []
    own = [Piece(u, out, s.index * s.here, s.here) for u, s, out in zip(units, slices, here, strict=False)]
    outputs = {u: s.total for u, s in zip(units, slices, strict=False)}
    if whole:
        outputs[name] = sum(s.total for s in slices)
    return own + whole, outputs


class _Shape(nn.Linear):
    """A linear of a given shape without a weight, for fused.parts to look at."""

    def __init__(self, m: int, n: int) -> None:
        nn.Module.__init__(self)
        self.out_features, self.in_features = m, n
