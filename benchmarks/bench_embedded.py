"""Tokens a second and step time ÷ base of the embedded engine: `python -m benchmarks.bench_embedded [--quick] [--out FILE]`.

Greedy requests that come at once, with 0, 1, 8 and 32 distinct adapters on all linears, at r=256 and r=64, in one
interleaved run a model; 256 requests with 256 adapters; and a step and a load while the store has ever more names. Beside
them, in the same loop: PEFT's LoRA, unmerged, one adapter for every row, since PEFT has none for each token of a packed batch;
merged, any one adapter is the base's row. And transformers' generate, the base, one padded batch. Time is the processor's,
with one thread, which other programs hardly disturb; a step's is a round's by the base's number of steps.
"""

import argparse
import contextlib
import copy
import json
import queue
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch

from veralib import VeraConfig, attach
from veralib.serving.embedded import EmbeddedEngine, Sampling
from veralib.serving.embedded.batching import Loop, config_for
from veralib.serving.embedded.sampling import Chooser, sampler
from veralib.store import Store, open_store

from . import measure

RANKS = (256, 64)
LORA = (1, 8, 16)
SLOTS, BATCH_TOKENS = 1024, 512
OUT = measure.ROOT / "results" / "serving" / "embedded.json"


@dataclass(frozen=True)
class Work:
    """What comes at once: requests of `prompt` + `answer` tokens, for so many distinct adapters."""

    requests: int = 32
    prompt: int = 32
    answer: int = 32
    distinct: tuple[int, ...] = (1, 8, 32)


CROWD = Work(256, 8, 8, (1, 32, 256))
QUICK = Work(4, 32, 4, (1,))
REGISTERED = (256, 10_000, 100_000)
"""Adapters in the store."""


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


MODELS: dict[str, tuple[Callable[[], Any], Work]] = {
    "books-4m": (books_4m, Work()),
    "llama-59m": (llama_59m, Work()),
    "llama-59m, crowd": (llama_59m, CROWD),
}
"""The parts by name."""


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

    def __init__(self, model: Any, requests: int) -> None:
        from transformers import GenerationConfig

        from veralib.serving.embedded import attention

        self.done: queue.SimpleQueue[str] = queue.SimpleQueue()
        chooser = Chooser(Sampling())
        self.loop = Loop(
            model,
            GenerationConfig(do_sample=False, eos_token_id=-1, pad_token_id=0),
            config_for(64 * 1024, 32, BATCH_TOKENS, requests, False),
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


def measure_model(build: Callable[[], Any], work: Work, rounds: int) -> dict[str, Any]:
    """Every row of one model."""
    model = build()
    size = model.get_input_embeddings().weight.shape[0]
    prompts = [[(7 * i + 3 * j) % (size - 8) + 4 for j in range(work.prompt)] for i in range(work.requests)]
    sampling = Sampling(max_tokens=work.answer, ignore_eos=True)
    rows: dict[str, Callable[[], Any]] = {}
    with contextlib.ExitStack() as stack:
        store = open_store(stack.enter_context(tempfile.TemporaryDirectory()), kind="packed")
        for rank in RANKS:
            fill(model, store, rank, max(work.distinct))
        plain = copy.deepcopy(model)
        engine = stack.enter_context(
            EmbeddedEngine(
                model, store, tokenizer=NoText(), slots=SLOTS, cache_tokens_limit=64 * 1024, max_batch_tokens=BATCH_TOKENS,
                max_batch_requests=work.requests,
            )
        )  # fmt: skip

        def ask(rank: int, k: int) -> Callable[[], Any]:
            models = [f"r{rank}-{i % k}" if k else None for i in range(work.requests)]
            return lambda: engine.generate(prompts, models, sampling)

        rows["base"] = ask(0, 0)
        for rank in RANKS:
            rows |= {f"veralib r={rank}, {k} adapters": ask(rank, k) for k in work.distinct}
        for rank in LORA:
            loop = PlainLoop(lora(plain, rank), work.requests)
            stack.callback(loop.loop.stop, hard_stop=True)
            rows[f"PEFT LoRA r={rank}, unmerged, one for all rows"] = lambda loop=loop: loop.run(prompts, work.answer)  # type: ignore[misc]
        ids = torch.tensor(prompts)
        batch = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
        fixed = {"max_new_tokens": work.answer, "do_sample": False, "eos_token_id": None, "pad_token_id": 0}
        rows["transformers' generate, base, one batch"] = lambda: plain.generate(**batch, **fixed)
        steps = engine.loop.steps
        rows["base"]()
        steps = engine.loop.steps - steps
        seconds = measure.interleave(rows, rounds, 1)
        cold = [_load_seconds(engine, f"r{RANKS[0]}-{k}") for k in range(max(work.distinct))]
    base = seconds["base"]
    out: dict[str, Any] = {"work": asdict(work), "steps": steps, "rows": {}, "load_ms": measure.spread([1000 * s for s in cold])}
    for row, times in seconds.items():
        ratio = measure.spread([t / b for t, b in zip(times, base, strict=True)])
        speed = measure.spread([work.requests * work.answer / t for t in times])
        out["rows"][row] = {"tokens_per_s": speed, "step_ms": measure.spread([1000 * t / steps for t in times]), "ratio": ratio}
    return out


def measure_registered(counts: Sequence[int], work: Work, rounds: int) -> list[dict[str, Any]]:
    """The step of `work`, every request with an adapter of its own, and a load from the store, by how many adapters this has.

    All but those that are asked for are small: their number is what might matter.
    """
    model = llama_59m()
    with contextlib.ExitStack() as stack:
        store = open_store(stack.enter_context(tempfile.TemporaryDirectory()), kind="packed")
        fill(model, store, RANKS[0], work.requests)
        vera = attach(model, VeraConfig(rank=4, targets=("q_proj",), layers=(0,)))
        small = vera.adapter()
        vera.detach()
        engine = stack.enter_context(
            EmbeddedEngine(
                model, store, tokenizer=NoText(), slots=SLOTS, cache_tokens_limit=64 * 1024, max_batch_tokens=BATCH_TOKENS,
                max_batch_requests=work.requests,
            )
        )  # fmt: skip
        prompts = [[(7 * i + 3 * j) % 31000 + 4 for j in range(work.prompt)] for i in range(work.requests)]
        names = [f"r{RANKS[0]}-{i}" for i in range(work.requests)]
        sampling = Sampling(max_tokens=work.answer, ignore_eos=True)
        engine.generate(prompts, names, sampling)
        out, have = [], work.requests
        for count in counts:
            store.put_many((f"more{i}", small) for i in range(have, count))
            have = max(have, count)
            times = []
            for _ in range(rounds):
                steps, start = engine.loop.steps, measure.clock()
                engine.generate(prompts, names, sampling)
                times.append(1000 * (measure.clock() - start) / (engine.loop.steps - steps))
            loads = [1000 * _load_seconds(engine, name) for name in names]
            out.append({"registered": have, "step_ms": measure.spread(times), "load_ms": measure.spread(loads)})
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
        w = model["work"]
        title = f"{name}, {w['requests']} × {w['prompt']} + {w['answer']} tokens"
        lines += [f"| {title} | tokens/s | ms a step | ÷ base |", "|---|---:|---:|---:|"]
        for row, said in model["rows"].items():
            numbers = f"{said['tokens_per_s']['median']:.0f} | {said['step_ms']['median']:.1f} | {said['ratio']['median']:.2f}"
            lines.append(f"| {row} | {numbers} |")
        lines += ["", f"An adapter that isn't in memory: {model['load_ms']['median']:.1f} ms.", ""]
    if "registered" in results:
        said = [
            f"{r['registered']:,}: {r['step_ms']['median']:.1f} and {r['load_ms']['median']:.1f} ms"
            for r in results["registered"]
        ]
        lines += [f"llama-59m, a step and a load from the store, by the number of adapters in the store: {', '.join(said)}.", ""]
    return "\n".join(lines)


def main(arguments: list[str] | None = None) -> int:
    """Measures, prints the table, writes the result file."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.bench_embedded", description=__doc__)
    parser.add_argument("--quick", action="store_true", help="few requests and rounds, for tests: the numbers mean nothing")
    parser.add_argument("--only", choices=[*MODELS, "registered"], help="one part alone")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--out", type=Path, default=None, help=f"the result file; {OUT.relative_to(measure.ROOT)} unless quick")
    options = parser.parse_args(arguments)
    torch.set_num_threads(1)
    wanted = [options.only] if options.only else [*MODELS, "registered"]
    rounds = 1 if options.quick else options.rounds
    out = options.out or (None if options.quick else OUT)
    with measure.alone():
        results: dict[str, Any] = json.loads(out.read_text()) if options.only and out is not None and out.exists() else {}
        results = {"run": "embedded", "targets": "all-linear", "models": {}, **results}
        made = {"rounds": rounds, "environment": measure.environment()}
        for name in [name for name in wanted if name in MODELS]:
            build, work = MODELS[name]
            results["models"][name] = measure_model(build, QUICK if options.quick else work, rounds)
            results |= made
        if "registered" in wanted:
            counts = (8, 16) if options.quick else REGISTERED
            results["registered"] = measure_registered(counts, QUICK if options.quick else Work(32, 8, 8), rounds)
            results["registered_made"] = made
        print(table(results))
        if out is not None:
            out.parent.mkdir(parents=True, exist_ok=True)
            out.write_text(json.dumps(results, indent=1, ensure_ascii=False) + "\n")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
