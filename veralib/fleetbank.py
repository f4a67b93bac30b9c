"""The storage of a fleet: one table with a slot for each owner that trains now, and one of the same size for gradients."""

from collections.abc import Mapping
from math import prod
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd import Function
from torch.autograd.function import once_differentiable

from .bank import Bank, Layout
from .errors import StateError

GONE = "an owner was removed between forward and backward: do that after it."


class FleetBank(Bank):
    """A fixed number of slots, each one owner's d and b in a flat row, and behind them its heads' parameters.

    Gradients are no Parameters' .grad: a layer's backward adds the gradients of the owners in the batch to their rows of
    `gradients` and notes in `touched` that they had one. Whoever has no row in a batch is neither read nor written.
    """

    trains = True

    def __init__(
        self,
        layout: Layout,
        device: torch.device,
        slots: int,
        dtype: torch.dtype = torch.float32,
        heads: Mapping[str, nn.Module] | None = None,
        recompute: bool | None = None,
    ) -> None:
        super().__init__(layout, device)
        self._recompute = recompute
        self.slots = self.chunk_rows = slots
        self.heads: dict[str, dict[str, tuple[int, torch.Size]]] = {}
        """Module trained in full -> its parameters -> (first column, shape)."""
        self.width = layout.size
        for head, module in (heads or {}).items():
            places = self.heads[head] = {}
            for name, parameter in module.named_parameters():
                places[name] = self.width, parameter.shape
                self.width += parameter.numel()
        self.chunks = [torch.zeros(slots, self.width, device=device, dtype=dtype)]
        self.gradients = torch.zeros_like(self.chunks[0])
        self.touched: set[int] = set()
        self.generation = [0] * slots
        """How often each slot has been given out or freed: an optimiser's state is of one owner, not of a slot."""
        self.free = list(range(slots - 1, -1, -1))
        self._anchor = torch.zeros((), device=device, requires_grad=True)  # what makes autograd come by

    @property
    def recompute(self) -> bool:
        """Whether a backward computes B u anew, or finds it saved."""
        return self.device.type != "cpu" if self._recompute is None else self._recompute

    @property
    def table(self) -> Tensor:
        """(slots, layout.size)."""
        return self.chunks[0]

    def put(self, row: Tensor) -> int:
        """A slot for one more owner, its vectors `row` (layout.size,). StateError where none is free."""
        if not self.free:
            raise StateError(
                f"all {self.slots} slots of this fleet are taken: remove(name) an owner that is done, or make the fleet with "
                "more slots."
            )
        slot = super().put(row)
        self.generation[slot] += 1
        return slot

    def drop(self, slot: int) -> None:
        """Frees a slot; its gradient is gone."""
        super().drop(slot)
        self.generation[slot] += 1
        self.clear([slot])

    def clear(self, slots: Any = None) -> None:
        """Zero gradient for these slots, or for all that had one."""
        for slot in list(self.touched) if slots is None else slots:
            self.gradients[slot].zero_()
            self.touched.discard(slot)

    def to(self, device: torch.device) -> None:
        """The table follows the model; an optimiser made before keeps its state where it was, so move first, as ever."""
        if device != self.device:
            super().to(device)
            self.gradients = self.gradients.to(device)
            self._anchor = torch.zeros((), device=device, requires_grad=True)

    def take(self, slots: tuple[int, ...], index: Tensor, start: int, middle: int, end: int) -> tuple[Tensor, Tensor]:
        """d (K, r) and b (K, m) of these slots, with a backward that adds to `gradients`. index: the slots as a tensor."""
        return _Take.apply(self._anchor, self, slots, index, start, middle, end)

    def head_parameters(self, slot: int, head: str) -> dict[str, Tensor]:
        """An owner's parameters of one head; their gradient goes into `gradients`."""
        places = self.heads[head]
        start = min(at for at, _ in places.values())
        end = max(at + prod(shape) for at, shape in places.values())
        flat = _TakeRow.apply(self._anchor, self, slot, start, end)
        return {name: flat[at - start : at - start + prod(shape)].view(shape) for name, (at, shape) in places.items()}

    @property
    def bytes(self) -> int:
        return super().bytes + self.gradients.numel() * self.gradients.element_size()


class _Take(Function):
    """Columns of some rows of a FleetBank; the gradient goes straight into the bank's rows, not through a zero-filled table."""

    @staticmethod
    def forward(
        ctx: Any, anchor: Tensor, bank: FleetBank, slots: tuple[int, ...], index: Tensor, start: int, middle: int, end: int
    ) -> tuple[Tensor, Tensor]:
        ctx.bank, ctx.slots, ctx.columns = bank, slots, (start, middle, end)
        ctx.generation = [bank.generation[s] for s in slots]
        ctx.save_for_backward(index)
        return bank.table[:, start:middle].index_select(0, index), bank.table[:, middle:end].index_select(0, index)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_d: Tensor | None, grad_b: Tensor | None) -> tuple:
        bank, (index,), (start, middle, end) = ctx.bank, ctx.saved_tensors, ctx.columns
        if ctx.generation != [bank.generation[s] for s in ctx.slots]:
            raise StateError(GONE)
        if grad_d is not None:
            bank.gradients[:, start:middle].index_add_(0, index, grad_d)
        if grad_b is not None:
            bank.gradients[:, middle:end].index_add_(0, index, grad_b)
        bank.touched.update(ctx.slots)
        return (None,) * 7


class _TakeRow(Function):
    """Some columns of one row, (end - start,); the gradient goes where _Take's goes."""

    @staticmethod
    def forward(ctx: Any, anchor: Tensor, bank: FleetBank, slot: int, start: int, end: int) -> Tensor:
        ctx.bank, ctx.slot, ctx.columns, ctx.generation = bank, slot, (start, end), bank.generation[slot]
        return bank.table[slot, start:end].clone()

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple:
        bank, slot = ctx.bank, ctx.slot
        if ctx.generation != bank.generation[slot]:
            raise StateError(GONE)
        bank.gradients[slot, slice(*ctx.columns)] += grad
        bank.touched.add(slot)
        return (None,) * 5
