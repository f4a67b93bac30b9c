"""torch.export, torch.jit.trace and nested tensors: a right answer, or an error that says what to do."""

import contextlib
import io
import warnings

import pytest
import torch
from torch import nn

from tests.conftest import randomise, tiny_llama, tokens
from tests.reference import logits
from veralib import StateError, VeraConfig, attach
from veralib.basis import clear_cache


@pytest.fixture
def vera():
    model = tiny_llama().eval()
    model.config.use_cache = False
    handle = attach(model, VeraConfig(rank=4, targets="all-linear"))
    randomise(handle, "default")
    return handle


def exported(model, ids, strict):
    """The logits of the exported model, saved and loaded, and the names of its graph's calls."""
    program = torch.export.export(model, (ids,), strict=strict)
    file = io.BytesIO()
    torch.export.save(program, file)
    file.seek(0)
    with torch.no_grad():
        return torch.export.load(file).module()(ids).logits, {str(n.target) for n in program.graph.nodes}


@pytest.mark.parametrize("strict", [False, True])
@pytest.mark.parametrize("grad", [False, True])
def test_a_merged_model_is_exported_without_an_operator_of_ours(vera, strict, grad):
    ids = tokens(2)
    vera.use(None)
    with torch.set_grad_enabled(grad):
        plain, _ = exported(vera.model, ids, strict)
        vera.use("default")
        beside = logits(vera.model, ids)
        vera.merge()
        merged, calls = exported(vera.model, ids, strict)
    assert (plain - beside).abs().max() > 1e-2
    torch.testing.assert_close(merged, beside, rtol=1e-4, atol=1e-5)
    assert not any("veralib" in call for call in calls)


@pytest.mark.parametrize("how", ["use", "using", "rows"])
def test_an_adapter_beside_its_base_isnt_exported(vera, how):
    vera.use("default" if how == "use" else None)
    chosen = {"use": contextlib.nullcontext, "using": lambda: vera.using("default"), "rows": lambda: vera.rows(["default", None])}
    with chosen[how](), pytest.raises(StateError, match=r"merge\(\) it first"):
        torch.export.export(vera.model, (tokens(2),), strict=False)


@pytest.mark.parametrize("plan", [None, "factored", "merged-weights", "apart-tokens"])
def test_a_trace_records_the_adapter_in_use(plan):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(6, 6), nn.Tanh(), nn.Linear(6, 2)).eval()
    vera = attach(model, VeraConfig(rank=4, targets=["0", "2"]))
    randomise(vera, "default")
    vera.runtime.plan = plan
    clear_cache()  # A is grown before B, and B's growing must not cost A its place
    x, other = torch.randn(3, 6), torch.randn(3, 6)
    with pytest.raises(StateError, match=r"trace under torch.no_grad\(\)"):
        torch.jit.trace(model, (x,))
    with torch.no_grad(), warnings.catch_warnings():
        warnings.simplefilter("ignore")  # torch's own: shapes are fixed in a trace
        expected = model(other)
        traced = torch.jit.trace(model, (x,))
        vera.use(None)
        assert (model(other) - expected).abs().max() > 1e-2
        torch.testing.assert_close(traced(other), expected)


def test_a_nested_tensor_is_refused_with_what_makes_it():
    encoder = nn.TransformerEncoder(nn.TransformerEncoderLayer(16, 2, 32, batch_first=True), 2)
    vera = attach(encoder, VeraConfig(rank=4, targets=["linear1", "linear2"]))
    randomise(vera, "default")
    encoder.eval()
    x, padding = torch.randn(2, 5, 16), torch.tensor([[False] * 5, [False] * 3 + [True] * 2])
    with torch.no_grad():
        for name in ("default", None):
            with vera.rows(["default", name]), pytest.raises(StateError, match="enable_nested_tensor=False"):
                encoder(x, src_key_padding_mask=padding)
        with pytest.raises(StateError, match="enable_nested_tensor=False"):
            encoder(x, src_key_padding_mask=padding)
        encoder.use_nested_tensor = False  # what enable_nested_tensor sets
        padded = encoder(x, src_key_padding_mask=padding)
        alone = encoder(x[1:, :3])
    torch.testing.assert_close(padded[1, :3], alone[0], rtol=1e-4, atol=1e-5)
