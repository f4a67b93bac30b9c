"""The adapted linear under torch.compile: custom operators that look the adapter up when they run.

The graph holds the base's matmul and one opaque call, so switching adapters or row patterns compiles nothing anew. There is no
memo of A x here: several layers that read one x each multiply it by A.
"""

import itertools
import sys
import weakref
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from torch.nn import functional as F

from .autograd import _add_product, _factored_backward, add_delta
from .errors import StateError

if TYPE_CHECKING:
    from .bank import Layout
    from .layers import Site

_TRAINS_USED = (
    "a compiled model trains the adapter that use() chose: inside rows(), tokens() or using() call it under torch.no_grad(), "
    "or call the uncompiled model."
)
_BIASES = "this adapter replaces biases (PEFT's bias='vera_only'), which a compiled model can't: call the uncompiled model."
_traces = getattr(torch._C._dynamo.eval_frame, "get_eval_frame_callback", lambda: True)
_numbers = itertools.count()
_untraced: dict[Callable, Callable] = {}
_sites: "weakref.WeakValueDictionary[int, Site]" = weakref.WeakValueDictionary()


def register(site: "Site") -> int:
    """A number by which a graph can name this site."""
    number = next(_numbers)
    _sites[number] = site
    return number


def is_exporting() -> bool:
    """Whether torch.export traces. torch 2.11's own function of that name is true in any graph."""
    return getattr(torch.compiler, "_is_exporting_flag", False)


def untraced(call: Callable) -> Callable:
    """call, so that torch.compile traces nothing in it where it left the layer's own frame to run as it is: it would compile
    each function of ours alone, and torch 2.11's gradients of such pieces are wrong."""
    if "torch._dynamo" not in sys.modules or not _traces():  # nor is the compiler loaded for it, which takes seconds
        return call
    if call not in _untraced:
        _untraced[call] = torch.compiler.disable(call)
    return _untraced[call]


def check_export(site: "Site") -> None:
    """StateError where an exported graph would need an operator of ours, which no other process knows; it holds the base's
    alone."""
    runtime = site.runtime
    if runtime.merged is None and (runtime.overrides or runtime.active.member is not None):
        raise StateError("torch.export can't hold an adapter beside its base: merge() it first, or use(None) for the base alone.")


def forward(site: "Site", h: Tensor, x: Tensor, training: bool) -> Tensor:
    """What a compiled layer does with the base's output h. StateError for what a graph can't do."""
    low = x.to(h.dtype)
    if not torch.is_grad_enabled():
        torch.ops.veralib.adapt_(h, low, site.number)
        return h
    if site.runtime.overrides:
        raise StateError(_TRAINS_USED)
    member = site.runtime.active.member
    if member is None or site.runtime.merged is not None:
        return h
    if member.config.dropout and training:
        raise StateError("a compiled model draws no dropout: set the adapter's dropout to 0, or train the uncompiled model.")
    if site.layer in member.biases:
        raise StateError(_BIASES)
    if site.layer not in member.layout.by_layer:
        return h
    vectors = member.tensors(member.layout.by_layer[site.layer])
    return h + torch.ops.veralib.trained_delta(low, vectors, site.number, member.number, h.shape[-1])[0]


def _layout(place: "Site", number: int) -> "Layout":
    """The layout of the adapter that a graph was traced with: use() may have chosen another before its backward."""
    member = next((m for m in place.runtime.members.values() if m.number == number), None)
    if member is None:
        raise StateError("the adapter of a compiled forward was removed before its backward: remove it after that.")
    return member.layout


@torch.library.custom_op("veralib::adapt_", mutates_args={"h"})
def adapt_(h: Tensor, x: Tensor, site: int) -> None:
    """h += ΔW x for the adapters that the selection in force names; without gradients."""
    place = _sites[site]
    selection = place.runtime.current()
    if selection.kind == "base":
        return
    if any(place.layer in m.biases for m in selection.distinct):
        raise StateError(_BIASES)
    if selection.kind != "one":
        place.check_rows(x, selection)
        out = h.view(selection.size, -1, place.m)
        for bucket in selection.buckets(place.layer):
            # Inductor writes another layer's input into the same tensor, and its version stays: no A x may outlive a bucket.
            place.runtime.clear_memo()
            try:
                place.add_bucket(out, x, bucket, grad=False)
            finally:
                place.runtime.clear_memo()
        return
    member = selection.member
    flat, out = x.reshape(-1, place.n), h.view(-1, place.m)
    for unit in member.layout.by_layer.get(place.layer, ()):  # type: ignore[union-attr]
        d, b = member.vectors(unit.unit)  # type: ignore[union-attr]
        add_delta(out, F.linear(flat, unit.A(flat)), unit, d, b)


@adapt_.register_fake
def _(h: Tensor, x: Tensor, site: int) -> None:
    return None


@torch.library.custom_op("veralib::trained_delta", mutates_args=())
def trained_delta(x: Tensor, vectors: list[Tensor], site: int, member: int, m: int) -> list[Tensor]:
    """[ΔW x, then each distinct u = A x] of the adapter with the number `member`."""
    place = _sites[site]
    layout = _layout(place, member)
    which, firsts = layout.one_basis[place.layer]
    flat = x.reshape(-1, place.n)
    us = [F.linear(flat, u.A(flat)) for u in firsts]
    out = flat.new_zeros(flat.shape[0], m)
    for k, unit in enumerate(layout.by_layer[place.layer]):
        _add_product(out, unit.rows, us[which[k]], unit.C(vectors[2 * k], vectors[2 * k + 1], flat).t())
    return [out.view(*x.shape[:-1], m), *us]


@trained_delta.register_fake
def _(x: Tensor, vectors: list[Tensor], site: int, member: int, m: int) -> list[Tensor]:
    place = _sites[site]
    rows = x.numel() // place.n
    firsts = _layout(place, member).one_basis[place.layer][1]
    return [x.new_empty(*x.shape[:-1], m), *(x.new_empty(rows, u.r) for u in firsts)]


@torch.library.custom_op("veralib::trained_delta_backward", mutates_args=())
def trained_delta_backward(g: Tensor, us: list[Tensor], vectors: list[Tensor], site: int, member: int) -> list[Tensor]:
    """[∂x, then ∂d and ∂b of each unit]."""
    place = _sites[site]
    layout = _layout(place, member)
    units, (which, firsts) = layout.by_layer[place.layer], layout.one_basis[place.layer]
    flat = g.reshape(-1, g.shape[-1])
    grads = _factored_backward(units, which, [*us, *vectors], len(us), flat, True, [True] * len(vectors))
    gx = flat.new_zeros(flat.shape[0], place.n)
    for unit, gu in zip(firsts, grads[: len(us)], strict=True):
        gx.addmm_(gu, unit.A(flat))  # type: ignore[arg-type]
    return [gx.view(*g.shape[:-1], place.n), *grads[len(us) :]]  # type: ignore[list-item]


@trained_delta_backward.register_fake
def _(g: Tensor, us: list[Tensor], vectors: list[Tensor], site: int, member: int) -> list[Tensor]:
    return [g.new_empty(*g.shape[:-1], _sites[site].n), *(torch.empty_like(v) for v in vectors)]


def _setup(ctx: Any, inputs: tuple, output: list[Tensor]) -> None:
    _, vectors, ctx.site, ctx.member, _ = inputs
    ctx.n_us = len(output) - 1
    ctx.save_for_backward(*output[1:], *vectors)


def _backward(ctx: Any, grads: list[Tensor]) -> tuple:
    us, vectors = list(ctx.saved_tensors[: ctx.n_us]), list(ctx.saved_tensors[ctx.n_us :])
    gx, *rest = torch.ops.veralib.trained_delta_backward(grads[0], us, vectors, ctx.site, ctx.member)
    return gx, rest, None, None, None


torch.library.register_autograd("veralib::trained_delta", _backward, setup_context=_setup)
