"""Kernels run on a GPU where there is one, else in Triton's interpreter: `TRITON_INTERPRET=1 python -m pytest tests/kernels`."""

import os

import pytest
import torch

INTERPRET = os.environ.get("TRITON_INTERPRET") == "1"


@pytest.fixture(autouse=True)
def fresh_numbers() -> None:
    """Other numbers at every run, since a kernel must be right for any. A failed test prints the SEED that repeats it."""
    seed = int(os.environ.get("SEED") or torch.seed() % 2**31)
    torch.manual_seed(seed)
    print(f"SEED={seed}")


@pytest.fixture
def device() -> torch.device:
    """Where kernels run here."""
    pytest.importorskip("triton", reason="needs triton: pip install 'veralib[gpu]'")
    if INTERPRET:
        return torch.device("cpu")
    if not torch.cuda.is_available():
        pytest.skip("neither a GPU nor TRITON_INTERPRET=1, with which Triton's interpreter runs kernels on the CPU")
    return torch.device("cuda")


@pytest.fixture
def switched_on(device):
    """Kernels in use during the test."""
    from veralib import kernels

    kernels.use()
    yield device
    kernels.use(False)


def error(out: torch.Tensor, right: torch.Tensor) -> float:
    """‖out − right‖ / ‖right‖ in float64; NaN is no number that passes a bound."""
    out, right = out.detach().double().cpu(), right.detach().double().cpu()
    return float((out - right).norm() / right.norm().clamp_min(1e-30))


# Of a result rounded once, and of sums of rounded products. The interpreter cuts bf16 off where a GPU rounds it: twice the error.
BOUND = {torch.float32: 5e-7, torch.float16: 8e-4, torch.bfloat16: 1.2e-2}
DTYPES = list(BOUND)


def draw(*shape: int, dtype: torch.dtype = torch.float32, device: torch.device) -> torch.Tensor:
    return torch.randn(*shape).to(device, dtype)


def any_seed() -> int:
    return int(torch.randint(2**62, ()))
