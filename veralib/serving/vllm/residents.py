"""The engine core's side: which adapters lie in the workers' CPU memory.

vLLM's own workers evict on their own and read an adapter's file again within a step; where the file is gone, the engine dies
for everybody. Here the engine core decides, which knows every unfinished request: what one of them waits for is never evicted,
so a step finds every adapter in memory.
"""

import inspect
from collections import OrderedDict
from itertools import count, islice
from typing import Any

from ...errors import AdapterMismatch
from .settings import settings_of

_NAME = "_vera_residents"
FAILED = "Call to add_lora method failed: "
"""How vLLM begins what it says of an exception in the engine's process."""


class Residents:
    """The adapters in CPU memory, by the number that requests carry; who was asked for longest ago goes first.

    Workers get numbers of our own, counted from 1: several API servers count alike, and vLLM's second runner keeps 32 bits.
    """

    def __init__(self, core: Any, capacity: int) -> None:
        self.core, self.capacity = core, capacity
        self.held: OrderedDict[int, int] = OrderedDict()
        """a request's number -> the workers' number."""
        self._numbers = count(1)

    def add(self, request: Any) -> bool:
        """The adapter of a LoRARequest is in every worker's memory. AdapterMismatch, in the worker's words, where it can't be."""
        known = self.held.get(request.lora_int_id)
        if known is not None and not request.load_inplace:
            self.held.move_to_end(request.lora_int_id)
            self._make_room(0)
            return True
        self._make_room(1)
        number = next(self._numbers)
        answers = self._ask("add_lora", _renumbered(request, number))
        if refusals := [a for a in answers if isinstance(a, str)]:
            self._ask("remove_lora", number)
            raise AdapterMismatch(refusals[0])
        if known is not None:
            self.remove(request.lora_int_id)
        self.held[request.lora_int_id] = number
        return True

    def remove(self, given: int) -> bool:
        """Forgets an adapter by its requests' number; not while a request uses it."""
        number = self.held.get(given)
        if number is None or number in self._in_use():
            return False
        del self.held[given]
        self._ask("remove_lora", number)
        return True

    def admit(self, request: Any) -> None:
        """Before a Request enters the scheduler: its adapter is in memory, and it carries the workers' number."""
        lora = request.lora_request
        if lora is None:
            return
        self.add(lora)
        request.lora_request = _renumbered(lora, self.held[lora.lora_int_id])

    def _make_room(self, more: int) -> None:
        if len(self.held) + more <= self.capacity:
            return
        in_use = self._in_use()
        # Only idle ones count. An API server relies on what it used among its last capacity / 2 names: that is here, unless
        # as many new versions came meanwhile.
        surplus = len(self.held) - len(in_use) - self.capacity + more
        idle = (given for given, number in self.held.items() if number not in in_use)
        for given in list(islice(idle, max(0, surplus))):
            self._ask("remove_lora", self.held.pop(given))

    def _in_use(self) -> set[int]:
        return {r.lora_request.lora_int_id for r in self.core.scheduler.requests.values() if r.lora_request}

    def _ask(self, method: str, *args: Any) -> list[Any]:
        return self.core.model_executor.collective_rpc(method, args=args)


def _renumbered(request: Any, number: int) -> Any:
    import msgspec

    return msgspec.structs.replace(request, lora_int_id=number, load_inplace=False)


def residents_of(core: Any) -> Residents | None:
    """The Residents of an engine core; None where the server has no VeRA settings."""
    if _NAME not in core.__dict__:
        settings = settings_of(core.vllm_config)
        core.__dict__[_NAME] = None if settings is None else Residents(core, core.vllm_config.lora_config.max_cpu_loras)
    return core.__dict__[_NAME]


def add_lora(core: Any, upstream: Any, request: Any) -> bool:
    """EngineCore.add_lora."""
    residents = residents_of(core)
    return upstream(core, request) if residents is None else residents.add(request)


def remove_lora(core: Any, upstream: Any, number: int) -> bool:
    """EngineCore.remove_lora."""
    residents = residents_of(core)
    return upstream(core, number) if residents is None else residents.remove(number)


def add_request(core: Any, upstream: Any, request: Any, request_wave: int = 0) -> None:
    """EngineCore.add_request: a request whose adapter can't be had is answered with an error, alone."""
    residents = residents_of(core)
    if residents is not None:
        try:
            residents.admit(request)
        except AdapterMismatch:
            answer = getattr(core, "_send_error_outputs_to_client", None)
            if answer is None:  # in process: the caller gets the exception
                raise
            answer([request.request_id], request.client_index)
            return None
    return upstream(core, request, request_wave)


def add_offline(engine: Any, upstream: Any, *args: Any, **options: Any) -> Any:
    """LLMEngine.add_request: the adapter is loaded first. A refusal later on would leave a request that never ends."""
    lora = inspect.signature(upstream).bind(engine, *args, **options).arguments.get("lora_request")
    if lora is not None and settings_of(engine.vllm_config) is not None:
        try:
            engine.engine_core.add_lora(lora)
        except AdapterMismatch:
            raise
        except Exception as e:  # from another process vLLM brings the words alone
            raise AdapterMismatch(str(e).partition(FAILED)[2] or str(e)) from e
    return upstream(engine, *args, **options)
