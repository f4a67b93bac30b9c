"""What VeRA adapters cost in vLLM: `python -m benchmarks.bench_vllm [--only PART …] [--out FILE]`.

A Llama of 59 M parameters with random weights, one engine in this process; in every round the base alone and batches with 1, 8,
32 and 256 distinct adapters in turn, so that what disturbs one disturbs the others. One thread, its processor time. Needs
vLLM: `make test-vllm` builds .venv-vllm, and this runs in it. Renders the tables of docs/serving-vllm.md: one of a
processor that has bf16 arithmetic, one of a processor that hasn't.
"""

import argparse
import gc
import json
import os
import re
import statistics
import tempfile
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

ENVIRONMENT = {
    "HF_HUB_OFFLINE": "1",
    "VLLM_NO_USAGE_STATS": "1",
    "VLLM_CPU_KVCACHE_SPACE": "2",
    "VLLM_CPU_OMP_THREADS_BIND": "nobind",
    "VLLM_ENABLE_V1_MULTIPROCESSING": "0",
    "VLLM_LOGGING_LEVEL": "WARNING",
    "OMP_NUM_THREADS": "1",
}
ROOT = Path(__file__).resolve().parent.parent
RESULTS = ROOT / "results" / "serving"
PAGE = ROOT / "docs" / "serving-vllm.md"
PART = r"(<!-- {0} -->\n).*?(<!-- /{0} -->)"
RANK = 256
SHAPE = {"hidden_size": 512, "intermediate_size": 1408, "num_hidden_layers": 8, "num_attention_heads": 8, "vocab_size": 32000}
PROMPT = 32
PARTS = ["float32", "bfloat16", "lora", "cold", "registered"]


def build(folder: Path, adapters: int) -> Any:
    """The base model and a store with `adapters` adapters of rank 256 on every linear; the store."""
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    from veralib import Adapter, VeraConfig, attach
    from veralib.store import open_store

    torch.manual_seed(0)
    model = LlamaForCausalLM(LlamaConfig(**SHAPE, num_key_value_heads=8, max_position_embeddings=512))
    model.save_pretrained(folder / "base")
    one = attach(model, VeraConfig(rank=RANK, targets="all-linear")).adapter("default")
    store = open_store(folder / "store", "packed")

    def made() -> Iterator[tuple[str, Adapter]]:
        for i in range(adapters):
            vectors = {u: (0.1 + 0.01 * torch.randn(len(d)), 0.1 * torch.randn(len(b))) for u, (d, b) in one.vectors.items()}
            yield f"a{i}", Adapter(one.config, one.basis, one.base, vectors)

    store.put_many(made())
    return store


def lora_adapters(folder: Path, rank: int, count: int) -> list[str]:
    """Folders of `count` LoRA adapters of one rank on every linear, as PEFT writes them."""
    import torch
    from safetensors.torch import save_file

    h, i = SHAPE["hidden_size"], SHAPE["intermediate_size"]
    shapes = {f"self_attn.{p}_proj": (h, h) for p in "qkvo"} | {"mlp.gate_proj": (i, h), "mlp.up_proj": (i, h)}
    shapes["mlp.down_proj"] = (h, i)
    config = {"peft_type": "LORA", "r": rank, "lora_alpha": rank, "bias": "none", "base_model_name_or_path": "base"}
    config["target_modules"] = sorted({name.split(".")[1] for name in shapes})
    paths = []
    for k in range(count):
        path = folder / f"lora{rank}-{k}"
        path.mkdir(parents=True)
        tensors = {}
        for layer in range(SHAPE["num_hidden_layers"]):
            for name, (m, n) in shapes.items():
                key = f"base_model.model.model.layers.{layer}.{name}"
                tensors[f"{key}.lora_A.weight"] = 0.02 * torch.randn(rank, n)
                tensors[f"{key}.lora_B.weight"] = 0.02 * torch.randn(m, rank)
        save_file(tensors, path / "adapter_model.safetensors")
        (path / "adapter_config.json").write_text(json.dumps(config))
        paths.append(str(path))
    return paths


def adapter_bytes(store: Any) -> dict[str, int]:
    """Of one adapter in float32: VeRA's, and a LoRA's on the same linears."""
    one = store.get("a0")
    sides = sum(m + n for m, n in one.base.layers.values())
    return {f"VeRA r={RANK}": one.bytes, **{f"LoRA r={r}": 4 * r * sides for r in (1, 8, 16)}}


class Engine:
    """vLLM in this process."""

    def __init__(self, folder: Path, dtype: str, slots: int, **options: Any) -> None:
        from vllm import LLM

        self.llm = LLM(
            str(folder / "base"), dtype=dtype, max_model_len=128, enforce_eager=True, skip_tokenizer_init=True,
            enable_lora=True, max_loras=slots, max_num_seqs=320, max_num_batched_tokens=8192,
            enable_prefix_caching=False, **options,
        )  # fmt: skip

    def run(self, adapters: Sequence[Any], requests: int, tokens: int, prompt: int = PROMPT) -> tuple[float, float]:
        """Seconds for `requests` requests of `prompt` + `tokens` tokens, adapters in turn; median seconds of a decode step."""
        from vllm import SamplingParams

        from . import measure

        engine = self.llm.llm_engine
        sampling = SamplingParams(max_tokens=tokens, temperature=0, ignore_eos=True, detokenize=False)
        for i in range(requests):
            ids = {"prompt_token_ids": [3 + (7 * i + 11 * j) % 31000 for j in range(prompt)]}
            engine.add_request(str(i), ids, sampling, lora_request=adapters[i % len(adapters)] if adapters else None)
        steps = []
        while engine.has_unfinished_requests():
            start = measure.clock()
            engine.step()
            steps.append(measure.clock() - start)
        return sum(steps), statistics.median(steps[-(tokens - 2) :])

    def first_token(self, adapter: Any) -> float:
        """The clock when a request of 8 tokens has its first answer; ends with the request."""
        from vllm import SamplingParams

        from . import measure

        sampling = SamplingParams(max_tokens=1, temperature=0, ignore_eos=True, detokenize=False)
        engine = self.llm.llm_engine
        engine.add_request("one", {"prompt_token_ids": list(range(3, 11))}, sampling, lora_request=adapter)
        while not any(out.finished for out in engine.step()):
            pass
        return measure.clock()

    def close(self) -> None:
        """Lets go of the model and its cache."""
        self.llm.llm_engine.engine_core.shutdown()
        del self.llm
        gc.collect()


def compare(
    engine: Engine, cases: dict[str, Sequence[Any]], requests: int, prompt: int, tokens: int, rounds: int
) -> dict[str, Any]:
    """{case: {total, step: time ÷ base's of the same round}} and the base's own seconds; "base" is among the cases."""
    for adapters in cases.values():
        engine.run(adapters, requests, 2, prompt)
    times: dict[str, list[tuple[float, float]]] = {name: [] for name in cases}
    names = list(cases)
    for k in range(rounds):
        for name in names[k % len(names) :] + names[: k % len(names)]:
            times[name].append(engine.run(cases[name], requests, tokens, prompt))
    out: dict[str, Any] = {"requests": requests, "prompt": prompt, "tokens": tokens, "rounds": rounds, "cases": {}}
    for name in names:
        total = [t / b for (t, _), (b, _) in zip(times[name], times["base"], strict=True)]
        step = [s / b for (_, s), (_, b) in zip(times[name], times["base"], strict=True)]
        out["cases"][name] = {
            "time_over_base": round(statistics.median(total), 3),
            "decode_step_over_base": round(statistics.median(step), 3),
            "seconds": round(statistics.median(t for t, _ in times[name]), 3),
            "decode_step_ms": round(1000 * statistics.median(s for _, s in times[name]), 2),
        }
        print(f"  {name:>6}: {out['cases'][name]}", flush=True)
    return out


def slow(dtype: str) -> bool:
    """Whether this processor has no arithmetic for the type."""
    import torch

    from veralib.products import emulated

    return emulated(torch.empty(0, dtype=getattr(torch, dtype)))


def vera(folder: Path, store: Any, dtype: str) -> list[dict[str, Any]]:
    """0, 1, 8, 32 distinct adapters in 64 requests; 1 and 256 in 256."""
    from veralib.serving.vllm import lora_request

    engine = Engine(
        folder, dtype, 256, max_cpu_loras=256, additional_config={"vera": {"store": str(folder / "store"), "max_rank": RANK}}
    )
    every = [lora_request(store, f"a{i}") for i in range(256)]
    cases = {"base": (), **{str(n): every[:n] for n in (1, 8, 32)}}
    if slow(dtype):
        out = [compare(engine, cases, 32, 16, 8, 2)]
    else:
        out = [compare(engine, cases, 64, PROMPT, 32, 5)]
        out.append(compare(engine, {"base": (), "1": every[:1], "256": every}, 256, 8, 8, 4))
        out.append(compare(engine, {"base": (), "32": every[:32]}, 64, 8, 8, 4))  # beside LoRA's
    engine.close()
    return out


def lora(folder: Path, rank: int, dtype: str) -> dict[str, Any]:
    """vLLM's own LoRA, in an engine of its own, whose base alone is slower the larger its slots are: see the tokens a second."""
    from vllm.lora.request import LoRARequest

    engine = Engine(folder, dtype, 32, max_cpu_loras=32, max_lora_rank=rank)
    paths = lora_adapters(folder / dtype, rank, 32)
    every = [LoRARequest(f"l{i}", i + 1, path) for i, path in enumerate(paths)]
    out = compare(engine, {"base": (), "1": every[:1], "32": every}, 64, 8, 8, 1)
    engine.close()
    return out


def registered(folder: Path, store: Any) -> list[dict[str, Any]]:
    """The decode step of 256 sequences with 256 adapters, while more and more are in memory."""
    import torch
    from vllm.lora.request import LoRARequest

    from veralib.basis import Basis
    from veralib.serving.vllm import lora_request
    from veralib.serving.vllm.wire import Unit, Vectors, pack

    engine = Engine(
        folder,
        "float32",
        256,
        max_cpu_loras=100_000,
        additional_config={"vera": {"store": str(folder / "store"), "max_rank": RANK}},
    )
    used = [lora_request(store, f"a{i}") for i in range(256)]
    unit = Unit("model.layers.0.self_attn.q_proj", 512, 512, torch.ones(16), torch.ones(512))
    path = pack(Vectors(Basis("philox-u8", 0), (unit,)))
    engine.run(used, 256, 2, 8)
    out, have = [], 256
    for count in (256, 10_000, 100_000):
        start = time.perf_counter()
        for i in range(have, count):
            engine.llm.llm_engine.add_lora(LoRARequest(f"more{i}", 10**9 + i, path))
        seconds, added, have = time.perf_counter() - start, count - have, count
        steps = [engine.run(used, 256, 6, 8)[1] for _ in range(2)]
        out.append(
            {
                "registered": count,
                "decode_step_ms": round(1000 * min(steps), 2),
                "load_ms": round(1000 * seconds / added, 3) if added else None,
            }
        )
        print(f"  {out[-1]}", flush=True)
    engine.close()
    return out


def cold(folder: Path, store: Any, rounds: int = 40) -> dict[str, Any]:
    """Milliseconds to the first token after a prompt of 8: the base; an adapter that only the store has; the same again."""
    from veralib.serving.vllm import lora_request

    from . import measure

    engine = Engine(
        folder, "float32", 256, max_cpu_loras=256, additional_config={"vera": {"store": str(folder / "store"), "max_rank": RANK}}
    )
    taken: dict[str, list[float]] = {"base": [], "cold": [], "resident": []}
    for k in range(rounds + 3):
        for case, name in (("base", None), ("cold", f"a{k}"), ("resident", f"a{k}")):
            start = measure.clock()
            taken[case].append(1000 * (engine.first_token(lora_request(store, name) if name else None) - start))
    engine.close()
    extra = [c - b for b, c in zip(taken["base"][3:], taken["cold"][3:], strict=True)]
    out = {f"{case}_ms": round(statistics.median(times[3:]), 2) for case, times in taken.items()}
    out |= {"rounds": rounds, "over_base_ms": round(statistics.median(extra), 2), "over_base_most_ms": round(max(extra), 2)}
    print(f"  {out}", flush=True)
    return out


def table(result: dict[str, Any]) -> str:
    """Markdown: the rows of a result file."""

    def row(name: str, what: str, run: dict[str, Any]) -> str:
        cells = []
        for case in ("base", "1", "8", "32", "256"):
            if (found := run["cases"].get(case)) is None:
                cells.append("")
                continue
            speed = run["requests"] * run["tokens"] / found["seconds"]
            cells.append(f"{found['time_over_base']:.2f} ({found['decode_step_over_base']:.2f}), {speed:.0f}/s")
        work = f"{run['requests']} × {run['prompt']} + {run['tokens']} tokens"
        return f"| {name} | {what} | {work} | {' | '.join(cells)} |"

    lines = ["| | dtype | requests | 0 adapters | 1 | 8 | 32 | 256 |", "|---|---|---|---|---|---|---|---|"]
    for dtype in ("bfloat16", "float32"):
        lines += [row(f"VeRA r={result['rank']}", dtype, run) for run in result.get(dtype, ())]
    for dtype, runs in result.get("lora", {}).items():
        lines += [row(f"LoRA r={rank}", dtype, run) for rank, run in runs.items()]
    if "registered" in result:
        steps = ", ".join(f"{r['registered']:,}: {r['decode_step_ms']:.0f} ms" for r in result["registered"])
        lines += ["", f"A decode step of 256 sequences with 256 adapters, by the number of adapters in memory: {steps}."]
    if "bytes" in result:
        lines += ["", f"Bytes of an adapter: {', '.join(f'{name} {size:,}' for name, size in result['bytes'].items())}."]
    if "cold" in result:
        c = result["cold"]
        lines += [
            "",
            f"First token after a prompt of 8: {c['base_ms']:.1f} ms with the base, {c['over_base_ms']:.1f} ms more (median of "
            f"{c['rounds']}; at most {c['over_base_most_ms']:.1f}) with an adapter that only the store had, "
            f"{c['resident_ms'] - c['base_ms']:.1f} ms more when it is asked for again.",
        ]
    return "\n".join(lines)


def render() -> None:
    """Puts the tables of what was run into the page."""
    text = PAGE.read_text()
    for name in ("vllm", "vllm-bf16"):
        if (path := RESULTS / f"{name}.json").exists():
            found = table(json.loads(path.read_text()))
            text = re.sub(PART.format(name), lambda m, found=found: f"{m[1]}{found}\n{m[2]}", text, flags=re.DOTALL)
    PAGE.write_text(text)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--only", nargs="+", choices=PARTS)
    parser.add_argument("--out", type=Path, help="left out: results/serving/vllm-bf16.json, vllm.json where bf16 is emulated")
    options = parser.parse_args()
    os.environ.update(ENVIRONMENT)
    import torch

    from . import measure

    torch.set_num_threads(1)
    parts = options.only or PARTS
    out = options.out or RESULTS / ("vllm.json" if slow("bfloat16") else "vllm-bf16.json")
    result: dict[str, Any] = json.loads(out.read_text()) if out.exists() else {"run": "vllm", "shape": SHAPE, "rank": RANK}
    with tempfile.TemporaryDirectory() as name, measure.alone():
        folder = Path(name)
        store = build(folder, 256)
        result["bytes"] = adapter_bytes(store)
        for part in parts:
            print(part, flush=True)
            if part == "lora":
                dtypes = [d for d in ("bfloat16", "float32") if not slow(d)]
                result[part] = {dtype: {str(rank): lora(folder, rank, dtype) for rank in (1, 8, 16)} for dtype in dtypes}
            elif part == "registered":
                result[part] = registered(folder, store)
            elif part == "cold":
                result[part] = cold(folder, store)
            else:
                result[part] = vera(folder, store, part)
            result["environment"] = measure.environment()
            out.parent.mkdir(parents=True, exist_ok=True)
            out.write_text(json.dumps(result, indent=1) + "\n")
    if options.out is None:
        render()


if __name__ == "__main__":
    main()
