"""Kinds of base linear: shape, dense weight, reading, writing and restoring, the hash by which a weight is known."""

import copy
import hashlib

import pytest
import torch
from torch import nn

from veralib.errors import ConfigError, StateError
from veralib.hashes import weight_hash
from veralib.linears import (
    computes_plainly,
    dense_weight,
    is_conv1d,
    is_linear,
    quantisation,
    read_weight,
    restore,
    shape,
    snapshot,
    unfit,
    write_weight,
)

M, N = 96, 64
QUANTISED = ("nf4", "nf4-nested", "fp4", "int8")


def linear(dtype=torch.float32) -> nn.Linear:
    torch.manual_seed(0)
    return nn.Linear(N, M).to(dtype).requires_grad_(False)


def conv1d() -> nn.Module:
    from transformers.pytorch_utils import Conv1D

    torch.manual_seed(0)
    return Conv1D(M, N).requires_grad_(False)


def quantised(kind: str, storage=torch.uint8) -> nn.Module:
    bnb = pytest.importorskip("bitsandbytes", reason="pip install 'veralib[quantised]' to test quantised bases")
    if kind == "int8":
        module = bnb.nn.Linear8bitLt(N, M, has_fp16_weights=False)
    else:
        module = bnb.nn.Linear4bit(
            N, M, compute_dtype=torch.float32, quant_type=kind[:3], compress_statistics="nested" in kind, quant_storage=storage
        )
    module.load_state_dict(linear().state_dict())
    return module.to("cpu")


def bits(module: nn.Module) -> dict[str, torch.Tensor]:
    """Everything that a state_dict would store of a module, copied."""
    return {k: v.clone() for k, v in module.state_dict().items()}


def same(a: dict[str, torch.Tensor], b: dict[str, torch.Tensor]) -> bool:
    return a.keys() == b.keys() and all(torch.equal(a[k], b[k]) for k in a)


def test_kinds():
    from transformers.models.llama4.modeling_llama4 import Llama4Router

    assert is_linear(linear()) and not is_conv1d(linear())
    assert is_linear(conv1d()) and is_conv1d(conv1d())
    assert not is_linear(nn.Embedding(3, 4)) and not is_linear(nn.Conv2d(3, 4, 1))
    assert shape(linear()) == shape(conv1d()) == (M, N)
    assert issubclass(Llama4Router, nn.Linear) and not computes_plainly(Llama4Router.__new__(Llama4Router))


@pytest.mark.parametrize("kind", QUANTISED)
def test_shape_and_name_of_a_quantised_linear(kind):
    module = quantised(kind)
    assert is_linear(module) and shape(module) == (M, N)
    assert quantisation(module) == {"nf4-nested": "bnb-nf4"}.get(kind, f"bnb-{kind}")
    assert dense_weight(module) is None


def test_quantisation_of_plain_and_foreign_weights():
    assert quantisation(linear()) == quantisation(linear(torch.bfloat16)) == quantisation(conv1d()) == ""
    foreign = linear()
    foreign.weight = nn.Parameter(torch.ones(M, N, dtype=torch.int8), requires_grad=False)
    assert quantisation(foreign) == "Linear"

    class FP8Linear(nn.Linear):
        pass

    fp8 = FP8Linear(N, M)
    fp8.weight = nn.Parameter(torch.ones(M, N).to(torch.float8_e4m3fn), requires_grad=False)
    assert quantisation(fp8) == "FP8Linear"
    assert dense_weight(fp8) is None
    for call in (read_weight, snapshot, lambda m: write_weight(m, torch.zeros(M, N))):
        with pytest.raises(ConfigError, match=r"FP8Linear.*Load the base model without this quantisation"):
            call(fp8)


@pytest.mark.parametrize("make", [linear, conv1d])
def test_dense_weight_is_a_view_that_multiplies_like_the_module(make):
    module = make()
    W = dense_weight(module)
    assert W.shape == (M, N) and W.untyped_storage().data_ptr() == module.weight.untyped_storage().data_ptr()
    x = torch.randn(5, N)
    torch.testing.assert_close(x @ W.T + module.bias, module(x))


def test_dense_weight_is_none_where_our_matmul_may_not_use_it():
    assert dense_weight(linear().requires_grad_(True)) is None
    assert dense_weight(nn.Linear(N, M, device="meta").requires_grad_(False)) is None
    assert dense_weight(nn.utils.parametrizations.weight_norm(linear())) is None

    class Subclass(torch.Tensor):
        pass

    other = linear()
    other.weight = nn.Parameter(other.weight.detach().as_subclass(Subclass), requires_grad=False)
    assert dense_weight(other) is None

    class Doubled(nn.Linear):
        def forward(self, x):
            return 2 * super().forward(x)

    assert dense_weight(Doubled(N, M).requires_grad_(False)) is None
    assert not computes_plainly(Doubled(N, M))


def test_dense_weight_is_none_for_a_sharded_weight():
    import torch.distributed as dist
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.tensor import Shard, distribute_tensor

    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    try:
        module = linear()
        sharded = distribute_tensor(module.weight.detach(), init_device_mesh("cpu", (1,)), [Shard(0)])
        module.weight = nn.Parameter(sharded, requires_grad=False)
        assert dense_weight(module) is None and weight_hash(module) == "" and quantisation(module) == ""
        with pytest.raises(StateError, match="sharded over processes"):
            read_weight(module)
    finally:
        dist.destroy_process_group()


def test_falcons_own_linear_is_plain():
    from transformers.models.falcon.modeling_falcon import FalconLinear

    module = FalconLinear(N, M).requires_grad_(False)
    assert computes_plainly(module) and unfit(module) == ""
    x = torch.randn(5, N)
    torch.testing.assert_close(x @ dense_weight(module).T + module.bias, module(x))


def test_unfit_linears():
    assert unfit(linear()) == unfit(conv1d()) == ""
    assert "never calls it" in unfit(nn.MultiheadAttention(8, 2).out_proj)
    assert "uninitialised" in unfit(nn.LazyLinear(4))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("make", [linear, conv1d])
def test_a_dense_weight_is_written_in_place_and_restored_bit_for_bit(make, dtype):
    module = make().to(dtype)
    before, pointer = bits(module), module.weight.data_ptr()
    kept = snapshot(module)
    assert kept.bytes == M * N * module.weight.element_size()
    W = torch.randn(M, N)
    write_weight(module, W)
    assert module.weight.data_ptr() == pointer and module.weight.dtype == dtype
    assert torch.equal(read_weight(module), W.to(dtype))
    torch.testing.assert_close(module(torch.eye(N, dtype=dtype)) - module.bias, W.T.to(dtype), atol=2e-2, rtol=2e-2)
    restore(module, kept)
    assert same(bits(module), before) and module.weight.data_ptr() == pointer


def test_tied_weights_stay_tied():
    one, two = linear(), linear()
    two.weight = one.weight
    write_weight(one, torch.ones(M, N))
    assert two.weight is one.weight and torch.equal(two.weight, torch.ones(M, N))


@pytest.mark.parametrize("kind", QUANTISED)
def test_reading_a_quantised_weight_gives_what_its_forward_multiplies_with(kind):
    module = quantised(kind).eval()
    W = read_weight(module)
    assert W.shape == (M, N) and W.dtype == torch.float32
    assert (W - linear().weight).abs().mean() < 0.15 * linear().weight.abs().mean()
    x = torch.randn(7, N)
    # int8 rounds the input too; a CPU with AVX512-BF16 multiplies in bf16
    torch.testing.assert_close(module(x), x @ W.T + module.bias, atol=3e-2, rtol=3e-2)
    torch.testing.assert_close(read_weight(module), W, atol=5e-3, rtol=5e-3)  # after a forward too


@pytest.mark.parametrize("after_forward", [False, True])
@pytest.mark.parametrize("kind", QUANTISED)
def test_a_quantised_weight_is_restored_bit_for_bit(kind, after_forward):
    module = quantised(kind).eval()
    x = torch.randn(7, N)
    if after_forward:
        module(x)
    reference = copy.deepcopy(module)
    kept = snapshot(module, "cpu")
    write_weight(module, read_weight(module) + 0.1)
    changed = module(x)
    restore(module, kept)
    assert same(bits(copy.deepcopy(module)), bits(copy.deepcopy(reference)))
    expected = reference(x)
    assert torch.equal(module(x), expected)
    assert (changed - expected).abs().max() > 0.1
    restore(module, kept)  # the forward in between changed nothing of the snapshot
    assert torch.equal(module(x), expected)


@pytest.mark.parametrize("kind", QUANTISED)
def test_a_quantised_weight_is_written_with_the_same_settings(kind):
    module, W = quantised(kind), linear().weight.detach() * 1.5
    before = bits(module)
    write_weight(module, W)
    assert quantisation(module) == quantisation(quantised(kind))
    after = bits(module)
    assert after.keys() == before.keys()
    for key in before.keys() - {"weight.quant_state.bitsandbytes__nf4"}:  # json, as long as its numbers
        assert after[key].dtype == before[key].dtype and after[key].shape == before[key].shape, key
    torch.testing.assert_close(read_weight(module), 1.5 * read_weight(quantised(kind)), atol=2e-3, rtol=2e-3)
    x = torch.randn(7, N)
    torch.testing.assert_close(module(x), x @ read_weight(module).T + module.bias, atol=5e-2, rtol=5e-2)


def test_quant_storage_is_kept():
    module = quantised("nf4", torch.bfloat16)
    dtype = module.weight.dtype
    write_weight(module, read_weight(module) * 2)
    assert module.weight.dtype == dtype == torch.bfloat16
    torch.testing.assert_close(read_weight(module), 2 * read_weight(quantised("nf4")))


def test_a_4_bit_weight_repacked_for_the_cpu_is_read_written_and_restored():
    """bitsandbytes' eval forward repacks weights on CPUs with AVX512-BF16; here it is repacked on any CPU."""
    functional = pytest.importorskip("bitsandbytes").functional
    for kind in ("nf4", "nf4-nested"):
        module, W = quantised(kind), read_weight(quantised(kind))
        state = copy.deepcopy(module.weight.quant_state)
        data, state = functional._convert_weight_packed_for_cpu(module.weight.data, state)
        module.weight.data, module.weight.quant_state = data, state
        packed = data.clone()
        torch.testing.assert_close(read_weight(module), W, atol=1e-3, rtol=1e-2)  # scales were rounded to bf16
        assert state.packing_format_for_cpu and torch.equal(module.weight.data, packed)
        kept = snapshot(module)
        write_weight(module, 2 * W)
        torch.testing.assert_close(read_weight(module), 2 * W, atol=2e-3, rtol=1e-2)
        assert module.weight.quant_state.nested == ("nested" in kind)
        restore(module, kept)
        assert torch.equal(module.weight.data, packed) and module.weight.quant_state.packing_format_for_cpu
        assert torch.equal(module.weight.quant_state.absmax, state.absmax)


def test_errors_name_the_next_step():
    with pytest.raises(StateError, match=r"meta device.*Load the model without offloading"):
        read_weight(nn.Linear(N, M, device="meta"))
    with pytest.raises(StateError, match=r"shape \(3, 4\), this linear's is \(96, 64\)"):
        write_weight(linear(), torch.zeros(3, 4))
    kept = snapshot(quantised("nf4"))
    with pytest.raises(StateError, match="was bnb-nf4 when it was copied and is plain now"):
        restore(linear(), kept)


def test_hash_agrees_across_copies_of_one_checkpoint_and_layouts():
    bf16 = linear(torch.bfloat16)
    assert weight_hash(bf16) == weight_hash(copy.deepcopy(bf16).float()) == weight_hash(copy.deepcopy(bf16).double())
    fp32 = linear()
    assert weight_hash(fp32) == weight_hash(copy.deepcopy(fp32).bfloat16())
    transposed = conv1d()
    transposed.weight.copy_(fp32.weight.T)
    assert weight_hash(transposed) == weight_hash(fp32)
    assert weight_hash(fp32.requires_grad_(True)) == weight_hash(linear())


def test_hash_is_of_the_shape_and_the_sampled_entries_in_bf16():
    module = nn.Linear(3, 5, bias=False)
    module.weight.data.copy_(torch.arange(15.0).reshape(5, 3))
    entries = torch.arange(15.0).bfloat16().view(torch.int16).numpy().astype("<i2").tobytes()
    assert weight_hash(module) == hashlib.sha256(b"5,3:" + entries).hexdigest()[:16] == "6f9513ace2f813fa"
    wide = nn.Linear(100, 10, bias=False)  # 1000 entries, so a stride of 619: 618 has the divisor 2 in common with 1000
    wide.weight.data.copy_(torch.arange(1000.0).reshape(10, 100))
    places = sorted(k * 619 % 1000 for k in range(64))
    entries = torch.tensor(places).bfloat16().view(torch.int16).numpy().astype("<i2").tobytes()
    assert weight_hash(wide) == hashlib.sha256(b"10,100:" + entries).hexdigest()[:16]


def test_hash_tells_weights_apart_by_any_of_its_entries():
    module = nn.Linear(5, 8, bias=False)  # 40 entries: all are sampled
    first = weight_hash(module)
    for i in range(40):
        changed = copy.deepcopy(module)
        changed.weight.data.view(-1)[i] += 1
        assert weight_hash(changed) != first


def test_hash_samples_64_places_spread_over_rows_and_columns():
    from veralib.hashes import _hash_positions

    for m, n in ((768, 768), (4096, 11008), (32000, 64)):
        places = _hash_positions(m, n, False, torch.device("cpu"))
        assert len(set(places.tolist())) == 64 and places.max() < m * n
        assert len(set((places // n).tolist())) >= 60 and len(set((places % n).tolist())) >= min(32, n // 2)


@pytest.mark.parametrize("kind", QUANTISED)
def test_hash_is_empty_without_a_plain_weight(kind):
    assert weight_hash(quantised(kind)) == ""
    assert weight_hash(nn.Linear(3, 4, device="meta")) == ""
