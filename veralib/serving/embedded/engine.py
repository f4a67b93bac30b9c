"""EmbeddedEngine: a language model and the adapters of a store, each request with its own, in one continuous batch."""

import contextlib
import itertools
import queue
import threading
from collections.abc import AsyncIterator, Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import torch

from ... import attach
from ...errors import VeraError
from ...store import Store
from . import attention, batching
from .errors import BadAdapter, BadRequest, EngineBusy, EngineError
from .loading import cache_tokens, encode, load_model, load_tokenizer, servable_layers
from .request import Completion, Piece, Running, whole
from .residents import Limits, Residents
from .sampling import Chooser, Sampling, sampler
from .step import StepSelections
from .text import TextStream

PAGE = 32


class EmbeddedEngine:
    """Serves a causal language model with transformers' continuous batching.

    model: a folder, a hub id, or a loaded model (with `tokenizer`). store: where adapters are found by name; None: only the base.
    slots: how many unused adapters stay in memory. cache_tokens_limit: room for keys and values, in tokens; None: from the free
    memory. max_requests: how many may run or wait; more are refused with EngineBusy. Close it, or use it in a `with`.
    """

    def __init__(
        self,
        model: Any,
        store: Store | None = None,
        *,
        tokenizer: Any = None,
        slots: int = 256,
        max_rank: int = 1024,
        max_bases: int = 8,
        max_model_len: int | None = None,
        cache_tokens_limit: int | None = None,
        max_batch_tokens: int | None = None,
        max_batch_requests: int | None = None,
        max_requests: int = 1024,
        dtype: str | torch.dtype | None = None,
        device: str | None = None,
        name: str | None = None,
    ) -> None:
        batching.check()
        self.model, path = load_model(model, dtype, device)
        self.tokenizer = tokenizer if tokenizer is not None else load_tokenizer(path)
        self.name = name or path or "base"
        cuda = self.model.device.type == "cuda"
        positions = getattr(self.model.config.get_text_config(), "max_position_embeddings", None) or 2**20
        wanted = min(positions, max_model_len or positions)
        batch_requests = max_batch_requests or (256 if cuda else 64)
        tokens = cache_tokens_limit or cache_tokens(self.model, wanted, batch_requests)
        self.max_model_len = min(wanted, tokens - PAGE)
        if self.max_model_len < 1:
            raise BadRequest(f"cache_tokens_limit is {tokens}, expected more than a page of {PAGE} tokens.", "cache_tokens_limit")
        self.max_requests = max_requests
        self.cache_tokens = tokens
        layers, self._output_layer = servable_layers(self.model)
        self.vera = attach(self.model)
        own = self.model.generation_config.eos_token_id
        self.eos = frozenset([own] if isinstance(own, int) else own or [])
        self._attention = self.model.config._attn_implementation
        from transformers import GenerationConfig

        config = batching.config_for(tokens, PAGE, max_batch_tokens or (4096 if cuda else 512), batch_requests, cuda)
        self.loop = batching.Loop(
            self.model,
            GenerationConfig(do_sample=False, eos_token_id=-1, pad_token_id=0),
            config,
            deliver=self._deliver,
            around=self._around,
            sample=sampler(self._choosers),
            ended=self._ended,
        )
        if attention.usable(self.model):
            attention.use(self.model)
        limits = Limits(slots, max_rank, max_bases, layers)
        self.residents = Residents(self.vera, store, limits, self.loop.between_steps)
        self._selections = StepSelections(self.vera)
        self._running: dict[str, Running] = {}
        self._ids = itertools.count()
        self._lock = threading.Lock()
        self.readers = ThreadPoolExecutor(32, thread_name_prefix="veralib-store")
        self.on_death: Callable[[], None] | None = None
        self._closing = False
        self.generated = 0
        self.loop.start()
        self.loop.between_steps(lambda: None).result()  # the cache is made in the loop's thread: what fails there fails here

    # What there is

    @property
    def alive(self) -> bool:
        """Whether the loop runs."""
        return self.loop.is_running() and self.loop.background_thread_status.fatal_error is None

    @property
    def load(self) -> int:
        """Requests that run or wait."""
        return len(self._running)

    # Asking

    def encode(self, text: str, special: bool = True) -> list[int]:
        """A prompt's tokens. BadRequest."""
        return encode(self.tokenizer, text, special)

    def check_prompt(self, prompt: Sequence[int], sampling: Sampling) -> int:
        """How many tokens may be generated. BadRequest where the prompt, or what is asked for, is too long."""
        size = self.model.get_input_embeddings().weight.shape[0]
        if not prompt:
            raise BadRequest("the prompt is empty, expected at least one token.", "prompt")
        if wrong := next((t for t in prompt if not 0 <= t < size), None):
            raise BadRequest(f"the prompt holds token {wrong}, expected 0 to {size - 1}.", "prompt")
        room = self.max_model_len - len(prompt)
        if room < 1 or (sampling.max_tokens or 1) > room:
            more = "" if sampling.max_tokens is None else f" and asks for {sampling.max_tokens} more"
            raise BadRequest(
                f"this model's maximum context length is {self.max_model_len} tokens; the prompt has {len(prompt)}{more}. "
                "Shorten the prompt or the answer.",
                "prompt",
            )
        return room if sampling.max_tokens is None else sampling.max_tokens

    def submit(self, prompt: Sequence[int], sampling: Sampling, model: str | None, notify: Callable[[], None]) -> Running:
        """Starts a request. model: an adapter's name; None or the engine's own name: the base. Waits for the disk where the
        adapter isn't in memory. BadRequest, UnknownName, BadAdapter, EngineBusy, EngineError."""
        limit = self.check_prompt(prompt, sampling)
        if not self.alive or self._closing:
            raise EngineError("the engine has stopped.")
        if len(self._running) >= self.max_requests:
            raise EngineBusy(f"{len(self._running)} requests run or wait, the most that this engine takes: ask again later.")
        adapter = None if model is None or model == self.name else self.residents.pin(model)
        stops = frozenset(sampling.stop_token_ids) | (frozenset() if sampling.ignore_eos else self.eos)
        running = Running(
            f"r{next(self._ids)}",
            adapter,
            tuple(prompt),
            sampling,
            stops,
            notify,
            Chooser(sampling),
            TextStream(self.tokenizer, sampling.stop),
        )
        with self._lock:
            self._running[running.id] = running
        accepted = self.loop.add_request(
            list(prompt), request_id=running.id, max_new_tokens=limit, streaming=True, eos_token_id=list(stops) or -1
        )
        if accepted is None or not self.alive:
            self._fail(running, EngineError("the engine has stopped."))
            raise EngineError("the engine has stopped.")
        return running

    def cancel(self, running: Running) -> None:
        """Stops computing a request, before the next step."""
        if not running.done:
            self.loop.cancel(running.id, lambda: self._end(running))

    async def stream(
        self, prompt: Sequence[int], sampling: Sampling | None = None, model: str | None = None
    ) -> AsyncIterator[Piece]:
        """The answer as it comes. Leaving the iteration cancels the request."""
        from .streams import Streams

        async with Streams(self) as streams:
            await streams.open([(prompt, sampling or Sampling())], model)
            async for _, piece in streams:
                yield piece

    def generate(
        self,
        prompts: Sequence[str | Sequence[int]],
        models: Sequence[str | None] | str | None = None,
        sampling: Sampling | None = None,
    ) -> list[Completion]:
        """Whole answers, in the order of the prompts; models: an adapter for each, or one for all."""
        sampling = sampling or Sampling()
        chosen = [models] * len(prompts) if models is None or isinstance(models, str) else list(models)
        if len(chosen) != len(prompts):
            raise BadRequest(f"{len(chosen)} models for {len(prompts)} prompts, expected one for each.", "models")
        came: queue.SimpleQueue[int] = queue.SimpleQueue()
        running: list[Running] = []
        pieces: list[list[Piece]] = [[] for _ in prompts]
        try:
            for i, (prompt, model) in enumerate(zip(prompts, chosen, strict=True)):
                tokens = self.encode(prompt) if isinstance(prompt, str) else prompt
                running.append(self.submit(tokens, sampling, model, lambda i=i: came.put(i)))  # type: ignore[misc]
            open_ones = set(range(len(prompts)))
            while open_ones:
                i = came.get()
                piece = running[i].take() if i in open_ones else None
                if piece is not None:
                    pieces[i].append(piece)
                    if piece.finish:
                        open_ones.discard(i)
                        self.cancel(running[i])
        finally:
            for r in running:
                self.cancel(r)
        return [whole(p, r) for p, r in zip(pieces, running, strict=True)]

    def close(self, wait: float = 30.0) -> None:
        """Ends the loop, after the running requests where they end within `wait` seconds."""
        self._closing = True
        if self.loop.is_running():
            self.loop.stop(block=True, timeout=wait)
            if self.loop.is_running():
                self.loop.stop(block=True, timeout=5.0, hard_stop=True)
        self.readers.shutdown(wait=False)
        if self.model.__dict__.get("_vera_handle") is self.vera:
            for name in list(self.residents.names):
                self.vera.remove(name)
            self.residents.entries.clear()
            self.vera.detach()
            self.model.set_attn_implementation(self._attention)

    def __enter__(self) -> "EmbeddedEngine":
        return self

    def __exit__(self, *_: Any) -> None:
        self.close()

    # In the loop's thread

    @contextlib.contextmanager
    def _around(self, batch: Sequence[Any]) -> Iterator[None]:
        adapters = [self._running[f.state.request_id].adapter for f in batch]
        members = [None if a is None else self.residents.member(a) for a in adapters]
        selection = self._selections.of(members, [f.query_length for f in batch])
        runner = self.loop.batch_processor.model_runner  # type: ignore[union-attr]
        if self._output_layer:  # an adapter there needs every token: its index is one for each
            adapted = any(m is not None and self._output_layer in m.layout.by_layer for m in members)
            runner._model_supports_logits_to_keep = False if adapted else None
        with self.vera.runtime.override(selection), attention.steps():
            yield

    def _choosers(self) -> list[Chooser]:
        return [self._running[f.state.request_id].chooser for f in self.loop.in_step if f.has_new_token]

    def _deliver(self, outputs: Sequence[Any]) -> None:
        for output in outputs:
            running = self._running.get(output.request_id)
            if running is None:
                continue
            if running.chooser.failed:
                self._fail(running, BadAdapter("the model's numbers overflowed: this adapter's vectors are too large to serve."))
                self.loop.cancel(running.id, lambda: None)
                continue
            new = output.generated_tokens[len(running.tokens) :]
            running.tokens += new
            running.chooser.tokens += new
            self.generated += len(new)
            if output.error:
                self._fail(running, EngineError(f"the answer broke off: {output.error}"))
            elif output.is_finished():
                self._end(running)
            else:
                running.notify()

    def _fail(self, running: Running, error: VeraError) -> None:
        running.error = error
        self._end(running)

    def _end(self, running: Running) -> None:
        with self._lock:
            if self._running.pop(running.id, None) is None:
                return
        running.done = True
        if running.adapter is not None:
            self.residents.release(running.adapter)
        running.notify()

    def _ended(self) -> None:
        for running in list(self._running.values()):
            self._fail(running, EngineError("the engine has stopped."))
        if self.on_death is not None and not self._closing:
            self.on_death()
