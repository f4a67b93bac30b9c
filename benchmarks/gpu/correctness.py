"""Is it right on this device? Plans, mixed rows, the basis and a whole model's gradients against plain references.

Errors are ‖out − right‖ / ‖right‖ with the right answer in float64 from the same rounded inputs, drawn anew for each case.
Also timed here, since nothing else needs a model of this kind: growing A and B, merging and switching a model.
"""

import dataclasses
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from veralib import kernels

from . import common
from .decode import fill
from .lora_mixed import MixedLora, grouped_mm

# float32: no TF32 is allowed, so plain float32; bf16 keeps 8 bits, and a sum of rounded terms a little less.
LIMIT = {torch.float32: 1e-4, torch.bfloat16: 2e-2, torch.float16: 3e-3}
# (T, m, n, r): odd sizes, one token, a rank above both sides, sizes of a real layer
SHAPES = ((1, 70, 50, 30), (37, 48, 40, 33), (129, 257, 384, 100), (64, 96, 80, 256), (512, 1024, 768, 256))


def _error(out: Tensor, right: Tensor) -> float:
    out, right = out.detach().double(), right.detach().double()
    return float((out - right).norm() / right.norm().clamp_min(1e-30))


def _unit(m: int, n: int, r: int, seed: int) -> Any:
    from veralib.autograd import UnitSpec
    from veralib.basis import Basis

    basis = Basis(seed=seed)
    return UnitSpec("layer", "layer", None, m, n, r, basis.scale(n, r), basis)


def plans(results: common.Results, device: torch.device, dtype: torch.dtype) -> bool:
    """Each plan's output and three gradients; d's and b's gradient must be float32. True if all are near."""
    from veralib.autograd import Apart, Factored, Merged
    from veralib.core import delta

    good = True
    for number, (T, m, n, r) in enumerate(SHAPES):
        unit = _unit(m, n, r, seed=number)
        g = torch.Generator().manual_seed(torch.seed() % 2**31)
        draw = lambda *s, g=g: torch.randn(*s, generator=g)  # noqa: E731
        x, W, bias, out_grad = (t.to(device, dtype) for t in (draw(T, n), draw(m, n), draw(m), draw(T, m)))
        d, b = draw(r).to(device), draw(m).to(device)
        exact = [t.double().requires_grad_() for t in (x, d, b)]
        A, B = (t.double() for t in (unit.A(x), unit.B(x)))
        right = F.linear(exact[0], W.double(), bias.double()) + delta(exact[0], A, B, exact[1] * unit.scale, exact[2])
        right.backward(out_grad.double())
        for plan in ("factored", "apart-tokens", "apart-weights", "merged-tokens", "merged-weights"):
            if plan.startswith("merged") and dtype != torch.float32:
                continue
            leaves = [t.clone().requires_grad_() for t in (x, d, b)]
            if plan == "factored":
                u = F.linear(leaves[0], unit.A(x))
                out = Factored.apply(None, leaves[0], W, bias, (unit,), (0,), u, *leaves[1:])
            elif plan.startswith("merged"):
                out = Merged.apply(leaves[0], W, bias, (unit,), plan.endswith("tokens"), *leaves[1:])
            else:
                out = Apart.apply(None, leaves[0], W, bias, (unit,), plan.endswith("tokens"), *leaves[1:])
            out.backward(out_grad)
            errors = {"out": _error(out, right)}
            errors |= {k: _error(t.grad, e.grad) for k, t, e in zip(("x", "d", "b"), leaves, exact, strict=True)}
            fine = max(errors.values()) < LIMIT[dtype] and leaves[1].grad.dtype == leaves[2].grad.dtype == torch.float32
            entry = {
                "kernels": kernels.wanted(),
                "plan": plan,
                "dtype": str(dtype),
                "T, m, n, r": [T, m, n, r],
                "errors": errors,
                "fine": fine,
            }
            results.put("plans", entry)
            good &= fine
    return good


@torch.no_grad()
def mixed(results: common.Results, options: common.Options) -> bool:
    """rows() with repeated and missing adapters that lie in several chunks of the bank, against one at a time; and LoRA's
    three ways against each other."""
    from veralib import bank

    clock, bank.CHUNK_BYTES = options.clock, 1  # 8 adapters a chunk, as models of real size have
    size = dataclasses.replace(common.TINY, hidden=256, mlp=688)
    good = True
    for dtype in (torch.float32, torch.bfloat16):
        model = common.build(size, clock.device, dtype).eval()
        vera = fill(model, 48, 20)
        x = torch.randn(7, 3, size.hidden).to(clock.device, dtype)
        step = lambda x, model=model: model(inputs_embeds=x, use_cache=False).last_hidden_state  # noqa: E731
        names = ["3", None, "19", "3", "0", None, "11"]
        with vera.rows(names):
            together = step(x)
        alone, wanted = [], kernels.wanted()
        kernels.use(False)  # a kernel isn't compared with itself
        for k, name in enumerate(names):
            with vera.using(name):
                alone.append(step(x)[k])
        with vera.using(None):
            bare = step(x)
        kernels.use(wanted)
        error = _error(together, torch.stack(alone))
        moved = _error(bare, together)
        bits = bool((together[1] == bare[1]).all() and (together[5] == bare[5]).all())
        fine = error < LIMIT[dtype] and moved > 0.01 and bits
        entry = {
            "kernels": kernels.wanted(),
            "dtype": str(dtype),
            "error": error,
            "adapters move the output by": moved,
            "base rows bit-equal": bits,
        }
        results.put("mixed", entry | {"fine": fine})
        good &= fine
    model = common.build(size, clock.device).eval()
    lora = MixedLora(model, 8, 4, torch.Generator(clock.device).manual_seed(0))
    x = torch.randn(8, 1, size.hidden).to(clock.device, torch.bfloat16)
    outs = {}
    for way in ("sorted", "gathered", *(["grouped"] if grouped_mm is not None and clock.cuda else [])):
        lora.choose([0, 0, 1, 1, 2, 2, 3, 3], way, clock.device)
        lora._x = None
        outs[way] = model(inputs_embeds=x, use_cache=False).last_hidden_state
    errors = {way: _error(out, outs["gathered"]) for way, out in outs.items()}
    results.put("lora_mixed", {"errors to gathered": errors, "fine": max(errors.values()) < LIMIT[torch.bfloat16]})
    return good and max(errors.values()) < LIMIT[torch.bfloat16]


def gradients(results: common.Results, options: common.Options, autocast: bool) -> bool:
    """d's and b's gradients of a whole small model in bf16 (plain, autocast) against the same weights in float32."""
    import veralib

    device = options.clock.device
    size = dataclasses.replace(common.TINY, hidden=256, mlp=688)
    grads: dict[torch.dtype, Tensor] = {}
    x, g = (torch.randn(2, 64, size.hidden).to(torch.bfloat16) for _ in range(2))
    for dtype in (torch.bfloat16, torch.float32):
        model = common.build(size, device, torch.bfloat16).to(dtype)
        vera = veralib.attach(model, veralib.VeraConfig(rank=96, targets=list(common.LINEARS), b_initial=0.1))
        with torch.autocast(device.type, torch.bfloat16, enabled=autocast and dtype == torch.bfloat16):
            out = model(inputs_embeds=x.to(device, dtype), use_cache=False).last_hidden_state
        out.backward(g.to(device, out.dtype))
        vectors = [v for u in vera.members["default"].layout.units for v in vera.members["default"].vectors(u.unit)]
        grads[dtype] = torch.cat([v.grad.flatten() for v in vectors])
        assert grads[dtype].dtype == torch.float32
    cosine = float(F.cosine_similarity(grads[torch.bfloat16], grads[torch.float32], dim=0))
    error = _error(grads[torch.bfloat16], grads[torch.float32])
    # The whole model's activations are rounded 2 layers long, so the limit is wider than an op's.
    entry = {"autocast": autocast, "error": error, "cosine": cosine, "fine": error < 5e-2}
    results.put("gradients", entry)
    return bool(entry["fine"])


def basis(results: common.Results, options: common.Options) -> bool:
    """The device's bytes against the CPU's, bit for bit, over offsets and ragged sizes; and the time to grow a real pair."""
    from veralib.basis import Basis, basis_bytes, clear_cache

    clock, good = options.clock, True
    for seed, layer_id in ((0, 0), (2**64 - 1, 0), (0x9E3779B97F4A7C15, 0xFFFFFFFF)):
        for rows, columns, row, column in ((33, 100, 0, 0), (5, 7, 1000, 9), (17, 1, 3, 16), (300, 513, 2**20, 11)):
            for matrix in (0, 1):
                where = {"row": row, "column": column, "layer_id": layer_id}
                ours = basis_bytes(seed, matrix, rows, columns, device=clock.device, **where)
                good &= bool((ours.cpu() == basis_bytes(seed, matrix, rows, columns, device="cpu", **where)).all())
    m, n, r = (40, 24, 16) if options.tiny else (11008, 11008, 1024)
    for levels in ("kaiming_uniform", "kaiming_normal"):
        for dtype in (torch.bfloat16, torch.float32):
            here = Basis(seed=7, levels=levels)
            for matrix in ("A", "B"):
                rows, columns = (r, n) if matrix == "A" else (m, r)
                grow = getattr(here, matrix)
                good &= bool((grow(rows, columns, clock.device, dtype).cpu() == grow(rows, columns, "cpu", dtype)).all())
    times, here, low = [], Basis(seed=7), torch.bfloat16
    for _ in range(3):
        clear_cache()
        times.append(clock.time_ms(lambda here=here: (here.A(r, n, clock.device, low), here.B(m, r, clock.device, low)))[0])
    results.put(
        "basis", {"kernels": kernels.wanted(), "bit-identical": good, "A and B": [[r, n], [m, r]], "ms": times, "fine": good}
    )
    clear_cache()
    return good


def merging(results: common.Results, options: common.Options) -> bool:
    """merge, switch and unmerge of the whole model, timed; ΔW is in the weights, and unmerge gives the bits back."""
    clock = options.clock
    model = common.build(options.size, clock.device).eval()
    vera = fill(model, 8 if options.tiny else 256, 2)
    before = [p.clone() for p in model.parameters()]
    times: dict[str, Sequence[float]] = {}
    there = []
    for _ in range(2):  # the second is kept: in the first A and B grow and hashes are taken
        times["merge"] = clock.time_ms(lambda: vera.merge("0", keep="device"))
        there.append(_share_of_delta(vera, "0", before))
        times["switch"] = clock.time_ms(lambda: vera.switch_merged("1"))
        there.append(_share_of_delta(vera, "1", before))
        times["unmerge"] = clock.time_ms(vera.unmerge)
    same = all(bool((p == q).all()) for p, q in zip(model.parameters(), before, strict=True))
    found = {"kernels": kernels.wanted(), "weight_bytes": 2 * options.size.weights, "ms": times, "unmerge bit-equal": same}
    fine = same and all(abs(share - 1) < 0.05 for share in there)
    results.put("merging", found | {"ΔW in the weights": there, "fine": fine})
    return fine


def _share_of_delta(vera: Any, name: str, before: list[Tensor]) -> float:
    """⟨W − W0, ΔW⟩ / ⟨ΔW, ΔW⟩ of the last layer's down_proj, in float64: 1 but for rounding."""
    layer, W = [(n.removesuffix(".weight"), p) for n, p in vera.model.named_parameters() if n.endswith("down_proj.weight")][-1]
    W0 = next(q for p, q in zip(vera.model.parameters(), before, strict=True) if p is W)
    member = vera.member(name)
    (unit,) = member.layout.by_layer[layer]
    d, b = (v.double() for v in member.vectors(unit.unit))
    delta = (b[:, None] * unit.B(W).double() * (d * unit.scale)) @ unit.A(W).double()
    return float(((W.double() - W0.double()) * delta).sum() / delta.square().sum())


def with_kernels(check: Callable[[], bool]) -> bool:
    """The check with veralib's Triton kernels in use."""
    kernels.use()
    try:
        return check()
    finally:
        kernels.use(False)


def main(arguments: list[str] | None = None) -> int:
    """Writes correctness.json; 1 if anything is wrong."""
    options = common.options(__doc__, arguments)
    results = options.results("correctness")
    device = options.clock.device
    kernels.use(False)
    checks = {f"plans {dtype}": (lambda dtype=dtype: plans(results, device, dtype)) for dtype in LIMIT}
    checks |= {
        "mixed rows": lambda: mixed(results, options),
        "gradients": lambda: gradients(results, options, autocast=False),
        "gradients, autocast": lambda: gradients(results, options, autocast=True),
        "basis": lambda: basis(results, options),
        "merging": lambda: merging(results, options),
    }
    if kernels.installed() and options.clock.cuda:
        again = [n for n in checks if n.startswith("plans") or n in ("mixed rows", "basis", "merging")]
        checks |= {f"{n}, kernels": (lambda check=checks[n]: with_kernels(check)) for n in again}
    wrong = []
    for name, check in checks.items():
        fine = False
        with results.attempt(name):
            fine = check()
        print(name, "fine" if fine else "WRONG", flush=True)
        results.put("checks", fine, name)
        wrong += [] if fine else [name]
    return 1 if wrong else 0


if __name__ == "__main__":
    raise SystemExit(main())
