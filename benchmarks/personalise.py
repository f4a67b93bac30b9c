"""What an adapter for each of very many people costs, by arithmetic: `python -m benchmarks.personalise [--write]`.

FLOPs, not measurements: a frozen base costs 4 a weight and token (forward, and the gradient of the activations), LoRA of rank
r 6·r·(n + m) a linear, VeRA in its factored form 4·r·(n + m) + 2·r·m (A x, B u, their gradients, and B u once more for ∂b). A GPU
is taken to do --flops a second of them. --write puts the tables into docs/personalise.md.
"""

import argparse
import re
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

from .store import size

PAGE = Path(__file__).parents[1] / "docs" / "personalise.md"
PART = re.compile(r"(<!-- arithmetic -->\n).*?(<!-- /arithmetic -->)", re.DOTALL)
GPUS = (1, 8, 64)


class Model(NamedTuple):
    """A base model by its shapes."""

    name: str
    weights: float
    layers: int
    linears: Sequence[tuple[int, int]]
    """(m, n) of the adapted linears of one layer."""


LLAMA_7B = Model("Llama-2 7B, all linears", 6.6e9, 32, ((4096, 4096),) * 4 + ((11008, 4096), (11008, 4096), (4096, 11008)))
LLAMA_7B_QV = LLAMA_7B._replace(name="Llama-2 7B, q and v", linears=((4096, 4096),) * 2)
LLAMA_1B = Model(
    "Llama-3.2 1B, all linears",
    1.2e9,
    16,
    ((2048, 2048), (512, 2048), (512, 2048), (2048, 2048), (8192, 2048), (8192, 2048), (2048, 8192)),
)
METHODS = (("VeRA", 256), ("VeRA", 64), ("LoRA", 1), ("LoRA", 16))


def parameters(model: Model, method: str, rank: int) -> int:
    """Trained numbers of one adapter."""
    of = (lambda m, n: m + rank) if method == "VeRA" else (lambda m, n: rank * (m + n))
    return model.layers * sum(of(m, n) for m, n in model.linears)


def flops(model: Model, method: str, rank: int) -> float:
    """Of one token's training, base included."""
    of = (lambda m, n: 4 * (m + n) + 2 * m) if method == "VeRA" else (lambda m, n: 6 * (m + n))
    return 4 * model.weights + model.layers * rank * sum(of(m, n) for m, n in model.linears)


def hours(seconds: float) -> str:
    """ "3.1 h", "12 days"."""
    return f"{seconds / 3600:.1f} h" if seconds < 48 * 3600 else f"{seconds / 86400:,.1f} days"


def tables(owners: int, examples: int, tokens: int, epochs: float, rate: float) -> str:
    """Markdown: time on 1, 8 and 64 GPUs, bytes of all adapters, memory of the slots."""
    total = owners * examples * tokens * epochs
    lines = [
        f"{owners:,} people, {examples} examples of {tokens} tokens each, {epochs:g} pass{'es' * (epochs != 1)}: {total:.3g} "
        f"tokens at {rate / 1e12:g} TFLOP/s a GPU.",
        "",
        "| model | method | "
        + " | ".join(f"{g} GPU{'s' * (g > 1)}" for g in GPUS)
        + " | a person, bf16 | everybody, bf16 | 256 slots |",
        "|" + "---|" * (5 + len(GPUS)),
    ]
    for model in (LLAMA_7B, LLAMA_7B_QV, LLAMA_1B):
        for method, rank in METHODS:
            count, seconds = parameters(model, method, rank), total * flops(model, method, rank) / rate
            times = [hours(seconds / g) for g in GPUS]
            sizes = [size(2 * count), size(2 * count * owners), size(16 * 256 * count)]
            lines.append(f"| {model.name} | {method} r={rank} | {' | '.join(times + sizes)} |")
    return "\n".join(lines)


def main(arguments: list[str] | None = None) -> None:
    """Prints the tables; --write also puts them into the page."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.personalise", description=__doc__)
    parser.add_argument("--owners", type=int, nargs="+", default=[200_000, 1_000_000])
    parser.add_argument("--examples", type=int, default=100)
    parser.add_argument("--tokens", type=int, default=256)
    parser.add_argument("--epochs", type=float, default=1.0)
    parser.add_argument("--flops", type=float, default=400e12, help="FLOPs a GPU does in a second")
    parser.add_argument("--write", action="store_true")
    a = parser.parse_args(arguments)
    text = "\n\n".join(tables(owners, a.examples, a.tokens, a.epochs, a.flops) for owners in a.owners)
    print(text)
    if a.write:
        PAGE.write_text(
            PART.sub(lambda found: f"{found[1]}{text}\n{found[2]}", PAGE.read_text(encoding="utf-8")), encoding="utf-8"
        )


if __name__ == "__main__":
    main()
