"""vera fleet train: every owner gets an adapter of its own, whoever else is there and however often it was interrupted."""

import json
from pathlib import Path

import pytest
import torch
from typer.testing import CliRunner

from tests.fleet.workshop import SIZES, changed, flat, sentences, worker
from tests.training import tiny
from veralib import ConfigError, DataError, StateError, attach, load_adapter
from veralib.cli import build
from veralib.fleet import run as run_module
from veralib.fleet.data import read_owners
from veralib.fleet.run import train_fleet
from veralib.store import open_store
from veralib.training.loading import Base
from veralib.training.rows import read_rows


def test_every_owner_gets_an_adapter_and_improves(settings):
    result = train_fleet(settings)
    store = open_store(Path(settings.output) / "store")
    assert sorted(store.names()) == sorted(SIZES) == sorted(result.owners)
    for name, count in SIZES.items():
        owner = result.owners[name]
        assert owner["status"] == "trained" and owner["examples"] + owner["held_out"] == count
        assert owner["steps"] == 2 * -(-owner["examples"] // 4)  # the epochs asked for, few rows or many
        assert owner["loss_after"] < owner["loss_before"]
    assert all(1 <= result.owners[n]["held_out"] < result.owners[n]["examples"] for n in SIZES if n != "one")
    assert result.owners["one"]["held_out"] == 0
    written = json.loads((Path(settings.output) / "fleet.json").read_text())
    assert written["owners"] == dict(result.owners) and written["summary"]["improved"] == 5  # "one" has nothing held out
    # What the file says is what the adapter does, through transformers alone.
    from transformers import AutoModelForCausalLM, AutoTokenizer

    model, tokenizer = AutoModelForCausalLM.from_pretrained(settings.model), AutoTokenizer.from_pretrained(settings.model)
    text = sentences("one", 1)[0]["text"]
    ids = torch.tensor(
        [[tokenizer.bos_token_id, *tokenizer(text, add_special_tokens=False)["input_ids"], tokenizer.eos_token_id]]
    )
    vera = attach(model)
    vera.load(store.get("one"), name="one")
    for key, name in (("loss_before", None), ("loss_after", "one")):
        vera.use(name)
        with torch.no_grad():
            assert float(model(input_ids=ids, labels=ids).loss) == pytest.approx(result.owners["one"][key], rel=1e-4)


@pytest.mark.parametrize("dtype", ["auto", "float16"])
def test_a_float16_base_has_a_loss_scale_however_its_type_was_named(settings, tmp_path, monkeypatch, dtype):
    from transformers import AutoModelForCausalLM, AutoTokenizer

    AutoModelForCausalLM.from_pretrained(settings.model).half().save_pretrained(tmp_path / "half")
    AutoTokenizer.from_pretrained(settings.model).save_pretrained(tmp_path / "half")
    made, build = [], run_module.FleetAdamW
    monkeypatch.setattr(run_module, "FleetAdamW", lambda *args, **more: made.append(build(*args, **more)) or made[-1])
    result = train_fleet(changed(settings, model=str(tmp_path / "half"), dtype=dtype, epochs=1))
    assert [o.loss_scale for o in made] == [run_module.LOSS_SCALE]
    assert all(owner["status"] == "trained" for owner in result.owners.values())


@pytest.mark.parametrize("owner", ["ann", "bob"])
def test_an_owner_is_what_it_would_be_alone(settings, tmp_path, owner):
    train_fleet(settings)
    tiny.write_jsonl(tmp_path / "alone.jsonl", [r for r in read_rows(settings.data[0]) if r["owner"] == owner])
    train_fleet(changed(settings, data=str(tmp_path / "alone.jsonl"), output=str(tmp_path / "alone"), slots=1, batch_rows=4))
    mixed, alone = open_store(tmp_path / "fleet/store"), open_store(tmp_path / "alone/store")
    torch.testing.assert_close(flat(mixed, owner), flat(alone, owner), rtol=1e-3, atol=2e-5)
    lines = [json.loads((tmp_path / f / "fleet.json").read_text())["owners"][owner] for f in ("fleet", "alone")]
    assert lines[0]["loss_after"] == pytest.approx(lines[1]["loss_after"], rel=1e-5)


def test_started_again_it_skips_the_finished_and_adds_the_new(settings, rows):
    train_fleet(settings)
    store = open_store(Path(settings.output) / "store")
    before = {n: flat(store, n) for n in SIZES}
    with open(rows, "a") as f:
        f.writelines(json.dumps(r) + "\n" for r in sentences("new", 6))
    result = train_fleet(settings)
    assert result.skipped == len(SIZES) and set(result.owners) == {*SIZES, "new"}
    assert all(torch.equal(flat(store, n), v) and store.current(n) == 1 for n, v in before.items())
    assert "new" in store
    with pytest.raises(StateError, match=r"other settings.*lr was 0.02, now 0.5"):
        train_fleet(changed(settings, lr=0.5))


def test_killed_it_goes_on_where_everyone_stood(settings, tmp_path):
    whole = changed(settings, output=str(tmp_path / "whole"))
    train_fleet(whole)
    for steps in ("3", "4", "5"):
        assert worker(settings, steps).returncode == -9
    assert list((tmp_path / "fleet").glob("standing-*"))
    printed = CliRunner().invoke(build(), ["fleet", "status", settings.output]).output
    assert "not finished" in printed
    done = worker(settings)
    assert done.returncode == 0, done.stderr
    total = json.loads((tmp_path / "whole/fleet.json").read_text())["steps"]
    assert json.loads(done.stdout)["steps"] < total - 6  # it didn't begin again
    first, second = open_store(tmp_path / "whole/store"), open_store(tmp_path / "fleet/store")
    for name in SIZES:
        torch.testing.assert_close(flat(first, name), flat(second, name), rtol=1e-3, atol=2e-5)
    owners = [json.loads((tmp_path / f / "fleet.json").read_text())["owners"] for f in ("whole", "fleet")]
    for name in SIZES:
        assert owners[0][name]["steps"] == owners[1][name]["steps"]
        assert owners[0][name]["loss_before"] == pytest.approx(owners[1][name]["loss_before"], rel=1e-5)
    assert not list((tmp_path / "fleet").glob("standing-*"))


@pytest.mark.slow
def test_two_processes_train_what_one_does(settings, tmp_path):
    whole = changed(settings, output=str(tmp_path / "whole"), shared_epochs=1)
    train_fleet(whole)
    two = changed(settings, shared_epochs=1)
    done = worker(
        two, launcher=("-m", "torch.distributed.run", "--nproc-per-node", "2", "--standalone", "-m", "tests.fleet.worker")
    )
    assert done.returncode == 0, done.stderr
    lines = [f.read_text().splitlines() for f in (tmp_path / "fleet").glob("owners-*.jsonl")]
    assert sorted(map(len, lines)) == [3, 3]  # each owner in one process
    first, second = open_store(tmp_path / "whole/store"), open_store(tmp_path / "fleet/store")
    assert sorted(second.names()) == sorted(SIZES)
    for name in SIZES:
        torch.testing.assert_close(flat(first, name), flat(second, name), rtol=1e-3, atol=2e-5)


@pytest.mark.slow
def test_two_processes_go_on_with_a_run_that_one_began(settings, rows, tmp_path):
    """Some owners are done, some can't train: everyone is trained once or named, whichever process would have had them."""
    few = tiny.write_jsonl(tmp_path / "few.jsonl", [r for r in read_rows(rows) if r["owner"] in ("ann", "bob")])
    train_fleet(changed(settings, data=str(few), epochs=1))
    with open(rows, "a") as f:
        f.writelines(json.dumps({"owner": o, "text": None}) + "\n" for o in ("empty", "empty too"))
        f.writelines(json.dumps(r) + "\n" for o in ("new", "newer", "newest") for r in sentences(o, 5))
    launcher = ("-m", "torch.distributed.run", "--nproc-per-node", "2", "--standalone", "-m", "tests.fleet.worker")
    done = worker(changed(settings, epochs=1), launcher=launcher)
    assert done.returncode == 0, done.stderr
    store, written = open_store(tmp_path / "fleet/store"), json.loads((tmp_path / "fleet/fleet.json").read_text())
    everyone = {*SIZES, "new", "newer", "newest"}
    assert set(store.names()) == set(written["owners"]) == everyone and all(store.current(n) == 1 for n in everyone)
    assert set(written["unusable"]) == {"empty", "empty too"}


def test_shared_start_is_where_everyone_begins(settings):
    shared = changed(settings, shared_epochs=2, epochs=1)
    result = train_fleet(shared)
    alone = train_fleet(changed(settings, epochs=1, output=settings.output + "2"))
    for name in SIZES:
        assert result.owners[name]["loss_before"] < alone.owners[name]["loss_before"]
    again = attach(__import__("transformers").AutoModelForCausalLM.from_pretrained(settings.model))
    again.load(Path(settings.output) / "shared.safetensors", name="shared")


def test_a_shared_start_that_was_killed_goes_on(settings, tmp_path):
    shared = changed(settings, shared_epochs=6, epochs=1)
    train_fleet(changed(shared, output=str(tmp_path / "whole")))
    assert worker(shared, "9").returncode == -9
    assert (tmp_path / "fleet/shared-standing.safetensors").exists()
    done = worker(shared)
    assert done.returncode == 0, done.stderr
    first, second = (load_adapter(tmp_path / f / "shared.safetensors").vectors for f in ("whole", "fleet"))
    for unit, pair in first.items():
        for one, other in zip(pair, second[unit], strict=True):
            torch.testing.assert_close(one, other, rtol=1e-3, atol=2e-5)
    assert not list((tmp_path / "fleet").glob("*standing*"))


def test_a_shared_start_reads_no_more_than_it_may(settings, base):
    from transformers import AutoModelForCausalLM, AutoTokenizer

    loaded = Base(AutoModelForCausalLM.from_pretrained(base), AutoTokenizer.from_pretrained(base), (), 64)
    owners = read_owners(settings)
    everything, count = run_module._everybody(settings, owners, loaded, ())
    some, _ = run_module._everybody(changed(settings, shared_examples=20), owners, loaded, ())
    assert count == len(SIZES) and len(everything.train) + len(everything.validation) == sum(SIZES.values())
    assert len(some.train) + len(some.validation) == 20 and all(e in everything.train for e in some.train)


def test_a_new_store_is_of_the_kind_asked_for(settings, tmp_path):
    where = str(tmp_path / "elsewhere")
    asked = changed(settings, store=where, store_kind="packed", precision="bfloat16", epochs=1)
    train_fleet(asked)
    store = open_store(where)
    assert type(store).__name__ == "PackedStore" and store.precision == "bfloat16" and len(store) == len(SIZES)
    with pytest.raises(StateError, match="store was"):
        train_fleet(changed(asked, store=str(tmp_path / "third")))


def test_bad_inputs(settings, rows, tmp_path, base):
    with pytest.raises(DataError, match=r'no owner column "user".*Columns there: owner, text'):
        read_owners(changed(settings, owner="user"))
    with pytest.raises(ConfigError, match=r"(?s)rank_.*held_out is 2"):
        changed(settings, rank_=3, held_out=2)
    with pytest.raises(ConfigError, match="patience goes by"):
        changed(settings, patience=1, held_out=0)
    folder = tmp_path / "owners"
    folder.mkdir()
    with pytest.raises(DataError, match="no files of rows"):
        read_owners(changed(settings, data=str(folder)))
    for name in ("ann", "bob"):
        tiny.write_jsonl(folder / f"{name}.jsonl", sentences(name, 5))
    (folder / "empty.jsonl").write_text("")
    (folder / "other.csv").write_text("title\nx\n")
    result = train_fleet(changed(settings, data=str(folder), output=str(tmp_path / "out")))
    assert set(result.owners) == {"ann", "bob"} and set(result.unusable) == {"empty", "other"}
    assert 'no column "text"' in result.unusable["other"] and "is empty" in result.unusable["empty"]
    printed = CliRunner().invoke(build(), ["fleet", "status", str(tmp_path / "nowhere")])
    assert printed.exit_code == 1 and "holds no fleet" in printed.output


def test_a_full_disk_keeps_what_ended_and_goes_on(settings, monkeypatch):
    from veralib.store.files import LocalFiles

    write, puts = LocalFiles.write, []

    def full(self, path, data):
        if path.startswith("adapters"):
            puts.append(path)
            if len(puts) == 3:
                raise __import__("veralib").StoreError("can't write: the disk is full.")
        return write(self, path, data)

    monkeypatch.setattr(LocalFiles, "write", full)
    with pytest.raises(Exception, match="disk is full"):
        train_fleet(settings)
    done = set(open_store(Path(settings.output) / "store").names())
    assert len(done) == 2
    result = train_fleet(settings)
    assert result.skipped == 2 and set(result.owners) == set(SIZES)
