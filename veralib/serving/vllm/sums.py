"""out += Λ_b B Λ_d A x for a batch in which each token has an adapter of its own: what one linear of vLLM's model does.

    u = x Aᵀ                  once for every slice of a fused linear
    h = u ∘ d[row]            row: each token's line of the table; the last is zero
    out += b[row] ∘ (h Bᵀ)    slices that read the same rows of B (k and v; gate and up) as one product

The eager form does no more than the step asks for: the tokens, pieces, ranks and bases that it holds. The static form, for
torch.compile and CUDA graphs, does everything always, with shapes that depend on the number of tokens alone. With veralib.kernels
on, it is one kernel a piece and basis, which leaves tokens without an adapter alone.
"""

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from .bases import Bases
from .sites import Piece, Place
from .tables import MOST_KEYS, Step, Tables

CHUNK = 256


@dataclass(frozen=True, eq=False)
class Group:
    """Neighbouring pieces that read the same rows of B: their columns of the output and of the tables; B in every place."""

    count: int
    out: slice
    d: Tensor
    b: Tensor
    B: Tensor


class Site:
    """One linear's share of the tables and bases. Lies on the module as `vera_site`; no parameters, no buffers."""

    def __init__(self, place: Place, tables: Tables, bases: Bases, first_d: int, first_b: int, first_piece: int) -> None:
        self.place, self.tables, self.bases = place, tables, bases
        self.called = False
        """Whether a forward came by: an adapter on a linear that never runs would do nothing."""
        self.A = bases.A(place.first, place.last)
        self.numbers = range(first_piece, first_piece + len(place.pieces))
        r = bases.rank
        widths = [p.width for p in place.pieces]
        self.columns_d = [slice(first_d + i * r, first_d + (i + 1) * r) for i in range(len(widths))]
        self.columns_b = [slice(first_b + sum(widths[:i]), first_b + sum(widths[: i + 1])) for i in range(len(widths))]
        self.all_groups = self._groups(range(len(widths)))
        self._by_key: dict[int, tuple[Group, ...]] = {}

    def _groups(self, which: Iterable[int]) -> tuple[Group, ...]:
        runs: list[list[int]] = []
        pieces = self.place.pieces
        for i in which:
            last = runs[-1][-1] if runs else -2
            if last == i - 1 and _follows(pieces[last], pieces[i]):
                runs[-1].append(i)
            else:
                runs.append([i])
        return tuple(self._group(run[0], run[-1]) for run in runs)

    def _group(self, i: int, j: int) -> Group:
        first, last = self.place.pieces[i], self.place.pieces[j]
        return Group(
            j - i + 1,
            slice(first.out, last.out + last.width),
            self.tables.d[:, self.columns_d[i].start : self.columns_d[j].stop],
            self.tables.b[:, self.columns_b[i].start : self.columns_b[j].stop],
            self.bases.B(first.start, first.start + first.width),
        )

    def groups(self, step: Step) -> tuple[Group, ...]:
        """The groups with a piece that some adapter of the step has."""
        found = self._by_key.get(step.key)
        if found is None:
            found = self._groups([i for i, number in enumerate(self.numbers) if number in step.pieces])
            if len(self._by_key) >= MOST_KEYS:
                self._by_key.clear()
            self._by_key[step.key] = found
        return found

    def add(self, x: Tensor, out: Tensor) -> Tensor:
        """out (…, m here) with every token's adapter added, in place. x: (…, n here)."""
        if torch.compiler.is_compiling():
            return self._add_static(x, out)
        self.called = True
        step = self.tables.step
        if step is None:
            return out
        if self.tables.static and x.device.type != "cpu":  # perhaps captured in a CUDA graph
            return self._add_static(x, out)
        if groups := self.groups(step):
            self._add_eager(x.reshape(-1, x.shape[-1]), out.view(-1, out.shape[-1]), step, groups)
        return out

    def _add_eager(self, x: Tensor, out: Tensor, step: Step, groups: tuple[Group, ...]) -> None:
        if x.shape[0] != step.tokens:
            if x.shape[0] < step.tokens:
                raise RuntimeError(
                    f'"{self.place.name}" got {x.shape[0]} of {step.tokens} tokens: whose adapters they use isn\'t known. '
                    "Restrict the adapters to other layers with --lora-target-modules."
                )
            x, out = x[: step.tokens], out[: step.tokens]  # padding
        n = len(step.rows)
        # On a CPU in pieces that stay in the cache: 5 % faster than 2048 tokens at once.
        size = CHUNK if x.device.type == "cpu" and n > 2 * CHUNK else n
        for start in range(0, n, size):
            self._add_chunk(x, out, step, groups, slice(start, start + size))

    def _add_chunk(self, x: Tensor, out: Tensor, step: Step, groups: tuple[Group, ...], some: slice) -> None:
        t, r, at = self.tables, step.rank, step.positions
        if at is not None:
            at = at[some]
            x = x.index_select(0, at)
        else:
            x, out = x[some], out[some]
        if x.dtype != t.dtype:
            x = x.to(t.dtype)
        us = [self.bases.product(x, self.A, k, rows=r) for k in step.bases]
        for g in groups:
            y = None
            for u, k, rows in zip(us, step.bases, step.rows_of, strict=True):
                d = g.d[step.slot : step.slot + 1] if step.slot is not None else g.d.index_select(0, rows[some])
                h = u[:, None] * d.view(-1, g.count, t.rank)[:, :, :r]
                part = self.bases.product(h.view(-1, r), g.B, k, columns=r)
                y = part if y is None else y.add_(part)
            y = y.view(x.shape[0], -1)  # type: ignore[union-attr]
            b = g.b[step.slot] if step.slot is not None else g.b.index_select(0, step.rows[some])
            if at is not None:
                out[:, g.out].index_add_(0, at, y.mul_(b).to(out.dtype))
            elif y.dtype == out.dtype:
                out[:, g.out].addcmul_(y, b)
            else:
                out[:, g.out].add_(y.mul_(b))

    def _add_static(self, x: Tensor, out: Tensor) -> Tensor:
        flat, sums = x.reshape(-1, x.shape[-1]).to(self.tables.dtype), out.reshape(-1, out.shape[-1])
        t, n = self.tables, flat.shape[0]
        rows = t.rows[:n]
        us = [F.linear(flat, self.A[k]) for k in range(self.bases.count)]
        if self.bases.fused:
            self._add_fused(us, sums)
            return sums.view(out.shape)
        has = (rows != t.slots)[:, None]
        parts = []
        for g in self.all_groups:
            y = torch.zeros((), dtype=t.dtype, device=flat.device)
            for k, u in enumerate(us):
                d = g.d.index_select(0, t.rows_of[k, :n]).view(n, g.count, t.rank)
                h = torch.where(d != 0, u[:, None] * d, 0)  # 0 · inf is NaN
                y = y + F.linear(h.view(n * g.count, t.rank), g.B[k]).view(n, -1)
            parts.append((g, y * g.b.index_select(0, rows)))
        for g, y in parts:
            part = sums[:, g.out]
            part.copy_(torch.where(has, part + y.to(out.dtype), part))
        return sums.view(out.shape)

    def _add_fused(self, us: list[Tensor], sums: Tensor) -> None:
        t, n = self.tables, sums.shape[0]
        for piece, columns_d, columns_b in zip(self.place.pieces, self.columns_d, self.columns_b, strict=True):
            B, out = self.bases.B(piece.start, piece.start + piece.width), sums[:, piece.out : piece.out + piece.width]
            # Without the last row, which is zero: its index then names nobody, and such a token is left alone.
            d, b = t.d[:-1, columns_d], t.b[:-1, columns_b]
            for k, u in enumerate(us):
                _mixed_add(out, u, d, b, t.rows_of[k, :n], B[k])


@torch.library.custom_op("veralib::mixed_add_", mutates_args={"out"})
def _mixed_add(out: Tensor, u: Tensor, d: Tensor, b: Tensor, index: Tensor, B: Tensor) -> None:
    """The kernel as one operation that torch.compile doesn't look into."""
    from ...kernels.mixed import mixed_add

    mixed_add(out, u, d, b, index, B)


def _follows(one: Piece, other: Piece) -> bool:
    return (one.start, one.width) == (other.start, other.width) and one.out + one.width == other.out


def adapted(inner: Any) -> Any:
    """A quant method's `apply` that adds the adapters of the layers that carry a Site."""

    def apply(layer: Any, x: Tensor, bias: Tensor | None = None) -> Tensor:
        out = inner(layer, x, bias)
        site = getattr(layer, "vera_site", None)
        return out if site is None else site.add(x, out)

    apply.vera_inner = inner  # type: ignore[attr-defined]
    return apply
