"""The engine core's side: which adapters lie in the workers' CPU memory.

vLLM's own workers evict on their own and read an adapter's file again within a step; where the file is gone, the engine dies
for everybody. Here the engine core decides, which knows every unfinished request: what one of them waits for is never evicted,
so a step finds every adapter in memory.
"""

import inspect
from collections import Counter, OrderedDict
from dataclasses import dataclass
from itertools import count, islice
from typing import Any

from ...errors import AdapterMismatch, StateError, VeraError
from .bases import FULL
from .settings import settings_of

_NAME = "_vera_residents"
_REFUSED, _LATER = "veralib refuses it: ", "veralib can't take it now: "
"""What the words of add_lora's exceptions begin with: another process gets the words alone, behind some of vLLM's."""


@dataclass(frozen=True)
class Held:
    """An adapter in the workers' memory. number: what they call it; basis: its place there; bytes: over all workers."""

    number: int
    name: str
    basis: int
    bytes: int


class Residents:
    """The adapters in CPU memory, by the number that requests carry; who was asked for longest ago goes first.

    Workers get numbers of our own, counted from 1: several API servers count alike, and vLLM's second runner keeps 32 bits.
    """

    def __init__(self, core: Any, capacity: int) -> None:
        self.core, self.capacity = core, capacity
        self.held: OrderedDict[int, Held] = OrderedDict()
        """By its requests' number."""
        self.leaving: dict[int, Held] = {}
        """By the workers' number: removed while requests use them; they go when the last of these ends."""
        self.bytes, self.bases = 0, Counter[int]()
        """Of what is held: bytes, and adapters by basis."""
        self._gone: OrderedDict[str, None] = OrderedDict()
        self._numbers = count(1)

    def add(self, request: Any) -> bool:
        """The adapter of a LoRARequest is in every worker's memory. AdapterMismatch, in the worker's words, where it can't be;
        StateError where that is so only now."""
        known = self.held.get(request.lora_int_id)
        if known is not None and not request.load_inplace:
            self.held.move_to_end(request.lora_int_id)
            self._make_room(0)
            return True
        self._make_room(1)
        number = next(self._numbers)
        answers = self._ask("add_lora", _renumbered(request, number))
        while FULL in answers and self._free_basis():
            answers = self._ask("add_lora", _renumbered(request, number))
        if refusals := [a for a in answers if isinstance(a, str)]:
            self._ask("remove_lora", number)
            if refusals[0] != FULL:
                raise AdapterMismatch(refusals[0])
            raise StateError(
                "running requests use as many different pairs A, B (seeds, kinds) as this server holds at once, and the adapter "
                'needs another: ask again later, or start the server with a larger "max_bases" in the setting "vera".'
            )
        self.remove(request.lora_int_id)
        held = Held(number, request.lora_name, answers[0][0], sum(a[1] for a in answers))
        self.held[request.lora_int_id] = held
        self.bytes += held.bytes
        self.bases[held.basis] += 1
        self._gone.pop(held.name, None)
        return True

    def remove(self, given: int) -> bool:
        """Forgets an adapter by its requests' number, at once or when its last request ends; whether it was there."""
        if given not in self.held:
            return False
        held = self._taken_out(given)
        self.leaving[held.number] = held
        self.sweep()
        return True

    def sweep(self) -> None:
        """Takes from the workers what was removed and no request uses any more."""
        if self.leaving:
            for number in self.leaving.keys() - self._in_use():
                self._ask("remove_lora", number)
                del self.leaving[number]

    def admit(self, request: Any) -> None:
        """Before a Request enters the scheduler: its adapter is in memory, and it carries the workers' number."""
        lora = request.lora_request
        if lora is None:
            return
        self.add(lora)
        request.lora_request = _renumbered(lora, self.held[lora.lora_int_id].number)

    def report(self) -> dict[str, Any]:
        """gone: the names that made room for others since the last report; adapters, bytes, bases: what is held now."""
        gone = list(self._gone)
        self._gone.clear()
        return {"gone": gone, "adapters": len(self.held), "bytes": self.bytes, "bases": len(+self.bases)}

    def _make_room(self, more: int) -> None:
        if len(self.held) + more <= self.capacity:
            return
        in_use = self._in_use()
        # Only idle ones count. An API server relies on what it used among its last capacity / 2 names: that is here, unless
        # as many new versions came meanwhile.
        surplus = len(self.held) - len(in_use - self.leaving.keys()) - self.capacity + more
        idle = (given for given, held in self.held.items() if held.number not in in_use)
        self._evict(list(islice(idle, max(0, surplus))))

    def _free_basis(self) -> bool:
        """Evicts the adapters of one basis that no request uses, the one asked for longest ago; whether there was one."""
        in_use = self._in_use()
        busy = {h.basis for h in [*self.held.values(), *self.leaving.values()] if h.number in in_use}
        last = {h.basis: place for place, h in enumerate(self.held.values()) if h.basis not in busy}
        if not last:
            return False
        oldest = min(last, key=last.__getitem__)
        self._evict([given for given, h in self.held.items() if h.basis == oldest])
        return True

    def _evict(self, idle: list[int]) -> None:
        for given in idle:
            held = self._taken_out(given)
            self._ask("remove_lora", held.number)
            self._gone[held.name] = None
            if len(self._gone) > 2 * self.capacity:  # nobody asks for reports
                self._gone.popitem(last=False)

    def _taken_out(self, given: int) -> Held:
        held = self.held.pop(given)
        self.bytes -= held.bytes
        self.bases[held.basis] -= 1
        return held

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


def refusal_in(e: BaseException) -> VeraError | None:
    """The plugin's own refusal in an exception of add_lora's, whatever process it came from: AdapterMismatch, or StateError
    where later is another matter. None where something else failed."""
    for mark, kind in ((_REFUSED, AdapterMismatch), (_LATER, StateError)):
        if mark in str(e):
            return kind(str(e).partition(mark)[2])
    return None


def add_lora(core: Any, upstream: Any, request: Any) -> bool:
    """EngineCore.add_lora."""
    residents = residents_of(core)
    if residents is None:
        return upstream(core, request)
    try:
        return residents.add(request)
    except AdapterMismatch as e:
        raise AdapterMismatch(_REFUSED + str(e)) from e
    except StateError as e:
        raise StateError(_LATER + str(e)) from e


def remove_lora(core: Any, upstream: Any, number: int) -> bool:
    """EngineCore.remove_lora."""
    residents = residents_of(core)
    return upstream(core, number) if residents is None else residents.remove(number)


def post_step(core: Any, upstream: Any, model_executed: bool) -> None:
    """EngineCore.post_step: requests may have ended, by themselves or since their clients left."""
    upstream(core, model_executed)
    residents = residents_of(core)
    if residents is not None:
        residents.sweep()


def report(core: Any) -> dict[str, Any] | None:
    """A method of our own on EngineCore, for API servers."""
    residents = residents_of(core)
    return None if residents is None else residents.report()


def add_request(core: Any, upstream: Any, request: Any, request_wave: int = 0) -> None:
    """EngineCore.add_request: a request whose adapter can't be had is answered with an error, alone."""
    residents = residents_of(core)
    if residents is not None:
        try:
            residents.admit(request)
        except (AdapterMismatch, StateError):
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
        except Exception as e:
            if (refusal := refusal_in(e)) is None:
                raise
            raise refusal from e
    return upstream(engine, *args, **options)
