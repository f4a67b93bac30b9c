"""What attach changes on the model itself: generate repeats rows, save_pretrained writes the adapter, hooks keep the state.

The model's class becomes a subclass of the same name, so pickling, deepcopy and isinstance go on working and nothing is
patched on the instance that a copy would share.
"""

import contextlib
import warnings
import weakref
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch.nn.modules.module import _IncompatibleKeys
from torch.optim.optimizer import register_optimizer_step_pre_hook
from torch.utils._pytree import tree_leaves

from .errors import AdapterMismatch, StateError, VeraWarning
from .selection import Selection

if TYPE_CHECKING:
    from .model import Vera

# lr · scale below which d (0.1 at the start) and b hardly move in a usual run: docs/choosing.md
SLOW_RATE = 1e-3
CHECKPOINT = "model.safetensors"  # the one name that transformers' Trainer resumes from and loads its best model from


class VeraRoot:
    """Mixed into the class of a model with adapters."""

    _vera_handle: Any

    def __reduce_ex__(self, protocol: Any) -> tuple:
        return _rebuild, (type(self)._vera_plain_root,), self.__getstate__()  # type: ignore[attr-defined]

    def load_state_dict(self, state_dict: Mapping[str, Any], strict: bool = True, assign: bool = False) -> Any:
        """The base's state, as ever; or an adapter's own tensors, which is what a Trainer checkpoint of this model holds."""
        vera = self._vera_handle
        member = next((m for m in [_main_member(vera)] if m is not None), None)
        names = set() if member is None else {f"{u.unit}.{v}" for u in member.layout.units for v in "db"}
        if names and names <= set(state_dict):
            _load_tensors(vera, member, state_dict)
            return _IncompatibleKeys([], [])
        own = {k: v for k, v in super().state_dict().items() if _is_own(k) and k not in state_dict}  # type: ignore[misc]
        return super().load_state_dict({**state_dict, **own}, strict=strict, assign=assign)  # type: ignore[misc]

    def _apply(self, fn: Any, recurse: bool = True) -> Any:
        super()._apply(fn, recurse)  # type: ignore[misc]
        vera = self._vera_handle
        vera.inside.move()
        vera._selections.clear()
        if vera.runtime.active.member is not None:
            vera.runtime.active = Selection("one", vera.runtime.active.member, device=vera.inside.device)
        return self


class VeraPreTrained(VeraRoot):
    """The same for transformers' PreTrainedModel."""

    def save_pretrained(self, save_directory: Any, *args: Any, state_dict: Any = None, **kwargs: Any) -> Any:
        """Unmerged: the trained adapter alone. Merged: the plain model, which transformers loads without veralib."""
        vera = self._vera_handle
        if vera.merged is None:
            return _save_adapters(vera, Path(save_directory))
        state = {k: v for k, v in (state_dict or super().state_dict()).items() if not _is_own(k)}  # type: ignore[misc]
        with _as_plain(self):
            return self.save_pretrained(save_directory, *args, state_dict=state, **kwargs)


class VeraGenerative(VeraPreTrained):
    """The same where the model generates."""

    def generate(self, *args: Any, **kwargs: Any) -> Any:
        runtime = self._vera_handle.runtime
        selection = runtime.overridden()
        with contextlib.nullcontext() if selection is None else runtime.override(selection):
            return super().generate(*args, **kwargs)  # type: ignore[misc]

    def _expand_inputs_for_generation(self, *args: Any, **kwargs: Any) -> Any:
        times = kwargs.get("expand_size", args[0] if args and isinstance(args[0], int) else 1)
        runtime = self._vera_handle.runtime
        selection = runtime.overridden()
        if times > 1 and selection is not None and selection.kind == "rows":
            runtime._stack()[-1] = selection.repeated(times)  # generate pushed its own entry and drops it at the end
        return super()._expand_inputs_for_generation(*args, **kwargs)  # type: ignore[misc]


def _rebuild(plain: type) -> Any:
    cls = _root_class(plain)
    return cls.__new__(cls)


_classes: dict[type, Any] = {}


def _root_class(plain: Any) -> Any:
    if plain in _classes:
        return _classes[plain]
    mixin: Any = VeraRoot
    if hasattr(plain, "save_pretrained") and hasattr(plain, "config_class"):
        mixin = VeraGenerative if hasattr(plain, "generate") else VeraPreTrained
    return type(
        plain.__name__, (mixin, plain), {"_vera_plain_root": plain, "__module__": plain.__module__, "__doc__": plain.__doc__}
    )


def adopt(model: nn.Module, vera: "Vera") -> None:
    """Makes `model` the root: its class, its handle, its hooks."""
    model.__class__ = _root_class(type(model))
    model.__dict__["_vera_handle"] = vera
    if hasattr(model, "save_pretrained"):
        # Trainer refuses a quantised base without it; it also makes gradient checkpointing ask inputs for gradients.
        model.__dict__["_hf_peft_config_loaded"] = True
    vera.__dict__["_hooks"] = (
        model.register_forward_pre_hook(_before_root),
        model.register_forward_hook(_after_root, always_call=True),
    )


def release(model: nn.Module) -> None:
    """The plain model's class again."""
    vera = model.__dict__.pop("_vera_handle")
    for hook in vera._hooks:
        hook.remove()
    model.__dict__.pop("_hf_peft_config_loaded", None)
    model.__class__ = type(model)._vera_plain_root  # type: ignore[attr-defined]


def _before_root(model: Any, args: Any) -> None:
    if torch.compiler.is_compiling():
        return
    vera = model._vera_handle
    if vera.merged is not None and model.training and torch.is_grad_enabled() and any(m.trainable for m in vera.members.values()):
        raise StateError(f'adapter "{vera.merged}" is merged, and its vectors get no gradient so: call unmerge() to train.')
    vera.runtime.forget_record()


def _after_root(model: Any, args: Any, output: Any) -> None:
    if torch.compiler.is_compiling():
        return
    vera = model._vera_handle
    vera.runtime.clear_memo()
    if output is None or torch._C._current_graph_task_id() >= 0:
        return  # a forward that failed has no output
    vera.inside.warn_uncalled(vera.runtime.overridden() or vera.runtime.active)
    if torch.is_grad_enabled():
        selection = vera.runtime.current()
        for leaf in tree_leaves(output):
            if isinstance(leaf, Tensor) and leaf.requires_grad:
                leaf.register_hook(lambda g, s=selection, r=vera.runtime: r.note_backward(s))


def _is_own(key: str) -> bool:
    """Whether a state_dict key is an adapter's: vera_0_d, vera_0_q_b, vera_0.weight."""
    return any(part.startswith("vera_") and part[5:6].isdigit() for part in key.split("."))


@contextlib.contextmanager
def _as_plain(model: Any):
    """transformers sees neither an adapter nor its children while it writes a merged model."""
    vera = model._vera_handle
    flag = model.__dict__.pop("_hf_peft_config_loaded", None)
    aside = [(head, n, head._modules.pop(n)) for head in vera.inside.heads.values() for n in list(head._modules) if _is_own(n)]
    parameters = [(m, n, m._parameters.pop(n)) for m in vera.inside.sites.values() for n in list(m._parameters) if _is_own(n)]
    cls = model.__class__
    model.__class__ = cls._vera_plain_root
    try:
        yield
    finally:
        model.__class__ = cls
        for head, n, child in aside:
            head._modules[n] = child
        for module, n, p in parameters:
            module._parameters[n] = p
        if flag is not None:
            model.__dict__["_hf_peft_config_loaded"] = flag


def _main_member(vera: "Vera") -> Any:
    """The adapter that a checkpoint is about: the active trainable one, else the only trainable, else the active one."""
    active = vera.runtime.active.member
    trainable = [m for m in vera.members.values() if m.trainable]
    if active is not None and (active.trainable or not trainable):
        return active
    return trainable[0] if trainable else next(iter(vera.members.values()), None)


def _save_adapters(vera: "Vera", folder: Path) -> None:
    from .format import save_adapter

    main = _main_member(vera)
    if main is None:
        raise StateError("there is no adapter to save: merge one to write the whole model, or detach() to write the plain one.")
    folder.mkdir(parents=True, exist_ok=True)
    save_adapter(vera.adapter(main.name), folder / CHECKPOINT)
    for member in vera.members.values():
        if member.trainable and member is not main:  # further trained ones, in folders named by their number
            save_adapter(vera.adapter(member.name), folder / f"vera_{member.number}" / CHECKPOINT)


@torch.no_grad()
def _load_tensors(vera: "Vera", member: Any, tensors: Mapping[str, Tensor]) -> None:
    for unit in member.layout.units:
        for vector, letter in zip(member.vectors(unit.unit), "db", strict=True):
            value = tensors[f"{unit.unit}.{letter}"]
            if value.shape != vector.shape:
                raise AdapterMismatch(
                    f'the checkpoint has {letter} of length {value.numel()} for "{unit.unit}"; adapter "{member.name}" has '
                    f"{vector.numel()}. Resume with the settings that the checkpoint was made with."
                )
            vector.copy_(value)
    for head in member.heads:
        module = vera.inside.head(head, member)
        prefix = f"module.{head}."
        module.load_state_dict({k[len(prefix) :]: v for k, v in tensors.items() if k.startswith(prefix)})


class Reference(nn.Module):
    """The base model inside a model with adapters, without a copy: no parameters of its own, no gradient, no training mode."""

    def __init__(self, vera: "Vera") -> None:
        super().__init__()
        self.__dict__["vera"] = vera
        self.config = getattr(vera.model, "config", None)

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        vera = self.__dict__["vera"]
        was_training = vera.model.training
        vera.model.eval()
        try:
            with torch.no_grad(), vera.using(None):
                return vera.model(*args, **kwargs)
        finally:
            vera.model.train(was_training)


_unwatched: "weakref.WeakSet[Any]" = weakref.WeakSet()


def watch_learning_rate(vera: "Vera") -> None:
    """Warns once, at the first optimiser step, where vectors train at a rate that can't move them."""
    if not _hooked:
        _hooked.append(register_optimizer_step_pre_hook(_check_learning_rate))
    _unwatched.add(vera)


_hooked: list[Any] = []  # one hook a process: torch can't take a hook off while it runs it


def _check_learning_rate(optimizer: Any, args: Any, kwargs: Any) -> None:
    for vera in list(_unwatched):
        vectors = {id(t): m for m in vera.members.values() if m.trainable for u in m.layout.units for t in m.vectors(u.unit)}
        for group in optimizer.param_groups:
            owner = next((vectors[id(p)] for p in group["params"] if id(p) in vectors), None)
            if owner is not None:
                _unwatched.discard(vera)
                _warn_of_rate(owner, group.get("initial_lr", group.get("lr", 1.0)))
                break


def _warn_of_rate(member: Any, rate: float) -> None:
    if 0 < rate * abs(member.config.scale) < SLOW_RATE:
        warnings.warn(
            f'the vectors of adapter "{member.name}" train at a learning rate of {rate:g}, which hardly moves them: VeRA needs '
            "1e-3 to 1e-1 (Table 8), through vera.parameter_groups(lr=1e-2, lr_head=4e-3) or the optimiser's lr; or set "
            "VeraConfig(scale=…), docs/choosing.md.",
            VeraWarning,
        )
