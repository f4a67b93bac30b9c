"""One decode step of Llama-7B-shape layers for batches whose rows have different adapters: step ÷ base.

One token a row, no cache to read: the base step is its least, so the ratios are their largest. Base, veralib (rows()) and a
mixed LoRA (lora_mixed.py) run on the same weights, each step as a CUDA graph replayed, and without one; where a graph can't
be captured the file says why. Rows are sorted by adapter, equally many each, as the best LoRA needs; veralib doesn't care.
"""

import dataclasses
import gc
from collections.abc import Callable
from typing import Any

import torch
from torch import nn

from veralib import kernels

from . import common
from .lora_mixed import MixedLora, grouped_mm

BATCHES = (1, 4, 16, 64, 128, 256)
FLAT_BATCH, FLAT_DISTINCT = 64, (1, 8, 32, 64)
REGISTERED = (64, 256, 1024)
ROUNDS, REPEATS = 9, 10


def graphed(run: Callable[[], Any], clock: common.Clock) -> Callable[[], Any]:
    """A replay of run() captured as a CUDA graph. Raises where run() waits for the device, which no graph can hold."""
    torch.cuda.set_sync_debug_mode("error")  # asks before capturing: a capture that fails leaves the allocator in disorder
    try:
        run()
    finally:
        torch.cuda.set_sync_debug_mode("default")
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for _ in range(3):
            run()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        kept = run()
    graph.kept = kept  # its memory is the graph's output
    return graph.replay


def fill(model: nn.Module, rank: int, count: int) -> Any:
    """A handle on the model with `count` resident adapters "0", "1", … of random vectors."""
    import veralib

    vera = veralib.attach(model)
    vera.add(veralib.VeraConfig(rank=rank, targets=list(common.LINEARS)), "seed")
    blank = vera.adapter("seed")
    vera.remove("seed")
    generator = torch.Generator().manual_seed(3)
    draw = lambda v: 0.1 * torch.randn(v.shape, generator=generator)  # noqa: E731
    first = {unit: (draw(d), draw(b)) for unit, (d, b) in blank.vectors.items()}
    for k in range(count):
        # One draw, scaled anew for each: they differ, and a thousand draws of a million numbers would take minutes.
        vectors = {unit: (d * (1 + k / count), b) for unit, (d, b) in first.items()}
        vera.load(dataclasses.replace(blank, vectors=vectors), str(k))
    return vera


def rows(batch: int, distinct: int) -> list[int]:
    return [i * distinct // batch for i in range(batch)]


class Decode:
    """Runs steps of one model over one x a batch size, and keeps what was measured."""

    def __init__(self, options: common.Options, results: common.Results, base: nn.Module | None = None) -> None:
        self.options, self.results, self.clock = options, results, options.clock
        self.rounds, self.repeats = (2, 1) if options.tiny else (ROUNDS, REPEATS)
        self.base = common.build(options.size, self.clock.device).eval() if base is None else base

    def x(self, batch: int) -> torch.Tensor:
        generator = torch.Generator().manual_seed(batch)
        width = self.options.size.hidden
        return torch.randn(batch, 1, width, generator=generator).to(self.clock.device, torch.bfloat16)

    def measure(self, label: dict[str, Any], runs: dict[str, Callable[[], Any]]) -> None:
        """Times all runs, eager and as graphs, interleaved, and writes one entry."""
        ready: dict[str, Callable[[], Any]] = {}
        why: dict[str, str] = {}
        for name, run in runs.items():
            try:
                run()
                ready[f"{name} eager"] = run
            except Exception as e:
                why[name] = f"{type(e).__name__}: {e}"[:300]
                continue
            if self.clock.cuda:
                try:
                    ready[f"{name} graph"] = graphed(run, self.clock)
                except Exception as e:
                    why[f"{name} graph"] = f"{type(e).__name__}: {e}"[:300]
                    torch.cuda.synchronize()
        taken = self.clock.interleave(ready, self.rounds, self.repeats)
        for entry in taken.values():
            del entry["rounds"]
        self.results.put("steps", label | {"contestants": taken, "failed": why})
        mode = "graph" if "base graph" in taken else "eager"
        floor = taken[f"base {mode}"]["ms"]["median"]
        shown = {n: f"{t['ms']['median'] / floor:.3f}" for n, t in taken.items() if n.endswith(mode)}
        print(label, f"base {floor:.3f} ms", shown, why or "", flush=True)

    @torch.no_grad()
    def step(self, model: nn.Module, x: torch.Tensor) -> torch.Tensor:
        return model(inputs_embeds=x, use_cache=False).last_hidden_state

    def veralib(self, model: nn.Module, vera: Any, x: torch.Tensor, distinct: int, fused: bool = False) -> Callable[[], Any]:
        """fused: with the Triton kernels."""
        apart = len(vera.names) // distinct  # the adapters in use lie all over the bank
        names = [str(k * apart) for k in rows(len(x), distinct)]

        def run() -> Any:
            kernels.use(fused)
            with vera.rows(names):
                return self.step(model, x)

        return run

    def lora(self, model: nn.Module, lora: MixedLora, x: torch.Tensor, distinct: int, way: Any) -> Callable[[], Any]:
        lora.choose(rows(len(x), distinct), way, self.clock.device)
        state = (lora.index, lora.offsets)  # each captured graph reads its own

        def run() -> Any:
            lora.way, lora.distinct, (lora.index, lora.offsets) = way, distinct, state
            lora._x = None
            return self.step(model, x)

        run()
        return run


def main(arguments: list[str] | None = None) -> int:
    """Writes decode.json: by batch and rank, by distinct adapters, by registered adapters, bytes an adapter."""
    options = common.options(__doc__, arguments)
    results = options.results("decode")
    decode = Decode(options, results)
    ranks, loras = ((4, 8), (1, 8)) if options.tiny else ((256, 1024), (16, 1))
    batches = (1, 4) if options.tiny else BATCHES
    fused = kernels.installed() and decode.clock.cuda
    flat, shares = (4, (1, 2, 4)) if options.tiny else (FLAT_BATCH, FLAT_DISTINCT)
    most = max(batches)
    models: dict[str, tuple[nn.Module, Any]] = {}
    for r in ranks:
        with results.attempt(f"load veralib {r}"):
            before = decode.clock.allocated()
            model = common.twin(decode.base)
            models[f"veralib-{r}"] = (model, vera := fill(model, r, most))
            decode.step(model, decode.x(1))
            tensors = 4 * sum(u.r + u.m for u in next(iter(vera.members.values())).layout.units)
            taken = decode.clock.allocated() - before
            results.put("memory", {"adapters": most, "tensor_bytes": tensors, "resident_bytes": taken}, f"veralib-{r}")
    for r in loras:
        with results.attempt(f"load lora {r}"):
            model = common.twin(decode.base)
            generator = torch.Generator(decode.clock.device).manual_seed(4)
            models[f"lora-{r}"] = (model, lora := MixedLora(model, r, most, generator))
            results.put(
                "memory", {"adapters": most, "tensor_bytes": lora.bytes // most, "resident_bytes": lora.bytes}, f"lora-{r}"
            )

    def contest(batch: int, distinct: int, ways: tuple[str, ...]) -> None:
        x = decode.x(batch)
        runs: dict[str, Callable[[], Any]] = {"base": lambda: decode.step(decode.base, x)}
        for name, (model, handle) in models.items():
            if name.startswith("veralib"):
                runs[name] = decode.veralib(model, handle, x, distinct)
                if fused:
                    runs[f"{name} kernels"] = decode.veralib(model, handle, x, distinct, fused=True)
                continue
            for way in ways:
                if way != "grouped" or (grouped_mm is not None and handle.rank % 8 == 0 and decode.clock.cuda):
                    with results.attempt(f"{name} {way} {batch}"):
                        runs[f"{name} {way}"] = decode.lora(model, handle, x, distinct, way)
        with results.attempt(f"batch {batch}, {distinct} distinct"):
            decode.measure({"batch": batch, "distinct": distinct, "registered": most}, runs)
        gc.collect()

    for batch in reversed(batches):
        if not options.late:
            contest(batch, batch, ("sorted", "gathered", "grouped") if batch in (16, most) else ("sorted",))
    for distinct in shares:
        if distinct != flat and not options.late:
            contest(flat, distinct, ("sorted",))
    name = f"veralib-{ranks[0]}"
    if name in models and not options.tiny:
        del models[f"veralib-{ranks[1]}"]
        for count in REGISTERED:
            if not options.late:
                with results.attempt(f"{count} registered"):
                    model, x = common.twin(decode.base), decode.x(flat)
                    run = decode.veralib(model, fill(model, ranks[0], count), x, flat)
                    runs = {"base": lambda x=x: decode.step(decode.base, x), name: run}
                    decode.measure({"batch": flat, "distinct": flat, "registered": count, "flatness": True}, runs)
                gc.collect()
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
