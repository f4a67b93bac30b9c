"""The demo's second part: an adapter for each of 64 packages, trained in one run on the project's own language model."""

from pathlib import Path
from typing import Any

from .comparison import Comparison, Recipe, Say
from .owners import load_texts

PROMPT = "Return the"


def compare(model: Path, say: Say) -> dict[str, Any]:
    """The comparison's result, with `about`: data hash, model, versions, hardware."""
    import time

    from transformers import AutoModelForCausalLM, AutoTokenizer

    from ..training.loading import quiet_transformers
    from ..training.result import hardware, versions

    began = time.perf_counter()
    say("reading the documentation of the standard library, torch and transformers")
    texts = load_texts()
    with quiet_transformers():
        base = AutoModelForCausalLM.from_pretrained(model, dtype="float32")
    tokenizer = AutoTokenizer.from_pretrained(model)
    tokenizer.model_max_length = 10**9  # texts are cut later; no warning about it
    result = Comparison(base, tokenizer, texts.train, texts.held_out, Recipe(), say).run(PROMPT)
    about = {"data": texts.hash, "model": model.name, "versions": versions(), "hardware": hardware()}
    return {**result, "about": {**about, "seconds": round(time.perf_counter() - began, 1)}}
