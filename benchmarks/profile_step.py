"""Milliseconds of each plan of the op beside the cost model's choice: `python -m benchmarks.profile_step`.

What the numbers in veralib.core.flops are held against. A group of linears of one shape reads the same x, as q, k, v do.
"""

import argparse
import json
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, get_args

import torch
from torch import Tensor, nn

from . import measure

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}


@dataclass(frozen=True)
class Case:
    """`group` linears (m, n) that read one x of (tokens, n), adapted at rank r."""

    tokens: int
    m: int
    n: int
    r: int
    group: int = 1
    dtype: str = "fp32"


# The linears of the Llama shape (q, k, v; o; gate, up; down) and of RoBERTa-base (query, value).
_SHAPES = [(512, 512, 3), (512, 512, 1), (1408, 512, 2), (512, 1408, 1)]
CASES = [Case(t, m, n, r, k) for t in (4096, 1024, 256) for r in (1024, 256, 64) for m, n, k in _SHAPES]
CASES += [Case(4096, 768, 768, r, 2) for r in (1024, 256)]
CASES += [Case(256, m, n, r, k, "bf16") for r in (1024, 256) for m, n, k in _SHAPES]


class Group(nn.Module):
    """Linears side by side on one input."""

    def __init__(self, case: Case) -> None:
        super().__init__()
        self.linears = nn.ModuleList(nn.Linear(case.n, case.m, bias=False) for _ in range(case.group))

    def forward(self, x: Tensor) -> list[Tensor]:
        return [linear(x) for linear in self.linears]


def run(case: Case, rounds: int) -> dict[str, Any]:
    """{"ms": {plan: [forward, backward]}, "chosen", "fastest", "loss"}: medians; loss is chosen over fastest, minus 1."""
    import veralib
    from veralib.core import Plan, Shape, choose_plan

    dtype = DTYPES[case.dtype]
    torch.manual_seed(0)
    model = Group(case).to(dtype)
    x = torch.randn(case.tokens, case.n, dtype=dtype, requires_grad=True)
    gradients = [torch.randn(case.tokens, case.m, dtype=dtype) for _ in range(case.group)]
    exact = dtype == torch.float32
    plans = [p for p in get_args(Plan) if exact or not p.startswith("merged")]
    vera = veralib.attach(model, veralib.VeraConfig(rank=case.r, targets="linears.*"))
    with torch.no_grad():
        for p in model.parameters():
            if p.requires_grad:
                p.uniform_(-0.1, 0.1)

    parts: dict[str, list[tuple[float, float]]] = {plan: [] for plan in ["frozen", *plans, "choice"]}

    def step(plan: str) -> Callable[[], None]:
        def act() -> None:
            vera.use(None if plan == "frozen" else "default")
            vera.runtime.plan = None if plan in ("frozen", "choice") else plan  # type: ignore[assignment]
            start = measure.clock()
            outputs = model(x)
            middle = measure.clock()
            torch.autograd.backward(outputs, gradients)
            parts[plan].append((1e3 * (middle - start), 1e3 * (measure.clock() - middle)))
            x.grad = None
            for p in model.parameters():
                p.grad = None

        return act

    warmup = 2
    measure.interleave({plan: step(plan) for plan in parts}, rounds, warmup)
    ms = {plan: [measure.spread([t[k] for t in times[warmup:]])["median"] for k in (0, 1)] for plan, times in parts.items()}
    fastest = min(plans, key=lambda plan: sum(ms[plan]))
    fields = {"tokens": case.tokens, "m": case.m, "n": case.n, "r": case.r, "exact": exact}
    chosen = [choose_plan(Shape(**fields, sharers=case.group)) for k in range(case.group)]  # type: ignore[arg-type]
    return asdict(case) | {
        "ms": ms,
        "chosen": chosen,
        "fastest": fastest,
        "loss": sum(ms["choice"]) / sum(ms[fastest]) - 1,
    }


def table(results: list[dict[str, Any]]) -> str:
    """The results as Markdown: forward + backward of each plan, what the model chose, how much slower that is."""
    from veralib.core import Plan

    plans = ["frozen", *get_args(Plan), "choice"]
    lines = ["| T | m × n, linears | r | " + " | ".join(plans) + " | chosen | fastest | loss |"]
    lines.append("|" + "---|" * (lines[0].count("|") - 1))
    for r in results:
        cells = ["{:.1f}+{:.1f}".format(*r["ms"][p]) if p in r["ms"] else "" for p in plans]
        chosen = ", ".join(dict.fromkeys(r["chosen"]))
        where = f"{r['tokens']} | {r['m']} × {r['n']}, {r['group']} | {r['r']}" + (" bf16" if r["dtype"] == "bf16" else "")
        lines.append(f"| {where} | " + " | ".join(cells) + f" | {chosen} | {r['fastest']} | {100 * r['loss']:.0f} % |")
    return "\n".join(lines)


def main() -> None:
    """Profiles the cases, prints the table, and writes the results where --out says."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.profile_step", description=__doc__)
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--tokens", type=int, help="only these cases")
    parser.add_argument("--dtype", choices=list(DTYPES), help="only these cases")
    parser.add_argument("--out", type=Path, help="a JSON file")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    cases = [c for c in CASES if options.tokens in (None, c.tokens) and options.dtype in (None, c.dtype)]
    with measure.alone():
        results = []
        for case in cases:
            results.append(run(case, options.rounds))
            print(table(results[-1:]).splitlines()[-1], flush=True)
    print("\n" + table(results))
    if options.out:
        options.out.write_text(json.dumps({"environment": measure.environment(), "cases": results}, indent=1) + "\n")


if __name__ == "__main__":
    main()
