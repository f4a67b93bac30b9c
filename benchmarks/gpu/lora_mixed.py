"""LoRA for rows with different adapters, made as fast as plain PyTorch allows: what decode.py compares with.

All adapters of a linear lie in one tensor. Linears that read the same x share one product with their A's side by side, as
veralib shares A x. Three ways to multiply row i by its own adapter's matrices:
- "sorted": rows come sorted by adapter, equally many for each: bmm over the adapters, no copy, each read once. The best case.
- "gathered": any order: the rows' matrices are copied together first, then bmm (what a library without a kernel does).
- "grouped": torch's grouped_mm over rows sorted by adapter (rank a multiple of 8), where this torch has it.
"""

from collections.abc import Sequence
from typing import Literal

import torch
from torch import Tensor, nn
from torch.nn import functional as F

Way = Literal["sorted", "gathered", "grouped"]
INPUT_GROUPS = (("q_proj", "k_proj", "v_proj"), ("o_proj",), ("gate_proj", "up_proj"), ("down_proj",))

grouped_mm = getattr(F, "grouped_mm", None) or getattr(torch, "_grouped_mm", None)


class MixedLora:
    """count random adapters of one rank in a model; call() rows of which each use their own. Changes the linears' forward."""

    def __init__(self, model: nn.Module, rank: int, count: int, generator: torch.Generator) -> None:
        self.rank, self.count, self.way = rank, count, "off"
        self.index: Tensor | None = None
        self.offsets: Tensor | None = None
        self.distinct = 0
        self._x: Tensor | None = None
        self._u: Tensor | None = None
        self.bytes = 0
        for parent in model.modules():
            for names in INPUT_GROUPS:
                if isinstance(getattr(parent, names[0], None), nn.Linear):
                    self._adapt([getattr(parent, n) for n in names], generator)

    def _adapt(self, linears: Sequence[nn.Linear], generator: torch.Generator) -> None:
        first, r = linears[0].weight, self.rank
        draw = lambda *s: (0.02 * torch.randn(*s, generator=generator, device=first.device)).to(first.dtype)  # noqa: E731
        A = draw(self.count, first.shape[1], len(linears) * r)
        Bs = [draw(self.count, r, linear.out_features) for linear in linears]
        self.bytes += sum(t.numel() * t.element_size() for t in (A, *Bs))
        for k, linear in enumerate(linears):
            plain = linear.forward
            part = slice(k * r, (k + 1) * r)
            linear.forward = lambda x, p=plain, A=A, B=Bs[k], s=part: self._forward(p, x, A, B, s)  # type: ignore[method-assign]

    def choose(self, names: Sequence[int], way: Way, device: torch.device) -> None:
        """Row i uses adapter names[i]. sorted, grouped: sorted, equally many rows for each of the first adapters."""
        self.way, self.distinct = way, len(set(names))
        self.index = torch.tensor(names, device=device)
        counts = [list(names).count(k) for k in range(self.distinct)]
        self.offsets = torch.tensor(counts, device=device).cumsum(0, dtype=torch.int32)
        if way != "gathered" and (list(names) != sorted(names) or len(set(counts)) != 1):
            raise ValueError("sorted and grouped want equally many rows for each adapter, in order")

    def _forward(self, plain, x: Tensor, A: Tensor, B: Tensor, part: slice) -> Tensor:
        h = plain(x)
        if self.way == "off":
            return h
        if self._x is not x:
            self._x, self._u = x, self._product(x.reshape(-1, x.shape[-1]), A)
        u = self._u[..., part]
        if self.way == "grouped":
            return h + grouped_mm(u.contiguous(), B[: self.distinct], offs=self.offsets).view(h.shape)
        if self.way == "gathered":
            return torch.baddbmm(h.reshape(-1, 1, h.shape[-1]), u, B[self.index]).view(h.shape)
        return torch.baddbmm(h.view(self.distinct, -1, h.shape[-1]), u, B[: self.distinct]).view(h.shape)

    def _product(self, x: Tensor, A: Tensor) -> Tensor:
        """x A of each row, for all linears of the group: grouped (R, gr), gathered (R, 1, gr), sorted (K, R/K, gr)."""
        if self.way == "grouped":
            return grouped_mm(x, A[: self.distinct], offs=self.offsets)
        if self.way == "gathered":
            return torch.bmm(x[:, None], A[self.index])
        return torch.bmm(x.view(self.distinct, -1, x.shape[-1]), A[: self.distinct])
