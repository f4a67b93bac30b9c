"""Modules that are trained in full, classification heads above all: one copy for each adapter beside the base's own."""

import copy
import functools
import types
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.func import functional_call

from .bank import Member
from .errors import StateError
from .fleetbank import FleetBank
from .layers import VeraLayer, _rebuild, adapted_class, is_own_key, release
from .runtime import Runtime


class HeadLayer:
    """Mixed into a module that is trained in full: one copy of it for each adapter beside the base's own."""

    _vera_head: "HeadSite"

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        plain = type(self)._vera_plain.forward  # type: ignore[attr-defined]
        return self._vera_head.forward(self, functools.partial(plain, _without_copies(self)), args, kwargs)  # type: ignore[arg-type]

    def train(self, mode: bool = True) -> Any:
        super().train(mode)  # type: ignore[misc]
        for module in self._vera_head.resident.values():
            module.train(mode)
        return self

    def _apply(self, fn: Callable, recurse: bool = True) -> Any:
        super()._apply(fn, recurse)  # type: ignore[misc]
        for module in self._vera_head.resident.values():
            module._apply(fn)
        return self

    def __reduce_ex__(self, protocol: Any) -> tuple:
        return _rebuild, (type(self)._vera_plain, HeadLayer), self.__getstate__()  # type: ignore[attr-defined]


def _without_copies(module: Any) -> Any:
    """The module as its own forward may see it: nn.Sequential's runs every child, and would run the adapters' copies too."""
    own = {n: c for n, c in module._modules.items() if not is_own_key(n)}
    if not own or len(own) == len(module._modules):
        return module
    view = module._vera_plain.__new__(module._vera_plain)
    view.__dict__.update(module.__dict__, _modules=own)
    return view


TEMPLATE = -1


class HeadSite:
    """The copies of one fully trained module: trainable ones are children vera_<k>, resident ones are kept out of the tree.

    A fleet's owners have theirs in the fleet's table: one more resident copy, TEMPLATE, runs with the parameters of each.
    """

    def __init__(self, name: str, runtime: Runtime) -> None:
        self.name = name
        self.runtime = runtime
        self.called = False
        self.hooked: Callable | None = None
        self.resident: dict[int, nn.Module] = {}

    def copy_of(self, module: nn.Module, member: Member | None) -> nn.Module | None:
        """The member's copy, or None where it has none, or has it in a fleet's table."""
        if member is None:
            return None
        return module._modules.get(f"vera_{member.number}") or self.resident.get(member.number)

    def state_of(self, module: nn.Module, member: Member) -> dict[str, Tensor]:
        """The member's copy as a state_dict."""
        if self._in_fleet(member):
            with torch.no_grad():
                own = member.bank.head_parameters(member.slot, self.name)  # type: ignore[union-attr]
            return {**self.resident[TEMPLATE].state_dict(), **own}
        copied = self.copy_of(module, member)
        assert copied is not None
        return copied.state_dict()

    def _in_fleet(self, member: Member) -> bool:
        return isinstance(member.bank, FleetBank) and self.name in member.bank.heads

    def _call_of(self, module: nn.Module, member: Member | None, base: Callable) -> Callable:
        if member is not None and self._in_fleet(member):
            return functools.partial(self._fleet_forward, member)
        return self.copy_of(module, member) or base

    def _fleet_forward(self, member: Member, *args: Any, **kwargs: Any) -> Any:
        template = self.resident[TEMPLATE]
        own = member.bank.head_parameters(member.slot, self.name)  # type: ignore[union-attr]
        like = dict(template.named_parameters())
        return functional_call(template, {k: t.to(like[k].dtype) for k, t in own.items()}, args, kwargs, tie_weights=False)

    def forward(self, module: nn.Module, base: Callable, args: tuple, kwargs: dict) -> Any:
        self.called = True
        selection = self.runtime.current(module.training)
        if selection.kind == "base":
            return base(*args, **kwargs)
        if selection.kind == "one":
            return self._call_of(module, selection.member, base)(*args, **kwargs)
        calls: dict[Member | None, Callable] = {m: self._call_of(module, m, base) for m in dict.fromkeys(selection.members)}
        rows: dict[Callable, list[int]] = {}
        for i, member in enumerate(selection.members):
            rows.setdefault(calls[member], []).append(i)
        if len(rows) == 1:
            return next(iter(rows))(*args, **kwargs)
        if selection.kind == "tokens":
            raise StateError(f'module "{self.name}" is trained in full and can\'t be chosen per token: use vera.rows().')
        return self._by_rows(rows, args, kwargs, selection.size)

    def _by_rows(self, rows: dict[Callable, list[int]], args: tuple, kwargs: dict, size: int) -> Any:
        out = None
        for call, positions in rows.items():
            index = torch.tensor(positions)

            def pick(v: Any, index: Tensor = index) -> Any:
                return v[index.to(v.device)] if isinstance(v, Tensor) and v.dim() and v.shape[0] == size else v

            y = call(*[pick(a) for a in args], **{k: pick(v) for k, v in kwargs.items()})
            if not isinstance(y, Tensor):
                raise StateError(
                    f'module "{self.name}" returns {type(y).__name__}, and rows() can only mix modules that return one tensor.'
                )
            out = y.new_zeros(size, *y.shape[1:]) if out is None else out
            out = out.index_copy(0, index.to(y.device), y)
        return out


def _hooked_head_forward(self: nn.Module, *args: Any, **kwargs: Any) -> Any:
    return self._vera_head.forward(self, self._vera_head.hooked, args, kwargs)  # type: ignore[union-attr, operator]


def adapt_head(name: str, module: nn.Module, runtime: Runtime) -> HeadSite:
    """Makes a module one that can have a copy for each adapter, in place."""
    if not isinstance(module, HeadLayer):
        if not hasattr(HeadSite.forward, "_torchdynamo_disable"):  # not at import: it loads all of torch's compiler
            HeadSite.forward = torch.compiler.disable(HeadSite.forward)  # type: ignore[method-assign]
        module.__class__ = adapted_class(type(module), HeadLayer)
        site = module.__dict__["_vera_head"] = HeadSite(name, runtime)
        site.hooked = module.__dict__.get("forward")
        if site.hooked is not None:  # as in adapt()
            module.__dict__["forward"] = types.MethodType(_hooked_head_forward, module)
    return module.__dict__["_vera_head"]


def plain_copy(module: nn.Module) -> nn.Module:
    """A copy of a head's base module, without any adapter's copies, vectors or hooks."""
    sites = {id(m._vera): m._vera for m in module.modules() if isinstance(m, VeraLayer)}
    own = {id(p): p for m in module.modules() for n, p in m._parameters.items() if p is not None and is_own_key(n)}
    heads = {id(m._vera_head): m._vera_head for m in module.modules() if isinstance(m, HeadLayer)}
    # Nothing of these is copied: a copied Site would ask a runtime of its own, where nobody chooses an adapter.
    memo: dict[int, Any] = {**sites, **own, **heads}
    copies = {id(c): c for m in module.modules() if isinstance(m, HeadLayer) for n, c in m._modules.items() if is_own_key(n)}
    memo |= copies
    copied = copy.deepcopy(module, memo)
    for m in list(copied.modules()):
        if isinstance(m, HeadLayer):
            release_head(m)
    for m in list(copied.modules()):
        if isinstance(m, VeraLayer):
            for name in [n for n in m._parameters if is_own_key(n)]:
                del m._parameters[name]
            release(m)
    for m in copied.modules():  # accelerate's hooks are bound to the original
        for name in ("forward", "_old_forward", "_hf_hook"):
            m.__dict__.pop(name, None)
    return copied


def release_head(module: nn.Module) -> None:
    """The plain module again."""
    if isinstance(module, HeadLayer):
        for name in [n for n in module._modules if n.startswith("vera_")]:  # type: ignore[attr-defined]
            del module._modules[name]  # type: ignore[attr-defined]
        site = module.__dict__.pop("_vera_head")
        if site.hooked is not None:
            module.__dict__["forward"] = site.hooked
        module.__class__ = type(module)._vera_plain  # type: ignore[attr-defined]
