"""Figure 6: the mean squared error of fitting random 10 × 10 matrices by LoRA (P Q) and VeRA (X d Y b) over their parameters.

Entries are N(0, 1), which the paper doesn't say. LoRA's best fit is the truncated SVD. VeRA's X and Y are drawn and fixed; d and
b are found by alternating least squares, each step exact in one of them, from b = 1.
"""

from pathlib import Path
from typing import Any

import numpy as np

from .pages import page, write

SIZE = 10
MATRICES = 50
ROUNDS = 100
LORA_RANKS = range(1, 6)
VERA_RANKS = (1, 2, 5, 10, 20, 30, 40, 50, 60, 70, 80, 90)


def lora_error(W: np.ndarray, rank: int) -> float:
    """Of the best matrix of that rank."""
    return float((np.linalg.svd(W, compute_uv=False)[rank:] ** 2).sum() / W.size)


def vera_error(W: np.ndarray, rank: int, rng: np.random.Generator, rounds: int = ROUNDS) -> float:
    """Of diag(b) X diag(d) Y after `rounds` of alternating least squares."""
    X, Y = rng.standard_normal((SIZE, rank)), rng.standard_normal((rank, SIZE))
    b = np.ones(SIZE)
    for _ in range(rounds):
        # Column k of the system is the outer product of (b ∘ X)_k and Y_k.
        system = np.einsum("ik,kj->ijk", b[:, None] * X, Y).reshape(-1, rank)
        d = np.linalg.lstsq(system, W.reshape(-1), rcond=None)[0]
        M = X * d @ Y
        b = (W * M).sum(1) / np.maximum((M * M).sum(1), 1e-30)
    return float(((W - b[:, None] * M) ** 2).mean())


def make(folder: Path, matrices: int | None = None, rounds: int | None = None) -> dict[str, Any]:
    """Mean and standard error over the matrices, MATRICES and ROUNDS if left out; the table and the picture."""
    matrices, rounds = matrices or MATRICES, rounds or ROUNDS
    rng = np.random.default_rng(0)
    targets = [rng.standard_normal((SIZE, SIZE)) for _ in range(matrices)]
    points: list[dict[str, Any]] = []
    for method, ranks in (("LoRA", LORA_RANKS), ("VeRA", VERA_RANKS)):
        for rank in ranks:
            errors = [lora_error(W, rank) if method == "LoRA" else vera_error(W, rank, rng, rounds) for W in targets]
            parameters = 2 * SIZE * rank if method == "LoRA" else SIZE + rank
            spread = float(np.std(errors, ddof=1) / matrices**0.5)
            points.append(
                {"method": method, "rank": rank, "parameters": parameters, "mse": float(np.mean(errors)), "error": spread}
            )
    cells = [
        (p["method"], str(p["rank"]), str(p["parameters"]), f"{p['mse']:.3f} ± {p['error']:.3f}")
        for p in sorted(points, key=lambda p: (p["parameters"], p["method"]))
    ]
    remark = (
        f"{matrices} matrices, {rounds} rounds of alternating least squares. LoRA can have multiples of 20 parameters alone, "
        "VeRA any number above 10."
    )
    columns = ("method", "rank", "parameters", "mean squared error")
    text = page("Figure 6: fitting random matrices", "fig6", [("", columns, cells)], [remark, "![](fig6.png)"])
    _draw(points, folder / "fig6.png")
    return write(folder, "fig6", {"matrices": matrices, "rounds": rounds, "points": points}, text)


def _draw(points: list[dict[str, Any]], path: Path) -> None:
    try:
        import matplotlib
    except ImportError as e:
        from ..errors import need

        raise need("matplotlib", "demo", "a figure") from e
    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    figure, axes = plt.subplots(figsize=(5, 3.6), constrained_layout=True)
    for method, marker in (("LoRA", "o"), ("VeRA", "^")):
        mine = [p for p in points if p["method"] == method]
        axes.errorbar(
            [p["parameters"] for p in mine], [p["mse"] for p in mine], [p["error"] for p in mine], marker=marker, label=method
        )
    axes.set(xlabel="trained parameters", ylabel="mean squared error")
    axes.legend(frameon=False)
    figure.savefig(path, dpi=130)
    plt.close(figure)
