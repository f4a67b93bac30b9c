"""The demo's second part: an adapter for each of 64 packages, trained in one run on the project's own language model."""

import shutil
from pathlib import Path
from typing import Any

from ..store import open_store
from .comparison import Comparison, Recipe, Say
from .owners import load_texts

PROMPT = "Return the"
ANSWER_TOKENS = 16


def compare(model: Path, say: Say, store: Path) -> dict[str, Any]:
    """The comparison's result, with `about`: data hash, model, versions, hardware. The adapters go into a new store."""
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
    comparison = Comparison(base, tokenizer, texts.train, texts.held_out, Recipe(), say)
    result = comparison.run(PROMPT)
    owners = [n for n in result["continuations"]["texts"] if n in comparison.names]
    result["greedy"] = comparison.continuations(PROMPT, owners, ANSWER_TOKENS, no_repeat_ngram_size=0)
    shutil.rmtree(store, ignore_errors=True)
    with open_store(store, "packed") as kept:
        kept.put_many(comparison.adapters["own_from_shared"].items())
    about = {"data": texts.hash, "model": model.name, "versions": versions(), "hardware": hardware()}
    return {**result, "about": {**about, "seconds": round(time.perf_counter() - began, 1)}}
