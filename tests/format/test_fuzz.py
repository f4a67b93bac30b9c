"""Mutated adapter files: each loads as the identical adapter or raises veralib's own error; never a crash, never another adapter.

About twenty seconds, with the same mutations at every run; FUZZ_EXAMPLES=20000 draws so many others of each kind. The
mutations are blind (bytes) and knowing (the header's JSON); a last test seals its forgeries with a right checksum, where
another adapter is what the file says and only a foreign exception or a contradiction is wrong.
"""

import json
import os
import struct
import warnings

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from tests.format.reader import canonical, pack
from tests.format.samples import SAMPLES, peft, plain, same, unpack
from veralib.checks import faults
from veralib.errors import AdapterFileError, VeraError
from veralib.format import load_adapter, read_header, save_adapter

EXAMPLES = int(os.environ.get("FUZZ_EXAMPLES") or 0)
FUZZ = settings(
    max_examples=EXAMPLES or 300, derandomize=not EXAMPLES, database=None, deadline=None, suppress_health_check=list(HealthCheck)
)
SMALL = [s for s in SAMPLES if s is not peft]  # growing PEFT's pair for each wrong size would be all that the time goes to


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    """(adapter, bytes) of each sample, and a path to write mutants to."""
    folder = tmp_path_factory.mktemp("fuzz")
    return [(s(), save_adapter(s(), folder / f"{s.__name__}.safetensors").read_bytes()) for s in SMALL], folder / "x.safetensors"


def loads(path, raw):
    """The adapter in these bytes, or None where veralib refuses them."""
    path.write_bytes(raw)
    adapter, refused = None, None
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        try:
            adapter = load_adapter(path)
        except AdapterFileError as e:
            refused = e
            assert str(path) in str(e) and len(str(e)) < 5000
        try:
            read_header(path)
        except VeraError:
            assert refused  # what a header refuses, a load refuses too
    return adapter


def edits(raw):
    """Strategies for one change of bytes."""
    at = st.integers(0, len(raw) - 1)
    some = st.binary(min_size=1, max_size=9)
    header = 8 + int.from_bytes(raw[:8], "little")
    return st.one_of(
        st.tuples(st.just("flip"), st.one_of(at, st.integers(0, 16), st.integers(8, header)), st.integers(1, 255)),
        st.tuples(st.just("cut"), at, st.integers(1, 40)),
        st.tuples(st.just("end"), at, st.none()),
        st.tuples(st.just("insert"), at, some),
        st.tuples(st.just("write"), at, some),
        st.tuples(st.just("repeat"), at, st.integers(1, 40)),
        st.tuples(st.just("length"), st.integers(0, 2**64 - 1), st.none()),
    )


def apply(raw, change):
    kind, at, value = change
    if kind == "flip" and at < len(raw):
        return raw[:at] + bytes([raw[at] ^ value]) + raw[at + 1 :]
    if kind == "cut":
        return raw[:at] + raw[at + value :]
    if kind == "end":
        return raw[:at]
    if kind == "insert":
        return raw[:at] + value + raw[at:]
    if kind == "write":
        return raw[:at] + value + raw[at + len(value) :]
    if kind == "repeat":
        return raw[:at] + raw[at : at + value] + raw[at:]
    return struct.pack("<Q", at) + raw[8:]


@FUZZ
@given(data=st.data())
def test_changed_bytes_load_the_identical_adapter_or_are_refused(files, data):
    adapter, raw = data.draw(st.sampled_from(files[0]))
    mutant = raw
    for change in data.draw(st.lists(edits(raw), min_size=1, max_size=3)):
        mutant = apply(mutant, change)
    loaded = loads(files[1], mutant)
    assert loaded is None or same(loaded, adapter)


VALUES = st.recursive(
    st.none()
    | st.booleans()
    | st.integers(-3, 12)
    | st.sampled_from([2**31, 2**53 + 1, 2**64, -(2**63), 10**400, 1e308, 0.5, -0.0])
    | st.text(max_size=6)
    | st.sampled_from(
        ["F32", "BF16", "BOOL", "peft", "philox-u8", "unique", "d", "rademacher", "h.0.q_proj", "all-linear", "(", "0"]
    ),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=5), inner, max_size=3),
    max_leaves=6,
)


def places(value, path=()):
    """The path of everything in a JSON value."""
    yield path
    items = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    for key, inner in items:
        yield from places(inner, (*path, key))


def change_json(value, draw):
    """A JSON value with one thing in it replaced, removed, renamed, added or exchanged with another."""
    value = json.loads(json.dumps(value))
    paths = [p for p in places(value) if p]
    path = draw(st.sampled_from(paths)) if paths else ()
    if not path:
        return draw(VALUES)
    holder = value
    for key in path[:-1]:
        holder = holder[key]
    key, how = path[-1], draw(st.sampled_from(["replace", "remove", "rename", "copy", "exchange"]))
    if how == "replace":
        holder[key] = draw(VALUES)
    elif how == "remove":
        del holder[key]
    elif how == "exchange":
        keys = [k for k in (holder if isinstance(holder, dict) else range(len(holder)))]
        other = draw(st.sampled_from(keys))
        holder[key], holder[other] = holder[other], holder[key]
    elif isinstance(holder, dict):
        new = draw(
            st.one_of(
                st.text(max_size=6), st.sampled_from(["h.0.q_proj.e", "module.a.b", "basis.A", "h.0.v_proj.bias", "h.9.b", ".d"])
            )
        )
        holder[new] = holder[key] if how == "copy" else holder.pop(key)
    return value


def forge(raw, draw):
    """(header, data) of a file with one change to its header, or to the JSON inside its metadata."""
    header, data = unpack(raw)
    inside = draw(st.sampled_from(["header", "metadata", "config", "basis", "base", "layer_ids", "modules", "notes"]))
    if inside == "header":
        metadata = header.pop("__metadata__")
        changed = change_json(header, draw)
        return (changed | {"__metadata__": metadata} if isinstance(changed, dict) else changed), data
    metadata = header["__metadata__"]
    if inside == "metadata":
        header["__metadata__"] = change_json(metadata, draw)
    else:
        metadata[inside] = canonical(change_json(json.loads(metadata[inside]), draw))
    return header, data


@FUZZ
@given(data=st.data())
def test_a_changed_header_loads_the_identical_adapter_or_is_refused(files, data):
    adapter, raw = data.draw(st.sampled_from(files[0]))
    header, rest = forge(raw, data.draw)
    loaded = loads(files[1], pack(header, rest, seal=False))
    assert loaded is None or same(loaded, adapter)


@FUZZ
@given(data=st.data())
def test_a_changed_header_under_a_right_checksum_is_a_sound_adapter_or_is_refused(files, data):
    _, raw = data.draw(st.sampled_from(files[0]))
    header, rest = forge(raw, data.draw)
    try:
        mutant = pack(header, rest, seal=True)
    except (TypeError, KeyError, ValueError, AttributeError, IndexError):
        mutant = pack(header, rest, seal=False)  # no checksum can be said of it
    loaded = loads(files[1], mutant)
    if loaded is not None:
        assert not list(faults(loaded))
        for unit in loaded.vectors:
            loaded.scale_of(unit), loaded.basis_of(unit)


@settings(FUZZ, max_examples=EXAMPLES or 150)
@given(raw=st.one_of(st.binary(max_size=60), st.binary(max_size=60).map(lambda b: struct.pack("<Q", len(b)) + b)))
def test_bytes_from_nowhere_are_refused(files, raw):
    assert loads(files[1], raw) is None


@settings(FUZZ, max_examples=EXAMPLES or 150)
@given(value=VALUES)
def test_any_json_as_a_header_is_refused(files, value):
    for header in (value, {"__metadata__": value}, {"a": value}, {"__metadata__": {"vera_format": "1"}, "a": value}):
        text = json.dumps(header).encode()
        assert loads(files[1], struct.pack("<Q", len(text)) + text) is None


def test_the_fuzz_test_would_notice(files):
    """A changed vector under a right checksum is another adapter: what the tests above must never see without one."""
    adapter, raw = files[0][0]
    assert adapter.config == plain().config
    header, data = unpack(raw)
    loaded = loads(files[1], pack(header, bytes([data[0] ^ 1]) + data[1:]))
    assert loaded is not None and not same(loaded, adapter)
