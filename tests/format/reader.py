"""A second reader, from docs/FORMAT.md alone: Python and its standard library, nothing of veralib's but the rules' names."""

import hashlib
import json
import re
import struct
from pathlib import Path

from tests.format.samples import unpack
from veralib.basis import SCALE_RULES

DOC = (Path(__file__).parents[2] / "docs" / "FORMAT.md").read_text()


def pack(header, data, seal=True):
    """A file of these parts; seal: with the checksum that fits them."""
    if seal and "__metadata__" in header:
        header["__metadata__"]["checksum"] = plain_checksum(header, data)
    text = json.dumps(header).encode()
    return struct.pack("<Q", len(text)) + text + data


def canonical(value):
    return json.dumps(value, sort_keys=True, separators=(",", ":"))


def plain_checksum(header, data):
    entries = {k: v for k, v in header.items() if k != "__metadata__"}
    metadata = {k: v for k, v in header["__metadata__"].items() if k != "checksum"}
    names = sorted(entries)
    digest = hashlib.sha256(canonical([metadata, [[n, entries[n]["dtype"], entries[n]["shape"]] for n in names]]).encode())
    for name in names:
        begin, end = entries[name]["data_offsets"]
        digest.update(data[begin:end])
    return digest.hexdigest()


def plain_philox(counter, seed):
    c, k = list(counter), [seed % 2**32, seed >> 32]
    for _ in range(10):
        p, q = c[0] * 0xD2511F53, c[2] * 0xCD9E8D57
        c = [q >> 32 ^ c[1] ^ k[0], q % 2**32, p >> 32 ^ c[3] ^ k[1], p % 2**32]
        k = [(k[0] + 0x9E3779B9) % 2**32, (k[1] + 0xBB67AE85) % 2**32]
    return c


def plain_byte(seed, matrix, i, j, layer_id=0):
    return plain_philox((j // 16, i, matrix, layer_id), seed)[j % 16 // 4] >> 8 * (j % 4) & 255


def plain_levels(levels):
    if levels == "kaiming_normal":
        block = re.search(r"in hex, from index 0:\n\n```text\n(.*?)```", DOC, re.S)[1]
        words = [w for line in block.splitlines() for w in line.split()[1:]]
        up = [struct.unpack("<f", struct.pack("<I", int(w, 16) << 16))[0] for w in words]
        return [-m for m in reversed(up)] + up
    rule = {
        "kaiming_uniform": lambda v: (2 * v - 255) / 256,
        "uniform": lambda v: v / 256,
        "rademacher": lambda v: 1 if v > 127 else -1,
    }
    return [rule[levels](v) for v in range(256)]


def plain_fingerprint(basis):
    seed, rules = int(basis["seed"]), dict(re.findall(r"\| `(\w+)` \| `(.+?)` \|", DOC[DOC.index("### Scale") :]))
    digest = hashlib.sha256(bytes(plain_byte(seed, 0, i, j) for i in range(16) for j in range(64)))
    digest.update(bytes(plain_byte(seed, 1, i, j) for i in range(64) for j in range(16)))
    digest.update(struct.pack("<256f", *plain_levels(basis["levels"])))
    digest.update(rules[basis["levels"]].encode())
    return digest.hexdigest()


def plain_delta(raw, unit):
    """s Λ_b B Λ_d A of one unit of a file on the native basis, as lists; its checksum and fingerprint checked."""
    header, data = unpack(raw)
    metadata = {
        k: v if k in ("checksum", "fingerprint", "format", "library") else json.loads(v)
        for k, v in header["__metadata__"].items()
    }
    assert metadata["checksum"] == plain_checksum(header, data)
    assert metadata["fingerprint"] == plain_fingerprint(metadata["basis"])

    def vector(name):
        assert header[name]["dtype"] == "F32"
        begin, end = header[name]["data_offsets"]
        return struct.unpack(f"<{(end - begin) // 4}f", data[begin:end])

    d, b = vector(f"{unit}.d"), vector(f"{unit}.b")
    n, layer_id = metadata["base"]["layers"][unit.partition(":")[0]][1], metadata["layer_ids"].get(unit, 0)
    seed, levels = int(metadata["basis"]["seed"]), plain_levels(metadata["basis"]["levels"])
    rule = {"6/sqrt(n*r)": 6 / (n * len(d)) ** 0.5, "2/sqrt(n*r)": 2 / (n * len(d)) ** 0.5, "0.01": 0.01}
    s = metadata["config"]["scale"] * rule[SCALE_RULES[metadata["basis"]["levels"]]]
    A = [[levels[plain_byte(seed, 0, k, j, layer_id)] for j in range(n)] for k in range(len(d))]
    B = [[levels[plain_byte(seed, 1, i, k, layer_id)] for k in range(len(d))] for i in range(len(b))]
    return [[sum(b[i] * B[i][k] * s * d[k] * A[k][j] for k in range(len(d))) for j in range(n)] for i in range(len(b))]
