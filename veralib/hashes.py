"""A base weight's hash, by which a base model is known again."""

import hashlib
from collections.abc import Sequence
from functools import lru_cache
from itertools import count
from math import gcd

import torch
from torch import Tensor, nn

from .foreign import is_foreign
from .linears import MATMUL_DTYPES, is_conv1d, is_plain, shape

HASH_ENTRIES = 64


@lru_cache(maxsize=1024)
def _hash_positions(m: int, n: int, conv1d: bool, device: torch.device) -> Tensor:
    """Flat positions of the sampled entries in the parameter's own storage order.

    In W0 (m, n), row by row: 0, s, 2s … modulo m·n, sorted, where s is the first number from 0.618034 m·n on that has no
    divisor in common with m·n: so none comes twice and they spread over rows and columns alike.
    """
    size = m * n
    step = next(s for s in count(size * 618034 // 1000000 or 1) if gcd(s, size) == 1)
    flat = sorted(k * step % size for k in range(min(HASH_ENTRIES, size)))
    if conv1d:
        flat = [(p % n) * m + p // n for p in flat]
    return torch.tensor(flat, dtype=torch.int64, device=device)


def weight_hash(module: nn.Module) -> str:
    """16 hex digits by which a base weight is known again; "" for a quantised, sharded or meta weight.

    SHA-256 over (m, n) and up to 64 entries at fixed places of W0, rounded to bf16, so a bf16 and an fp32 copy of one
    checkpoint agree. (An fp16 copy of an fp32 checkpoint doesn't always: fp32 rounded to fp16 first may fall on the
    other side.)
    """
    return weight_hashes([module])[0]


def weight_hashes(modules: Sequence[nn.Module]) -> list[str]:
    """weight_hash of each: the entries of all of them are rounded and fetched at once."""
    entries: list[Tensor] = []
    shapes: list[tuple[int, int] | None] = []
    for module in modules:
        weight = module._parameters.get("weight")
        if weight is None or is_foreign(module) or not is_plain(weight) or weight.is_meta or weight.dtype not in MATMUL_DTYPES:
            shapes.append(None)
            continue
        m, n = shape(module)
        shapes.append((m, n))
        taken = weight.detach().take(_hash_positions(m, n, is_conv1d(module), weight.device))
        entries.append(taken if weight.dtype == torch.bfloat16 else taken.bfloat16())
    if len({t.device for t in entries}) > 1:
        entries = [t.cpu() for t in entries]
    data = torch.cat(entries).view(torch.int16).cpu().numpy().astype("<i2", copy=False) if entries else None
    found, at = [], 0
    for known in shapes:
        if known is None:
            found.append("")
            continue
        m, n = known
        end = at + min(HASH_ENTRIES, m * n)
        found.append(hashlib.sha256(b"%d,%d:" % (m, n) + data[at:end].tobytes()).hexdigest()[:16])  # type: ignore[index]
        at = end
    return found
