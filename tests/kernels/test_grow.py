"""A and B grown by the kernel are the bits of basis.py."""

import pytest
import torch

from tests.kernels.conftest import DTYPES
from veralib import basis, kernels
from veralib.basis import MATRIX_A, MATRIX_B, Basis, basis_bytes


@pytest.mark.parametrize("levels", ["kaiming_uniform", "kaiming_normal", "uniform", "rademacher"])
@pytest.mark.parametrize("seed, layer_id", [(0, 0), (12345678901234567, 1), (2**64 - 1, 2**32 - 1)])
def test_bits_are_the_basis(device, levels, seed, layer_id):
    from veralib.kernels.grow import grow

    pair = Basis(seed=seed, levels=levels, layer_id=layer_id)
    for matrix, shape in ((MATRIX_A, (3, 50)), (MATRIX_B, (33, 17)), (MATRIX_A, (1, 1))):
        made = lambda dtype, matrix=matrix, shape=shape: grow(pair, matrix, torch.empty(shape, dtype=dtype, device=device)).cpu()  # noqa: E731
        assert torch.equal(made(torch.uint8), basis_bytes(seed, matrix, *shape, layer_id=layer_id))
        for dtype in DTYPES:
            right = (pair.B if matrix else pair.A)(*shape, "cpu", dtype)
            assert torch.equal(made(dtype), right)


def test_nothing_is_asked_for(device):
    from veralib.kernels.grow import grow

    assert grow(Basis(), MATRIX_A, torch.empty(0, 7, device=device)).shape == (0, 7)


def test_a_basis_uses_it_when_kernels_are_on(device, monkeypatch):
    from veralib.kernels import grow

    plain, made = Basis(seed=3).A(5, 40).clone(), []
    basis.clear_cache()
    monkeypatch.setattr(grow, "grow", lambda *a, grow=grow.grow: made.append(a) or grow(*a))
    kernels.use()
    try:
        assert torch.equal(Basis(seed=3).A(5, 40, device).cpu(), plain) and len(made) == 1
    finally:
        kernels.use(False)
        basis.clear_cache()
