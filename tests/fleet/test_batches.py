"""Batches are full, owners come and go, and one whose loss diverges costs nobody else a bit."""

import random

import pytest
import torch

from tests.fleet.workshop import changed, sentences
from tests.training import tiny
from veralib import VeraConfig, attach
from veralib.fleet import FleetAdamW
from veralib.fleet.batches import Order, OwnerData, choose
from veralib.fleet.data import read_owners
from veralib.fleet.run import train_fleet
from veralib.fleet.trainer import FleetTrainer, Plan


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
