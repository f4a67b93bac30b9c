"""Clocks, memory counts, the machine's ceilings and the base model of the GPU measurements."""

import argparse
import copy
import importlib.metadata
import json
import statistics
import time
import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn

from veralib import kernels

from .. import measure

LINEARS = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")


@dataclass(frozen=True)
class Size:
    """A Llama's shape. seven: Llama-7B's layers, as many as `layers` says; no embedding and no head are measured."""

    name: str
    hidden: int
    mlp: int
    heads: int
    layers: int

    @property
    def linears(self) -> dict[str, tuple[int, int]]:
        """Of one layer: name -> (m, n)."""
        h, f = self.hidden, self.mlp
        return {n: {"gate_proj": (f, h), "up_proj": (f, h), "down_proj": (h, f)}.get(n, (h, h)) for n in LINEARS}

    @property
    def weights(self) -> int:
        """Parameters of all linears of all layers."""
        return self.layers * sum(m * n for m, n in self.linears.values())


SEVEN = Size("seven", 4096, 11008, 32, 8)
TINY = Size("tiny", 64, 176, 4, 2)


def build(size: Size, device: torch.device, dtype: torch.dtype = torch.bfloat16, seed: int = 0) -> nn.Module:
    """transformers' LlamaModel of this size, its weights drawn from one seed, frozen, in training mode."""
    from transformers import LlamaConfig, LlamaModel

    config = LlamaConfig(
        hidden_size=size.hidden,
        intermediate_size=size.mlp,
        num_attention_heads=size.heads,
        num_key_value_heads=size.heads,
        num_hidden_layers=size.layers,
        vocab_size=256,  # the embedding isn't measured: inputs are vectors
        max_position_embeddings=4096,
        use_cache=False,
        attn_implementation="sdpa",
    )
    torch.manual_seed(seed)
    with device:
        model = LlamaModel(config)
    return model.to(dtype).requires_grad_(False).train()


def twin(model: nn.Module) -> nn.Module:
    """A copy with modules of its own and the same weights in memory."""
    return copy.deepcopy(model, {id(t): t for t in [*model.parameters(), *model.buffers()]})


@dataclass(frozen=True)
class Clock:
    """Times work on one device, and counts its memory."""

    device: torch.device

    @property
    def cuda(self) -> bool:
        return self.device.type == "cuda"

    def sync(self) -> None:
        if self.cuda:
            torch.cuda.synchronize()

    def time_ms(self, run: Callable[[], Any], repeats: int = 1) -> tuple[float, float]:
        """(ms on the device, ms until the host had given out the work), each of one run, out of `repeats` back to back.

        Where the two are equal the host is the slower one, and the device waits for it.
        """
        self.sync()
        begin = time.perf_counter()
        if not self.cuda:
            for _ in range(repeats):
                run()
            taken = 1e3 * (time.perf_counter() - begin) / repeats
            return taken, taken
        first, last = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        first.record()
        for _ in range(repeats):
            run()
        last.record()
        host = 1e3 * (time.perf_counter() - begin) / repeats
        last.synchronize()
        return first.elapsed_time(last) / repeats, host

    def interleave(self, runs: dict[str, Callable[[], Any]], rounds: int, repeats: int, warmup: int = 2) -> dict[str, dict]:
        """{name: {"ms", "host_ms"}} with the spread over the rounds; the order moves on by one from round to round."""
        names = list(runs)
        for name in names:
            for _ in range(warmup):
                runs[name]()
        taken: dict[str, list[tuple[float, float]]] = {n: [] for n in names}
        for r in range(rounds):
            for k in range(len(names)):
                name = names[(r + k) % len(names)]
                taken[name].append(self.time_ms(runs[name], repeats))
        return {
            n: {"ms": measure.spread([t for t, _ in pairs]), "host_ms": statistics.median(h for _, h in pairs), "rounds": pairs}
            for n, pairs in taken.items()
        }

    def allocated(self) -> int:
        return torch.cuda.memory_allocated() if self.cuda else 0

    def peak(self, run: Callable[[], Any]) -> tuple[int, int]:
        """(bytes still held, most bytes held) by run() beyond what was there before; its result is alive in the first."""
        self.sync()
        before = self.allocated()
        if self.cuda:
            torch.cuda.reset_peak_memory_stats()
        kept = run()
        self.sync()
        held = self.allocated() - before
        most = (torch.cuda.max_memory_allocated() if self.cuda else 0) - before
        del kept
        return held, most


def ceilings(clock: Clock) -> dict[str, float]:
    """What the chip does at best, measured: copy bandwidth in GB/s (read and written), bf16 and fp32 matmuls in TFLOP/s."""
    big = 2**30 if clock.cuda else 2**20
    side = 8192 if clock.cuda else 256
    source, target = (torch.empty(big, dtype=torch.uint8, device=clock.device) for _ in range(2))
    source.random_(0, 255)
    copy_ms = statistics.median(clock.time_ms(lambda t=target, s=source: t.copy_(s), 5)[0] for _ in range(5))
    out = {"copy_GBs": 2 * big / copy_ms / 1e6}
    for dtype, label in ((torch.bfloat16, "bf16"), (torch.float32, "fp32")):
        a, b = (torch.randn(side, side, device=clock.device).to(dtype) for _ in range(2))
        ms = statistics.median(clock.time_ms(lambda a=a, b=b: a @ b, 3)[0] for _ in range(5))
        out[f"{label}_TFLOPs"] = 2 * side**3 / ms / 1e9
    return out


def environment(clock: Clock, commit: str) -> dict[str, Any]:
    """The device, the machine and the versions."""
    found = measure.environment()
    if kernels.installed():
        found["versions"]["triton"] = importlib.metadata.version("triton")
    if commit:
        found["commit"] = commit  # a copy of the tree has no git
    if clock.cuda:
        p = torch.cuda.get_device_properties(clock.device)
        found |= {"device": p.name, "device_memory": p.total_memory, "multiprocessors": p.multi_processor_count}
        found["cuda"] = torch.version.cuda
        found["tf32"] = torch.backends.cuda.matmul.allow_tf32
        found["L2_bytes"] = getattr(p, "L2_cache_size", 0)
    else:
        found["device"] = "cpu"
    return found


class Results:
    """A result file that is written anew after every entry, so that nothing measured is lost."""

    def __init__(self, path: Path, head: dict[str, Any]) -> None:
        self.path = path
        self.data = head
        path.parent.mkdir(parents=True, exist_ok=True)

    def put(self, section: str, entry: Any, key: str | None = None) -> None:
        """Appends entry to a list, or sets it under a key."""
        if key is None:
            self.data.setdefault(section, []).append(entry)
        else:
            self.data.setdefault(section, {})[key] = entry
        self.path.write_text(json.dumps(self.data, indent=1) + "\n")

    @contextmanager
    def attempt(self, what: str) -> Iterator[None]:
        """Goes on after a failure, which the file and the log keep."""
        try:
            yield
        except Exception as e:
            print(f"FAILED {what}: {type(e).__name__}: {e}", flush=True)
            traceback.print_exc()
            self.put("failures", {"what": what, "error": f"{type(e).__name__}: {e}"[:500]})
            if torch.cuda.is_available():
                torch.cuda.empty_cache()


@dataclass(frozen=True)
class Options:
    """What every script is asked: where to write, how long to go on, and on which device."""

    out: Path
    tiny: bool
    commit: str
    seconds: float
    started: float
    layers: int

    @property
    def clock(self) -> Clock:
        return Clock(torch.device("cuda" if torch.cuda.is_available() and not self.tiny else "cpu"))

    @property
    def size(self) -> Size:
        chosen = TINY if self.tiny else SEVEN
        return Size(chosen.name, chosen.hidden, chosen.mlp, chosen.heads, self.layers or chosen.layers)

    @property
    def late(self) -> bool:
        """Whether the script's time is up: what isn't begun is left out."""
        return time.monotonic() - self.started > self.seconds

    def results(self, question: str) -> Results:
        clock = self.clock
        head = {"question": question, "size": vars(self.size) | {"weights": self.size.weights}, "tiny": self.tiny}
        return Results(self.out / f"{question}.json", head | {"environment": environment(clock, self.commit)})


def options(description: str | None, arguments: list[str] | None = None) -> Options:
    """Reads --out, --tiny, --commit, --seconds, --layers."""
    parser = argparse.ArgumentParser(description=description)
    parser.add_argument("--out", type=Path, default=measure.ROOT / "results/gpu", help="folder for the result files")
    parser.add_argument("--tiny", action="store_true", help="small shapes on the CPU: the numbers mean nothing")
    parser.add_argument("--commit", default="", help="the commit measured, where git can't tell")
    parser.add_argument("--seconds", type=float, default=1e9, help="begin nothing new after this long")
    parser.add_argument("--layers", type=int, default=0, help="layers of the model; default 8")
    o = parser.parse_args(arguments)
    return Options(o.out, o.tiny, o.commit, o.seconds, time.monotonic(), o.layers)
