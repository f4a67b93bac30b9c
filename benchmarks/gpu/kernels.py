"""The Triton kernels against the plain forms and torch.compile of them, op by op, on Llama-7B's linears.

mixed: out += b_i ∘ B(d_i ∘ u), each token its own adapter, B read as bf16 or as bytes, or grown; rank_space: u = A x likewise;
fold and vector_gradients: the elementwise work of a training step; grow: A and B made anew. Each run is a CUDA graph over several
copies of its inputs, more bytes than the L2 holds, divided by their number; the frozen linear of that shape is timed beside them.
"""

import functools
from collections.abc import Callable
from typing import Any

import torch
from torch.nn import functional as F

from veralib import basis, kernels
from veralib.basis import MATRIX_A, MATRIX_B, Basis
from veralib.kernels import folding, grow, mixed

from . import common
from .decode import graphed

TOKENS, TUNED = (256, 128, 64, 16, 1, 2048), (1, 64, 256)
RANKS = (256, 1024)
COLD_BYTES = 160 * 2**20  # more than twice an H200's L2
# What the first choice by arithmetic is measured against.
READ = (
    (16, 64, 64, 4, 3),
    (16, 128, 64, 4, 4),
    (32, 128, 64, 4, 3),
    (64, 64, 64, 4, 3),
    (64, 128, 64, 4, 3),
    (128, 64, 64, 4, 3),
)
GROWN = ((16, 32, 16, 4, 2), (16, 64, 16, 4, 2), (64, 32, 16, 4, 2), (64, 64, 16, 4, 2), (128, 32, 16, 4, 2), (128, 64, 16, 8, 2))
TILES = {False: tuple(mixed.Tile(*t) for t in READ), True: tuple(mixed.Tile(*t) for t in GROWN)}


class Bench:
    """Times ops over enough copies of their inputs that none is found in the cache."""

    def __init__(self, options: common.Options, results: common.Results) -> None:
        self.options, self.results, self.clock = options, results, options.clock
        self.generator = torch.Generator(self.clock.device).manual_seed(5)

    def draw(self, *shape: int, dtype: torch.dtype = torch.bfloat16) -> torch.Tensor:
        return torch.randn(*shape, generator=self.generator, device=self.clock.device).to(dtype)

    def copies(self, moved: int) -> int:
        return 2 if self.options.tiny else max(4, min(64, COLD_BYTES // max(1, moved)))

    def contest(self, section: str, label: dict[str, Any], runs: dict[str, list[Callable[[], Any]]]) -> None:
        """runs: name -> the same op on each copy. Writes µs an op, medians of interleaved rounds."""
        ready: dict[str, Callable[[], Any]] = {}
        failed: dict[str, str] = {}
        for name, calls in runs.items():

            def all_of(calls: list[Callable[[], Any]] = calls) -> Any:
                return [call() for call in calls][-1]

            try:
                all_of()
                ready[name] = graphed(all_of, self.clock) if self.clock.cuda else all_of
            except Exception as e:
                failed[name] = f"{type(e).__name__}: {e}"[:300]
        rounds, repeats = (1, 1) if self.options.tiny else (7, 3)
        taken = self.clock.interleave(ready, rounds, repeats)
        micros = {n: {q: 1e3 * v / len(runs[n]) for q, v in t["ms"].items()} for n, t in taken.items()}
        self.results.put(section, label | {"us": micros, "failed": failed})
        print(section, label, {n: round(t["median"], 1) for n, t in micros.items()}, failed or "", flush=True)


def each(call: Callable[..., Any], *columns: list[Any]) -> list[Callable[[], Any]]:
    """The call on each row of these columns."""
    return [functools.partial(call, *row) for row in zip(*columns, strict=True)]


def products(bench: Bench, m: int, n: int, r: int, T: int, more: bool) -> None:
    """mixed and rank_space of one linear's shape, each source. more: torch.compile and other tiles too, which take a while."""
    device, low = bench.clock.device, torch.bfloat16
    count = bench.copies(2 * r * m + 2 * T * (r + 3 * m))
    pairs = [Basis(seed=k) for k in range(count)]
    for matrix, (outputs, inputs), section in ((MATRIX_B, (m, r), "mixed"), (MATRIX_A, (r, n), "rank_space")):
        made = [grow.grow(p, matrix, outputs, inputs, device, low) for p in pairs]
        raw = [mixed.Bytes(grow.grow(p, matrix, outputs, inputs, device, torch.uint8), p.levels) for p in pairs]
        never = [mixed.Grown(p, matrix, (outputs, inputs)) for p in pairs]
        xs = [bench.draw(T, inputs) for _ in pairs]
        outs = [bench.draw(T, outputs) for _ in pairs]
        vectors = [(bench.draw(T, inputs), bench.draw(T, outputs)) for _ in pairs]
        label = {"m": m, "n": n, "r": r, "T": T, "copies": count}
        runs: dict[str, list[Callable[[], Any]]] = {}
        W = [bench.draw(m, n) for _ in range(min(count, 4))]
        runs["frozen linear"] = each(F.linear, [bench.draw(T, n) for _ in W], W)
        if section == "mixed":
            plain = lambda o, u, d, b, B: o.addcmul_(F.linear(u * d, B), b)  # noqa: E731
            ds, bs = [d for d, _ in vectors], [b for _, b in vectors]
            runs["plain"] = each(plain, outs, xs, ds, bs, made)
            if more:  # not in place: a compiled function may not change its input inside a graph
                same = lambda o, u, d, b, B: torch.addcmul(o, F.linear(u * d, B), b)  # noqa: E731
                runs["compiled"] = each(torch.compile(same, dynamic=False), outs, xs, ds, bs, made)
        else:
            ds = bs = [None] * count
            runs["plain"] = each(F.linear, xs, made)
        for name, sources in (("numbers", made), ("bytes", raw), ("grown", never)):
            grown = name == "grown"
            chosen = mixed.choose_tile(T, outputs, grown, low)
            for tile in dict.fromkeys((chosen, *(TILES[grown] if more else ()))):
                launch = functools.partial(mixed._launch, tile=tile)
                title = name if tile == chosen else f"{name} {'x'.join(map(str, tile))}"
                runs[title] = each(launch, outs, xs, sources, ds, bs, [None] * count, [1] * count)
        with bench.results.attempt(f"{section} {label}"):
            bench.contest(section, label, runs)


def elementwise(bench: Bench, m: int, r: int) -> None:
    """fold and vector_gradients."""
    count = bench.copies(4 * m * r)
    low = torch.bfloat16
    Bs, Ps = ([bench.draw(m, r) for _ in range(count)] for _ in range(2))
    d, b = bench.draw(r, dtype=torch.float32), bench.draw(m, dtype=torch.float32)
    label = {"m": m, "r": r, "copies": count}
    forms = {
        "fold": (folding.fold_plain, folding.fold, lambda f, B, P: f(B, d, b, 0.5, low)),
        "vector_gradients": (
            folding.vector_gradients_plain, folding.vector_gradients, lambda f, B, P: f(P, B, d, b, 0.5)
        ),
    }  # fmt: skip
    for section, (plain, kernel, call) in forms.items():
        three = {"plain": plain, "compiled": torch.compile(plain, dynamic=False), "kernel": kernel}
        runs = {
            name: [functools.partial(call, f, B, P) for B, P in zip(Bs, Ps, strict=True)] for name, f in three.items()
        }  # fmt: skip
        with bench.results.attempt(f"{section} {label}"):
            bench.contest(section, label, runs)


def growing(bench: Bench, m: int, r: int) -> None:
    """B made anew, bit for bit the same either way."""
    device, low = bench.clock.device, torch.bfloat16

    def plain() -> torch.Tensor:
        kernels.use(False)
        return basis._make(Basis(seed=1), MATRIX_B, m, r, device, low)

    def kernel() -> torch.Tensor:
        return grow.grow(Basis(seed=1), MATRIX_B, m, r, device, low)

    same = bool(torch.equal(plain(), kernel()))
    taken = bench.clock.interleave({"plain": plain, "kernel": kernel}, *((1, 1) if bench.options.tiny else (7, 3)))
    micros = {n: {q: 1e3 * v for q, v in t["ms"].items()} for n, t in taken.items()}
    bench.results.put("grow", {"m": m, "r": r, "bit-identical": same, "us": micros})
    print("grow", m, r, "same bits" if same else "OTHER BITS", {n: round(t["median"], 1) for n, t in micros.items()}, flush=True)


def main(arguments: list[str] | None = None) -> int:
    """Writes kernels.json. With --tiny, Triton's interpreter runs them (TRITON_INTERPRET=1): a test of the script."""
    options = common.options(__doc__, arguments)
    results = options.results("kernels")
    bench = Bench(options, results)
    with results.attempt("ceilings"):
        results.put("environment", common.ceilings(options.clock), "ceilings")
    f, h = (24, 16) if options.tiny else (options.size.mlp, options.size.hidden)
    ranks, tokens = ((8,), (1,)) if options.tiny else (RANKS, TOKENS)
    for r in ranks:
        for m in (f, h):
            with results.attempt(f"grow {m} {r}"):
                growing(bench, m, r)
            elementwise(bench, m, r)
    for r in ranks:
        for T in tokens:
            for m, n in ((f, h), (h, f)):
                if not options.late:
                    products(bench, m, n, r, T, more=m == f and r == ranks[0] and T in TUNED)
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
