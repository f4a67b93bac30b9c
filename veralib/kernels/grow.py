"""A and B grown on the device: the bits of basis.py, sixteen entries for each Philox call."""

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..basis import Basis
from .words import LEVELS, byte, key, level, table, words


@triton.jit(do_not_specialize=["matrix", "layer", "k0", "k1"])
def _grow(out, levels, rows, columns, matrix, layer, k0, k1, LEVELS: tl.constexpr, RAW: tl.constexpr,
          BI: tl.constexpr, BC: tl.constexpr):  # fmt: skip
    i = tl.program_id(0) * BI + tl.arange(0, BI)[:, None]
    c = tl.program_id(1) * BC + tl.arange(0, BC)[None, :]
    w0, w1, w2, w3 = words(c, i, matrix, layer, k0, k1)
    place = out + i.to(tl.int64) * columns + c * 16
    for s in tl.static_range(16):
        v = byte(w0, w1, w2, w3, s)
        there = (i < rows) & (c * 16 + s < columns)
        if RAW:
            tl.store(place + s, v.to(tl.uint8), mask=there)
        else:
            tl.store(place + s, level(v, levels, LEVELS).to(out.dtype.element_ty), mask=there)


def grow(basis: Basis, matrix: int, out: Tensor) -> Tensor:
    """Fills out (rows, columns) with the leading block of A or B (matrix: MATRIX_A or MATRIX_B); raw bytes v where it is uint8.

    Only for a "philox-u8" basis. The plain form: basis.basis_bytes and basis.Basis.A, whose bits these are.
    """
    rows, columns = out.shape
    BI, BC = 32, 8
    if not out.numel():
        return out
    with torch.cuda.device_of(out):
        k0, k1 = key(basis)
        kinds = {"LEVELS": LEVELS[basis.levels], "RAW": out.dtype == torch.uint8}
        grid = (triton.cdiv(rows, BI), triton.cdiv(columns, 16 * BC))
        _grow[grid](out, table(basis.levels, out), rows, columns, matrix, basis.layer_id, k0, k1, BI=BI, BC=BC, **kinds)
    return out
