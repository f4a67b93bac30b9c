"""Heads in a fleet: each owner trains a copy of its own, in the fleet's table, as if alone."""

import copy

import pytest
import torch

from tests.conftest import tiny_bert, tiny_llama, tokens
from veralib import AdapterMismatch, ConfigError, UnknownName, VeraConfig, attach
from veralib.fleet import FleetAdamW, owner_loss

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
