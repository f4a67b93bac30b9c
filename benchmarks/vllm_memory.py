"""Where vLLM's memory goes while it serves: `python -m benchmarks.vllm_memory [--out FILE]`, in vLLM's environment, five minutes.

models/books-4m on the processor, one thread, each in a process of its own: as vLLM comes; with the plugin and adapters; as it
comes, with few prepared matrix products kept. Memory after batches of one size, after batches of all sizes from 1 to 64, after
the same sizes again and again, and with the plugin after many more adapters. Writes results/serving/vllm-memory.json and .md.
"""

import argparse
import json
import os
import random
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
OUT = ROOT / "results" / "serving" / "vllm-memory.json"
ENVIRONMENT = {
    "HF_HUB_OFFLINE": "1",
    "VLLM_NO_USAGE_STATS": "1",
    "VLLM_CPU_KVCACHE_SPACE": "1",
    "VLLM_CPU_OMP_THREADS_BIND": "nobind",
    "VLLM_ENABLE_V1_MULTIPROCESSING": "0",
    "VLLM_LOGGING_LEVEL": "ERROR",
    "OMP_NUM_THREADS": "1",
}
FEW = {"ONEDNN_PRIMITIVE_CACHE_CAPACITY": "8", "LRU_CACHE_CAPACITY": "8"}
"""How many prepared products oneDNN keeps, and torch's own layer over it; 1024 each where nothing is said."""
KINDS = {"plain": "vLLM alone", "vera": "with the plugin and adapters", "few": "vLLM alone, eight prepared products kept"}
RANK, SLOTS, MEMORY, MORE = 64, 64, 256, 1728
REQUESTS, PROMPT, TOKENS, AGAIN = 64, 12, 3, 3


def measured(kind: str, folder: str) -> list[tuple[str, float]]:
    """[(after what, MiB of this process)]. folder: of the store."""
    os.environ.update(ENVIRONMENT)
    if kind != "vera":
        os.environ["VLLM_PLUGINS"] = ""
    if kind == "few":
        os.environ.update(FEW)
    import psutil
    from vllm import LLM, SamplingParams

    options: dict[str, Any] = {"dtype": "float32", "max_model_len": 64, "max_num_seqs": 64, "num_gpu_blocks_override": 256}
    draw, store = random.Random(0), None
    if kind == "vera":
        from veralib.store import open_store

        store = open_store(folder)
        options |= {"enable_lora": True, "max_loras": SLOTS, "max_cpu_loras": MEMORY}
        options["additional_config"] = {"vera": {"store": folder, "max_rank": RANK}}
    llm = LLM(str(ROOT / "models" / "books-4m"), enforce_eager=True, enable_prefix_caching=False, **options)
    sampling = SamplingParams(temperature=0, max_tokens=TOKENS, ignore_eos=True)

    def run(requests: int, names: Sequence[int] = ()) -> None:
        loras = None
        if store is not None:
            from veralib.serving.vllm import lora_request

            loras = [lora_request(store, f"a{i}") for i in names or [draw.randrange(MEMORY) for _ in range(requests)]]
        prompts = [{"prompt_token_ids": [draw.randrange(5, 3000) for _ in range(PROMPT)]} for _ in range(requests)]
        llm.generate(prompts, sampling, use_tqdm=False, lora_request=loras)

    found = []

    def note(what: str) -> None:
        found.append((what, psutil.Process().memory_info().rss / 2**20))

    run(REQUESTS)
    note("the first batch")
    for _ in range(100):
        run(REQUESTS)
    note(f"a hundred batches of {REQUESTS} requests")
    for _ in range(1 + AGAIN):
        for requests in draw.sample(range(1, REQUESTS + 1), REQUESTS):
            run(requests)
        note(f"batches of 1 to {REQUESTS} requests" + (", again" if len(found) > 2 else ""))
    if store is not None:
        for start in range(MEMORY, MEMORY + MORE, REQUESTS):
            run(REQUESTS, range(start, start + REQUESTS))
        note(f"{MORE:,} other adapters, each once")
    return found


def fill(folder: str) -> None:
    """Puts adapters with random vectors into a store."""
    import torch
    from transformers import AutoModelForCausalLM

    from veralib import Adapter, VeraConfig, attach
    from veralib.store import open_store

    model = AutoModelForCausalLM.from_pretrained(ROOT / "models" / "books-4m", dtype=torch.float32)
    one = attach(model, VeraConfig(rank=RANK)).adapter("default")
    store = open_store(folder, "packed")
    made = (Adapter(one.config, one.basis, one.base, {u: (d, torch.randn(len(b))) for u, (d, b) in one.vectors.items()})
            for _ in range(MEMORY + MORE))  # fmt: skip
    store.put_many((f"a{i}", adapter) for i, adapter in enumerate(made))


def render(result: dict[str, Any]) -> str:
    """The Markdown page."""
    lines = [
        "# Where vLLM's memory goes while it serves",
        "",
        "Rendered by `python -m benchmarks.vllm_memory`; nothing is typed. MiB of one process, engine and worker in it, on the "
        f"processor with one thread: models/books-4m in float32, prompts of {PROMPT} tokens; with the plugin {MEMORY} adapters "
        f"of rank {RANK} in memory and {SLOTS} slots; the last column with {' '.join(f'{k}={v}' for k, v in FEW.items())}.",
        "",
        *(f"| after | {' | '.join(KINDS.values())} |", "|---" * (1 + len(KINDS)) + "|"),
    ]
    rows = max((result[kind] for kind in KINDS), key=len)
    for i, (what, _) in enumerate(rows):
        cells = [f"{result[kind][i][1]:.0f}" if i < len(result[kind]) else "" for kind in KINDS]
        lines.append(f"| {what} | {' | '.join(cells)} |")
    return "\n".join(lines) + "\n"


def main() -> None:
    """Measures one kind after the other."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=OUT)
    parser.add_argument("--child", nargs=2, help=argparse.SUPPRESS)  # what a child measures, and the store's folder
    options = parser.parse_args()
    if options.child:
        print(json.dumps(measured(*options.child)))
        return
    from . import measure

    result: dict[str, Any] = {}
    with tempfile.TemporaryDirectory() as folder, measure.alone():
        fill(folder)
        for kind in KINDS:
            command = [sys.executable, "-m", "benchmarks.vllm_memory", "--child", kind, folder]
            child = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True, cwd=ROOT)
            result[kind] = json.loads(child.stdout.splitlines()[-1])
    result["machine"] = measure.environment()
    options.out.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")
    options.out.with_suffix(".md").write_text(render(result), encoding="utf-8")
    print(render(result))


if __name__ == "__main__":
    main()
