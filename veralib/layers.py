"""The adapted linear: attach changes a module's class in place, so names, state_dict keys, isinstance and ties stay."""

import functools
import types
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from . import compiled, kernels
from .autograd import Apart, Factored, Merged, MixedDelta, UnitSpec, _base, add_delta
from .bank import Member
from .core import Shape, choose_plan
from .errors import StateError
from .foreign import is_foreign, plain_class
from .linears import dense_weight, quantisation, shape
from .runtime import Runtime
from .selection import Bucket, Selection, stacked_vectors

_choose = functools.lru_cache(maxsize=4096)(lambda *fields: choose_plan(Shape(*fields)))


def _full_precision_matmul(dtype: torch.dtype, device: torch.device) -> bool:
    """Whether a matmul of this dtype is what it says: float64, or float32 without TF32 or bf16 tricks."""
    if dtype == torch.float64:
        return True
    if dtype != torch.float32:
        return False
    return torch.get_float32_matmul_precision() == "highest" and not (
        device.type == "cuda" and torch.backends.cuda.matmul.allow_tf32
    )


class Site:
    """One adapted linear's place: its name, its runtime, and the forward of Eq. 2 there."""

    def __init__(self, layer: str, module: nn.Module, runtime: Runtime) -> None:
        self.layer = layer
        self.runtime = runtime
        self.m, self.n = shape(module)
        self.hooked: Callable | None = module.__dict__.get("forward")
        self.called = False
        self.time_first: str | None = None  # the module around it whose first dimension isn't the batch
        self.number = compiled.register(self)

    def __setstate__(self, state: dict) -> None:
        self.__dict__.update(state)
        self.number = compiled.register(self)

    def forward(self, module: nn.Module, base: Callable[[Tensor], Tensor], x: Tensor) -> Tensor:
        """base: the module's own forward. x: (..., n) -> (..., m)."""
        self.called = True
        selection = self.runtime.current(module.training)
        if selection.kind == "base":
            return base(x)
        if torch.jit.is_tracing() and torch.is_grad_enabled():
            raise StateError(
                "torch.jit.trace can't record an adapter's gradients: trace under torch.no_grad(), or merge() first."
            )
        if selection.kind == "one":
            member = selection.member
            assert member is not None
            if self.layer not in member.layout.by_layer and self.layer not in member.biases:
                return base(x)
            return self._one(module, base, x, member)
        return self._mixed(module, base, x, selection)

    def _one(self, module: nn.Module, base: Callable[[Tensor], Tensor], x: Tensor, member: Member) -> Tensor:
        units = member.layout.by_layer.get(self.layer, ())
        own_bias = member.biases.get(self.layer)
        if not units:
            return _with_bias(base(x), module, own_bias)
        self._refuse_nested(x)
        vectors = member.tensors(units) if not _is_replica(module) else _replica_vectors(module, member, units, x.device)
        self.runtime.begins(self, x)
        device = x.device.type
        autocast = torch.is_autocast_enabled(device) and x.dtype != torch.float64
        dtype = torch.get_autocast_dtype(device) if autocast else x.dtype
        W = dense_weight(module) if self.hooked is None else None
        if W is not None and not autocast and W.dtype != dtype:
            W = None  # the base's own forward answers, whatever it makes of it
        if W is None and not autocast and not x.is_floating_point():
            return base(x)
        bias = getattr(module, "bias", None) if own_bias is None else own_bias.to(x.device, dtype)
        training = torch.is_grad_enabled() and (x.requires_grad or any(v.requires_grad for v in vectors))
        dropout = member.config.dropout if module.training and member.trainable else 0.0
        flat = self.runtime.cast(x, x.reshape(-1, self.n), dtype)
        which, firsts = member.layout.one_basis[self.layer]
        exact = W is not None and not autocast and _full_precision_matmul(dtype, x.device)
        plan = self.runtime.plan or _choose(
            flat.shape[0],
            sum(u.m for u in units),
            self.n,
            max(u.r for u in units),
            exact,
            W is not None,
            training,
            x.requires_grad,
            member.layout.sharers[self.layer],
        )
        if torch.jit.is_tracing():  # which can't record an autograd.Function
            plan = "factored"
        if plan.startswith("merged") and not exact:
            plan = "apart-weights" if plan.endswith("weights") else "apart-tokens"
        h = None
        if W is None:
            h = base(x)
            if training:
                self._check_gradient(module, x, h)
            h = h.reshape(-1, self.m)
            if own_bias is not None:
                h = _with_bias(h, module, own_bias)
        if plan == "factored" or dropout:
            if dropout:
                dropped = nn.functional.dropout(flat, dropout, training=True)
                us = [nn.functional.linear(dropped, u.A(dropped)) for u in firsts]
            else:
                us = [self.runtime.rank_space(x, flat, u) for u in firsts]
            if training:
                out = Factored.apply(h, None if W is None else flat, W, bias, units, which, *us, *vectors)
            else:
                out = _base(h, flat, W, bias, dtype)
                for k, unit in enumerate(units):
                    add_delta(out, us[which[k]], unit, vectors[2 * k], vectors[2 * k + 1])
        elif plan.startswith("merged"):
            out = Merged.apply(flat, W, bias, units, plan == "merged-tokens", *vectors)
        else:
            out = Apart.apply(h, flat, W, bias, units, plan == "apart-tokens", *vectors)
        return out.reshape(*x.shape[:-1], self.m)

    def _refuse_nested(self, x: Tensor) -> None:
        if x.is_nested:
            raise StateError(
                f"layer {self.layer} was given a nested tensor: pad the batch. nn.TransformerEncoder makes them in eval of a "
                "batch with a padding mask, unless it was made with enable_nested_tensor=False."
            )

    def _check_gradient(self, module: nn.Module, x: Tensor, h: Tensor) -> None:
        """StateError where the base's own forward lets no gradient through: some quantised layers are for inference alone."""
        if x.requires_grad and not h.requires_grad:
            kind = quantisation(module)
            what = plain_class(module).__name__ + (f" ({kind})" if kind and not is_foreign(module) else "")
            raise StateError(
                f"the {what} at {self.layer} gives its input no gradient, so adapters below it would learn from a part of the "
                "model alone: load the base quantised in a way that can be trained on."
            )

    def _mixed(self, module: nn.Module, base: Callable[[Tensor], Tensor], x: Tensor, selection: Selection) -> Tensor:
        self._refuse_nested(x)
        if _is_replica(module):
            raise StateError("vera.rows() doesn't work inside nn.DataParallel: use DistributedDataParallel (torchrun).")
        rows = self.check_rows(x, selection)
        self.runtime.begins(self, x)
        h = base(x)
        buckets = selection.buckets(self.layer)
        changed = [m for m in selection.distinct if self.layer in m.biases]
        if not buckets and not changed:
            return h
        grad = torch.is_grad_enabled() and (h.requires_grad or any(bucket.trains for bucket in buckets))
        if grad:
            self._check_gradient(module, x, h)
        if grad and module.training and any(m.trainable and m.config.dropout for m in selection.distinct):
            raise StateError(
                f"vera.{selection.kind}() draws no dropout, and an adapter in it trains with some: set its dropout to 0, or "
                "train it with use() or using()."
            )
        out = h.reshape(rows, -1, self.m)
        for bucket in buckets:
            out = self.add_bucket(out, x, bucket, grad)
        for member in changed:
            mine = torch.tensor([m is member for m in selection.members], device=x.device)[:, None, None]
            out = torch.where(mine, _with_bias(out, module, member.biases[self.layer]), out)
        return out.reshape(h.shape)

    def check_rows(self, x: Tensor, selection: Selection) -> int:
        """The number of rows (or tokens) of x, which must be the selection's."""
        if selection.kind == "rows" and self.time_first is not None:
            raise StateError(
                f'layer "{self.layer}" sees (time, batch, …), since "{self.time_first}" has batch_first=False, and vera.rows() '
                "names an adapter for each entry of the first dimension: build the model with batch_first=True, or use "
                "vera.tokens(index), with an index for each of its time x batch tokens."
            )
        rows = x.shape[0] if selection.kind == "rows" else x.numel() // self.n
        if rows != selection.size or x.dim() < 2:
            what = "row" if selection.kind == "rows" else "token"
            raise StateError(
                f'layer "{self.layer}" was given {rows} {what}s, and vera.{selection.kind}() named adapters for '
                f"{selection.size}: give one for each {what} of the batch; a layer that sees packed or routed tokens needs "
                "vera.tokens(index), with an index for each token it sees."
            )
        return rows

    def add_bucket(self, out: Tensor, x: Tensor, bucket: Bucket, grad: bool) -> Tensor:
        """out (R, t, m) plus what a bucket's adapters add to their rows; in place where no gradient is asked for."""
        widest = bucket.widest
        flat = self.runtime.cast(x, x, out.dtype).reshape(out.shape[0], -1, self.n)
        if not torch.is_grad_enabled() and not isinstance(widest.rows, Tensor) and out.is_contiguous() and kernels.on(out, flat):
            from .kernels.mixed import mixed_add

            d, b = self.runtime.adapter_vectors(self.layer, bucket, out.dtype)
            u = self.runtime.rank_space(x, flat, widest)
            flat_out = out.view(-1, self.m)
            columns = flat_out if widest.rows is None else flat_out[:, widest.rows]
            mixed_add(columns, u.reshape(-1, widest.r), d, b, bucket.places(out.shape[0]), widest.B(u), out.shape[1])
            return out
        u = self.runtime.rank_space(x, flat, widest, None if bucket.everyone else bucket.positions)
        part = widest.rows
        if not torch.is_grad_enabled():
            d, b = self.runtime.row_vectors(self.layer, bucket, u.dtype)
            y = nn.functional.linear(u * d, widest.B(u))
            if bucket.everyone and not isinstance(part, Tensor) and out.dtype == y.dtype:
                (out if part is None else out[:, :, part]).addcmul_(y, b)
                return out
            y = y.mul_(b).to(out.dtype)
        else:
            d, b = stacked_vectors(bucket)
            whole = part is None and bucket.everyone and out.dtype == u.dtype
            y = MixedDelta.apply(out if whole else None, u, d, b, bucket.index, widest.B(u), bucket.recompute)
            if whole:
                return y
            y = y.to(out.dtype)
        if isinstance(part, Tensor):  # an interleaved part: spread over all outputs
            y = y.new_zeros(*y.shape[:-1], self.m).index_add(2, part.to(y.device), y)
        elif part is not None:
            out = out.clone() if grad else out
            target = out[:, :, part]
            if bucket.everyone:
                target.add_(y)
            else:
                target.index_add_(0, bucket.positions, y)
            return out
        if grad:
            return out + y if bucket.everyone else out.index_add(0, bucket.positions, y)
        return out.add_(y) if bucket.everyone else out.index_add_(0, bucket.positions, y)


def _is_replica(module: nn.Module) -> bool:
    return module.__dict__.get("_is_replica", False)  # set by nn.DataParallel


def _replica_vectors(module: nn.Module, member: Member, units: Sequence[UnitSpec], device: torch.device) -> list[Tensor]:
    """d and b of each unit on a replica's device; trained ones are the replica's own, whose gradients DataParallel adds up."""
    if not member.trainable:
        return [t.to(device) for t in member.tensors(units)]
    return [getattr(module, name) for u in units for name in member.owners[u.unit][1:]]


def _with_bias(out: Tensor, module: nn.Module, bias: Tensor | None) -> Tensor:
    """out with the adapter's bias, (m,), in place of the base's; in out's dtype, which autocast chose."""
    assert bias is not None
    old = getattr(module, "bias", None)
    return out + (bias.to(out.device) - (old if isinstance(old, Tensor) else 0.0)).to(out.dtype)


def _forward(module: Any, base: Callable[[Tensor], Tensor], x: Tensor) -> Tensor:
    """An adapted linear's forward, in a graph or out of one. base: its own."""
    if not torch.compiler.is_compiling():
        return compiled.untraced(Site.forward)(module._vera, module, base, x)
    if compiled.is_exporting():
        compiled.check_export(module._vera)
        return base(x)
    return compiled.forward(module._vera, base(x), x, module.training)


class VeraLayer:
    """Mixed into an adapted linear's class. The layer's Parameters vera_<k>_d and vera_<k>_b stay float32 whatever is cast."""

    _vera: Site

    def forward(self, x: Any = None, *args: Any, **kwargs: Any) -> Tensor:
        x = kwargs.pop("input") if x is None else x  # nn.Linear's name of it
        return _forward(self, super().forward, x)  # type: ignore[misc, arg-type]

    def _apply(self, fn: Callable, recurse: bool = True) -> Any:
        own = {id(t) for name, p in self._parameters.items() if name.startswith("vera_") for t in (p, p.grad)}  # type: ignore[attr-defined]

        def by_device_only(t: Tensor) -> Tensor:
            out = fn(t)
            # t moves, not out: out has been rounded to the other type
            return t.to(out.device) if id(t) in own and out.dtype != t.dtype else out

        return super()._apply(by_device_only, recurse)  # type: ignore[misc]

    def __reduce_ex__(self, protocol: Any) -> tuple:
        return _rebuild, (type(self)._vera_plain, VeraLayer), self.__getstate__()  # type: ignore[attr-defined]


def _rebuild(plain: type, mixin: type) -> Any:
    cls = adapted_class(plain, mixin)
    return cls.__new__(cls)


_classes: dict[tuple[type, type], Any] = {}


def adapted_class(plain: Any, mixin: Any = VeraLayer) -> Any:
    """The class that a module of class `plain` gets: VeraLinear for nn.Linear, say. It pickles by naming `plain`."""
    if (plain, mixin) not in _classes:
        name = plain.__name__ if mixin is not VeraLayer else "Vera" + plain.__name__
        _classes[plain, mixin] = type(name, (mixin, plain), {"_vera_plain": plain, "__module__": plain.__module__})
    return _classes[plain, mixin]


VeraLinear = adapted_class(nn.Linear)


def _hooked_forward(self: nn.Module, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
    return _forward(self, self._vera.hooked, x)  # type: ignore[union-attr, operator, arg-type]


def _no_fast_path(module: nn.Module, args: Any) -> None:
    """A no-op hook: nn.TransformerEncoderLayer's fast path, which reads weights and calls no layer, looks for one."""


def _time_first(layer: str, model: nn.Module) -> str | None:
    """The module around a layer that takes (time, batch, …), as torch's own do; the innermost that says which it takes counts."""
    path = layer.split(".")
    for depth in reversed(range(len(path))):
        around = model.get_submodule(".".join(path[:depth]))
        torchs = isinstance(around, (nn.TransformerEncoderLayer, nn.TransformerDecoderLayer))
        batch_first = getattr(around.self_attn if torchs else around, "batch_first", None)
        if batch_first:
            return None
        if batch_first is False:
            return ".".join(path[:depth]) or type(around).__name__
    return None


def adapt(layer: str, module: nn.Module, model: nn.Module, runtime: Runtime) -> None:
    """Makes a linear of the model an adapted one, in place."""
    if not isinstance(module, VeraLayer):
        site = Site(layer, module, runtime)
        site.time_first = _time_first(layer, model)
        module.__class__ = adapted_class(type(module))
        module.__dict__["_vera"] = site
        if site.hooked is not None:  # accelerate replaces forward on the instance, where no class is asked
            module.__dict__["forward"] = types.MethodType(_hooked_forward, module)
        module.__dict__["_vera_hook"] = module.register_forward_pre_hook(_no_fast_path)


def release(module: nn.Module) -> None:
    """The plain linear again: class, attributes, forward."""
    if isinstance(module, VeraLayer):
        site = module._vera
        module.__dict__.pop("_vera_hook").remove()
        del module.__dict__["_vera"]
        if site.hooked is not None:
            module.__dict__["forward"] = site.hooked
        module.__class__ = type(module)._vera_plain  # type: ignore[attr-defined]


def is_own_key(key: str) -> bool:
    """Whether a state_dict key is an adapter's: vera_0_d, vera_0_q_b, vera_0.weight."""
    return any(part.startswith("vera_") and part[5:6].isdigit() for part in key.split("."))
