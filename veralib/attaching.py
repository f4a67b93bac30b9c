"""attach: a model can carry adapters from then on. handle: the Vera that lives on it."""

from typing import Any

from torch import nn

from .config import as_config
from .errors import ConfigError, StateError
from .linears import keep_unpacked
from .model import Vera
from .sharded import refuse_new_vectors


def attach(model: nn.Module, config: Any = None, name: str = "default") -> Vera:
    """The handle of `model`, which can now carry adapters; with a config, a fresh trainable adapter is active in it.

    The base's parameters are frozen. Modules keep their names, classes stay subclasses of what they were, and the handle
    lives on the model (handle(model) finds it). config: a VeraConfig or a peft.VeraConfig; without one, load adapters later.
    Raises StateError on a model that is attached already or is a PeftModel, ConfigError where the config's targets match
    nothing; then the model is as it was.
    """
    if not isinstance(model, nn.Module):
        raise ConfigError(f"model is a {type(model).__name__}, expected a torch module: load it first.")
    if "_vera_handle" in model.__dict__:
        raise StateError(
            "this model is attached already: handle(model).add(config, name=…) puts another adapter beside the others."
        )
    if any(cls.__module__.startswith("peft.") for m in model.modules() for cls in type(m).__mro__):
        raise StateError(
            "this is a PeftModel or holds one's layers, which are wrapped already: veralib.from_peft(model) takes over its VeRA "
            "adapters, or attach to the base model, model.unload()."
        )
    if inside := [n for n, m in model.named_modules() if "_vera_handle" in m.__dict__]:
        raise StateError(f'"{inside[0]}" inside this model is attached already: detach it first, or use its own handle.')
    config = as_config(config, name, model)
    if config is not None:
        refuse_new_vectors(model)
    keep_unpacked(model)
    vera = Vera(model)
    if config is not None:
        try:
            vera.add(config, name)
            vera.use(name)
        except BaseException:
            vera.detach()
            raise
    return vera


def handle(model: nn.Module) -> Vera:
    """The Vera handle that lives on a model, also behind DistributedDataParallel or torch.compile. StateError without one."""
    inner: Any = model
    while inner is not None and "_vera_handle" not in inner.__dict__:
        inner = inner._modules.get("module") or inner._modules.get("_orig_mod")
    if inner is None:
        raise StateError("this model carries no adapters: attach(model, VeraConfig(…)) first.")
    return inner.__dict__["_vera_handle"]
