"""Which kernels the time goes to: torch's profiler over training steps and decode steps, the top of each list kept."""

from collections.abc import Callable
from typing import Any

import torch
from torch.profiler import ProfilerActivity, profile

from veralib import kernels as kernels_of_veralib

from . import common, decode, train_step

TOP = 25


def kernels(clock: common.Clock, run: Callable[[], Any], repeats: int = 3) -> dict[str, Any]:
    """Of one run: ms in kernels, how many there are, and the TOP by time: {"kernel", "count", "ms"}. On the CPU: of ops."""
    run()
    run()
    clock.sync()
    activities = [ProfilerActivity.CPU] + ([ProfilerActivity.CUDA] if clock.cuda else [])
    with profile(activities=activities) as profiler:
        for _ in range(repeats):
            run()
        clock.sync()
    rows = []
    for e in profiler.key_averages():
        on_device = str(e.device_type).endswith("CUDA")
        if on_device == clock.cuda:
            micros = e.self_device_time_total if clock.cuda else e.self_cpu_time_total
            rows.append({"kernel": e.key[:120], "count": e.count / repeats, "ms": micros / 1e3 / repeats})
    rows = [r for r in rows if r["ms"] > 0]
    rows.sort(key=lambda r: -r["ms"])
    return {"ms": sum(r["ms"] for r in rows), "launches": sum(r["count"] for r in rows), "top": rows[:TOP]}


def main(arguments: list[str] | None = None) -> int:
    """Writes where.json."""
    options = common.options(__doc__, arguments)
    results = options.results("where")
    clock, size = options.clock, options.size
    base = common.build(size, clock.device)
    tokens = 32 if options.tiny else train_step.TOKENS
    x = torch.randn(1, tokens, size.hidden, device=clock.device).to(torch.bfloat16).requires_grad_()
    g = torch.randn_like(x)
    fused = (False, True) if kernels_of_veralib.installed() and clock.cuda else (False,)
    for contestant in train_step.CONTESTANTS:
        if contestant.fused not in fused:
            continue
        if contestant.method in ("frozen", "veralib") or (contestant.rank == 16 and not contestant.low):
            with results.attempt(f"train {contestant.name}"):
                _, step = train_step.make_step(train_step.enter(base, contestant), x, g, False, contestant.fused)
                results.put("train_step", kernels(clock, step), contestant.name)
    base.eval()
    ranks, batch, count = ((4,), 4, 4) if options.tiny else ((256, 1024), 64, 64)
    runs = decode.Decode(options, results, base)
    one = runs.x(batch)
    results.put("decode", kernels(clock, lambda: runs.step(base, one)), "base")
    for r in ranks:
        with results.attempt(f"decode veralib-{r}"):
            model = common.twin(base)
            vera = decode.fill(model, r, count)
            for wanted in fused:
                run = runs.veralib(model, vera, one, batch, wanted)
                results.put("decode", kernels(clock, run), f"veralib-{r}" + "-kernels" * wanted)
    for section in ("train_step", "decode"):
        for name, found in results.data.get(section, {}).items():
            print(f"{section} {name}: {found['ms']:.2f} ms in {found['launches']:.0f} launches", flush=True)
            for row in found["top"][:8]:
                print(f"    {row['ms']:8.3f} ms  {row['count']:6.0f} x  {row['kernel'][:90]}", flush=True)
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
