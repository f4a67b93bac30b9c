"""What a GPU would run, seen without one; and the script that measures the kernels, with numbers that mean nothing."""

import json
import os
import subprocess
import sys

import pytest

from tests.kernels.conftest import INTERPRET


def run(*arguments: str, **environment: str) -> str:
    env = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"} | environment
    done = subprocess.run([sys.executable, "-m", *arguments], capture_output=True, text=True, env=env)
    assert done.returncode == 0, done.stderr
    return done.stdout


@pytest.mark.slow
def test_every_kernel_compiles_for_hopper_and_keeps_its_numbers_in_registers(device, tmp_path):
    run("benchmarks.gpu.resources", "--out", str(tmp_path), TRITON_CACHE_DIR=str(tmp_path / "cache"))
    made = json.loads((tmp_path / "kernels_code.json").read_text())["kernels"]
    assert {e["what"] for e in made} == {"mixed_add", "rank_space", "total", "fold", "vector_gradients", "merge", "grow"}
    assert not [e for e in made if e["stack_bytes"] > 16]  # a spilled tile is hundreds of bytes
    products = [e for e in made if "source" in e]
    # Half precision goes through the matrix units; float32 doesn't, which would round it to TF32.
    assert all((e["mma"] + e["wgmma"] > 0) == (e["dtype"] != "float32") for e in made if e in products or e["what"] == "merge")
    assert all((e["high_products"] > 0) == (e["source"] == "grown") for e in products)


@pytest.mark.slow
def test_the_measuring_script_and_its_page(device, tmp_path):
    if not INTERPRET:
        pytest.skip("small shapes in the interpreter: with a GPU run python -m benchmarks.gpu.kernels")
    run("benchmarks.gpu.kernels", "--tiny", "--out", str(tmp_path), TRITON_INTERPRET="1")
    run("benchmarks.gpu.render", str(tmp_path))
    page, found = (tmp_path / "README.md").read_text(), json.loads((tmp_path / "kernels.json").read_text())
    assert "failures" not in found and not [
        e for s in ("mixed", "rank_space", "fold", "vector_gradients", "merge") for e in found[s] if e["failed"]
    ]
    assert "u = A x; a kernel's best tile" in page and all(e["bit-identical"] for e in found["grow"])
