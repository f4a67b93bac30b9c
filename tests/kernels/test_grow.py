"""A and B grown by the kernel are the bits of basis.py."""

import pytest
import torch

from tests.kernels.conftest import DTYPES
from veralib import basis
from veralib.basis import MATRIX_A, MATRIX_B, Basis, basis_bytes


@pytest.mark.parametrize("levels", ["kaiming_uniform", "kaiming_normal", "uniform", "rademacher"])
@pytest.mark.parametrize("seed, layer_id", [(0, 0), (12345678901234567, 1), (2**64 - 1, 2**32 - 1)])
def test_bits_are_the_basis(device, levels, seed, layer_id):
    from veralib.kernels.grow import grow

    pair = Basis(seed=seed, levels=levels, layer_id=layer_id)
    for matrix, shape in ((MATRIX_A, (3, 50)), (MATRIX_B, (33, 17)), (MATRIX_A, (1, 1))):
        raw = grow(pair, matrix, *shape, device, torch.uint8)
        assert torch.equal(raw.cpu(), basis_bytes(seed, matrix, *shape, layer_id=layer_id))
        for dtype in DTYPES:
            right = (pair.B if matrix else pair.A)(*shape, "cpu", dtype)
            assert torch.equal(grow(pair, matrix, *shape, device, dtype).cpu(), right)


def test_nothing_is_asked_for(device):
    from veralib.kernels.grow import grow

    assert grow(Basis(), MATRIX_A, 0, 7, device, torch.float32).shape == (0, 7)


def test_a_basis_uses_it_when_kernels_are_on(switched_on, monkeypatch):
    from veralib.kernels import grow

    made, plain = [], Basis(seed=3).A(5, 40)
    basis.clear_cache()
    monkeypatch.setattr(grow, "grow", lambda *a, grow=grow.grow: made.append(a) or grow(*a))
    assert torch.equal(Basis(seed=3).A(5, 40, switched_on).cpu(), plain) and len(made) == 1
    basis.clear_cache()
