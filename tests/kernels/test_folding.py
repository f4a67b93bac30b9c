"""C = Λ_b B Λ_d and the gradients of d and b, against float64."""

import pytest
import torch

from tests.kernels.conftest import BOUND, DTYPES, draw, error
from veralib.kernels import plain


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("m, r", [(1, 1), (70, 33), (37, 300), (0, 4), (4, 0)])
def test_fold(device, dtype, m, r):
    from veralib.kernels.folding import fold

    B, d, b = draw(m, r + 2, dtype=dtype, device=device)[:, :r], draw(r, device=device), draw(m, device=device)
    right = b.double()[:, None] * B.double() * (d.double() * 0.37)
    out = fold(B, d, b, 0.37, dtype)
    assert out.shape == (m, r) and out.dtype == dtype
    assert error(out, right) < BOUND[dtype] and error(plain.fold(B, d, b, 0.37, dtype), right) < BOUND[dtype]


def test_columns_apart_are_refused(device):
    from veralib.kernels.folding import fold, vector_gradients

    B, d, b = draw(6, 8, device=device), draw(4, device=device), draw(6, device=device)
    with pytest.raises(ValueError, match="B has stride 2 between its columns"):
        fold(B[:, ::2], d, b, 1.0, torch.float32)
    with pytest.raises(ValueError, match="P has stride 6"):
        vector_gradients(draw(4, 6, device=device).t(), B[:, :4], d, b, 1.0)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("m, r", [(1, 1), (70, 33), (37, 300), (0, 4), (4, 0)])
def test_vector_gradients_are_float32_and_the_same_every_time(device, dtype, m, r):
    from veralib.kernels.folding import vector_gradients

    B, P = (draw(m, r + k, dtype=dtype, device=device)[:, :r] for k in (2, 1))
    d, b = draw(r, device=device), draw(m, device=device)
    Q = P.double() * B.double()
    right = (Q.t() @ b.double() * 0.37, Q @ d.double() * 0.37)
    for make in (vector_gradients, plain.vector_gradients):
        for out, exact in zip(make(P, B, d, b, 0.37), right, strict=True):
            assert out.dtype == torch.float32 and out.shape == exact.shape and error(out, exact) < 2e-6
    again = vector_gradients(P, B, d, b, 0.37)
    assert all(torch.equal(x, y) for x, y in zip(again, vector_gradients(P, B, d, b, 0.37), strict=True))
