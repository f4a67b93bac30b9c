"""vera fleet train: every owner gets an adapter of its own, whoever else is there and however often it was interrupted."""

import itertools
import json
import os
import random
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from typer.testing import CliRunner

from tests.training import tiny
from veralib import AdapterMismatch, ConfigError, DataError, StateError, UnknownName, VeraConfig, attach, load_adapter
from veralib.cli import build
from veralib.fleet import FleetAdamW
from veralib.fleet import folder as files
from veralib.fleet import run as run_module
from veralib.fleet.batches import Order, OwnerData, choose
from veralib.fleet.data import owner_data, read_owners
from veralib.fleet.run import FleetResult, train_fleet, update_owner
from veralib.fleet.settings import FleetSettings
from veralib.fleet.trainer import FleetTrainer, OwnerResult, Plan
from veralib.store import open_store
from veralib.training.data import read_rows
from veralib.training.loading import Base

SIZES = {"ann": 40, "bob": 5, "c/../d": 17, "🦆": 9, "eve": 23, "one": 1}


@pytest.fixture(scope="module")
def base(tmp_path_factory) -> Path:
    return tiny.make_llama(tmp_path_factory.mktemp("llama"))


def sentences(owner: str, count: int, seed: int = 0) -> list[dict]:
    """Each owner says the same things of other animals, in sentences of several lengths."""
    chooser = random.Random(f"{owner}/{seed}")
    animal = ["cat", "dog", "bird", "fish"][sum(map(ord, owner)) % 4]
    word = lambda: ["the", animal, "likes", "the", chooser.choice(["red", "blue"]), "house"]  # noqa: E731
    texts = [" ".join(w for _ in range(chooser.randint(1, 4)) for w in word()) for _ in range(count)]
    return [{"owner": owner, "text": text} for text in texts]


@pytest.fixture
def rows(tmp_path) -> Path:
    path = tmp_path / "rows.jsonl"
    everything = [row for owner, count in SIZES.items() for row in sentences(owner, count)]
    random.Random(0).shuffle(everything)
    tiny.write_jsonl(path, everything)
    return path


@pytest.fixture
def settings(base, rows, tmp_path) -> FleetSettings:
    return FleetSettings(
        model=base, data=rows, output=tmp_path / "fleet", rank=8, epochs=2, slots=3, batch_rows=8, lr=2e-2, seed=3, plot=False
    )


def changed(settings: FleetSettings, **changes) -> FleetSettings:
    return FleetSettings(**{**{n: getattr(settings, n) for n in settings.model_fields_set}, **changes})


def flat(store, name: str) -> torch.Tensor:
    return torch.cat([t for pair in store.get(name).vectors.values() for t in pair])


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


def worker(settings: FleetSettings, *arguments: str, launcher: tuple[str, ...] = ()):
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    command = [sys.executable, *launcher, "-m", "tests.fleet.worker"] if not launcher else [sys.executable, *launcher]
    values = json.dumps({n: v for n, v in settings.to_dict().items() if n in settings.model_fields_set})
    root = Path(__file__).parents[2]
    return subprocess.run([*command, values, *arguments], capture_output=True, text=True, env=environment, cwd=root)


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


# What earlier rows and base weights mean


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
    assert run_module._Standing(tmp_path / "fleet", 0, fleet).saved() == {}


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


def test_owners_are_read_when_a_slot_is_free(settings, tmp_path, base):
    folder = tmp_path / "owners"
    folder.mkdir()
    for owner in ("ann", "bob", "cat"):
        tiny.write_jsonl(folder / f"{owner}.jsonl", sentences(owner, 5))
    (folder / "broken.jsonl").write_text("{")
    read = []
    owners = read_owners(changed(settings, data=str(folder)))
    assert len(owners.rows) == 4
    vera = attach(__import__("transformers").AutoModelForCausalLM.from_pretrained(base))
    fleet = vera.fleet(settings.vera_config(), 1)
    trainer = FleetTrainer(fleet, FleetAdamW(fleet), Plan(epochs=1))

    def source():
        for data in make_data({"ann": 5, "bob": 5, "cat": 5}):
            read.append(data.name)
            yield data

    seen = []
    for result, _ in trainer.run(source()):
        seen.append((result.name, len(read)))
    assert seen == [("ann", 1), ("bob", 2), ("cat", 3)]
    found = train_fleet(changed(settings, data=str(folder), output=str(tmp_path / "by file")))
    assert set(found.owners) == {"ann", "bob", "cat"} and "broken" in found.unusable


def test_a_new_store_is_of_the_kind_asked_for(settings, tmp_path):
    where = str(tmp_path / "elsewhere")
    asked = changed(settings, store=where, store_kind="packed", precision="bfloat16", epochs=1)
    train_fleet(asked)
    store = open_store(where)
    assert type(store).__name__ == "PackedStore" and store.precision == "bfloat16" and len(store) == len(SIZES)
    with pytest.raises(StateError, match="store was"):
        train_fleet(changed(asked, store=str(tmp_path / "third")))


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


# Steps and batches


def make_data(sizes: dict[str, int], long: int = 12) -> list[OwnerData]:
    chooser = random.Random(0)
    lengths = lambda: chooser.randint(3, long)  # noqa: E731
    return [
        OwnerData(n, [{"input_ids": [5] * k, "labels": [5] * k} for k in (lengths() for _ in range(c))])
        for n, c in sizes.items()
    ]  # fmt: skip


def test_each_epoch_has_every_row_once_in_an_order_of_the_owners_own():
    (data,) = make_data({"ann": 23})
    order = Order(data, 4, 3, seed=1)
    seen = []
    while not order.done:
        seen.append([id(e) for e in order.rows()])
        order.taken += 1
    epochs = [[row for step in seen[6 * k : 6 * k + 6] for row in step] for k in range(3)]
    assert all(sorted(e) == sorted(map(id, data.train)) for e in epochs) and epochs[0] != epochs[1]
    assert len(seen) == order.total == 18


def test_batches_are_full_and_hardly_padded():
    orders = [Order(d, 4, 2, seed=0) for d in make_data({f"o{i}": 5 + 37 * i % 60 for i in range(40)}, long=200)]
    sizes, tokens, cells = [], 0, 0
    while waiting := [o for o in orders if not o.done]:
        chosen = choose(waiting, 32)
        rows = [e for o in chosen for e in o.rows()]
        sizes.append(len(rows))
        tokens += sum(len(e["input_ids"]) for e in rows)
        cells += len(rows) * max(len(e["input_ids"]) for e in rows)
        assert len(rows) <= 32 and len({o.data.name for o in chosen}) == len(chosen)
        for o in chosen:
            o.taken += 1
    assert sum(s >= 28 for s in sizes) > 0.8 * len(sizes)
    assert tokens / cells > 0.6  # rows drawn blindly: 0.5


def test_patience_stops_an_owner_at_its_best_and_frees_its_slot(base):
    from transformers import AutoModelForCausalLM

    vera = attach(AutoModelForCausalLM.from_pretrained(base))
    fleet = vera.fleet(VeraConfig(rank=8, targets="all-linear"), slots=1)
    optimizer = FleetAdamW(fleet, lr=0.3)  # far too much: held-out loss rises after a few epochs
    chooser = random.Random(0)
    rows = lambda n: [{"input_ids": ids, "labels": ids} for ids in ([2, *chooser.choices(range(7, 20), k=9)] for _ in range(n))]  # noqa: E731
    owners = [OwnerData(f"o{i}", rows(8), rows(4)) for i in range(3)]
    trainer = FleetTrainer(fleet, optimizer, Plan(epochs=60, patience=2))
    found = list(trainer.run(owners))
    assert [r.name for r, _ in found] == ["o0", "o1", "o2"]  # one slot: one after another
    for result, adapter in found:
        assert result.status == "stopped" and result.steps < 120
        fleet.add("again", start=adapter)
        trainer.running["again"] = type("R", (), {"order": Order(next(o for o in owners if o.name == result.name), 4, 1, 0)})()
        assert trainer.held_out_scores(["again"])["again"].loss == pytest.approx(result.loss_after, rel=1e-6)
        trainer.running.clear()
        fleet.remove("again")


def test_one_diverging_owner_is_reported_and_the_others_are_bit_equal(base):
    from transformers import AutoModelForCausalLM

    ends = {}
    for poisoned in (False, True):
        vera = attach(AutoModelForCausalLM.from_pretrained(base))
        fleet = vera.fleet(VeraConfig(rank=8, targets="all-linear"), slots=3)
        trainer = FleetTrainer(fleet, FleetAdamW(fleet, lr=1e-2), Plan(epochs=3, batch_rows=12))

        def poison(t, fleet=fleet):
            if t.steps == 2:
                fleet.bank.row(fleet.slot("bob"))[:8] = float("inf")

        trainer.on_step = poison if poisoned else None
        ends[poisoned] = {r.name: (r, torch.cat([t for p in a.vectors.values() for t in p]))
                          for r, a in trainer.run(make_data({"ann": 12, "bob": 14, "cat": 9, "dan": 6}))}  # fmt: skip
    assert {n: r.status for n, (r, _) in ends[True].items()} == {
        "ann": "trained", "bob": "diverged", "cat": "trained", "dan": "trained"}  # fmt: skip
    for name in ("ann", "cat", "dan"):
        assert torch.equal(ends[False][name][1], ends[True][name][1])


# Bad input


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
