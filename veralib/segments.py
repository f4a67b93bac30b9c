"""The checkpointed segment that a layer runs in: its forward writes there what it followed, its recomputation reads it.

torch.utils.checkpoint has an object for each segment of a graph: a frame (use_reentrant=False), which the hook that packs the
segment's tensors knows, or the context of an autograd.Function. Neither is public: where torch has changed them, or somebody else
checkpoints, none is found, and runtime.py goes by the root's gradients.
"""

import sys
from collections.abc import Iterator
from typing import Any

import torch

_MODULE = "torch.utils.checkpoint"
_RECOMPUTE = {"unpack_hook": "frame", "backward": "ctx"}  # a function of _MODULE: which of its variables is the segment

# (pack, unpack) of the innermost torch.autograd.graph.saved_tensors_hooks, or None; torch promises nobody this function
innermost_hook = getattr(torch._C._autograd, "_top_saved_tensors_default_hooks", lambda ignore_is_tracing: None)


def of_forward() -> Any:
    """The innermost segment whose forward this is, or None."""
    if not torch.is_grad_enabled():  # a reentrant segment's forward
        return next(_enclosing({"forward": "ctx"}), None)
    hook = innermost_hook(False)
    pack = None if hook is None else hook[0]
    names = getattr(getattr(pack, "__code__", None), "co_freevars", ())
    if getattr(pack, "__module__", None) != _MODULE or "frame" not in names:
        return None
    return pack.__closure__[names.index("frame")].cell_contents  # type: ignore[union-attr]


def write(segment: Any, runtime: Any, selection: Any) -> None:
    """One more selection that the segment's forward followed."""
    followed = segment.__dict__.setdefault("_veralib", {}).setdefault(runtime, [])
    if not any(selection.same(s) for s in followed):
        followed.append(selection)


def recomputed(runtime: Any) -> list[Any]:
    """What the innermost known segment that is recomputed now followed in its forward; empty where none is known."""
    found = (getattr(segment, "_veralib", {}).get(runtime) for segment in _enclosing(_RECOMPUTE))
    return next((followed for followed in found if followed), [])


def _enclosing(functions: dict[str, str]) -> Iterator[Any]:
    """From the inside out."""
    frame: Any = sys._getframe(1)
    while frame is not None:
        name = functions.get(frame.f_code.co_name)
        if name is not None and frame.f_globals.get("__name__") == _MODULE and name in frame.f_locals:
            yield frame.f_locals[name]
        frame = frame.f_back
