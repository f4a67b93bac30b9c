"""The loop: transformers' continuous batching, with an adapter for each request, our own sampling, and work between the steps.

What is overridden is private to transformers: check() looks at each name at the start and refuses in words.
"""

import inspect
import threading
from collections import deque
from collections.abc import Callable, Sequence
from concurrent.futures import Future
from typing import Any

from transformers import GenerationConfig
from transformers.generation.configuration_utils import ContinuousBatchingConfig
from transformers.generation.continuous_batching.continuous_api import (
    ContinuousBatchingManager,
    ContinuousBatchProcessor,
    OutputRouter,
)
from transformers.generation.continuous_batching.model_runner import ModelRunner
from transformers.generation.continuous_batching.requests import FutureRequestState, GenerationOutput, RequestState

from ...errors import MissingPackage
from .errors import EngineError

_NEEDED: tuple[tuple[Any, str, tuple[str, ...]], ...] = (
    (ContinuousBatchingManager, "__init__", ("model", "generation_config", "continuous_batching_config")),
    (ContinuousBatchingManager, "_generation_loop_body", ("batch_processor", "bootstrapping")),
    (ContinuousBatchingManager, "_generation_step", ()),
    (ContinuousBatchingManager, "_run_generation_loop", ()),
    (ContinuousBatchingManager, "_create_batch_processor", ()),
    (ContinuousBatchingManager, "add_request", ("input_ids", "request_id", "max_new_tokens", "streaming", "eos_token_id")),
    (ContinuousBatchProcessor, "prepare_next_batch", ()),
    (ModelRunner, "_sample", ("scores", "output_ids")),
    (OutputRouter, "deliver", ("output",)),
    (OutputRouter, "deliver_batch", ("outputs",)),
)
_SLOTS = ("state", "has_new_token", "query_length")


def check() -> None:
    """MissingPackage where this transformers' continuous batching isn't the one that is known here."""
    import transformers

    for owner, name, parameters in _NEEDED:
        function = getattr(owner, name, None)
        if function is None or not set(parameters) <= inspect.signature(function).parameters.keys():
            missing = f"{owner.__name__}.{name}({', '.join(parameters)})"
            break
    else:
        if set(_SLOTS) <= set(FutureRequestState.__slots__):
            return
        missing = f"FutureRequestState with {', '.join(_SLOTS)}"
    raise MissingPackage(
        f"transformers {transformers.__version__} has no {missing}, which the embedded engine builds on: "
        "pip install 'transformers>=5.17,<5.20'"
    )


class Router(OutputRouter):
    """Hands each request's outputs, in the loop's thread, to one function."""

    def __init__(self, deliver: Callable[[Sequence[GenerationOutput]], None]) -> None:
        super().__init__()
        self._deliver = deliver

    def deliver(self, output: GenerationOutput) -> None:
        self._deliver([output])

    def deliver_batch(self, outputs: list[GenerationOutput]) -> None:
        self._deliver(outputs)


class Loop(ContinuousBatchingManager):
    """The thread that runs the model. `around` gives the context of a step; `ended` is called when the thread has ended."""

    def __init__(
        self,
        model: Any,
        generation: GenerationConfig,
        config: ContinuousBatchingConfig,
        *,
        deliver: Callable[[Sequence[GenerationOutput]], None],
        around: Callable[[Sequence[FutureRequestState]], Any],
        sample: Callable[..., None],
        ended: Callable[[], None],
    ) -> None:
        super().__init__(model, generation, config)
        self.output_router = Router(deliver)
        self._around, self._sample, self._ended = around, sample, ended
        self._work: deque[tuple[Callable[[], Any], Future]] = deque()
        self._cancelled: list[tuple[str, Callable[[], None]]] = []
        self._wake = getattr(self, "_wake_up_loop", None) or self.__dict__["_has_new_requests"]  # 5.19, 5.17
        self._closed = False
        self._lock = threading.Lock()
        self.steps = 0

    # For every thread

    def start(self) -> None:
        """As the original's, in a thread that doesn't keep a process alive whose main thread has ended."""
        self.background_thread_status.clear()
        thread: Any = threading.Thread(target=self._run_generation_loop, name="veralib-engine", daemon=True)
        self._generation_thread = thread
        thread.start()

    def between_steps(self, function: Callable[[], Any]) -> "Future[Any]":
        """Runs a function in the loop's thread before the next step; its result or what it raised. EngineError once closed."""
        future: Future[Any] = Future()
        with self._lock:
            if self._closed:
                future.set_exception(EngineError("the engine has stopped."))
                return future
            self._work.append((function, future))
        self._wake.set()
        return future

    def cancel(self, request_id: str, gone: Callable[[], None]) -> None:
        """Takes a request out before the next step; gone() is called in the loop's thread when no step can use it any more."""
        self.between_steps(lambda: self._cancelled.append((request_id, gone)))

    # In the loop's thread

    @property
    def in_step(self) -> Sequence[FutureRequestState]:
        """The requests of the step that runs now."""
        processor: Any = self.batch_processor
        return processor.inputs_and_outputs.requests_in_batch

    def _create_batch_processor(self) -> ContinuousBatchProcessor:
        processor = super()._create_batch_processor()
        processor.model_runner._sample = self._sample  # type: ignore[method-assign]
        return processor

    def _generation_loop_body(self, batch_processor: ContinuousBatchProcessor, bootstrapping: bool) -> bool:
        while self._work:
            function, future = self._work.popleft()
            try:
                future.set_result(function())
            except Exception as e:  # the asker's, never the loop's
                future.set_exception(e)
        cancelled, self._cancelled = self._cancelled, []
        for request_id, _ in cancelled:
            batch_processor.scheduler.set_request_cancellation(request_id)
        goes_on = super()._generation_loop_body(batch_processor, bootstrapping)
        for _, gone in cancelled:
            gone()
        return goes_on

    def _generation_step(self) -> None:
        self.steps += 1
        with self._around(self.in_step):
            super()._generation_step()

    def _run_generation_loop(self) -> None:
        try:
            super()._run_generation_loop()
        finally:
            with self._lock:
                self._closed = True
            while self._work:
                self._work.popleft()[1].set_exception(EngineError("the engine has stopped."))
            self._ended()


def config_for(tokens: int, page: int, batch_tokens: int, batch_requests: int, cuda: bool) -> ContinuousBatchingConfig:
    """The loop's settings. No block of the cache is ever shared, so neither two adapters nor two salts can meet in one."""
    settings: dict[str, Any] = dict(
        page_size=page,
        num_blocks=-(-tokens // page),
        max_batch_tokens=batch_tokens,
        max_requests_per_batch=batch_requests,
        allow_block_sharing=False,
        use_async_batching=False,
        use_cuda_graph=False,  # the adapters' indices aren't in the static inputs that a graph replays
        auto_switch_to_flash=cuda,  # it asks the hub for kernels
        max_blocks_per_request=0,
    )
    known = inspect.signature(ContinuousBatchingConfig).parameters
    return ContinuousBatchingConfig(**{k: v for k, v in settings.items() if k in known})


__all__ = ["Loop", "RequestState", "check", "config_for"]
