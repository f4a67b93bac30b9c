"""What a step must take at least: operations and bytes over the chip's ceilings. `python -m benchmarks.gpu.floors` prints them.

The predictions in docs/LOG.md come from here; render.py sets them beside what was measured, with the ceilings measured then.
"""

from dataclasses import dataclass

from . import common

# Measured earlier on an H200 (copy, read and written; an 8192³ bf16 product): render.py takes those of the run itself.
COPY_GBs, BF16_TFLOPs = 4300.0, 780.0
# Layers that read the same x share A x: q, k, v; o; gate, up; down.
GROUPS = (("q_proj", "k_proj", "v_proj"), ("o_proj",), ("gate_proj", "up_proj"), ("down_proj",))


@dataclass(frozen=True)
class Ceilings:
    """Of one chip."""

    copy_GBs: float = COPY_GBs
    bf16_TFLOPs: float = BF16_TFLOPs

    def ms(self, flops: float, moved: float) -> float:
        """The larger of the two times."""
        return max(flops / self.bf16_TFLOPs / 1e9, moved / self.copy_GBs / 1e6)


def sums(size: common.Size) -> tuple[int, int]:
    """(inputs summed over input groups, outputs summed over linears) of one layer."""
    shapes = size.linears
    return sum(shapes[group[0]][1] for group in GROUPS), sum(m for m, _ in shapes.values())


def train_flops(size: common.Size, tokens: int, rank: int = 0) -> float:
    """A step's matmuls: W0 x and W0ᵀ g of the frozen linears; with a rank, the factored plan's A and B, A x shared.

    Per layer 2·T·r·inputs twice (A x, Aᵀ gu), 2·T·r·outputs three times (C u, Cᵀ g, gᵀ u).
    """
    inputs, outputs = sums(size)
    return 4 * tokens * size.weights + size.layers * 2 * tokens * rank * (2 * inputs + 3 * outputs)


def saved_bytes(size: common.Size, tokens: int, rank: int) -> int:
    """The least that the adapter keeps for backward: u in bf16, once for each input group."""
    return size.layers * len(GROUPS) * tokens * rank * 2


def decode_ms(size: common.Size, batch: int, rank: int, distinct: int, method: str, c: Ceilings) -> float:
    """A decode step of the linears. base: the weights read once. veralib: A and B once a layer's group or linear (they don't
    stay in the L2 between layers), d and b of each distinct adapter in bf16. lora: every distinct adapter's A and B."""
    inputs, outputs = sums(size)
    all_inputs = sum(n for _, n in size.linears.values())
    base = c.ms(2 * batch * size.weights, 2 * size.weights)
    if method == "base":
        return base
    flops = size.layers * 2 * batch * rank * (inputs + outputs)
    if method == "veralib":
        vectors = distinct * (7 * rank + outputs) * 2
        return base + c.ms(flops, size.layers * (2 * rank * (size.mlp * 2) + vectors))
    return base + c.ms(flops, size.layers * distinct * rank * (all_inputs + outputs) * 2)


def main() -> int:
    """Prints the floors of the measured settings."""
    size, c = common.SEVEN, Ceilings()
    print(f"{size.layers} layers, {size.weights / 1e9:.2f} G weights; {c}")
    floor = c.ms(train_flops(size, 2048), 0)
    for rank in (0, 256, 1024):
        ms = c.ms(train_flops(size, 2048, rank), 0)
        print(
            f"train 2048 tokens r={rank}: {ms:.1f} ms, {ms / floor:.2f} x, saves {saved_bytes(size, 2048, rank) / 2**20:.0f} MiB"
        )
    for batch in (1, 16, 64, 128, 256):
        base = decode_ms(size, batch, 0, 0, "base", c)
        cells = [f"{m} r={r} {decode_ms(size, batch, r, batch, m, c) / base:.3f}" for m, r in
                 (("veralib", 256), ("veralib", 1024), ("lora", 1), ("lora", 16))]  # fmt: skip
        print(f"decode batch {batch}, all distinct: base {base:.3f} ms; " + "; ".join(cells))
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
