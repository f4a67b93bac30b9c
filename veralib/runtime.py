"""The runtime of one model: it knows which selection is in force, and what layers that read the same x share.

A layer asks it for the current selection in every forward. Inside a backward pass (recomputation under gradient checkpointing)
the answer is the selection that the recomputed segment's forward followed, since the user's `with` has ended.
"""

import threading
from contextlib import contextmanager

import torch
from torch import Tensor

from . import segments
from .autograd import UnitSpec
from .bank import Member
from .core import Plan
from .errors import StateError
from .products import apply_frozen
from .selection import BASE, Bucket, Selection, stacked_vectors


class Runtime:
    """What all layers of one model ask: its adapters, the selection in force, and the last A x of this thread."""

    def __init__(self) -> None:
        self.members: dict[str, Member] = {}
        self.active = BASE
        self.merged: str | None = None
        self.plan: Plan | None = None
        self._local = threading.local()
        self._record: tuple[int, list[Selection]] | None = None
        self._written = 0
        self.lock = threading.RLock()
        """Held while an adapter comes or goes."""
        self._in_force: list[Selection] = []
        self.overrides = 0
        """How many rows(), tokens() and using() haven't ended, over all threads."""

    def __getstate__(self) -> dict:
        return {"members": self.members, "active": self.active, "merged": self.merged, "plan": self.plan}

    def __setstate__(self, state: dict) -> None:
        self.__init__()  # type: ignore[misc]
        self.__dict__.update(state)

    def current(self, training: bool = False) -> Selection:
        """The selection that a layer must follow now. training: whether the layer that asks is in training mode."""
        if self.merged is not None:
            return BASE
        if torch._C._current_graph_task_id() >= 0:
            return self._in_backward()
        stack = getattr(self._local, "stack", None)
        selection = stack[-1] if stack else self.active
        if (training or torch.is_grad_enabled()) and (segment := segments.of_forward()) is not None:
            segments.write(segment, self, selection)
        return selection

    def _in_backward(self) -> Selection:
        """What the recomputed layer's forward followed: its segment knows. Of an unknown kind of checkpoint the root tells, by
        its output's gradient."""
        task = torch._C._current_graph_task_id()
        if getattr(self._local, "tasks", None) and self._local.tasks[-1] == task:
            return self._local.stack[-1]  # a `with` within the segment, or of its context_fn
        selections = segments.recomputed(self)
        if selections and (inner := segments.of_forward()) is not None:  # a checkpoint within the segment
            segments.write(inner, self, selections[0])
        if not selections and self._record is not None and self._record[0] == task:
            selections = self._record[1]
        if len(selections) > 1:
            raise StateError(
                "gradient checkpointing recomputes a layer, and its forward followed several rows() or use(): which adapter it "
                "ran with can't be known. Call backward once for each forward, or checkpoint what one `with` holds."
            )
        return selections[0] if selections else self.active

    def note_backward(self, selection: Selection) -> None:
        """Called by the root output's gradient hook: from here on this selection's layers may be recomputed."""
        task = torch._C._current_graph_task_id()
        if self._record is None or self._record[0] != task:
            record: tuple[int, list[Selection]] = (task, [])
            self._record = record

            def end() -> None:
                if self._record is record:
                    self._record = None

            torch.autograd.Variable._execution_engine.queue_callback(end)  # type: ignore[attr-defined]
        if not any(selection.same(s) for s in self._record[1]):
            self._record[1].append(selection)

    @contextmanager
    def override(self, selection: Selection):
        """The selection of this thread inside the `with`. StateError where one of its adapters has been removed."""
        stack = self._stack()
        depth = len(stack)
        with self.lock:
            for member in selection.distinct:
                if self.members.get(member.name) is not member:
                    raise StateError(
                        f'adapter "{member.name}" was removed after this rows(), tokens() or using() was made: load() it and '
                        "make a new one."
                    )
            self._in_force.append(selection)
            self.overrides = len(self._in_force)
        stack.append(selection)
        self._local.tasks.append(torch._C._current_graph_task_id() if torch._C._current_graph_task_id() >= 0 else None)
        try:
            yield
        finally:
            del stack[depth:], self._local.tasks[depth:]
            with self.lock:
                self._in_force.remove(selection)
                self.overrides = len(self._in_force)

    def in_use(self, member: Member) -> bool:
        """Whether a rows(), tokens() or using() that hasn't ended names the adapter."""
        with self.lock:
            return any(member in s.distinct for s in self._in_force)

    def _stack(self) -> list[Selection]:
        if not hasattr(self._local, "stack"):
            self._local.stack, self._local.tasks = [], []
        return self._local.stack

    def overridden(self) -> Selection | None:
        stack = getattr(self._local, "stack", None)
        return stack[-1] if stack else None

    # The memo: layers that read the same x (q, k, v; gate, up) share A x, and in low precision the cast of x.

    def rank_space(self, x: Tensor, flat: Tensor, unit: UnitSpec, rows: Tensor | None = None) -> Tensor:
        """u = A x, (…, r), once for all layers that read the very same x. flat: what is multiplied; rows: which rows of it."""
        key = (unit.basis, unit.r, flat.dtype, flat.dim(), None if rows is None else id(rows), torch.is_grad_enabled())
        memo = self._memo(x)
        if key not in memo:
            memo[key] = apply_frozen(flat if rows is None else flat.index_select(0, rows), unit.A(flat))
        return memo[key]

    def cast(self, x: Tensor, flat: Tensor, dtype: torch.dtype) -> Tensor:
        """flat in the matmuls' dtype, once for all layers that read the same x."""
        if flat.dtype == dtype:
            return flat
        memo, key = self._memo(x), ("cast", dtype, torch.is_grad_enabled())
        if key not in memo:
            memo[key] = flat.to(dtype)
        return memo[key]

    def begins(self, site: object, x: Tensor) -> None:
        """A layer begins on x. One that has read it before is in another forward, of a model called by parts: x may have been
        written over meanwhile without a trace (memory shared with numpy)."""
        local = self._local
        local.site = id(site)
        if getattr(local, "x", None) is x:
            if local.site in local.readers:
                self.clear_memo()
            local.readers.add(local.site)

    def _memo(self, x: Tensor) -> dict:
        local = self._local
        if x.is_inference():  # no version counter: a change in place couldn't be seen
            return {}
        # A checkpointed segment saves tensors through a hook of its own and must compute all that it saves: nothing of another's.
        hook = segments.innermost_hook(False) if torch.is_grad_enabled() else None
        segment = None if hook is None else hook[0]
        if getattr(local, "x", None) is not x or local.version != x._version or local.segment is not segment:
            local.x, local.version, local.segment, local.memo = x, x._version, segment, {}
            local.readers = {getattr(local, "site", 0)}
            if torch._C._current_graph_task_id() >= 0:  # a checkpoint's recomputation: no forward of the root clears it
                mine = local.__dict__  # this thread's: on a GPU the callback runs in another
                end = lambda: mine.update(x=None, segment=None, memo=None)  # noqa: E731
                torch.autograd.Variable._execution_engine.queue_callback(end)  # type: ignore[attr-defined]
        return local.memo

    # What the last mixed selection without gradients multiplies by: a decode loop asks for the same hundreds of times.

    def row_vectors(self, layer: str, bucket: Bucket, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
        """d (R, 1, r) and b (R, 1, m) of each row of a bucket, in dtype. Without gradients only."""
        d, b = self.adapter_vectors(layer, bucket, dtype)
        if not bucket.own:
            d, b = d.index_select(0, bucket.index), b.index_select(0, bucket.index)
        return d[:, None], b[:, None]

    def adapter_vectors(self, layer: str, bucket: Bucket, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
        """d (K, r) and b (K, m) of the K adapters of a bucket, in dtype. Without gradients only.

        They are kept for the selection used last, where all of them are resident and so can't change.
        """
        if bucket.trains:
            d, b = stacked_vectors(bucket)
            return d.to(dtype), b.to(dtype)
        local, selection = self._local, self.current()
        if getattr(local, "kept_for", None) is not selection or local.kept_at != self._written:
            local.kept_for, local.kept_at, local.kept = selection, self._written, {}
        key = (layer, bucket.units[0].unit, bucket.units[0].basis, dtype)
        if key not in local.kept:
            local.kept[key] = tuple(v.to(dtype) for v in stacked_vectors(bucket))
        return local.kept[key]

    def forget_vectors(self) -> None:
        """Resident vectors were written: what any thread kept of them is stale."""
        self._written += 1

    def clear_memo(self) -> None:
        self._local.x, self._local.segment, self._local.memo, self._local.readers = None, None, {}, set()
