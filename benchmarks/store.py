"""How fast and how large a store is: `python -m benchmarks.store [--small 1000000] [--large 2000] [--out FOLDER]`.

small: adapters of 4 KB, packed; large: adapters of a 7B model's q and v at r=256, 0.56 MB in bfloat16, packed and in a folder.
Values are generated. Reads of "uncached" adapters come after the kernel was told to drop the file's pages.
"""

import argparse
import json
import os
import random
import shutil
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from veralib import Adapter, VeraConfig
from veralib.adapter import BaseModel
from veralib.basis import Basis
from veralib.store import CachedStore, Store, open_store

from . import measure

BATCH = 1000
READS = 5000


def adapter(layers: int, out: int, inputs: int, rank: int, seed: int = 0) -> Adapter:
    """One with `layers` adapted linears of out x inputs, its vectors drawn."""
    generator = torch.Generator().manual_seed(seed)
    names = [f"model.layers.{i // 2}.self_attn.{'qv'[i % 2]}_proj" for i in range(layers)]
    return Adapter(
        VeraConfig(rank=rank, targets=["q_proj", "v_proj"]),
        Basis("philox-u8", 0),
        BaseModel("meta-llama/Llama-2-7b-hf", "", {n: (out, inputs) for n in names}, {n: "0" * 16 for n in names}),
        {n: (torch.randn(rank, generator=generator), torch.randn(out, generator=generator)) for n in names},
    )


def variants(base: Adapter, count: int) -> list[Adapter]:
    """Adapters of one configuration and other values, as a fleet gives them."""
    from dataclasses import replace

    return [replace(base, vectors={u: (d + i, b - i) for u, (d, b) in base.vectors.items()}) for i in range(count)]


def fill(store: Store, base: Adapter, count: int, log: Callable[[str], None]) -> float:
    """Seconds to put `count` adapters, BATCH at a time, the making of them left out."""
    pool = variants(base, min(count, BATCH))
    taken = 0.0
    for k in range(0, count, BATCH):
        items = [(name_of(k + i), a) for i, a in enumerate(pool[: count - k])]
        start = time.perf_counter()
        store.put_many(items)
        taken += time.perf_counter() - start
        if (k + BATCH) % (count // 10 or 1) == 0:
            log(f"    {k + BATCH:,} put, {(k + BATCH) / taken:,.0f} a second")
    return taken


def name_of(i: int) -> str:
    """A user's name of a usual length."""
    return f"user-{i:08d}@example"


def milliseconds(action: Callable[[str], Any], names: list[str]) -> dict[str, float]:
    """p50 and p99 of action(name)."""
    times = []
    for name in names:
        start = time.perf_counter()
        action(name)
        times.append(1000 * (time.perf_counter() - start))
    cuts = statistics.quantiles(times, n=100, method="inclusive")
    return {"p50": statistics.median(times), "p99": cuts[98], "n": len(times)}


def bytes_of(folder: Path) -> int:
    """Bytes of all files in a folder."""
    return sum(p.stat().st_size for p in folder.rglob("*") if p.is_file())


def forget_pages(folder: Path) -> None:
    """Tells the kernel to drop what it holds of these files."""
    os.sync()
    for path in folder.rglob("*.vera"):
        handle = os.open(path, os.O_RDONLY)
        os.posix_fadvise(handle, 0, 0, os.POSIX_FADV_DONTNEED)
        os.close(handle)


def measure_store(
    folder: Path, kind: Any, precision: Any, base: Adapter, count: int, log: Callable[[str], None]
) -> dict[str, Any]:
    """Everything about one store of `count` adapters."""
    store = open_store(folder, kind=kind, precision=precision)
    seconds = fill(store, base, count, log)
    payload = base.parameters * {"float32": 4, "bfloat16": 2, "int8": 1}[precision]
    chooser = random.Random(0)
    single = milliseconds(lambda n: store.put(n, base), [f"single {i}" for i in range(100)])
    store.close()
    size = bytes_of(folder)
    starts = []
    for _ in range(5):
        start = time.perf_counter()
        store = open_store(folder)
        starts.append(1000 * (time.perf_counter() - start))
        store.close()
    store = open_store(folder)
    names = [name_of(chooser.randrange(count)) for _ in range(min(READS, count))]
    store.get(names[0])
    forget_pages(folder)
    cold = milliseconds(store.get, names[: len(names) // 2])
    warm = milliseconds(store.get, names[: len(names) // 2])
    cache = CachedStore(store, max_bytes=2**30)
    few = names[:200]
    for name in few:
        cache.get(name)
    cached = milliseconds(cache.get, few * 10)
    found = {
        "kind": kind,
        "precision": precision,
        "count": count,
        "payload_bytes": payload,
        "bytes": size,
        "overhead": size / (payload * (count + 100)) - 1,
        "put_many_per_second": count / seconds,
        "single_put_ms": single,
        "open_ms": statistics.median(starts),
        "get_uncached_ms": cold,
        "get_in_page_cache_ms": warm,
        "get_cached_ms": cached,
    }
    log(f"  {kind} {precision}: " + ", ".join(f"{k} {v}" for k, v in found.items() if k not in ("kind", "precision")))
    return found


# (model, layers, hidden size): query and value adapted, as in the paper's introduction
MODELS = (("GPT-3 175B", 96, 12288), ("Llama-2 7B", 32, 4096))
USERS = 1_000_000


def arithmetic() -> list[str]:
    """Bytes for a million users, by the parameters alone; the paper's 275 TB is LoRA r=16 on GPT-3 in float32."""
    lines = ["| model | method | parameters a user | float32, one user | a million users | bfloat16 | int8 |", "|" + "---|" * 7]
    for model, layers, hidden in MODELS:
        linears = 2 * layers
        counts = {f"LoRA r={r}": linears * r * 2 * hidden for r in (16, 1)}
        counts |= {f"VeRA r={r}": linears * (hidden + r) for r in (1024, 256)}
        for name, count in counts.items():
            sizes = [size(4 * count), size(4 * count * USERS)]
            # int8 has a float32 scale for each vector; of LoRA's matrices a scale a row would cost the same order
            sizes += [size(2 * count * USERS), size((count + 8 * linears) * USERS) if name.startswith("VeRA") else ""]
            lines.append(f"| {model} | {name} | {count:,} | {' | '.join(sizes)} |")
    return lines


def size(count: float) -> str:
    """ "275.3 TiB" and the like."""
    for unit in ("bytes", "KiB", "MiB", "GiB", "TiB"):
        if count < 1024 or unit == "TiB":
            return f"{count:,.1f} {unit}"
        count /= 1024
    raise AssertionError


def render(result: dict[str, Any]) -> str:
    """The Markdown page of a result."""
    head = ["store", "adapters", "payload", "overhead", "put_many a second", "put, p50 / p99 ms", "open ms"]
    head += ["get uncached, p50 / p99 ms", "get in page cache", "get cached"]
    pair = lambda d: f"{d['p50']:.3f} / {d['p99']:.3f}"  # noqa: E731
    rows = [
        [
            f"{s['kind']}, {s['precision']}",
            f"{s['count']:,}",
            size(s["payload_bytes"]),
            f"{100 * s['overhead']:.1f} %",
            f"{s['put_many_per_second']:,.0f}",
            pair(s["single_put_ms"]),
            f"{s['open_ms']:.1f}",
            pair(s["get_uncached_ms"]),
            pair(s["get_in_page_cache_ms"]),
            pair(s["get_cached_ms"]),
        ]
        for s in result["stores"]
    ]
    e = result["environment"]
    return "\n".join(
        [
            "# The store, measured",
            "",
            "Rendered by `python -m benchmarks.store`; nothing here is typed. Goals: overhead at most 10 %, put_many at least",
            "5,000 a second at 4 KB, cached get at most 0.1 ms, uncached at most 2 ms at 0.56 MB. A single put is durable when",
            "it returns.",
            "",
            f"| {' | '.join(head)} |",
            "|" + "---|" * len(head),
            *(f"| {' | '.join(r)} |" for r in rows),
            "",
            f"{e['processor']}, {e['cores']} cores, one thread; veralib {e['commit']}, {e['date']}.",
            "",
            "## A million users, by arithmetic",
            "",
            *arithmetic(),
            "",
        ]
    )


def main(arguments: list[str] | None = None) -> int:
    """Writes store.json and README.md into the output folder."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.store", description=__doc__)
    parser.add_argument("--small", type=int, default=1_000_000, help="adapters of 4 KB")
    parser.add_argument("--large", type=int, default=2_000, help="adapters of 0.56 MB")
    parser.add_argument("--out", type=Path, default=measure.ROOT / "results/store")
    parser.add_argument("--scratch", type=Path, help="folder for the stores; a temporary one unless told")
    options = parser.parse_args(arguments)
    torch.set_num_threads(1)
    options.out.mkdir(parents=True, exist_ok=True)
    scratch = Path(tempfile.mkdtemp(prefix="veralib-store-", dir=options.scratch))

    def log(line: str) -> None:
        print(line, flush=True)

    small, large = adapter(4, 240, 240, 16), adapter(64, 4096, 4096, 256)
    rows = [
        ("packed", "float32", small, options.small),
        ("packed", "bfloat16", large, options.large),
        ("folder", "bfloat16", large, options.large),
        ("packed", "int8", large, options.large),
    ]
    try:
        stores = []
        with measure.alone():
            for i, (kind, precision, base, count) in enumerate(rows):
                stores.append(measure_store(scratch / str(i), kind, precision, base, count, log))
                shutil.rmtree(scratch / str(i))
        result = {"run": "store", "environment": measure.environment(), "stores": stores}
        (options.out / "store.json").write_text(json.dumps(result, indent=1) + "\n")
        (options.out / "README.md").write_text(render(result))
    finally:
        shutil.rmtree(scratch, ignore_errors=True)
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
