"""A local model that answers: a hub id or folder, with an adapter if there is one, and its chat template."""

import hashlib
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from ..errors import ConfigError, VeraWarning
from .answers import Sampling


class LocalModel:
    """A loaded model; load_local makes it. longest: tokens that it reads, the answer's included."""

    def __init__(self, model: Any, tokenizer: Any, longest: int) -> None:
        self.model, self.tokenizer, self.longest = model.eval(), tokenizer, longest

    def answer(
        self, talks: Sequence[Sequence[Mapping[str, str]]], temperature: float, sampling: Sampling, batch: str
    ) -> list[str]:
        """The next answer of each conversation. batch: names the batch; it and the seed decide what is drawn.

        A conversation that leaves too little room for an answer keeps its end, and a warning says so.
        """
        import warnings

        import torch

        from ..training.decoding import pad_left
        from ..training.loading import quiet_transformers
        from ..training.tokens import render

        room = min(sampling.max_new_tokens, max(self.longest // 2, 1))
        with quiet_transformers():
            prompts = [render(self.tokenizer, talk, f"batch {batch}", add_generation_prompt=True) for talk in talks]
        if cut := sum(len(p) > self.longest - room for p in prompts):
            prompts = [p[-(self.longest - room) :] for p in prompts]
            many = f"{cut} of {len(talks)} conversations"
            warnings.warn(f"{many} leave no room in the model's {self.longest} tokens; their end was kept", VeraWarning)
        pad = self.tokenizer.pad_token_id or 0
        inputs = {k: v.to(self.model.device) for k, v in pad_left(prompts, pad).items()}
        width = inputs["input_ids"].shape[1]
        draws = {"do_sample": True, "temperature": temperature} if temperature >= 1e-4 else {"do_sample": False}
        stops = {"stopping_criteria": [_Stops(self.tokenizer, sampling.stop, width)]} if sampling.stop else {}
        torch.manual_seed(int.from_bytes(hashlib.sha256(f"{sampling.seed}/{batch}".encode()).digest()[:6], "big"))
        with torch.inference_mode(), quiet_transformers():
            made = self.model.generate(
                **inputs, max_new_tokens=min(sampling.max_new_tokens, self.longest - width), pad_token_id=pad, **draws, **stops
            )
        texts = self.tokenizer.batch_decode(made[:, width:], skip_special_tokens=True)
        return [_before(text, sampling.stop).strip() for text in texts]


def load_local(model: str | None, adapter: str | None, **changes: Any) -> tuple[LocalModel, dict[str, Any]]:
    """(the model, what it is): its names and the adapter's SHA-256, for the answers' file.

    adapter: a run's folder, an adapter file, a PEFT folder or a hub id; it names its base model, unless model does. changes:
    settings that differ: chat_template, dtype, quantise, revision. Errors: ConfigError, DataError, AdapterMismatch.
    """
    import torch

    from ..training.loading import load_base
    from ..training.predict import find_source, load_source
    from ..training.settings import Settings
    from ..training.tokens import chat_template

    changes = {k: v for k, v in changes.items() if v is not None}
    fields = {**changes, "task": "chat", "max_length": 2**31}  # a training run's max_length is no limit of the model's
    if adapter is not None:
        source = find_source(adapter, {"model": model, **fields, "text": ("messages",)})
        loaded, base, _ = load_source(source)
        about = {"model": source.settings.model, "adapter": str(adapter), "adapter_sha256": _sha256(Path(adapter))}
    elif model is not None:
        settings = Settings(model=model, data=("none",), **fields)
        base = load_base(settings)
        if torch.cuda.is_available() and not settings.quantise:
            base.model.to("cuda")
        chat_template(settings, base.tokenizer)
        loaded = base.model
        about = {"model": model}
    else:
        raise ConfigError("no model is named: give --model, --adapter, or --endpoint with --api-model")
    # A tokenizer without a limit says 10**30, and a config without one leaves it: then memory is the limit.
    return LocalModel(loaded, base.tokenizer, base.max_length), {**about, **changes}


def _sha256(path: Path) -> str:
    from ..training.data import sha256_file

    file = next((path / n for n in ("adapter_model.safetensors", "model.safetensors") if (path / n).is_file()), path)
    return sha256_file(file) if file.is_file() else ""


class _Stops:
    """Tells generate which rows have said a stop text. transformers' own stop_strings fails on tokenizers of whole words."""

    def __init__(self, tokenizer: Any, stops: Sequence[str], width: int) -> None:
        self.tokenizer, self.stops, self.width = tokenizer, stops, width
        self.tail = max(len(s.encode()) for s in stops) + 1  # a token is at least a byte

    def __call__(self, input_ids: Any, scores: Any, **kwargs: Any) -> Any:
        import torch

        said = self.tokenizer.batch_decode(input_ids[:, self.width :][:, -self.tail :], skip_special_tokens=True)
        return torch.tensor([any(s in text for s in self.stops) for text in said], device=input_ids.device)


def _before(text: str, stops: Sequence[str]) -> str:
    cut = min((at for stop in stops if (at := text.find(stop)) >= 0), default=len(text))
    return text[:cut]
