"""The Triton kernels against the plain forms and torch.compile of them, op by op, on Llama-7B's linears.

mixed: out += b_i ∘ B(d_i ∘ u), each token its own adapter, B read as bf16 or as bytes, or grown; rank_space: u = A x likewise;
fold and vector_gradients: the elementwise work of a training step; merge: W0 + ΔW; grow: A and B made anew. Each run is a CUDA
graph over several copies of its inputs, more bytes than the L2 holds, divided by their number; the frozen linear, or a
copy of its weight, is timed beside them.
"""

import functools
import types
from collections.abc import Callable
from typing import Any

import torch
from torch.nn import functional as F

from veralib import basis, kernels
from veralib.basis import MATRIX_A, MATRIX_B, Basis
from veralib.kernels import folding, grow, merge, mixed, plain

from . import common
from .decode import graphed

TOKENS, TUNED = (256, 128, 64, 16, 1, 2048), (1, 64, 256)
RANKS = (256, 1024)
COLD_BYTES = 160 * 2**20  # more than twice an H200's L2
# What the first choice by arithmetic is measured against.
READ = ((16, 32, 64, 4, 3), (16, 64, 64, 4, 3), (16, 128, 64, 4, 4), (32, 128, 64, 4, 3), (64, 64, 64, 4, 3), (64, 128, 64, 4, 3),
        (128, 64, 64, 4, 3), (128, 128, 64, 8, 3))  # fmt: skip
GROWN = ((16, 32, 16, 4, 1), (16, 64, 16, 4, 1), (64, 32, 16, 4, 1), (64, 64, 16, 4, 2), (128, 32, 16, 4, 1), (128, 64, 16, 8, 1))
MERGES = ((64, 128, 32, 4, 3), (64, 128, 64, 4, 3), (128, 64, 32, 4, 4), (128, 128, 64, 8, 3))
TILES = {False: tuple(mixed.Tile(*t) for t in READ), True: tuple(mixed.Tile(*t) for t in GROWN)}


class Bench:
    """Times ops over enough copies of their inputs that none is found in the cache."""

    def __init__(self, options: common.Options, results: common.Results) -> None:
        self.options, self.results, self.clock = options, results, options.clock
        self.generator = torch.Generator(self.clock.device).manual_seed(5)

    def draw(self, *shape: int, dtype: torch.dtype = torch.bfloat16) -> torch.Tensor:
        return torch.randn(*shape, generator=self.generator, device=self.clock.device).to(dtype)

    def copies(self, moved: int) -> int:
        """How many copies of inputs there must be. moved: bytes that the contestant which reads least moves of one."""
        return 2 if self.options.tiny else max(4, min(256, COLD_BYTES // max(1, moved)))

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
    for section, matrix, outputs, inputs in (("mixed", MATRIX_B, m, r), ("rank_space", MATRIX_A, r, n)):
        label = {"m": m, "n": n, "r": r, "T": T, "tiles": more}
        with bench.results.attempt(f"{section} {label}"):
            _product(bench, section, label, matrix, outputs, inputs)


def _product(bench: Bench, section: str, label: dict[str, Any], matrix: int, outputs: int, inputs: int) -> None:
    device, low, T, more = bench.clock.device, torch.bfloat16, label["T"], label["tiles"]
    vectors = 2 * T * (inputs + outputs) if section == "mixed" else 0
    count = bench.copies(outputs * inputs + 2 * T * (inputs + outputs) + vectors)
    pairs = [Basis(seed=k) for k in range(count)]
    blank = lambda dtype: torch.empty(outputs, inputs, dtype=dtype, device=device)  # noqa: E731
    made = [grow.grow(p, matrix, blank(low)) for p in pairs]
    raw = [mixed.Bytes(grow.grow(p, matrix, blank(torch.uint8)), p.levels) for p in pairs]
    never = [mixed.Grown(p, matrix, (outputs, inputs)) for p in pairs]
    xs, outs = ([bench.draw(T, width) for _ in pairs] for width in (inputs, outputs))
    W = [bench.draw(label["m"], label["n"]) for _ in range(min(count, 4))]
    runs = {"frozen linear": each(F.linear, [bench.draw(T, label["n"]) for _ in W], W)}
    if section == "mixed":
        ds, bs = ([bench.draw(T, width) for _ in pairs] for width in (inputs, outputs))
        plainly = lambda o, u, d, b, B: o.addcmul_(F.linear(u * d, B), b)  # noqa: E731  # as layers.py does
        runs["plain"] = each(plainly, outs, xs, ds, bs, made)
        if more:  # not in place: a compiled function may not change its input inside a graph
            same = lambda o, u, d, b, B: torch.addcmul(o, F.linear(u * d, B), b)  # noqa: E731
            runs["compiled"] = each(torch.compile(same, dynamic=False), outs, xs, ds, bs, made)
    else:
        ds = bs = [None] * count
        runs["plain"] = each(F.linear, xs, made)
    for name, sources in (("numbers", made), ("bytes", raw), ("grown", never)):
        chosen = mixed.choose_tile(T, outputs, name == "grown", low)
        near = range(min(T, 256) // 4, max(16, T) + 1)  # tiles of far more tokens than there are waste their work
        fitting = [t for t in TILES[name == "grown"] if more and t.BT in near]
        if section == "rank_space":
            chosen, *fitting = (t._replace(parts=mixed.choose_parts(t, T, outputs, inputs)) for t in (chosen, *fitting))
            fitting += [chosen._replace(parts=parts) for parts in (1, 4, 8, 16) if more]
        for tile in dict.fromkeys((chosen, *fitting)):
            launch = functools.partial(mixed._launch, tile=tile)
            title = name if tile == chosen else f"{name} {'x'.join(map(str, tile))}"
            runs[title] = each(launch, outs, xs, sources, ds, bs, [None] * count, [1] * count)
    bench.contest(section, label | {"copies": count}, runs)


def elementwise(bench: Bench, m: int, r: int) -> None:
    """fold and vector_gradients."""
    low, count = torch.bfloat16, bench.copies(4 * m * r)
    Bs, Ps = ([bench.draw(m, r) for _ in range(count)] for _ in range(2))
    d, b = bench.draw(r, dtype=torch.float32), bench.draw(m, dtype=torch.float32)
    for section, call in (
        ("fold", lambda form, B, P: form.fold(B, d, b, 0.5, low)),
        ("vector_gradients", lambda form, B, P: form.vector_gradients(P, B, d, b, 0.5)),
    ):
        of = lambda form, call=call: each(functools.partial(call, form), Bs, Ps)  # noqa: E731
        alike = types.SimpleNamespace(fold=_fold_alike, vector_gradients=plain.vector_gradients)
        compiled = types.SimpleNamespace(**{k: torch.compile(v, dynamic=False) for k, v in vars(alike).items()})
        with bench.results.attempt(f"{section} {m} {r}"):
            runs = {"plain": of(plain), "compiled": of(compiled), "kernel": of(folding)}
            bench.contest(section, {"m": m, "r": r, "copies": count}, runs)


def _fold_alike(B: torch.Tensor, d: torch.Tensor, b: torch.Tensor, scale: float, dtype: torch.dtype) -> torch.Tensor:
    """plain.fold as torch.compile can fuse it, without an out=."""
    return (b[:, None] * B.float() * (d * scale)).to(dtype)


def merging(bench: Bench, m: int, n: int, r: int) -> None:
    """W0 + ΔW into a weight, beside a copy of that weight: the same bytes."""
    device, low = bench.clock.device, torch.bfloat16
    A, B = Basis().A(r, n, device, low), Basis().B(m, r, device, low)
    d, b = bench.draw(r, dtype=torch.float32), bench.draw(m, dtype=torch.float32)
    count = bench.copies(4 * m * n)
    olds, outs = ([bench.draw(m, n) for _ in range(count)] for _ in range(2))
    forms: dict[str, Callable[..., Any]] = {"plain": plain.merge_into, "kernel": merge.merge_into}
    for BI, BJ, BK, warps, stages in MERGES:
        chosen = {"BI": BI, "BJ": BJ, "BK": BK, "num_warps": warps, "num_stages": stages}
        forms[f"kernel {BI}x{BJ}x{BK}x{warps}x{stages}"] = functools.partial(merge.merge_into, chosen=chosen)
    runs = {"copy": each(lambda out, W0: out.copy_(W0), outs, olds)}
    runs |= {name: each(lambda out, W0, form=form: form(out, W0, A, B, d, b), outs, olds) for name, form in forms.items()}
    bench.contest("merge", {"m": m, "n": n, "r": r, "copies": count}, runs)


def growing(bench: Bench, m: int, r: int) -> None:
    """B made anew, bit for bit the same either way. The plain form can't be in a graph: it brings a table from the host."""
    device, low = bench.clock.device, torch.bfloat16
    pairs = [Basis(seed=k) for k in range(bench.copies(2 * m * r))]

    def plainly() -> torch.Tensor:
        kernels.use(False)
        return basis._make(pairs[1], MATRIX_B, m, r, device, low)

    outs = [torch.empty(m, r, dtype=low, device=device) for _ in pairs]
    fused = each(grow.grow, pairs, [MATRIX_B] * len(pairs), outs)
    same = bool(torch.equal(plainly(), fused[1]()))
    label = {"m": m, "r": r, "bit-identical": same}
    bench.contest("grow", label, {"kernel": fused})
    taken = bench.clock.interleave({"plain": plainly}, *((1, 1) if bench.options.tiny else (5, 2)))["plain"]["ms"]
    bench.results.data["grow"][-1]["us"]["plain"] = {q: 1e3 * v for q, v in taken.items()}
    print("grow", m, r, "same bits" if same else "OTHER BITS", f"plain, no graph: {1e3 * taken['median']:.1f}", flush=True)


def main(arguments: list[str] | None = None) -> int:
    """Writes kernels.json. With --tiny, Triton's interpreter runs them (TRITON_INTERPRET=1): a test of the script."""
    options = common.options(__doc__, arguments)
    results = options.results("kernels")
    bench = Bench(options, results)
    with results.attempt("ceilings"):
        results.put("environment", common.ceilings(options.clock), "ceilings")
    f, h = (24, 16) if options.tiny else (options.size.mlp, options.size.hidden)
    ranks, tokens = ((8,), (1,)) if options.tiny else (RANKS, TOKENS)
    # What compiles longest comes last: other tiles, then torch.compile of the elementwise work.
    plan: list[tuple[str, Callable[[], None]]] = []
    add = lambda name, call, *args: plan.append((f"{name} {args}", lambda: call(bench, *args)))  # noqa: E731
    for r in ranks:
        for m in (f, h):
            add("grow", growing, m, r)
    for r in ranks:
        add("merge", merging, f, h, r)
    for r in ranks:
        for T in tokens:
            for m, n in ((f, h), (h, f)):
                add("products", products, m, n, r, T, False)
    for T in [t for t in tokens if t in TUNED]:
        add("tiles", products, f, h, ranks[0], T, True)
    for r in ranks:
        for m in (f, h):
            add("elementwise", elementwise, m, r)
    for name, call in plan:
        if options.late:
            results.put("left_out", name)
            continue
        with results.attempt(name):
            call()
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
