"""What the kernels come to in machine code: compiled for a Hopper GPU (sm_90), which needs no GPU. Needs the package triton.

Of each: registers a thread, bytes of spilled registers, shared memory, and instructions that say which units it uses. Prints a
line a kernel and writes kernels_code.json. `python -m benchmarks.gpu.resources`
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

from veralib.kernels import folding, grow, mixed

from . import common

POINTER = {torch.bfloat16: "*bf16", torch.float16: "*fp16", torch.float32: "*fp32"}
INTEGERS = ("T", "outputs", "per_row", "m", "r", "rows", "columns", "matrix", "layer", "k0", "k1")
SOURCES = ("numbers", "bytes", "grown")
TOKENS, OUTPUTS = (16, 32, 256), 11008


def compiled(kernel: Any, pointers: dict[str, str], constants: dict[str, Any], warps: int = 4, stages: int = 3) -> dict[str, Any]:
    """One kernel's resources. pointers: the types of its tensors, all of them aligned to 16 bytes, as are strides."""
    names = kernel.arg_names
    integers = {n: "i32" for n in names if n in INTEGERS or n.startswith("s_")}
    types = pointers | integers | {"scale": "fp32"}
    aligned = {(i,): [["tt.divisibility", 16]] for i, n in enumerate(names) if n in pointers or n.startswith("s_")}
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
        "kernel": kernel.__name__.lstrip("_"),
        "registers": found["reg"],
        "spilled_bytes": found["stack"],
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

    for dtype in POINTER:
        low, name = POINTER[dtype], str(dtype).removeprefix("torch.")
        for kind, source in enumerate(SOURCES):
            for T in TOKENS if dtype == torch.bfloat16 else TOKENS[:1]:
                tile = mixed.choose_tile(T, OUTPUTS, kind == 2, dtype)
                pointers = dict.fromkeys(("out", "x", "F", "d", "b"), low) | {"index": "*i64", "levels": "*fp32"}
                if source == "bytes":
                    pointers["F"] = "*u8"
                shape = {"BT": tile.BT, "BO": tile.BO, "BK": tile.BK}
                constants = {"INPUTS": 256, "SCALED": True, "INDEXED": True, "SOURCE": kind, "LEVELS": 0, "INTERPRETED": False}
                what = {"dtype": name, "source": source, "T": T, "tile": list(shape.values())}
                put(what, mixed._product, pointers, constants | shape, tile.num_warps, tile.num_stages)
        vectors = {"d": "*fp32", "b": "*fp32"}
        put({"dtype": name}, folding._fold, {"out": low, "B": low, **vectors}, {"BI": 16, "BJ": 256})
        inputs = {"part_d": "*fp32", "grad_b": "*fp32", "P": low, "B": low, **vectors}
        put({"dtype": name}, folding._gradients, inputs, {"R": 1024, "BI": 32, "BJ": 128})
        for raw in (False, True):
            output = {"out": "*u8" if raw else low, "levels": "*fp32"}
            put({"dtype": "uint8" if raw else name}, grow._grow, output, {"LEVELS": 0, "RAW": raw, "BI": 32, "BC": 8})
    spilled = [e for e in results.data["kernels"] if e["spilled_bytes"]]
    print(f"{len(results.data['kernels'])} kernels, {len(spilled)} of them spill registers", flush=True)
    return 0


if __name__ == "__main__":
    sys.exit(main())
