"""API keys: kept as hashes, bound to prefixes, taken and revoked without a restart."""

import hashlib
import json
import os
import time

import pytest

from veralib import ConfigError, UnknownName
from veralib.serving.gateway.keys import Keys
from veralib.serving.gateway.records import Records
from veralib.serving.gateway.settings import GatewaySettings, is_loopback
from veralib.serving.gateway.tenants import Tenant


def test_a_key_is_found_and_nowhere_on_the_disk(tmp_path):
    keys = Keys(tmp_path)
    key, record = keys.add("acme:", note="first")
    assert keys.find(key) == Tenant(record.id, "acme:") and len(key) == len("sk-vera-") + 12 + 1 + 43
    files = [p for p in tmp_path.rglob("*") if p.is_file()]
    secret = key.rpartition("-")[2]
    assert len(files) == 1 and secret not in files[0].read_text() and files[0].stat().st_mode & 0o077 == 0
    assert json.loads(files[0].read_text())["sha256"] == hashlib.sha256(key.encode()).hexdigest()


def test_changed_keys_are_nobodys(tmp_path):
    keys = Keys(tmp_path)
    key, record = keys.add("acme:")
    other = keys.add("globex:")[0]
    wrong = [
        "",
        "x",
        key[:-1],
        key + "a",
        key[:-1] + "?",
        key.upper(),
        f"sk-vera-{record.id}-{other[-43:]}",
        "sk-vera-" + "é" * 56,
    ]
    assert [keys.find(w) for w in wrong] == [None] * len(wrong)


def test_another_process_adds_and_revokes(tmp_path):
    """Many changes within one tick of the file system's clock are seen too."""
    keys, elsewhere = Keys(tmp_path), Keys(tmp_path)
    for _ in range(20):
        key, record = elsewhere.add("acme:")
        assert keys.find(key) is not None
        elsewhere.revoke(record.id)
        assert keys.find(key) is None
    with pytest.raises(UnknownName, match="no key"):
        keys.revoke(record.id)


def test_two_changes_within_one_tick_of_the_clock(tmp_path):
    """The folder's time is the same after the second change as after the first."""
    keys, elsewhere = Keys(tmp_path), Keys(tmp_path)
    tick = time.time_ns()
    found = []
    for _ in range(2):
        key = elsewhere.add("acme:")[0]
        os.utime(keys.folder, ns=(tick, tick))
        found.append(keys.find(key) is not None)
    assert found == [True, True]


def test_what_did_not_change_is_not_read_again(tmp_path, monkeypatch):
    keys = Keys(tmp_path)
    key = keys.add("acme:")[0]
    os.utime(keys.folder, (1, 1))
    assert keys.find(key) is not None
    monkeypatch.setattr(type(keys.folder), "glob", lambda *_: pytest.fail("the folder was read again"))
    assert keys.find(key) is not None


@pytest.mark.parametrize(
    "prefix", ["", "acme", ":", "a:b:", "acme::", ".a:", "a/b:", "../a:", "ä:", "a" * 64 + ":", "acme:x", "a:\n"]
)
def test_prefixes_that_could_meet_another_are_refused(tmp_path, prefix):
    with pytest.raises(ConfigError, match="prefix is"):
        Keys(tmp_path).add(prefix)


def test_a_key_is_an_admins_or_has_a_prefix(tmp_path):
    for given in ({"prefix": "acme:", "admin": True}, {}):
        with pytest.raises(ConfigError, match="either a prefix"):
            Keys(tmp_path).add(**given)


def test_the_state_folder_is_its_owners_alone(tmp_path):
    """Chats lie in it as well as keys."""
    Keys(tmp_path / "keys first" / "state")
    Records(tmp_path / "records first" / "state")
    folders = [tmp_path / first / "state" for first in ("keys first", "records first")]
    assert [folder.stat().st_mode & 0o777 for folder in folders] == [0o700] * 2


def test_a_damaged_record_shuts_nobody_else_out(tmp_path):
    keys = Keys(tmp_path)
    key, record = keys.add("acme:")
    bad, other = keys.add("globex:")
    text = json.loads((keys.folder / f"{other.id}.json").read_text())
    (keys.folder / f"{other.id}.json").write_text(json.dumps({**text, "prefix": "acme"}))
    (keys.folder / "x.json").write_text("{")
    for name, digest in (("umlaut", "ä" * 64), ("nothing", None)):
        (keys.folder / f"{name}.json").write_text(json.dumps({**text, "id": name, "sha256": digest}))
    (keys.folder / "folder.json").mkdir()
    fresh = Keys(tmp_path)
    assert fresh.find(key) is not None and fresh.find(bad) is None and [r.id for r in fresh.list()] == [record.id]


def test_keys_are_off_on_loopback_only():
    assert not GatewaySettings(store="s", engine_url="http://e", auth=False).auth
    for host in ("0.0.0.0", "::", "10.0.0.1", "example.com", ""):
        assert not is_loopback(host)
        with pytest.raises(ConfigError, match="everybody admin"):
            GatewaySettings(store="s", engine_url="http://e", auth=False, host=host)
    assert all(map(is_loopback, ("127.0.0.1", "::1", "localhost", "127.8.8.8")))


def test_settings_list_every_fault():
    with pytest.raises(ConfigError, match=r"store: .*port: .*engine_url: .*max_tokens: "):
        GatewaySettings(port=-1, max_tokens=0, engine_url="localhost")
    with pytest.raises(ConfigError, match="--model"):
        GatewaySettings(store="s")
