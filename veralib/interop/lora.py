"""An adapter as a LoRA folder, exactly or cut to a lower rank, for everything that reads LoRA and not VeRA.

ΔW = C A with C = Λ_b B Λ_d (m, r) is a LoRA of rank r already: lora_B = C, lora_A = A, and no scale is left over.
"""

from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from ..adapter import Adapter, layer_of
from ..basis import Basis
from ..core import folded_B
from ..errors import AdapterMismatch, ConfigError
from ..fused import Parts, part_rows, parts
from .folder import PREFIX, WEIGHTS_FILE, write_folder
from .parse import require_shapes


@dataclass(frozen=True)
class LoraReport:
    """What to_lora wrote."""

    folder: Path
    ranks: Mapping[str, int]
    """Rank of each adapted linear, before any padding."""
    errors: Mapping[str, float]
    """Relative error of each linear's ΔW: Frobenius norm of what was cut off over that of ΔW. 0: nothing was cut off."""
    error: float
    """The same over all linears together."""
    bytes: int
    """Of the tensor file."""

    def __str__(self) -> str:
        low, high = min(self.ranks.values()), max(self.ranks.values())
        ranks = f"rank {low}" if low == high else f"ranks {low} to {high}"
        how = "exact" if self.error == 0 else f"relative error of ΔW {self.error:.2%}"
        return f"{self.folder}: LoRA of {len(self.ranks)} linears, {ranks}, {how}, {self.bytes / 1e6:.2f} MB"


def to_lora(
    adapter: Adapter,
    folder: str | Path,
    rank: int | None = None,
    energy: float | None = None,
    *,
    model: Any = None,
    same_rank: bool = False,
) -> LoraReport:
    """Writes the adapter as a LoRA folder that PEFT loads (peft_type LORA) and reports what was lost.

    Exact without rank and energy: rank r, or min(m, n) of a layer where r is larger; logits are equal. `rank` cuts every
    layer to its best approximation of that rank, `energy` to the smallest rank that keeps this share (0 to 1) of the
    squared singular values. lora_alpha = rank, layer by layer, so the LoRA's own scale is 1. Parts of a fused linear become
    one LoRA on the whole of it; `model`, the base model or its config, then says which rows are whose (None: the config is
    looked for by base.id, without network). same_rank pads all layers with zeros to the largest rank, for readers that know
    one rank for all, llama.cpp for one. train_modules go along as modules_to_save, biases as bias="lora_only".
    ConfigError for a rank or energy out of range; AdapterMismatch where shapes or rows aren't known.
    """
    _check(rank, energy)
    require_shapes(adapter, "to_lora")
    units: dict[str, list[str]] = {}
    for unit in adapter.vectors:
        units.setdefault(layer_of(unit), []).append(unit)
    model_config = _model_config(adapter, model) if any(":" in unit for unit in adapter.vectors) else None
    factors, errors, lost, total = {}, {}, 0.0, 0.0
    for layer, its_units in units.items():
        C, A = _factors(adapter, layer, its_units, model_config)
        if rank is not None or energy is not None:
            C, A, cut, whole = truncate(C, A, rank, energy)
        else:
            cut, whole = 0.0, 0.0
            C, A = reduce(C, A)
        factors[layer] = (C, A)
        errors[layer] = (cut / whole) ** 0.5 if whole else 0.0
        lost, total = lost + cut, total + whole
    ranks = {layer: A.shape[0] for layer, (_, A) in factors.items()}
    if same_rank:
        widest = max(ranks.values())
        factors = {layer: _padded(C, A, widest) for layer, (C, A) in factors.items()}
    tensors = {}
    for layer, (C, A) in factors.items():
        tensors[f"{PREFIX}{layer}.lora_A.weight"] = A.float()
        tensors[f"{PREFIX}{layer}.lora_B.weight"] = C.float()
    out = write_folder(folder, adapter, _config(adapter, {k: A.shape[0] for k, (_, A) in factors.items()}), tensors)
    error = (lost / total) ** 0.5 if total else 0.0
    return LoraReport(out, ranks, errors, error, (out / WEIGHTS_FILE).stat().st_size)


def reduce(C: Tensor, A: Tensor) -> tuple[Tensor, Tensor]:
    """The same C A with the inner dimension at most min(m, n), by QR of the factor that is wider than it is long.

    C: (m, r)  A: (r, n)  ->  (m, k), (k, n), k = min(r, m, n).
    """
    m, r = C.shape
    n = A.shape[1]
    if r <= min(m, n):
        return C, A
    if n <= m:
        Q, R = torch.linalg.qr(A.double().T)
        return C.double() @ R.T, Q.T
    Q, R = torch.linalg.qr(C.double())
    return Q, R @ A.double()


def truncate(C: Tensor, A: Tensor, rank: int | None = None, energy: float | None = None) -> tuple[Tensor, Tensor, float, float]:
    """The best approximation of C A of a lower rank, and ‖what is cut off‖² and ‖C A‖², in float64.

    C: (m, r)  A: (r, n)  ->  (m, k), (k, n). By QR of C and of Aᵀ and the SVD of a core no larger than (r, r): the (m, n)
    product is never formed. k is `rank`, less where C A has no more, or the least k that keeps the share `energy` of the
    squared singular values.
    """
    Qc, Rc = torch.linalg.qr(C.double())
    Qa, Ra = torch.linalg.qr(A.double().T)
    U, S, Vh = torch.linalg.svd(Rc @ Ra.T, full_matrices=False)
    squares = S**2
    whole = float(squares.sum())
    if energy is not None:
        k = int(torch.searchsorted(squares.cumsum(0), energy * whole)) + 1
    else:
        assert rank is not None
        k = rank
    k = max(1, min(k, len(S)))
    return Qc @ (U[:, :k] * S[:k]), Vh[:k] @ Qa.T, float(squares[k:].sum()), whole


def _check(rank: int | None, energy: float | None) -> None:
    if rank is not None and energy is not None:
        raise ConfigError(f"to_lora got rank={rank} and energy={energy}: give one of them, or neither for an exact LoRA.")
    if rank is not None and (not isinstance(rank, int) or isinstance(rank, bool) or rank <= 0):
        raise ConfigError(f"rank is {rank!r}, expected a whole number above 0.")
    if energy is not None and not 0 < energy <= 1:
        raise ConfigError(f"energy is {energy!r}, expected a share above 0 and up to 1, such as 0.99.")


def _factors(adapter: Adapter, layer: str, units: list[str], model_config: Any) -> tuple[Tensor, Tensor]:
    """(C, A) of one whole linear, float32: units with the same A share its rows, others stand side by side."""
    m, n = adapter.base.layers[layer]
    known: Parts = {}
    if any(":" in unit for unit in units):
        known = parts(layer, nn.Linear(n, m, bias=False, device="meta"), model_config)
    by_basis: dict[Basis, list[str]] = {}
    for unit in units:
        by_basis.setdefault(adapter.basis_of(unit), []).append(unit)
    Cs, As = [], []
    for basis, its_units in by_basis.items():
        r = max(adapter.vectors[unit][0].numel() for unit in its_units)
        C = torch.zeros(m, r)
        for unit in its_units:
            d, b = adapter.vectors[unit]
            B = basis.B(b.numel(), d.numel())
            C[_rows(adapter, unit, known), : d.numel()] = folded_B(B, d * adapter.scale_of(unit), b)
        Cs.append(C)
        As.append(basis.A(r, n))
    return torch.cat(Cs, 1), torch.cat(As, 0)


def _rows(adapter: Adapter, unit: str, known: Parts) -> Any:
    layer, _, part = unit.partition(":")
    if not part:
        return slice(None)
    b = adapter.vectors[unit][1]
    if part not in known or part_rows(known[part]) != b.numel():
        raise AdapterMismatch(
            f'"{unit}" has {b.numel()} outputs; which rows of "{layer}" they are depends on the base model, and this one\'s '
            f"parts are {', '.join(f'{p} ({part_rows(r)} rows)' for p, r in known.items()) or '(none)'}. "
            "Give model=, the adapter's base model or its config."
        )
    return known[part]


def _model_config(adapter: Adapter, model: Any) -> Any:
    """The base model's config: given, a model's own, or found on this machine by the adapter's base.id."""
    if model is not None:
        return getattr(model, "config", model)
    problem: object = "the adapter doesn't know its base model's id"
    if adapter.base.id:
        try:
            from transformers import AutoConfig

            return AutoConfig.from_pretrained(adapter.base.id, revision=adapter.base.revision or None, local_files_only=True)
        except (OSError, ValueError, ImportError) as e:
            problem = str(e).partition("\n")[0]
    raise AdapterMismatch(
        "this adapter adapts parts of fused linears, and which rows those are depends on the base model's config, which wasn't "
        f"found: {problem}. Give to_lora(…, model=…), the base model or its config."
    )


def _padded(C: Tensor, A: Tensor, rank: int) -> tuple[Tensor, Tensor]:
    more = rank - A.shape[0]
    return nn.functional.pad(C, (0, more)), nn.functional.pad(A, (0, 0, 0, more))


def _config(adapter: Adapter, ranks: Mapping[str, int]) -> dict[str, Any]:
    """PEFT's LoraConfig as JSON. Layers whose rank isn't the commonest go into rank_pattern and alpha_pattern."""
    common = Counter(ranks.values()).most_common(1)[0][0]
    # PEFT takes the first pattern that a name ends with, so a name that ends with another one comes first.
    odd = {layer: r for layer, r in sorted(ranks.items(), key=lambda item: -len(item[0])) if r != common}
    return {
        "peft_type": "LORA",
        "r": common,
        "lora_alpha": common,
        "rank_pattern": odd,
        "alpha_pattern": odd,
        "lora_dropout": adapter.config.dropout,
        "bias": "lora_only" if adapter.biases else "none",
        "init_lora_weights": True,
        "use_rslora": False,
        "use_dora": False,
        "layers_pattern": None,
        "layers_to_transform": None,
    }
