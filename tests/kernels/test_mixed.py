"""u = A x and out += b ∘ B(d ∘ u) against the same in float64, from each source of the matrix."""

import pytest
import torch

from tests.kernels.conftest import BOUND, DTYPES, any_seed, draw, error, product
from veralib.basis import MATRIX_A, MATRIX_B, Basis, basis_bytes

SOURCES = ["numbers", "bytes", "grown"]


def source(kind, pair, matrix, shape, device, dtype):
    from veralib.kernels.mixed import Bytes, Grown

    if kind == "bytes":
        return Bytes(basis_bytes(pair.seed, matrix, *shape, layer_id=pair.layer_id).to(device), pair.levels)
    if kind == "grown":
        return Grown(pair, matrix, shape)
    wide = (pair.B if matrix else pair.A)(shape[0], shape[1] + 5, device, dtype)
    return wide[:, : shape[1]]  # rows apart from each other, as a view of a wider pair


def exactly(out, u, d, b, index, B, per_row):
    """In float64, token by token, with the terms for error()."""
    right = out.double().cpu()
    squares = right.square()
    for t in range(len(u)):
        k = t // per_row if index is None else int(index[t // per_row])
        if 0 <= k < len(d):
            update, terms = product(d[k].double() * u[t].double(), B)
            right[t] += b[k].double().cpu() * update
            squares[t] += (b[k].double().cpu() * terms).square()
    return right, squares.sqrt()


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("kind", SOURCES)
@pytest.mark.parametrize(
    "T, m, r, K, per_row",
    [
        (1, 9, 1, 1, 1),
        (1, 17, 16, 2, 1),
        (5, 70, 33, 3, 1),
        (18, 40, 300, 4, 3),
        (37, 24, 7, 37, 1),
        (20, 33, 40, 1, 20),
        (40, 9, 5, 3, 1),
    ],
)
def test_mixed_add(device, dtype, kind, T, m, r, K, per_row):
    from veralib.kernels import plain
    from veralib.kernels.mixed import mixed_add, numbers

    pair = Basis(seed=any_seed(), layer_id=T)
    B = source(kind, pair, MATRIX_B, (m, r), device, dtype)
    wide = draw(T, m + 9, dtype=dtype, device=device)  # out is some columns of it
    before, out = wide.clone(), wide[:, 4 : 4 + m]
    u = draw(T, r + 3, dtype=dtype, device=device)[:, 1 : 1 + r]
    table = draw(K, r + m, device=device)
    d, b = table[:, :r], table[:, r:]
    index = None
    if K * per_row != T:
        index = torch.randint(-1, K + 1, (T // per_row,), device=device)
        index[T // per_row // 2 :] = -1  # whole tiles of it in the longest case
    right = exactly(out, u, d, b, index, numbers(B, u).double().cpu(), per_row)
    without = plain.mixed_add(out.clone(), u, d, b, index, numbers(B, u), per_row)
    version = out._version
    assert mixed_add(out, u, d, b, index, B, per_row) is out and out._version > version
    assert error(out, *right) < BOUND[dtype] and error(without, *right) < BOUND[dtype]
    assert torch.equal(wide[:, :4], before[:, :4]) and torch.equal(wide[:, 4 + m :], before[:, 4 + m :])
    if index is not None:
        nobody = ((index < 0) | (index >= K)).repeat_interleave(per_row)
        assert torch.equal(out[nobody], before[:, 4 : 4 + m][nobody])


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("kind", SOURCES)
@pytest.mark.parametrize("levels", ["kaiming_uniform", "kaiming_normal", "uniform", "rademacher"])
def test_rank_space(device, dtype, kind, levels):
    from veralib.kernels.mixed import numbers, rank_space

    pair = Basis(seed=any_seed(), levels=levels)
    for T, n, r in ((1, 5, 3), (19, 70, 20)):
        A, x = source(kind, pair, MATRIX_A, (r, n), device, dtype), draw(T, n, dtype=dtype, device=device)
        assert error(rank_space(x, A), *product(x, numbers(A, x))) < BOUND[dtype]


@pytest.mark.parametrize("kind", SOURCES)
@pytest.mark.parametrize("parts", [2, 4, 16])
def test_sums_in_parts_leave_no_input_out_and_take_none_twice(device, kind, parts):
    """Lengths that no part divides, and more parts than there is to do."""
    from veralib.kernels.mixed import Tile, _launch, numbers

    pair = Basis(seed=any_seed())
    for T, n, r in ((1, 513, 20), (18, 700, 9), (3, 5, 3)):
        A, x = source(kind, pair, MATRIX_A, (r, n), device, torch.float32), draw(T, n, device=device)
        out = torch.full((T, r), torch.nan, device=device)
        _launch(out, x, A, None, None, None, 1, Tile(16, 16, 1 if kind == "grown" else 16, 4, 1, parts))
        assert error(out, *product(x, numbers(A, x))) < BOUND[torch.float32]


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("kind", SOURCES)
def test_a_long_sum_for_few_tokens(device, kind, dtype):
    from veralib.kernels.mixed import choose_parts, choose_tile, numbers, rank_space

    pair, n, r = Basis(seed=any_seed()), 1100, 20
    A, x = source(kind, pair, MATRIX_A, (r, n), device, dtype), draw(3, n, dtype=dtype, device=device)
    assert choose_parts(choose_tile(3, r, kind == "grown", dtype), 3, r, n) == 4
    assert error(rank_space(x, A), *product(x, numbers(A, x))) < BOUND[dtype]


def test_a_row_without_an_adapter_is_left_alone_whatever_it_holds(device):
    """Never multiplied by zero: inf · 0 is no number. Nor is anything read for an index that no adapter has."""
    from veralib.kernels.mixed import mixed_add

    out, u = draw(3, 8, device=device), draw(3, 4, device=device)
    out[1:], u[1:] = torch.inf, torch.nan
    d, b = draw(1, 4, device=device), draw(1, 8, device=device)
    mixed_add(out, u, d, b, torch.tensor([0, -1, 2**40], device=device), draw(8, 4, device=device))
    assert out[0].isfinite().all() and (out[1:] == torch.inf).all()


def test_no_tokens_and_columns_apart(device):
    from veralib.kernels.mixed import mixed_add, rank_space

    A = draw(3, 5, device=device)
    assert rank_space(torch.empty(0, 5, device=device), A).shape == (0, 3)
    with pytest.raises(ValueError, match="x has stride 2 between its columns"):
        rank_space(draw(4, 10, device=device)[:, ::2], A)
    with pytest.raises(ValueError, match="out has stride"):
        mixed_add(draw(4, 6, device=device)[:, ::2], draw(4, 5, device=device), A[:1], A[:1, :3], None, A, 4)
