"""What the kernels come to in machine code: compiled for a Hopper GPU (sm_90), which needs no GPU. Needs the package triton.

Of each: registers a thread, bytes of stack, where registers spill, shared memory, and instructions that say which units it uses.
Prints a line a kernel and writes kernels_code.json. `python -m benchmarks.gpu.resources`
"""

import re
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from veralib.kernels import folding, grow, merge, mixed
from veralib.kernels.words import LEVELS

from . import common

POINTER = {torch.bfloat16: "*bf16", torch.float16: "*fp16", torch.float32: "*fp32"}
INTEGERS = (
    "T", "outputs", "inputs", "length", "adapters", "per_row", "m", "n", "r", "rows", "columns", "size", "matrix", "layer",
    "k0", "k1",
)  # fmt: skip
WHOLE = ("inputs", "outputs", "length", "m", "n", "r", "rows", "columns")  # multiples of 16 in real models, as strides are
SOURCES = ("numbers", "bytes", "grown")
HALF, FULL = torch.bfloat16, torch.float32
# what, dtype, source, tokens, outputs, kind of levels
PRODUCTS = (
    *(("mixed_add", HALF, source, T, 11008, "kaiming_uniform") for source in SOURCES for T in (16, 32, 256)),
    *(("mixed_add", dtype, source, 16, 11008, "kaiming_uniform") for dtype in (torch.float16, FULL) for source in SOURCES),
    *(("mixed_add", FULL, source, 256, 11008, "kaiming_uniform") for source in SOURCES[:2]),
    *(("mixed_add", HALF, source, 16, 11008, "kaiming_normal") for source in SOURCES[1:]),
    *(("rank_space", HALF, source, T, 256, "kaiming_uniform") for source in SOURCES for T in (16, 256)),
)


def compiled(kernel: Any, pointers: dict[str, str], constants: dict[str, Any], warps: int = 4, stages: int = 3) -> dict[str, Any]:
    """One kernel's resources. pointers: its tensors' types, all aligned to 16 bytes; constants: what is known at compile time."""
    names = kernel.arg_names
    integers = {n: "i64" if n == "k0" else "i32" for n in names if n in INTEGERS or n.startswith("s_")}
    types = pointers | integers | {"scale": "fp32"}
    even = {*pointers, *WHOLE, *(n for n in names if n.startswith("s_"))} - constants.keys()
    aligned = {(i,): [["tt.divisibility", 16]] for i, n in enumerate(names) if n in even}
    source = ASTSource(
        fn=kernel,
        signature={n: types[n] if n in types and n not in constants else "constexpr" for n in names},
        constexprs={(names.index(n),): value for n, value in constants.items()},
        attrs=aligned,
    )
    made = triton.compile(source, target=GPUTarget("cuda", 90, 32), options={"num_warps": warps, "num_stages": stages})
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(made.asm["cubin"])
        file.flush()
        dump = Path(triton.__file__).parent / "backends/nvidia/bin/cuobjdump"
        said = subprocess.run([dump, "-res-usage", file.name], capture_output=True, text=True, check=True).stdout
    count = made.asm["ptx"].count
    found = {name.lower(): int(number) for name, number in re.findall(r"(REG|STACK):(\d+)", said)}
    return {
        "registers": found["reg"],
        "stack_bytes": found["stack"],
        "shared_bytes": made.metadata.shared,
        "wgmma": count("wgmma.mma_async"),
        "mma": count("mma.sync"),
        "high_products": count("mul.hi.u32"),
    }


def main(arguments: list[str] | None = None) -> int:
    """Prints a line a kernel; writes kernels_code.json."""
    options = common.options(__doc__, arguments)
    path = options.out / "kernels_code.json"
    results = common.Results(path, {"question": "kernels_code", "target": "sm_90", "triton": triton.__version__})

    def put(what: dict[str, Any], *args: Any) -> None:
        entry = what | compiled(*args)
        results.put("kernels", entry)
        print(", ".join(f"{k} {v}" for k, v in entry.items()), flush=True)

    for what, dtype, source, T, outputs, levels in PRODUCTS:
        low, kind, scaled = POINTER[dtype], SOURCES.index(source), what == "mixed_add"
        tile = mixed.choose_tile(T, outputs, source == "grown", dtype)
        pointers = dict.fromkeys(("out", "x", "F", "d", "b"), low)
        pointers |= {"index": "*i64" if scaled else low, "levels": "*fp32" if levels == "kaiming_normal" else low}
        if source == "bytes":
            pointers["F"] = "*u8"
        shape = {"BT": tile.BT, "BO": tile.BO, "BK": tile.BK}
        constants = {"per_row": 1, "LENGTH": 0, "SCALED": scaled, "INDEXED": scaled, "SOURCE": kind, "LEVELS": LEVELS[levels]}
        label = {"what": what, "dtype": str(dtype).removeprefix("torch."), "source": source, "levels": levels, "T": T}
        put(label | {"tile": list(shape.values())}, mixed._product, pointers, constants | shape, tile.num_warps, tile.num_stages)
    put({"what": "total"}, mixed._total, {"out": POINTER[HALF], "parts": POINTER[FULL]}, {"PARTS": 16, "BLOCK": 256}, 2)
    for dtype, low in POINTER.items():
        name = str(dtype).removeprefix("torch.")
        vectors = {"d": "*fp32", "b": "*fp32"}
        put({"what": "fold", "dtype": name}, folding._fold, {"out": low, "B": low, **vectors}, {"BI": 16, "BJ": 256})
        inputs = {"part_d": "*fp32", "grad_b": "*fp32", "P": low, "B": low, **vectors}
        put({"what": "vector_gradients", "dtype": name}, folding._gradients, inputs, {"LENGTH": 0, "BI": 16, "BJ": 128})
    for dtype, low in POINTER.items():
        half = dtype != FULL
        pointers = {"out": low, "W0": low, "sums": "*fp32", **vectors} | dict.fromkeys(("A", "B"), "*bf16" if half else "*fp32")
        tile = merge.tile(half)
        warps, stages = tile.pop("num_warps"), tile.pop("num_stages")
        constants = {"LENGTH": 0, "SPLIT": half, "s_out_n": 1, "s_W0_n": 1, **tile}
        label = {"what": "merge", "dtype": str(dtype).removeprefix("torch."), "tile": list(tile.values())}
        put(label, merge._merge, pointers, constants, warps, stages)
    for name, out in (("uint8", "*u8"), *((str(dtype).removeprefix("torch."), low) for dtype, low in POINTER.items())):
        constants = {"LEVELS": 0, "RAW": name == "uint8", "BI": 32, "BC": 8}
        put({"what": "grow", "dtype": name}, grow._grow, {"out": out, "levels": out}, constants)
    most = max(e["stack_bytes"] for e in results.data["kernels"])
    print(f"{len(results.data['kernels'])} kernels, with {most} bytes of stack at most", flush=True)
    return 0


if __name__ == "__main__":
    sys.exit(main())
