"""Later runs: what earlier rows, states and base weights mean; updates of one owner, and everyone on a new base."""

import itertools
from pathlib import Path

import pytest
import torch
from typer.testing import CliRunner

from tests.fleet.workshop import SIZES, changed, flat, sentences, worker
from tests.training import tiny
from veralib import AdapterMismatch, ConfigError, StateError, UnknownName, attach
from veralib.cli import build
from veralib.fleet import folder as files
from veralib.fleet.data import kept_rows, owner_data
from veralib.fleet.run import FleetResult, train_fleet, update_owner
from veralib.fleet.standing import Standing
from veralib.fleet.trainer import FleetTrainer, OwnerResult
from veralib.store import open_store
from veralib.training.rows import read_rows


def test_what_trained_once_is_never_held_out_later(settings):
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(settings.model)
    mine = [{"text": " ".join(p)} for p in itertools.permutations(["the", "cat", "likes", "red"])]
    ids = lambda examples: {tuple(e["input_ids"]) for e in examples}  # noqa: E731
    made = lambda rows: owner_data("ann", rows, tokenizer, settings, settings.row_settings(), 64)  # noqa: E731
    before = made(mine[:8])
    for count in range(9, 25):
        after = made(mine[:count])
        assert not ids(before.train) & ids(after.validation) and len(after.train) + len(after.validation) == count
        before = after
    assert 1 <= len(before.validation) <= 12


def test_a_standing_state_of_other_rows_or_weights_is_not_used(settings, rows, tmp_path):
    assert worker(settings, "4").returncode == -9
    standing = files.standing(tmp_path / "fleet")
    name, state = next(iter(standing.items()))
    everything = read_rows(rows)
    for row in everything:  # as many rows, and so as many steps, of which one is another
        if row["owner"] == name:
            row["text"] = "the dog eats the tree and the dog eats the tree"
            break
    tiny.write_jsonl(rows, everything)
    fresh = changed(settings, output=str(tmp_path / "fresh"))
    train_fleet(fresh)
    train_fleet(settings)
    first, second = open_store(tmp_path / "fresh/store"), open_store(tmp_path / "fleet/store")
    torch.testing.assert_close(flat(first, name), flat(second, name), rtol=1e-3, atol=2e-5)
    from transformers import AutoModelForCausalLM

    fleet = attach(AutoModelForCausalLM.from_pretrained(settings.model)).fleet(settings.vera_config(), 1)
    files.save_standing(files.standing_file(tmp_path / "fleet", 0), {name: {**state, "base": "other weights"}})
    assert Standing(tmp_path / "fleet", 0, fleet).saved() == {}


def test_an_owner_begins_on_no_other_weights_than_its_start(settings, tmp_path):
    train_fleet(settings)
    adapter = open_store(tmp_path / "fleet/store").get("ann")
    from transformers import AutoModelForCausalLM

    other = AutoModelForCausalLM.from_pretrained(settings.model)
    with torch.no_grad():
        for parameter in other.parameters():
            parameter.mul_(1.1)
    fleet = attach(other).fleet(settings.vera_config(), 1)
    with pytest.raises(AdapterMismatch, match="other weights"):
        fleet.add("ann", start=adapter)
    assert fleet.free == 1


def test_an_update_that_diverges_leaves_what_was_there(settings, monkeypatch):
    train_fleet(settings)
    monkeypatch.setattr(FleetTrainer, "run", lambda self, owners: iter([(diverged, None)]))
    diverged = OwnerResult("bob", "diverged", 5, 1, 3.0, float("nan"))
    said = []
    assert update_owner(settings.output, "bob", [], said.append).status == "diverged"
    assert "diverged" in said[-1] and files.ended(Path(settings.output))["bob"]["status"] == "trained"


def test_a_loss_that_overflowed_is_left_out_of_the_means():
    line = {"status": "trained", "held_out": 3, "bytes": 8, "loss_before": 2.0, "loss_after": 1.0}
    owners = {"ann": line, "bob": {**line, "loss_after": None}}
    found = FleetResult(owners, {}, 0, 1.0, 1, 0, 1, 1, "store").summary()
    assert (found["loss_before"], found["loss_after"], found["improved"], found["owners"]) == (2.0, 1.0, 1, 2)
    nobody = FleetResult({"ann": {**line, "held_out": 0}}, {}, 0, 1.0, 1, 0, 1, 1, "store").summary()
    assert nobody["loss_before"] is None


def test_a_file_of_settings_counts_for_a_new_base_too(settings, tmp_path):
    train_fleet(settings)
    (tmp_path / "new.yaml").write_text(f"output: {tmp_path / 'by yaml'}\nepochs: 1\n")
    words = ["fleet", "train", str(tmp_path / "new.yaml"), "--base", settings.model, "--from", settings.output]
    done = CliRunner().invoke(build(), words)
    assert done.exit_code == 0, done.output
    written = files.read_settings(tmp_path / "by yaml")
    assert written["epochs"] == 1 and written["rank"] == 8


def test_update_goes_on_with_one_owner(settings, tmp_path):
    train_fleet(settings)
    store = open_store(Path(settings.output) / "store")
    others = {n: flat(store, n) for n in SIZES if n != "bob"}
    old = flat(store, "bob")
    result = update_owner(settings.output, "bob", sentences("bob", 12, seed=1), lambda line: None)
    assert result.examples + result.held_out == 17 and result.version == 2
    assert not torch.equal(flat(store, "bob"), old) and torch.equal(flat_version(store, "bob", 1), old)
    assert all(torch.equal(flat(store, n), v) for n, v in others.items())
    assert result.loss_after < result.loss_before
    with pytest.raises(UnknownName, match='no adapter "bo"'):
        update_owner(settings.output, "bo", [], lambda line: None)


def flat_version(store, name, version):
    return torch.cat([t for pair in store.get(name, version).vectors.values() for t in pair])


def test_a_new_base_retrains_everyone_from_the_kept_rows(settings, rows, tmp_path):
    run = lambda *words: CliRunner().invoke(build(), ["fleet", *words])  # noqa: E731
    flags = [f"--{k.replace('_', '-')}={v}" for k, v in settings.to_dict().items()
             if k in settings.model_fields_set and k not in ("plot", "data")]  # fmt: skip
    done = run("train", *flags, "--data", str(rows))
    assert done.exit_code == 0 and "owners that got better" in done.output and (tmp_path / "fleet/plot.png").exists(), done.output
    rows.unlink()
    new = tiny.make_llama(tmp_path / "new base")
    again = run("train", "--base", str(new), "--from", settings.output, "--output", str(tmp_path / "second"))
    assert again.exit_code == 0, again.output
    first, second = open_store(tmp_path / "fleet/store"), open_store(tmp_path / "second/store")
    assert sorted(first.names()) == sorted(second.names()) == sorted(SIZES)
    status = run("status", str(tmp_path / "second")).output
    assert "finished" in status and "not finished" not in status
    refused = run("train", "--base", str(new), "--from", settings.output)
    assert refused.exit_code == 1 and "another --output" in refused.output


def test_a_relative_store_is_the_same_from_another_folder(settings, tmp_path, monkeypatch):
    work, elsewhere = tmp_path / "work", tmp_path / "elsewhere"
    work.mkdir(), elsewhere.mkdir()
    monkeypatch.chdir(work)
    relative = changed(settings, output="fleet", store="adapters")
    train_fleet(relative)
    monkeypatch.chdir(elsewhere)
    assert update_owner("../work/fleet", "ann", sentences("ann", 2, seed=5), progress=lambda line: None).version == 2
    train_fleet(changed(settings, output="../work/fleet", store="../work/adapters"))  # the same settings: no refusal
    assert files.forget_owner(Path("../work/fleet"), "ann") > 2
    assert "ann" not in open_store(work / "adapters") and list(elsewhere.iterdir()) == []
    (work / "adapters").rename(work / "away")
    with pytest.raises(StateError, match="isn't there; nothing was removed"):
        files.forget_owner(Path("../work/fleet"), "bob")
    assert "bob" in files.ended(work / "fleet") and not (work / "adapters").exists()


def test_of_two_standing_files_the_one_that_got_further_counts(tmp_path):
    at = lambda taken: {"ann": {"taken": taken, "row": torch.full((3,), float(taken))}}  # noqa: E731
    for rank, taken in ((0, 90), (1, 10)):  # two processes, interrupted; then one, interrupted again
        files.save_standing(files.standing_file(tmp_path, rank), at(taken))
    found = files.standing(tmp_path)["ann"]
    assert found["taken"] == 90 and torch.equal(found["row"], torch.full((3,), 90.0))


def test_update_refuses_anothers_rows_and_leaves_everything_as_it_was(settings):
    train_fleet(settings)
    store, output = open_store(Path(settings.output) / "store"), Path(settings.output)
    old, kept = flat(store, "bob"), kept_rows(output, "bob")
    with pytest.raises(ConfigError, match=r'row 2 is of "ann" \(column "owner"\), and "bob" was to be updated'):
        update_owner(output, "bob", [*sentences("bob", 1), *sentences("ann", 1)], lambda line: None)
    assert torch.equal(flat(store, "bob"), old) and kept_rows(output, "bob") == kept and len(store.versions("bob")) == 1
