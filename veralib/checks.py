"""Where an Adapter contradicts itself: what save_adapter and load_adapter refuse, a sentence a fault.

What takes the base model to see (other names, shapes or weights) is vera.load's to check.
"""

from collections.abc import Iterable, Iterator

import torch
from torch import Tensor

from .adapter import Adapter, layer_of
from .config import rank_of
from .container import NAMES
from .errors import unknown_text

MAX_PAIR = 2**30
"""Entries of a pair that PEFT's generator makes while a file is checked (4 GiB): a forged size must not fill the memory."""


def faults(adapter: Adapter) -> Iterator[str]:
    """Every way in which the parts of an adapter don't fit each other."""
    config, basis = adapter.config, adapter.basis
    if (config.basis, config.seed, config.levels) != (basis.kind, basis.seed, basis.levels) or basis.layer_id:
        yield f"its config says basis {config.basis}, seed {config.seed}, {config.levels}; its basis says {basis}"
    yield from _vector_faults(adapter)
    yield from _layer_faults(adapter)
    yield from _basis_faults(adapter)
    if not all_finite(t for pair in adapter.vectors.values() for t in pair):
        unit = next(unit for unit, pair in adapter.vectors.items() if not all_finite(pair))
        yield f'the vectors of "{unit}" hold NaN or inf: its training diverged; train again with a lower learning rate'
    if not all_finite(adapter.biases.values()):
        yield "its biases hold NaN or inf"


def writing_faults(adapter: Adapter) -> Iterator[str]:
    """What only an Adapter in memory can have wrong; the types of a file's tensors are checked where they're read."""
    for unit, (d, b) in adapter.vectors.items():
        if d.dtype != torch.float32 or b.dtype != torch.float32:
            yield f'"{unit}" has d in {d.dtype} and b in {b.dtype}, expected float32'
        elif rank_of(adapter.config, unit) != d.numel():
            yield f'"{unit}" has d of length {d.numel()}, its config says rank {rank_of(adapter.config, unit)}'
    tensors = {f"{name}.{key}": t for name, state in adapter.modules.items() for key, t in state.items()}
    for name, t in {**tensors, **adapter.biases}.items():
        if t.dtype not in NAMES or t.layout != torch.strided or t.is_quantized or t.is_meta:
            yield f'"{name}" is {t.dtype}, {t.layout}, on {t.device}; expected a plain tensor of {", ".join(NAMES.values())}'
    base = adapter.base
    texts = [base.id, base.revision, base.quantised, *base.hashes.values(), *adapter.notes, *adapter.notes.values()]
    if not all(isinstance(text, str) for text in texts):
        yield "its notes, and its base's id, revision, quantisation and hashes, must be text"


def _vector_faults(adapter: Adapter) -> Iterator[str]:
    config, layers = adapter.config, adapter.base.layers
    if not adapter.vectors:
        yield "it has no vectors"
    # No pattern of the config is run on a name: a regular expression in a stranger's file could run forever.
    ranks = [config.rank] if isinstance(config.rank, int) else list(config.rank.values())
    taken = dict.fromkeys(layers, 0)
    for unit, (d, b) in adapter.vectors.items():
        layer, _, part = unit.partition(":")
        m = layers[layer][0] if layer in layers else 0
        if layer not in layers:
            yield f'"{unit}" is in no layer of its base: {unknown_text("layer", layer, layers)}'
        elif d.dim() != 1 or b.dim() != 1:
            yield f'"{unit}" has d of shape {tuple(d.shape)} and b of shape {tuple(b.shape)}, expected one dimension'
        elif d.numel() not in ranks:
            yield f'"{unit}" has d of length {d.numel()}, its config says rank {config.rank}'
        elif not part and b.numel() != m:
            yield f'"{unit}" has b of length {b.numel()}, its base has {m} outputs there'
        elif part:
            taken[layer] += b.numel()
            if taken[layer] > m or b.numel() == 0:
                yield f'"{unit}" has b of length {b.numel()}; with the parts before it {taken[layer]} of {m} outputs'
    ids = adapter.layer_ids
    if ids.keys() != (adapter.vectors.keys() if config.sharing == "unique" else set()):
        yield f"it has {len(ids)} layer ids for {len(adapter.vectors)} units, with sharing={config.sharing!r}"
    if not all(0 < word < 2**32 for word in ids.values()):
        yield "a layer id is outside 1 to 2**32 - 1"


def _layer_faults(adapter: Adapter) -> Iterator[str]:
    layers = adapter.base.layers
    for layer, (m, n) in layers.items():
        if m <= 0 or n < 0:
            yield f'"{layer}" has {m} outputs and {n} inputs'
        elif n == 0 and not adapter.basis.max_in:
            # PEFT's files don't say n; where A is stored, or its width known, nothing depends on it until the base is there.
            yield (
                f'how many inputs "{layer}" has isn\'t known: load the adapter into its base model with vera.load, and '
                "save it from there"
            )
    if without := layers.keys() - {layer_of(unit) for unit in adapter.vectors}:
        yield f'"{min(without)}" is among its base\'s layers, and has no vectors'
    if unknown := adapter.base.hashes.keys() - layers.keys():
        yield f"it has a weight hash of \"{min(unknown)}\", which isn't among its base's layers"
    for layer, bias in adapter.biases.items():
        if layer not in layers or tuple(bias.shape) != (layers[layer][0],) or not bias.is_floating_point():
            yield f'the bias of "{layer}" is {bias.dtype} of shape {tuple(bias.shape)}, which the layer can\'t take'


def _basis_faults(adapter: Adapter) -> Iterator[str]:
    basis, shapes = adapter.basis, adapter.base.layers.values()
    size = (basis.rank, basis.max_in, basis.max_out)
    if basis.kind != "peft":
        if basis.stored or any(size):
            yield f"its basis is {basis.kind} and has a stored pair or a size, which only PEFT's has"
        return
    rank = max((d.numel() for d, _ in adapter.vectors.values()), default=0)
    least = (rank, max((n for _, n in shapes), default=0), max((m for m, _ in shapes), default=0))
    if any(have < need or have == 0 for have, need in zip(size, least, strict=True)):
        yield f"PEFT's pair has rank, inputs, outputs {size}, its vectors and layers need {least}"
    elif basis.stored:
        found = (tuple(basis.stored.A.shape), tuple(basis.stored.B.shape))
        if found != ((size[0], size[1]), (size[2], size[0])):
            yield f"A and B have shapes {found}, its basis says rank, inputs, outputs {size}"
        elif not all_finite((basis.stored.A, basis.stored.B)):
            yield "A or B holds NaN or inf"
    elif size[0] * (size[1] + size[2]) > MAX_PAIR:
        yield f"PEFT's pair of rank, inputs, outputs {size} has more than {MAX_PAIR} entries, and isn't stored"


@torch.no_grad()
def all_finite(tensors: Iterable[Tensor]) -> bool:
    """Whether no entry is NaN or inf."""
    flat = [t if t.dim() == 1 else t.reshape(-1) for t in tensors]
    # The sum of all shows it in a tenth of the time of 112 tests; it may overflow itself, then each is looked at.
    return not flat or bool(torch.cat(flat).sum().isfinite()) or all(bool(t.isfinite().all()) for t in flat)


def has_moved(adapter: Adapter) -> bool:
    """Whether training has changed anything: some b isn't 0, and d and b aren't all at their start."""
    d, b = adapter.config.d_start, adapter.config.b_start
    pairs = adapter.vectors.values()
    return any(bool(pair[1].any()) for pair in pairs) and any(bool((p[0] != d).any() or (p[1] != b).any()) for p in pairs)
