"""A and B: the generator against its known answers and a tiny reference, the prefix property, exactness, PEFT's pair."""

import copy
import dataclasses
import hashlib
import os
import pickle
import subprocess
import sys

import numpy as np
import pytest
import torch

from veralib import basis as module
from veralib.basis import (
    MATRIX_A,
    MATRIX_B,
    SCALE_RULES,
    Basis,
    StoredPair,
    basis_bytes,
    cache_bytes,
    clear_cache,
    layer_id_of,
    level_table,
    pair_digest,
    peft_pair,
    philox4x32_10,
)
from veralib.config import VeraConfig
from veralib.errors import ConfigError

LEVELS = list(SCALE_RULES)

# Random123 1.14, tests/kat_vectors, lines "philox4x32 10": counter, key, words.
KNOWN_ANSWERS = [
    ((0, 0, 0, 0), (0, 0), (0x6627E8D5, 0xE169C58D, 0xBC57AC4C, 0x9B00DBD8)),
    ((0xFFFFFFFF,) * 4, (0xFFFFFFFF,) * 2, (0x408F276D, 0x41C83B0E, 0xA20BC7C6, 0x6D5451FD)),
    (
        (0x243F6A88, 0x85A308D3, 0x13198A2E, 0x03707344),  # the digits of pi
        (0xA4093822, 0x299F31D0),
        (0xD16CFE09, 0x94FDCCEB, 0x5001E420, 0x24126EA1),
    ),
]

# From an independent numpy implementation of docs/FORMAT.md's text, not from this code. B's second row starts at column 250;
# layer7: row 0 of A with layer id 7; the digests are of the bytes of A[0:16, 0:64] and B[0:64, 0:16].
VECTORS = {
    0: {
        "A_row0": [213, 232, 39, 102, 141, 197, 105, 225, 76, 172, 87, 188, 216, 219, 0, 155, 164, 204, 228, 248],
        "A_row3_from16": [100, 222, 30, 128, 165, 37, 66, 39],
        "B_row5": [203, 229, 5, 193, 24, 187, 21, 72],
        "B_row700_from250": [75, 107, 80, 135, 57, 57, 81, 3],
        "layer7": [103, 136, 11, 113, 150, 101, 35, 0],
        "A": "53d2c6ff57c189592572bdda61b60f627ec053b456d0e2db2fbfd5926bebf8e9",
        "B": "90d96c42fb472ee329920ef05435fc69f2b075db8561b4776e1c54208be1a558",
    },
    42: {
        "A_row0": [83, 240, 234, 156, 59, 73, 245, 119, 173, 80, 191, 18, 215, 179, 66, 87, 39, 33, 219, 252],
        "A_row3_from16": [107, 102, 2, 197, 42, 249, 214, 230],
        "B_row5": [226, 67, 253, 150, 153, 127, 248, 103],
        "B_row700_from250": [0, 31, 65, 10, 87, 98, 32, 121],
        "layer7": [20, 8, 191, 73, 215, 217, 255, 7],
        "A": "a4b4b24d975aae97de877f0b3095b2dc9b5fe0f55a29b3ca11351d3e07861e85",
        "B": "281c6374f42d155b4c191dd912d269c86900b1da01bfc5028433294d31cb5647",
    },
    1099511627783: {
        "A_row0": [249, 222, 247, 51, 153, 78, 239, 244, 35, 37, 124, 11, 83, 207, 174, 157, 70, 93, 2, 94],
        "A_row3_from16": [76, 255, 233, 146, 245, 203, 50, 27],
        "B_row5": [97, 198, 25, 209, 44, 202, 24, 143],
        "B_row700_from250": [90, 194, 216, 189, 205, 142, 57, 137],
        "layer7": [157, 240, 17, 244, 250, 102, 241, 45],
        "A": "c9f777d421470997f532223fa2c33bbc8a0f302bfe8be1523807df268374cc9f",
        "B": "629b707b6d4e661b5f6b8a4692f84e5f91bdff7cc821673a43080e471a295134",
    },
}


def words(counter, key):
    """Philox4x32-10 of one counter in Python's whole numbers, as the paper prints it."""
    c, k = list(counter), list(key)
    for _ in range(10):
        p0, p1 = 0xD2511F53 * c[0], 0xCD9E8D57 * c[2]
        c = [(p1 >> 32) ^ c[1] ^ k[0], p1 % 2**32, (p0 >> 32) ^ c[3] ^ k[1], p0 % 2**32]
        k = [(k[0] + 0x9E3779B9) % 2**32, (k[1] + 0xBB67AE85) % 2**32]
    return tuple(c)


def entry(seed, matrix, i, j, layer_id=0):
    """The byte of one entry, from the text of docs/FORMAT.md."""
    word = words((j // 16, i, matrix, layer_id), (seed % 2**32, seed // 2**32))[(j % 16) // 4]
    return word.to_bytes(4, "little")[j % 4]


def through_torch(monkeypatch):
    """Sends the CPU through the branch that other devices take."""
    monkeypatch.setattr(module, "_rows_numpy", module._rows_torch)


@pytest.mark.parametrize(("counter", "key", "answer"), KNOWN_ANSWERS)
@pytest.mark.parametrize("kind", ["numpy", "torch", "reference"])
def test_philox_gives_the_known_answers(counter, key, answer, kind):
    if kind == "reference":
        assert words(counter, key) == answer
        return
    array = np.array if kind == "numpy" else torch.tensor
    seed = key[0] + (key[1] << 32)
    found = philox4x32_10(tuple(array([c]) for c in counter), seed)
    assert tuple(int(w[0]) for w in found) == answer


@pytest.mark.parametrize("seed", VECTORS)
@pytest.mark.parametrize("path", ["numpy", "torch"])
def test_the_bytes_are_those_of_an_independent_implementation(seed, path, monkeypatch):
    if path == "torch":
        through_torch(monkeypatch)
    want = VECTORS[seed]
    A, B = basis_bytes(seed, MATRIX_A, 16, 64), basis_bytes(seed, MATRIX_B, 704, 258)
    assert A[0, :20].tolist() == want["A_row0"] and A[3, 16:24].tolist() == want["A_row3_from16"]
    assert B[5, :8].tolist() == want["B_row5"] and B[700, 250:].tolist() == want["B_row700_from250"]
    assert basis_bytes(seed, MATRIX_A, 1, 8, layer_id=7)[0].tolist() == want["layer7"]
    assert hashlib.sha256(A.numpy().tobytes()).hexdigest() == want["A"]
    assert hashlib.sha256(B[:64, :16].contiguous().numpy().tobytes()).hexdigest() == want["B"]


@pytest.mark.parametrize("seed", [0, 5, 2**32 - 1, 2**32, 2**63, 2**64 - 1])
@pytest.mark.parametrize("path", ["numpy", "torch"])
def test_every_seed_of_64_bits_gives_the_references_bytes(seed, path, monkeypatch):
    if path == "torch":
        through_torch(monkeypatch)
    for matrix, layer_id in ((MATRIX_A, 0), (MATRIX_B, 0), (MATRIX_A, 2**32 - 1)):
        found = basis_bytes(seed, matrix, 3, 37, row=2**20, column=5, layer_id=layer_id)
        want = [[entry(seed, matrix, 2**20 + i, 5 + j, layer_id) for j in range(37)] for i in range(3)]
        assert found.tolist() == want and found.dtype == torch.uint8


@pytest.mark.parametrize("path", ["numpy", "torch"])
@pytest.mark.parametrize("matrix", [MATRIX_A, MATRIX_B])
def test_any_block_is_that_block_of_the_whole(path, matrix, monkeypatch):
    """Ranks, widths, offsets, ragged ends: what a tensor-parallel rank or a smaller adapter asks for."""
    whole = basis_bytes(11, matrix, 70, 101)
    if path == "torch":
        through_torch(monkeypatch)
    blocks = [(0, 0, 70, 101), (0, 0, 1, 1), (0, 0, 64, 16), (0, 0, 7, 33), (3, 0, 5, 100), (0, 15, 70, 2), (0, 16, 9, 16)]
    blocks += [(69, 100, 1, 1), (8, 17, 40, 64), (1, 31, 69, 70)]
    for row, column, rows, columns in blocks:
        block = basis_bytes(11, matrix, rows, columns, row=row, column=column)
        assert torch.equal(block, whole[row : row + rows, column : column + columns]), (row, column, rows, columns)


@pytest.mark.parametrize("path", ["numpy", "torch"])
def test_blocks_larger_than_one_step_join_seamlessly(path, monkeypatch):
    if path == "torch":
        through_torch(monkeypatch)
    wide = basis_bytes(1, MATRIX_A, 300, 16 * 1024 + 3)  # 1025 counters a row, 31 rows a step
    for i, j in ((0, 0), (30, 16386), (31, 0), (62, 9), (299, 16386)):
        assert wide[i, j] == entry(1, MATRIX_A, i, j)


@pytest.mark.parametrize("levels", LEVELS)
def test_a_smaller_rank_or_width_is_a_prefix_and_shares_memory(levels):
    clear_cache()
    basis = Basis(seed=3, levels=levels)
    small = basis.A(8, 20).clone()
    large, A, B = basis.A(64, 300), basis.A(8, 20), basis.B(5, 64)
    assert torch.equal(large[:8, :20], small) and torch.equal(A, small)
    assert A.data_ptr() == large.data_ptr() and basis.B(300, 8).shape == (300, 8)
    assert torch.equal(basis.B(300, 8)[:5], B[:, :8])
    other = Basis(seed=3, levels=levels)
    assert other.A(8, 20) is basis.A(8, 20)
    assert cache_bytes() == 4 * (64 * 300 + 300 * 64)


def test_a_grown_matrix_leaves_no_block_of_the_old_one_behind():
    clear_cache()
    basis = Basis(seed=4)
    old = basis.A(4, 4)
    large = basis.A(64, 64)
    assert basis.A(4, 4).data_ptr() == large.data_ptr() != old.data_ptr() and torch.equal(basis.A(4, 4), old)
    clear_cache()
    assert cache_bytes() == 0 and basis.A(4, 4).data_ptr() != large.data_ptr()


def test_a_block_made_in_inference_mode_can_be_trained_through():
    clear_cache()
    with torch.inference_mode():
        Basis(seed=5).A(3, 4)
    x = torch.ones(4, requires_grad=True)
    (Basis(seed=5).A(3, 4) @ x).sum().backward()
    assert torch.equal(x.grad, Basis(seed=5).A(3, 4).sum(0))


def test_a_block_asked_for_without_values_is_not_kept_for_others():
    from torch._subclasses.fake_tensor import FakeTensorMode

    clear_cache()
    with FakeTensorMode():
        assert Basis(seed=6).A(3, 4).shape == (3, 4)
    assert type(Basis(seed=6).A(3, 4)) is torch.Tensor and Basis(seed=6).A(3, 4)[0, 0] != 0


@pytest.mark.parametrize("levels", LEVELS)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
def test_entries_are_exact_in_every_dtype(levels, dtype):
    basis = Basis(seed=9, levels=levels)
    assert torch.equal(basis.A(40, 70, dtype=dtype).double(), basis.A(40, 70).double())
    assert torch.equal(basis.B(70, 40, dtype=dtype).double(), basis.B(70, 40).double())
    assert level_table(levels).astype(np.float16).astype(np.float32).tolist() == level_table(levels).tolist()


@pytest.mark.parametrize("levels", LEVELS)
def test_entries_are_the_levels_of_their_bytes(levels):
    basis, table = Basis(seed=2**63 + 1, levels=levels), level_table(levels)
    raw = basis_bytes(2**63 + 1, MATRIX_B, 50, 33).numpy()
    assert np.array_equal(basis.B(50, 33).numpy(), table[raw])
    assert set(np.unique(raw)) <= set(range(256)) and len(np.unique(raw)) > 200


def test_levels_are_what_they_are_called():
    v = np.arange(256)
    assert level_table("kaiming_uniform").tolist() == ((2 * v - 255) / 256).tolist()
    assert level_table("uniform").tolist() == (v / 256).tolist()
    assert level_table("rademacher").tolist() == [-1.0] * 128 + [1.0] * 128
    normal = level_table("kaiming_normal").astype(np.float64)
    assert np.array_equal(normal, -normal[::-1]) and (np.diff(normal) > 0).all() and abs((normal**2).mean() - 1) < 1e-4
    # Each is the root mean square of its 1/256 of the normal distribution, rounded to bf16 (here by quadrature).
    x = np.linspace(0, 9, 1_000_001)
    density = np.exp(-(x**2) / 2)
    below = np.cumsum(density) / density.sum()
    bins = np.minimum((below * 128).astype(int), 127)
    rms = np.sqrt(np.bincount(bins, density * x**2) / np.bincount(bins, density))
    assert torch.tensor(rms).bfloat16().double().tolist() == normal[128:].tolist()


@pytest.mark.parametrize("levels", ["kaiming_uniform", "kaiming_normal", "rademacher"])
@pytest.mark.parametrize(("rank", "n"), [(16, 256), (256, 64)])
def test_the_product_has_variance_4_over_n_at_any_rank(levels, rank, n):
    basis = Basis(seed=1, levels=levels)
    A, B = basis.A(rank, n).double(), basis.B(2000, rank).double()
    assert abs(A.mean()) < 5 / (rank * n) ** 0.5 and abs(B.mean()) < 5 / (rank * 2000) ** 0.5
    variance = (basis.scale(n, rank) * B @ A).pow(2).mean().item()
    assert variance == pytest.approx(4 / n, rel=0.06)  # A's own sample of 4096 to 16384 entries gives about 2 %


@pytest.mark.parametrize("levels", LEVELS)
def test_scales_are_the_rules_that_the_fingerprint_names(levels):
    from math import sqrt

    found = Basis(levels=levels).scale(48, 10)
    assert found == pytest.approx(eval(SCALE_RULES[levels], {"sqrt": sqrt, "n": 48, "r": 10}), rel=1e-15)
    bound = {"kaiming_uniform": sqrt(6), "kaiming_normal": sqrt(2), "rademacher": sqrt(2)}
    if levels in bound:  # the product of A's and B's own scales
        assert found == pytest.approx(bound[levels] / sqrt(48) * bound[levels] / sqrt(10))
    assert Basis("peft", rank=10, max_in=48, max_out=5).scale(48, 10) == 1.0


def test_fingerprints_tell_bases_apart_and_nothing_else():
    """No device or dtype is in it, and the matrices of every dtype are equal: one fingerprint on any model."""
    bases = [Basis(seed=s, levels=levels) for s in (0, 1, 2**32, 2**63) for levels in LEVELS]
    assert len({b.fingerprint() for b in bases}) == len(bases)
    assert Basis(seed=1, layer_id=7).fingerprint() == Basis(seed=1).fingerprint()
    first = hashlib.sha256(
        basis_bytes(1, MATRIX_A, 16, 64).numpy().tobytes() + basis_bytes(1, MATRIX_B, 64, 16).numpy().tobytes()
    )
    first.update(level_table("uniform").tobytes() + b"0.01")
    assert Basis(seed=1, levels="uniform").fingerprint() == first.hexdigest()


def test_a_layers_own_pair_follows_from_its_name():
    digest = hashlib.sha256(b"h.0.q_proj").digest()
    assert layer_id_of("h.0.q_proj") == int.from_bytes(digest[:4], "little") != layer_id_of("h.1.q_proj")
    own, shared = Basis(seed=1, layer_id=layer_id_of("h.0.q_proj")), Basis(seed=1)
    assert not torch.equal(own.A(4, 32), shared.A(4, 32)) and own.shared() == shared and shared.shared() is shared


@pytest.mark.parametrize(
    "fields", [{"seed": 2**64}, {"seed": -1}, {"layer_id": 2**32}, {"levels": "normal"}, {"kind": "philox"}], ids=str
)
def test_a_basis_that_cannot_be_is_refused(fields):
    with pytest.raises(ConfigError):
        Basis(**fields)


# One object, many places


def test_a_basis_is_frozen_hashable_and_survives_copying_and_pickling():
    pair = StoredPair(torch.ones(2, 3), torch.ones(4, 2))
    for basis in (
        Basis(seed=2**64 - 1, levels="uniform", layer_id=5),
        Basis("peft", 1, rank=2, max_in=3, max_out=4, stored=pair),
    ):
        others = [copy.copy(basis), copy.deepcopy(basis), pickle.loads(pickle.dumps(basis)), dataclasses.replace(basis)]
        assert all(other == basis and hash(other) == hash(basis) and repr(other) == repr(basis) for other in others)
        assert copy.deepcopy(basis) is basis  # a deepcopied model shares A and B
        with pytest.raises(dataclasses.FrozenInstanceError):
            basis.seed = 3
        assert hash(dataclasses.replace(basis, seed=3)) != hash(basis)


def test_a_pickled_basis_hashes_anew_in_another_process():
    """Text hashes differently in every process: a hash carried along would find nothing."""
    text = pickle.dumps(Basis(seed=5)).hex()
    code = f"import pickle; from veralib.basis import Basis; print(pickle.loads(bytes.fromhex('{text}')) in {{Basis(seed=5)}})"
    hash_seed = "1" if os.environ.get("PYTHONHASHSEED") != "1" else "2"
    env = os.environ | {"PYTHONHASHSEED": hash_seed, "PYTHONPATH": os.pathsep.join(sys.path)}
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=env)
    assert run.stdout.strip() == "True", run.stderr


# PEFT's pair


def peft_model(config_changes=None, widths=((20, 12), (12, 30), (8, 8))):
    from peft import VeraConfig as PeftConfig
    from peft import get_peft_model
    from torch import nn

    model = nn.ModuleDict({f"lin{i}": nn.Linear(n, m) for i, (n, m) in enumerate(widths)})
    names = [f"lin{i}" for i in range(len(widths))]
    return get_peft_model(model, PeftConfig(target_modules=names, **{"r": 6, **(config_changes or {})}))


@pytest.mark.parametrize("seed", [0, 7, 2**40])
@pytest.mark.parametrize("rank", [1, 6, 64])
def test_pefts_pair_is_pefts_bit_for_bit(seed, rank):
    layer = peft_model({"r": rank, "projection_prng_key": seed}).base_model.model["lin0"]
    basis = Basis("peft", seed, rank=rank, max_in=20, max_out=30)
    assert torch.equal(basis.A(rank, 20), layer.vera_A["default"]) and torch.equal(basis.B(30, rank), layer.vera_B["default"])
    assert basis.fingerprint() == pair_digest(layer.vera_A["default"], layer.vera_B["default"])
    A, B = peft_pair(basis)
    assert (A.shape, B.shape) == ((rank, 20), (30, rank))


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16], ids=str)
def test_pefts_pair_depends_on_no_default_of_torch(dtype):
    basis = Basis("peft", 7, rank=6, max_in=20, max_out=30)
    usual, digest = (basis.A(6, 20).clone(), basis.B(30, 6).clone()), basis.fingerprint()
    clear_cache()
    module._fingerprint.cache_clear()
    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    torch.set_default_device("meta")
    try:
        under = basis.A(6, 20), basis.B(30, 6)
        assert basis.fingerprint() == digest
    finally:
        torch.set_default_device(None)
        torch.set_default_dtype(before)
    later = basis.A(6, 20), basis.B(30, 6)
    for pair in (under, later):
        assert all(torch.equal(one, other) for one, other in zip(pair, usual, strict=True))
    clear_cache()


def test_pefts_pair_is_bound_to_its_size():
    basis = Basis("peft", 7, rank=6, max_in=20, max_out=30)
    assert torch.equal(basis.A(6, 12), basis.A(6, 20)[:, :12]) and torch.equal(basis.B(8, 6), basis.B(30, 6)[:8])
    with pytest.raises(ConfigError, match=r"A has shape \(6, 20\), and a layer asks for \(6, 21\).*philox-u8"):
        basis.A(6, 21)
    assert not torch.equal(Basis("peft", 7, rank=6, max_in=21, max_out=30).A(6, 20), basis.A(6, 20))


def test_a_stored_pair_is_used_as_it_is():
    pair = StoredPair(torch.randn(2, 3).double(), torch.randn(4, 2).T.contiguous().T)
    basis = Basis("peft", 1, rank=2, max_in=3, max_out=4, stored=pair)
    assert pair.A.dtype == torch.float32 and torch.equal(basis.A(2, 3), pair.A) and torch.equal(basis.B(3, 2), pair.B[:3])
    assert basis.fingerprint() == pair.digest != Basis("peft", 1, rank=2, max_in=3, max_out=4).fingerprint()
    assert basis == Basis("peft", 1, rank=2, max_in=3, max_out=4, stored=StoredPair(pair.A.clone(), pair.B.clone()))
    assert pair != StoredPair(pair.A + 1, pair.B)


def test_pefts_basis_in_the_config_excludes_seeds_that_torch_cannot_take():
    with pytest.raises(ConfigError, match=r"torch's generator.*below 2\*\*63"):
        VeraConfig(basis="peft", seed=2**63)
