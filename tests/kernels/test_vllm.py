"""The sums of vLLM's static form, for torch.compile and CUDA graphs, with the kernel in them. Needs no vLLM."""

import pytest
import torch

from tests.kernels.conftest import BOUND, DTYPES, error
from tests.serving.vllm.test_parts import Setting

SLOTS = {n: n - 1 for n in (1, 2, 3, 4)}
BATCHES = [(1, 2, 3, 4, 0, 0, 1), (2,) * 5, (1, 1, 0), (0, 3, 0, 3), (1, 3), (0, 0)]


def batch(setting, ids, device, dtype):
    setting.tables.follow(ids, SLOTS)
    return (torch.randn(len(ids), 24).to(device, dtype) for _ in range(2))


@pytest.mark.parametrize("dtype", DTYPES)
def test_sums_by_the_kernel_are_exact(switched_on, dtype):
    s = Setting(dtype, static=True, device=switched_on)
    assert s.bases.fused
    for ids in BATCHES:
        x, out = batch(s, ids, switched_on, dtype)
        before = out.clone()
        got = s.site._add_static(x, out)
        assert got.data_ptr() == out.data_ptr()
        # u is rounded once more than in the kernel's own tests
        assert error(got, s.want(x.cpu(), before.cpu(), ids)) < 2 * BOUND[dtype]
        nobody = torch.tensor(ids, device=got.device) == 0
        assert torch.equal(got[nobody], before[nobody])


def test_a_token_without_an_adapter_is_left_alone_whatever_it_holds(switched_on):
    """CUDA graphs are padded: what lies behind the step's tokens may be anything."""
    s = Setting(static=True, device=switched_on)
    s.tables.follow((1, 0), SLOTS)
    x, out = (torch.randn(4, 24, device=switched_on) for _ in range(2))
    x[1], x[2:], out[1:] = torch.inf, torch.nan, torch.inf
    got = s.site._add_static(x, out)
    assert got[0].isfinite().all() and (got[1:] == torch.inf).all()


def test_a_compiled_layer_adds_by_the_kernel_and_follows_the_tables(switched_on):
    s = Setting(static=True, device=switched_on)
    compiled = torch.compile(lambda x, W: s.site.add(x, x @ W), backend="aot_eager", fullgraph=True)
    W = torch.randn(24, 24, device=switched_on)
    for ids in [(1, 2, 3), (0, 4, 1), (0, 0, 0)]:
        x, _ = batch(s, ids, switched_on, torch.float32)
        with torch.compiler.set_stance("default" if ids == (1, 2, 3) else "fail_on_recompile"), torch.no_grad():
            assert error(compiled(x, W), s.want(x.cpu(), (x @ W).cpu(), ids)) < 2e-6


def test_kernels_turned_on_later_change_nothing(device):
    """B is laid out for one form or the other when the engine starts."""
    from veralib import kernels

    s = Setting(static=True, device=device)
    kernels.use()
    try:
        x, out = batch(s, (1, 2, 0), device, torch.float32)
        want = s.want(x.cpu(), out.cpu(), (1, 2, 0))
        assert not s.bases.fused and error(s.site._add_static(x, out), want) < 2e-6
    finally:
        kernels.use(False)
