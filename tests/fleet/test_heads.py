"""Heads in a fleet: each owner trains a copy of its own, in the fleet's table, as if alone."""

import copy
import random

import pytest
import torch

from tests.conftest import tiny_bert, tiny_llama, tokens
from tests.training import tiny
from veralib import AdapterMismatch, ConfigError, DataError, UnknownName, VeraConfig, attach
from veralib.fleet import FleetAdamW, owner_loss
from veralib.fleet.data import OwnerRows
from veralib.fleet.run import train_fleet, update_owner
from veralib.fleet.settings import FleetSettings
from veralib.store import open_store

CONFIG = VeraConfig(rank=8, targets=["query", "value"], train_modules=["classifier"])
OWNERS = ("ann", "bob", "cat")
ROWS = 3
STEPS = 4


def classifier(dtype=torch.float64):
    return tiny_bert().to(dtype).eval()


def batch_of(owner: str, step: int):
    seed = 100 * OWNERS.index(owner) + step
    ids = tokens(ROWS, 7, seed=seed)
    return ids, torch.randint(3, (ROWS,), generator=torch.Generator().manual_seed(seed))


def alone(model, owner, lr=0.05, lr_head=0.01):
    """d, b and the head of one owner, by torch's AdamW over two groups of Parameters."""
    vera = attach(model, CONFIG)
    for module in model.modules():
        for name, p in list(module._parameters.items()):
            if name.startswith("vera_"):
                p.data = torch.full(p.shape, 0.1 if name.endswith("_d") else 0.0, dtype=torch.float64)
    named = {n: p for n, p in model.named_parameters() if p.requires_grad}
    heads = [p for n, p in named.items() if "classifier" in n]
    vectors = [p for n, p in named.items() if "classifier" not in n]
    optimizer = torch.optim.AdamW([{"params": vectors, "lr": lr}, {"params": heads, "lr": lr_head}], weight_decay=0.1)
    for step in range(STEPS):
        ids, labels = batch_of(owner, step)
        torch.nn.functional.cross_entropy(model(input_ids=ids).logits, labels).backward()
        torch.nn.utils.clip_grad_norm_([*vectors, *heads], 0.5)
        optimizer.step()
        optimizer.zero_grad()
    return vera.adapter()


def together(model, dtype=torch.float64):
    vera = attach(model)
    fleet = vera.fleet(CONFIG, slots=4, dtype=dtype).add(["idle", *OWNERS])
    optimizer = FleetAdamW(fleet, lr=0.05, lr_head=0.01, weight_decay=0.1, max_norm=0.5)
    for step in range(STEPS):
        rows = [o for o in OWNERS for _ in range(ROWS)]
        parts = [batch_of(o, step) for o in OWNERS]
        with vera.rows(rows):
            logits = model(input_ids=torch.cat([ids for ids, _ in parts])).logits
        owner_loss(logits, torch.cat([labels for _, labels in parts]), rows).backward()
        assert set(optimizer.step().moved) == set(OWNERS)
        optimizer.zero_grad()
    return vera, fleet


def test_fleet_equals_alone_in_float64():
    base = classifier()
    vera, fleet = together(copy.deepcopy(base))
    for owner in OWNERS:
        expected, found = alone(copy.deepcopy(base), owner), vera.adapter(owner)
        for unit, pair in expected.vectors.items():
            for one, other in zip(found.vectors[unit], pair, strict=True):
                torch.testing.assert_close(one, other, rtol=0, atol=1e-9)
        for key, tensor in expected.modules["classifier"].items():
            torch.testing.assert_close(found.modules["classifier"][key], tensor, rtol=0, atol=1e-9)
        assert (found.modules["classifier"]["weight"] - base.classifier.weight).abs().max() > 1e-3
    idle = vera.adapter("idle").modules["classifier"]
    assert all(torch.equal(idle[k], t) for k, t in base.classifier.state_dict().items())
    assert fleet.head_parameters_per_owner == sum(p.numel() for p in base.classifier.parameters())


def test_a_saved_owner_predicts_the_same_in_a_fresh_model(tmp_path):
    base = classifier(torch.float32)
    vera, _ = together(copy.deepcopy(base), torch.float32)
    ids, _ = batch_of("bob", 9)
    with torch.no_grad(), vera.rows(["bob", "ann", None]):
        mixed = vera.model(input_ids=ids).logits
    vera.save(tmp_path / "bob.safetensors", name="bob")
    fresh = attach(copy.deepcopy(base))
    fresh.load(tmp_path / "bob.safetensors", name="bob")
    fresh.use("bob")
    with torch.no_grad():
        torch.testing.assert_close(fresh.model(input_ids=ids).logits[:1], mixed[:1], rtol=1e-5, atol=1e-6)
        torch.testing.assert_close(base(input_ids=ids).logits[2:], mixed[2:], rtol=1e-5, atol=1e-6)
    fresh.merge("bob")
    with torch.no_grad():
        torch.testing.assert_close(fresh.model(input_ids=ids).logits[:1], mixed[:1], rtol=1e-4, atol=1e-5)


def test_an_owner_starts_from_an_adapters_head_and_goes_on_after_a_reset():
    vera, fleet = together(classifier())
    ann = vera.adapter("ann")
    fleet.remove("idle")
    fleet.add("dan", start=ann)
    assert torch.equal(vera.adapter("dan").modules["classifier"]["weight"], ann.modules["classifier"]["weight"])
    fleet.reset("dan")
    assert torch.equal(vera.adapter("dan").modules["classifier"]["weight"], vera.model.classifier.weight)


def test_a_bf16_base_trains_heads_in_float32():
    vera, _ = together(classifier(torch.bfloat16), torch.float32)
    weight = vera.adapter("ann").modules["classifier"]["weight"]
    assert weight.dtype == torch.float32 and not torch.equal(weight, weight.bfloat16().float())
    with vera.rows(["ann"] * ROWS), torch.no_grad():
        assert vera.model(input_ids=batch_of("ann", 0)[0]).logits.dtype == torch.bfloat16


def test_bad_inputs():
    vera, fleet = together(classifier())
    headless = attach(classifier()).fleet(VeraConfig(rank=8, targets=["query", "value"]), slots=1, dtype=torch.float64)
    with pytest.raises(AdapterMismatch, match=r"classifier.*train_modules"):
        headless.add("ann", start=vera.adapter("ann"))
    with pytest.raises(ConfigError, match="lr_head"):
        FleetAdamW(fleet, lr_head=0.0)
    with pytest.raises(UnknownName, match="nowhere"):
        attach(tiny_llama()).fleet(VeraConfig(rank=2, train_modules=["nowhere"]), slots=1)


# vera fleet train with a head


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tiny.make_bert(tmp_path_factory.mktemp("bert"))


def opinions(count: int) -> OwnerRows:
    """ann takes red for good and blue for bad; bob the other way round: no shared adapter can please both."""
    chooser = random.Random(0)
    rows = {}
    for owner, good in {"ann": "red", "bob": "blue"}.items():
        colours = [chooser.choice(["red", "blue"]) for _ in range(count)]
        rows[owner] = [{"text": f"the cat likes the {c} house", "label": "good" if c == good else "bad"} for c in colours]
    return OwnerRows(rows)


def settings_of(folder, output, **changes) -> FleetSettings:
    known = {"model": str(folder), "data": "given", "output": str(output), "task": "classification", "rank": 8, "epochs": 12}
    return FleetSettings(**{**known, "lr": 0.05, "lr_head": 0.02, "plot": False, **changes})


def predicted(folder, adapter, rows) -> list[str]:
    """What a fresh model with the adapter alone predicts."""
    from transformers import AutoModelForSequenceClassification, AutoTokenizer

    torch.manual_seed(7)  # another start of the head than the run's
    model = AutoModelForSequenceClassification.from_pretrained(folder, num_labels=2)
    vera = attach(model.eval())
    vera.load(adapter, name="it")
    vera.use("it")
    tokenizer = AutoTokenizer.from_pretrained(folder)
    with torch.no_grad():
        logits = model(**tokenizer([r["text"] for r in rows], return_tensors="pt", padding=True)).logits
    return [("bad", "good")[i] for i in logits.argmax(-1)]


@pytest.mark.parametrize("own", [True, False])
def test_a_classifier_for_each_owner(folder, tmp_path, own):
    rows = opinions(40)
    how = {"head_per_owner": True} if own else {"shared_epochs": 2.0}
    result = train_fleet(settings_of(folder, tmp_path, **how), rows)
    store = open_store(tmp_path / "store")
    for owner, mine in rows.rows.items():
        line = result.owners[owner]
        assert line["loss_after"] < 0.5 < line["loss_before"] and line["accuracy"] == 1.0
        assert predicted(folder, store.get(owner), mine) == [r["label"] for r in mine]
    heads = [store.get(o).modules["classifier"]["weight"] for o in rows.rows]
    assert torch.equal(*heads) is not own
    again = train_fleet(settings_of(folder, tmp_path, **how), rows)
    assert again.skipped == 2 and again.steps == 0
    before = store.get("ann")
    update_owner(tmp_path, "ann", rows.rows["ann"][:4], lambda line: None)
    after = store.get("ann")
    assert torch.equal(after.modules["classifier"]["weight"], before.modules["classifier"]["weight"]) is not own
    assert predicted(folder, after, rows.rows["ann"]) == [r["label"] for r in rows.rows["ann"]]


def test_a_frozen_head_within_the_base_stays_out_of_all_linear(folder, tmp_path):
    """A checkpoint without a pooler: it is a head too, inside the base model."""
    from transformers import AutoTokenizer, BertModel

    headless = tmp_path / "without a pooler"
    BertModel.from_pretrained(folder, add_pooling_layer=False).save_pretrained(headless)
    AutoTokenizer.from_pretrained(folder).save_pretrained(headless)
    settings = settings_of(headless, tmp_path / "run", shared_epochs=2.0, targets="all-linear", epochs=1)
    result = train_fleet(settings, opinions(12))
    adapter = open_store(tmp_path / "run/store").get("ann")
    inside = [n for n in adapter.modules if n != "classifier"]
    assert inside == ["bert.pooler.dense"] and not any(n.startswith(tuple(inside)) for n in adapter.vectors)
    assert all(line["status"] == "trained" for line in result.owners.values())


def test_an_owner_of_the_run_is_the_owner_alone(folder, tmp_path):
    rows = opinions(12)
    for name, some in {"both": rows, "one": OwnerRows({"ann": rows.rows["ann"]})}.items():
        train_fleet(settings_of(folder, tmp_path / name, head_per_owner=True, epochs=2), some)
    one, both = (open_store(tmp_path / n / "store").get("ann") for n in ("one", "both"))
    torch.testing.assert_close(both.modules["classifier"]["weight"], one.modules["classifier"]["weight"], rtol=0, atol=1e-5)


def test_regression_takes_the_squared_error(folder, tmp_path):
    numbers = {o: [{**r, "label": 1.0 if r["label"] == "good" else -1.0} for r in rs] for o, rs in opinions(40).rows.items()}
    result = train_fleet(settings_of(folder, tmp_path, task="regression", head_per_owner=True), OwnerRows(numbers))
    for line in result.owners.values():
        assert line["loss_after"] < 0.1 < line["loss_before"] and line["accuracy"] is None


def test_a_label_that_came_later_makes_its_owner_unusable_and_nobody_else(folder, tmp_path):
    rows = opinions(8)
    settings = settings_of(folder, tmp_path, head_per_owner=True, epochs=1)
    train_fleet(settings, rows)
    late = [{"text": "the dog eats", "label": "ugly"}] * 8
    result = train_fleet(settings, OwnerRows({**rows.rows, "late": late, "dan": rows.rows["ann"]}))
    assert "ugly" in result.unusable["late"] and set(result.owners) == {"ann", "bob", "dan"}


def test_bad_settings_and_rows(folder, tmp_path):
    with pytest.raises(ConfigError, match="head_per_owner"):
        settings_of(folder, tmp_path)
    with pytest.raises(DataError, match=r'"label" holds 0 labels.*text'):
        train_fleet(settings_of(folder, tmp_path, head_per_owner=True), OwnerRows({"ann": [{"text": "the cat"}]}))
