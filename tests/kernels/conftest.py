"""Kernels run on a GPU where there is one, else in Triton's interpreter: `TRITON_INTERPRET=1 python -m pytest tests/kernels`."""

import os

import pytest
import torch

INTERPRET = os.environ.get("TRITON_INTERPRET") == "1"


@pytest.fixture(autouse=True)
def fresh_numbers() -> None:
    """The same numbers at every run, or those of SEED; SEED=any draws others and prints the seed that repeats them."""
    given = os.environ.get("SEED") or "0"
    seed = torch.seed() % 2**31 if given == "any" else int(given)
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


def error(out: torch.Tensor, right: torch.Tensor, terms: torch.Tensor | None = None) -> float:
    """‖out − right‖ / ‖right‖ in float64; NaN is no number that passes a bound.

    ``terms`` is the root of each sum's squared terms. ‖terms‖ divides where it is larger: the few sums of a short result may all
    cancel, and their rounding doesn't shrink with them.
    """
    out, right = out.detach().double().cpu(), right.detach().double().cpu()
    size = right.norm() if terms is None else torch.maximum(right.norm(), terms.norm())
    return float((out - right).norm() / size.clamp_min(1e-30))


def product(x: torch.Tensor, M: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """x Mᵀ and its ``terms`` for error(), in float64."""
    x, M = x.detach().double().cpu(), M.detach().double().cpu()
    return x @ M.t(), (x.square() @ M.square().t()).sqrt()


# Of a result rounded once, and of sums of rounded products. The interpreter cuts bf16 off where a GPU rounds it: twice the error.
BOUND = {torch.float32: 5e-7, torch.float16: 8e-4, torch.bfloat16: 1.2e-2}
DTYPES = list(BOUND)


def draw(*shape: int, dtype: torch.dtype = torch.float32, device: torch.device) -> torch.Tensor:
    return torch.randn(*shape).to(device, dtype)


def any_seed() -> int:
    return int(torch.randint(2**62, ()))
