"""EncoderEngine: embeddings and classes from an encoder, each row of a micro-batch with its own adapter and head."""

import json
import queue
import threading
from collections.abc import Callable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor

from ... import attach
from ...errors import ConfigError
from ...store import Store
from .errors import BadAdapter, BadRequest, EngineBusy, EngineError
from .loading import encode, load_model, load_tokenizer, pad_token
from .residents import Limits, Residents

Pooling = Literal["mean", "cls"]


@dataclass(frozen=True)
class Encoded:
    """What the model says about one text. logits: None where the model has no head."""

    embedding: Tensor
    logits: Tensor | None
    tokens: int


@dataclass(eq=False)
class Job:
    """One text that waits for a batch."""

    tokens: list[int]
    adapter: str | None
    answer: "Future[Encoded]" = field(default_factory=Future)


class EncoderEngine:
    """Serves an encoder. One thread runs it on whatever waits, up to max_batch texts at a time.

    pooling and normalise: None: as the model's sentence-transformers files say, otherwise the mean, normalised. labels: loads the
    model with a head for so many classes, which adapters bring (`train_modules`); None: as the checkpoint is.
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
        max_batch: int = 32,
        max_requests: int = 4096,
        pooling: Pooling | None = None,
        normalise: bool | None = None,
        labels: int | None = None,
        dtype: str | torch.dtype | None = None,
        device: str | None = None,
        name: str | None = None,
    ) -> None:
        self.model, path, self.head_is_trained = _load(model, dtype, device, labels)
        self.tokenizer = tokenizer if tokenizer is not None else load_tokenizer(path)
        self.name = name or path or "base"
        found = sentence_transformers_settings(path)
        self.pooling: Pooling = pooling or found[0]
        self.normalise = found[1] if normalise is None else normalise
        self.max_model_len = min(_positions(self.model), self.tokenizer.model_max_length, max_model_len or 2**31)
        self.max_requests = max_requests
        self.labels = getattr(self.model.config, "id2label", None) or {}
        self.classifies = type(self.model).__name__.endswith("ForSequenceClassification")
        # A decoder that classifies looks for a text's last token by its config's pad_token_id: the one that we fill up with.
        config = self.model.config.get_text_config()
        self.pad, self._own_pad = pad_token(self.model, self.tokenizer), getattr(config, "pad_token_id", None)
        config.pad_token_id = self.pad
        self.max_batch = 1 if self.classifies and self.pad is None else max_batch
        self.vera = attach(self.model)
        self._work: queue.SimpleQueue[Any] = queue.SimpleQueue()
        self._waiting = 0
        self._lock = threading.Lock()
        self._closing = self._closed = False
        self.on_death: Callable[[], None] | None = None
        self.steps = self.generated = 0
        self.residents = Residents(
            self.vera, store, Limits(slots, max_rank, max_bases, heads=self.classifies), self.between_steps
        )
        self.readers = ThreadPoolExecutor(32, thread_name_prefix="veralib-store")
        self._thread = threading.Thread(target=self._run, name="veralib-encoder", daemon=True)
        self._thread.start()

    @property
    def alive(self) -> bool:
        """Whether its thread runs."""
        return self._thread.is_alive() and not self._closed

    @property
    def load(self) -> int:
        """Texts that wait or run."""
        return self._waiting

    def encode(self, text: str, special: bool = True) -> list[int]:
        """A text's tokens. BadRequest."""
        return encode(self.tokenizer, text, special)

    def check_prompt(self, tokens: Sequence[int]) -> None:
        """BadRequest where a text is empty, too long, or holds a token that the model hasn't."""
        size = self.model.get_input_embeddings().weight.shape[0]
        if not 0 < len(tokens) <= self.max_model_len:
            raise BadRequest(f"a text has {len(tokens)} tokens, expected 1 to {self.max_model_len}.", "input")
        if wrong := next((t for t in tokens if not 0 <= t < size), None):
            raise BadRequest(f"a text holds token {wrong}, expected 0 to {size - 1}.", "input")

    def submit(self, texts: Sequence[Sequence[int]], model: str | None = None, classes: bool = False) -> "list[Future[Encoded]]":
        """Starts to encode texts, given as tokens; classes: for their logits. BadRequest, UnknownName, BadAdapter, EngineBusy,
        EngineError."""
        for tokens in texts:
            self.check_prompt(tokens)
        if not self.alive or self._closing:
            raise EngineError("the engine has stopped.")
        if self._waiting + len(texts) > self.max_requests:
            raise EngineBusy(f"{self._waiting} texts wait, and this engine takes up to {self.max_requests}: ask again later.")
        jobs: list[Job] = []
        try:
            for tokens in texts:
                adapter = None if model is None or model == self.name else self.residents.pin(model)
                jobs.append(Job(list(tokens), adapter))
                if classes and adapter is not None:
                    self._check_own_head(adapter)
        except BaseException:
            for job in jobs:
                if job.adapter is not None:
                    self.residents.release(job.adapter)
            raise
        with self._lock:
            self._waiting += len(jobs)
        for job in jobs:
            self._work.put(job)
        return [job.answer for job in jobs]

    def embed(self, texts: Sequence[str], model: str | None = None) -> list[list[float]]:
        """The texts' embeddings."""
        return [f.result().embedding.tolist() for f in self.submit([self.encode(t) for t in texts], model)]

    def classify(self, texts: Sequence[str], model: str | None = None) -> list[list[float]]:
        """Each text's probabilities of the classes."""
        self.check_head(model)
        answers = [f.result().logits for f in self.submit([self.encode(t) for t in texts], model, classes=True)]
        return [a.softmax(-1).tolist() for a in answers if a is not None]

    def check_head(self, model: str | None) -> None:
        """BadRequest where there is no head to classify with."""
        if not self.classifies:
            raise BadRequest("this model has no classification head: load it with one (--labels N).", "model")
        if not self.head_is_trained and (model is None or model == self.name):
            raise BadRequest("the base model's classification head was never trained: name an adapter that brings one.", "model")

    def _check_own_head(self, adapter: str) -> None:
        heads, inner = self.residents.member(adapter).heads, f"{self.model.base_model_prefix}."
        if not self.head_is_trained and all(head.startswith(inner) for head in heads):
            raise BadAdapter(
                f'the adapter "{adapter.partition("@")[0]}" brings no classification head, and the base model\'s was never '
                "trained: train the adapter with one (train_modules)."
            )

    def close(self) -> None:
        """Ends the thread after what waits."""
        self._closing = True
        self._work.put(None)
        self._thread.join()
        self.readers.shutdown(wait=False)
        self.model.config.get_text_config().pad_token_id = self._own_pad
        if self.model.__dict__.get("_vera_handle") is self.vera:
            self.vera.detach()

    def __enter__(self) -> "EncoderEngine":
        return self

    def __exit__(self, *_: Any) -> None:
        self.close()

    def between_steps(self, function: Callable[[], Any]) -> "Future[Any]":
        """Runs a function between two batches, in the thread that runs them."""
        future: Future[Any] = Future()
        with self._lock:
            if self._closed:
                future.set_exception(EngineError("the engine has stopped."))
            else:
                self._work.put((function, future))
        return future

    # In the thread

    def _run(self) -> None:
        try:
            while self._batch():
                pass
        finally:
            with self._lock:
                self._closed = True
            while not self._work.empty():
                item = self._work.get()
                if item is None:
                    continue
                future = item.answer if isinstance(item, Job) else item[1]
                if future.set_running_or_notify_cancel():
                    future.set_exception(EngineError("the engine has stopped."))
            if self.on_death is not None and not self._closing:
                self.on_death()

    def _batch(self) -> bool:
        """One batch of what waits; False: it is time to end."""
        jobs: list[Job] = []
        item = self._work.get()
        while True:
            if item is None:
                break
            if isinstance(item, Job):
                jobs.append(item)
            else:
                function, future = item
                try:
                    future.set_result(function())
                except Exception as e:
                    future.set_exception(e)
            if len(jobs) >= self.max_batch or (self._work.empty()):
                break
            item = self._work.get()
        if jobs:
            self._answer([job for job in jobs if job.answer.set_running_or_notify_cancel()])  # not cancelled any more
            with self._lock:
                self._waiting -= len(jobs)
            for job in jobs:
                if job.adapter is not None:
                    self.residents.release(job.adapter)
        return item is not None

    def _answer(self, jobs: list[Job]) -> None:
        try:
            results = self._forward(jobs) if jobs else []
        except Exception as e:
            adapters = list(dict.fromkeys(j.adapter for j in jobs))
            if len(adapters) > 1:  # whose fault it is shows one by one
                for adapter in adapters:
                    self._answer([j for j in jobs if j.adapter == adapter])
            else:
                for job in jobs:
                    job.answer.set_exception(EngineError(f"the model failed: {e}"))
            return
        for job, result in zip(jobs, results, strict=True):
            finite = result.embedding.isfinite().all() and (result.logits is None or result.logits.isfinite().all())
            if finite:
                job.answer.set_result(result)
            else:
                job.answer.set_exception(
                    BadAdapter("the model's numbers overflowed: this adapter's vectors are too large to serve.")
                )

    @torch.no_grad()
    def _forward(self, jobs: Sequence[Job]) -> list[Encoded]:
        self.steps += 1
        longest, pad = max(len(j.tokens) for j in jobs), self.pad or 0
        ids = torch.tensor([j.tokens + [pad] * (longest - len(j.tokens)) for j in jobs], device=self.model.device)
        mask = torch.tensor([[1] * len(j.tokens) + [0] * (longest - len(j.tokens)) for j in jobs], device=self.model.device)
        adapters = [j.adapter for j in jobs]
        alone = len(set(adapters)) == 1
        with self.vera.using(adapters[0]) if alone else self.vera.rows(adapters):
            out = self.model(input_ids=ids, attention_mask=mask, output_hidden_states=True)
        hidden = out.hidden_states[-1].float()
        pooled = hidden[:, 0] if self.pooling == "cls" else (hidden * mask[..., None]).sum(1) / mask.sum(1, keepdim=True)
        if self.normalise:
            pooled = torch.nn.functional.normalize(pooled, dim=-1)
        logits = out.logits.float().cpu() if self.classifies else None
        pooled = pooled.cpu()
        return [Encoded(pooled[i], None if logits is None else logits[i], len(j.tokens)) for i, j in enumerate(jobs)]


def sentence_transformers_settings(path: str) -> tuple[Pooling, bool]:
    """(pooling, normalise) of a model's folder: its 1_Pooling/config.json and modules.json, else the mean, normalised."""
    folder = Path(path)
    try:
        pooling = json.loads((folder / "1_Pooling" / "config.json").read_text())
    except (OSError, ValueError):
        return "mean", True
    try:
        kinds = [m.get("type", "") for m in json.loads((folder / "modules.json").read_text())]
    except (OSError, ValueError):
        kinds = []
    way: Pooling | None = "cls" if pooling.get("pooling_mode_cls_token") else None
    way = "mean" if pooling.get("pooling_mode_mean_tokens") else way
    if way is None:
        asked = ", ".join(k for k, v in pooling.items() if v is True) or "none"
        raise ConfigError(f"{path}/1_Pooling/config.json asks for {asked}; the embedded engine has mean and cls: set pooling.")
    return way, any(k.endswith("Normalize") for k in kinds)


def _load(model: Any, dtype: Any, device: str | None, labels: int | None) -> tuple[Any, str, bool]:
    if isinstance(model, torch.nn.Module):
        return (*load_model(model), True)
    from transformers import AutoConfig

    try:
        config = AutoConfig.from_pretrained(model)
    except (OSError, ValueError) as e:
        raise ConfigError(f'the model "{model}" can\'t be loaded: {e}') from e
    has_head = any(a.endswith("ForSequenceClassification") for a in config.architectures or [])
    if not has_head and labels is None:
        return (*load_model(model, dtype, device, auto=""), False)
    options = {} if labels is None or (has_head and labels == config.num_labels) else {"num_labels": labels}
    if options and has_head:
        raise ConfigError(f'the model "{model}" has {config.num_labels} classes, and labels is {labels}: leave labels out.')
    return (*load_model(model, dtype, device, "SequenceClassification", **options), has_head)


def _positions(model: Any) -> int:
    positions = getattr(model.config, "max_position_embeddings", None) or 2**20
    table = next((m for n, m in model.named_modules() if n.endswith("position_embeddings")), None)
    offset = getattr(table, "padding_idx", None)  # RoBERTa counts from padding_idx + 1
    return positions - (0 if offset is None else offset + 1)
