"""Tokens a second and step time ÷ base of the embedded engine: `python -m benchmarks.bench_embedded [--quick] [--out FILE]`.

REQUESTS at once, PROMPT + ANSWER tokens each, greedy, with 0, 1, 8 and 32 distinct adapters on all linears, at r=256 and r=64, in
one interleaved run a model. Beside them, in the same loop: PEFT's LoRA, unmerged, one adapter for every row, since PEFT has no
adapter for each token of a packed batch; merged, any one adapter is the base's row. And transformers' generate, the base, one
padded batch. Time is the processor's, with one thread, which other programs hardly disturb;
a step's is a round's by the base's number of steps.
"""

import argparse
import contextlib
import copy
import json
import queue
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from veralib import VeraConfig, attach
from veralib.serving.embedded import EmbeddedEngine, Sampling
from veralib.serving.embedded.batching import Loop, config_for
from veralib.serving.embedded.sampling import Chooser, sampler
from veralib.store import Store, open_store

from . import measure

REQUESTS, PROMPT, ANSWER = 32, 32, 32
DISTINCT = (0, 1, 8, 32)
RANKS = (256, 64)
LORA = (1, 8, 16)
OUT = measure.ROOT / "results" / "serving" / "embedded.json"


class NoText:
    """Only tokens are measured."""

    def encode(self, text: str, add_special_tokens: bool = True) -> list[int]:
        return [1]

    def decode(self, tokens: list[int], **_: Any) -> str:
        return ""


def llama_59m() -> Any:
    """The shape that the vLLM measurements use: 8 layers of 512, MLP 1408, 32,000 tokens, untied."""
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    config = LlamaConfig(
        hidden_size=512, num_hidden_layers=8, num_attention_heads=8, num_key_value_heads=8, intermediate_size=1408,
        vocab_size=32000, max_position_embeddings=1024,
    )  # fmt: skip
    return LlamaForCausalLM(config).eval()


def books_4m() -> Any:
    """The model that ships here."""
    from transformers import AutoModelForCausalLM

    return AutoModelForCausalLM.from_pretrained(measure.ROOT / "models" / "books-4m", dtype=torch.float32).eval()


MODELS: dict[str, Callable[[], Any]] = {"books-4m": books_4m, "llama-59m": llama_59m}


def fill(model: Any, store: Store, rank: int, count: int) -> None:
    """`count` adapters of one rank, drawn, under r<rank>-<k>."""
    vera = attach(model, VeraConfig(rank=rank, targets="all-linear"))
    adapter = vera.adapter()
    vera.detach()
    generator = torch.Generator().manual_seed(rank)
    for k in range(count):
        for _, b in adapter.vectors.values():
            b.copy_(0.1 * torch.randn(b.shape, generator=generator))
        store.put(f"r{rank}-{k}", adapter)


class PlainLoop:
    """The engine's loop around a model without veralib: for PEFT's LoRA."""

    def __init__(self, model: Any) -> None:
        from transformers import GenerationConfig

        from veralib.serving.embedded import attention

        self.done: queue.SimpleQueue[str] = queue.SimpleQueue()
        chooser = Chooser(Sampling())
        self.loop = Loop(
            model,
            GenerationConfig(do_sample=False, eos_token_id=-1, pad_token_id=0),
            config_for(64 * 1024, 32, 512, 64, False),
            deliver=lambda outputs: [self.done.put(o.request_id) for o in outputs if o.is_finished()] and None,
            around=lambda batch: contextlib.nullcontext(),
            sample=sampler(lambda: [chooser for f in self.loop.in_step if f.has_new_token]),
            ended=lambda: None,
        )
        attention.use(model)
        self.loop.start()

    def run(self, prompts: list[list[int]], answer: int) -> None:
        for k, prompt in enumerate(prompts):
            self.loop.add_request(prompt, request_id=f"{time.monotonic_ns()}-{k}", max_new_tokens=answer, streaming=True)
        for _ in prompts:
            self.done.get()


def lora(model: Any, rank: int) -> Any:
    """A copy of the model with one LoRA adapter of PEFT on all linears, unmerged."""
    import peft

    config = peft.LoraConfig(r=rank, target_modules="all-linear", task_type="CAUSAL_LM", init_lora_weights=False)
    return peft.get_peft_model(copy.deepcopy(model), config).eval().base_model.model


def measure_model(name: str, build: Callable[[], Any], rounds: int, requests: int, answer: int) -> dict[str, Any]:
    """Every row of one model."""
    model = build()
    size = model.get_input_embeddings().weight.shape[0]
    prompts = [[(7 * i + 3 * j) % (size - 8) + 4 for j in range(PROMPT)] for i in range(requests)]
    sampling = Sampling(max_tokens=answer, ignore_eos=True)
    distinct = [k for k in DISTINCT if k <= requests]
    rows: dict[str, Callable[[], Any]] = {}
    with contextlib.ExitStack() as stack:
        store = open_store(stack.enter_context(tempfile.TemporaryDirectory()), kind="packed")
        for rank in RANKS:
            fill(model, store, rank, max(distinct))
        plain = copy.deepcopy(model)
        engine = stack.enter_context(EmbeddedEngine(model, store, tokenizer=NoText()))

        def ask(rank: int, k: int) -> Callable[[], Any]:
            models = [f"r{rank}-{i % k}" if k else None for i in range(requests)]
            return lambda: engine.generate(prompts, models, sampling)

        rows["base"] = ask(0, 0)
        for rank in RANKS:
            rows |= {f"veralib r={rank}, {k} adapters": ask(rank, k) for k in distinct if k}
        for rank in LORA:
            loop = PlainLoop(lora(plain, rank))
            stack.callback(loop.loop.stop, hard_stop=True)
            rows[f"PEFT LoRA r={rank}, unmerged, one for all rows"] = lambda loop=loop: loop.run(prompts, answer)  # type: ignore[misc]
        ids = torch.tensor(prompts)
        batch = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
        fixed = {"max_new_tokens": answer, "do_sample": False, "eos_token_id": None, "pad_token_id": 0}
        rows["transformers' generate, base, one batch"] = lambda: plain.generate(**batch, **fixed)
        steps = engine.loop.steps
        rows["base"]()
        steps = engine.loop.steps - steps
        seconds = measure.interleave(rows, rounds, 1)
        cold = [_load_seconds(engine, f"r{RANKS[0]}-{k}") for k in range(max(distinct))]
    base = seconds["base"]
    out: dict[str, Any] = {"steps": steps, "rows": {}, "load_ms": measure.spread([1000 * s for s in cold])}
    for row, times in seconds.items():
        ratio = measure.spread([t / b for t, b in zip(times, base, strict=True)])
        speed = measure.spread([requests * answer / t for t in times])
        out["rows"][row] = {"tokens_per_s": speed, "step_ms": measure.spread([1000 * t / steps for t in times]), "ratio": ratio}
    return out


def _load_seconds(engine: EmbeddedEngine, name: str) -> float:
    """From the request for an adapter that isn't in memory until it is."""
    engine.residents.forget(engine.residents.resolve(name))
    engine.loop.between_steps(lambda: None).result()
    start = time.perf_counter()
    engine.residents.release(engine.residents.pin(name))
    return time.perf_counter() - start


def table(results: dict[str, Any]) -> str:
    """The result file's models as Markdown."""
    lines = []
    for name, model in results["models"].items():
        lines += [f"| {name} | tokens/s | ms a step | ÷ base |", "|---|---:|---:|---:|"]
        for row, said in model["rows"].items():
            numbers = f"{said['tokens_per_s']['median']:.0f} | {said['step_ms']['median']:.1f} | {said['ratio']['median']:.2f}"
            lines.append(f"| {row} | {numbers} |")
        lines += ["", f"An adapter that isn't in memory: {model['load_ms']['median']:.1f} ms.", ""]
    return "\n".join(lines)


def main(arguments: list[str] | None = None) -> int:
    """Measures, prints the table, writes the result file."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.bench_embedded", description=__doc__)
    parser.add_argument("--quick", action="store_true", help="few requests and rounds, for tests: the numbers mean nothing")
    parser.add_argument("--only", choices=list(MODELS), help="one model alone")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--out", type=Path, default=None, help=f"the result file; {OUT.relative_to(measure.ROOT)} unless quick")
    options = parser.parse_args(arguments)
    torch.set_num_threads(1)
    requests, answer, rounds = (4, 4, 1) if options.quick else (REQUESTS, ANSWER, options.rounds)
    wanted = {options.only: MODELS[options.only]} if options.only else MODELS
    with measure.alone():
        environment = measure.environment()
        models = {n: measure_model(n, build, rounds, requests, answer) for n, build in wanted.items()}
    asked = {"requests": requests, "prompt_tokens": PROMPT, "answer_tokens": answer, "rounds": rounds, "targets": "all-linear"}
    results = {"run": "embedded", "setting": asked, "environment": environment, "models": models}
    print(table(results))
    out = options.out or (None if options.quick else OUT)
    if out is not None:
        out.parent.mkdir(parents=True, exist_ok=True)
        out.write_text(json.dumps(results, indent=1, ensure_ascii=False) + "\n")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
