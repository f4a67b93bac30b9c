"""A fleet: every owner ends where it would have ended alone, and nobody moves who wasn't there."""

import pytest
import torch

from tests.conftest import tiny_gpt2, tiny_llama, tokens
from veralib import AdapterMismatch, ConfigError, StateError, UnknownName, VeraConfig, attach, load_adapter
from veralib.fleet import FleetAdamW, owner_loss, owner_losses

STEPS = {"ann": 6, "bob": 4, "cat": 3}
ROWS = {"ann": 2, "bob": 1, "cat": 3}
HERE = [("ann", "bob", "cat"), ("ann", "cat"), ("bob",), ("ann", "bob", "cat"), ("ann", "bob"), ("ann",), ("ann",)]


def batch_of(owner: str, step: int) -> torch.Tensor:
    """The rows of one owner's own step."""
    return tokens(ROWS[owner], 9, seed=1000 * sum(map(ord, owner)) + step)


def alone(config: VeraConfig, owner: str, build=tiny_llama, dtype=torch.float64, lr=0.05, decay=0.1, max_norm=0.5):
    """The vectors of an owner trained by torch's own AdamW, LambdaLR and clip_grad_norm_ on Parameters of its own."""
    model = build().to(dtype)
    vera = attach(model, config)
    for module in model.modules():
        for name, p in list(module._parameters.items()):
            if name.startswith("vera_"):
                p.data = torch.full(p.shape, float(config.d_start if name.endswith("_d") else config.b_start), dtype=dtype)
    trained = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=lr, weight_decay=decay)
    warm = 1  # ceil(0.1 * 6) = ceil(0.1 * 4) = ceil(0.1 * 3)
    total = STEPS[owner]
    factor = lambda k: (k + 1) / (warm + 1) if k < warm else 1 - (k - warm) / (total - warm)  # noqa: E731
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, factor)
    for step in range(total):
        ids = batch_of(owner, step)
        logits = model(input_ids=ids).logits[:, :-1]  # transformers' own loss rounds to float32
        torch.nn.functional.cross_entropy(logits.flatten(0, 1), ids[:, 1:].flatten()).backward()
        torch.nn.utils.clip_grad_norm_(trained, max_norm)
        optimizer.step()
        schedule.step()
        optimizer.zero_grad()
    return vera.adapter("default").vectors


def together(config: VeraConfig, build=tiny_llama, dtype=torch.float64, lr=0.05, decay=0.1, max_norm=0.5, recompute=None):
    """All owners in mixed batches; each step of HERE takes the next own step of the owners it names."""
    vera = attach(build().to(dtype))
    fleet = vera.fleet(config, slots=5, dtype=dtype, recompute=recompute)
    fleet.add(["gone"]).remove("gone")
    fleet.add(["idle", *STEPS])
    optimizer = FleetAdamW(fleet, lr=lr, weight_decay=decay, max_norm=max_norm, schedule="linear", warmup=0.1)
    for name, steps in STEPS.items():
        optimizer.plan(name, steps)
    for here in HERE:
        owners = [o for o in here for _ in range(ROWS[o])]
        ids = torch.cat([batch_of(o, optimizer.steps_of(o)) for o in here])
        with vera.rows(owners):
            loss = owner_loss(vera.model(input_ids=ids).logits, ids, owners)
        loss.backward()
        assert set(optimizer.step().moved) == set(here)
        optimizer.zero_grad()
    return vera, fleet, optimizer


@pytest.mark.parametrize(
    ("config", "build"),
    [
        (VeraConfig(rank=8, targets="all-linear"), tiny_llama),
        (VeraConfig(rank=24, targets=["q_proj", "v_proj"], scale=3.0, levels="rademacher"), tiny_llama),
        (VeraConfig(rank=4, targets="all-linear", train="d"), tiny_llama),
        (VeraConfig(rank=4, targets="all-linear", train="b", sharing="unique"), tiny_llama),
        (VeraConfig(rank=8, targets=["c_attn:q", "c_attn:v", "c_fc"]), tiny_gpt2),
    ],
)
def test_fleet_equals_alone_in_float64(config, build):
    vera, _fleet, optimizer = together(config, build)
    for owner in STEPS:
        expected = alone(config, owner, build)
        found = vera.adapter(owner).vectors
        for unit, (d, b) in expected.items():
            torch.testing.assert_close(found[unit][0], d, rtol=0, atol=1e-9)
            torch.testing.assert_close(found[unit][1], b, rtol=0, atol=1e-9)
        assert any((b - config.b_start).abs().max() > 1e-3 or (d - config.d_start).abs().max() > 1e-3 for d, b in found.values())
    idle = vera.adapter("idle").vectors
    assert all((d == config.d_start).all() and (b == config.b_start).all() for d, b in idle.values())
    assert optimizer.steps_of("idle") == 0


def test_recomputing_b_u_in_backward_saves_memory_and_gives_the_same_bits():
    """On a CPU a fleet keeps B u for backward; elsewhere, and where it is told to, it computes it anew."""
    config, found, saved, kept = VeraConfig(rank=8, targets="all-linear"), [], [], []

    def count(t: torch.Tensor) -> torch.Tensor:
        kept.append(t.nbytes)
        return t

    for recompute in (True, False, None):
        vera, _fleet, _optimizer = together(config, recompute=recompute)
        found.append({o: vera.adapter(o).vectors for o in STEPS})
        kept.clear()
        with (
            torch.autograd.graph.saved_tensors_hooks(count, lambda t: t),
            vera.rows(["idle"]),
        ):
            vera.model(input_ids=tokens(1))
        saved.append(sum(kept))
    for owner in STEPS:
        for unit, pair in found[0][owner].items():
            assert all(torch.equal(a, b) for other in found[1:] for a, b in zip(pair, other[owner][unit], strict=True))
    widths = sum(len(b) for _, b in vera.adapter("idle").vectors.values())
    assert saved[1] - saved[0] == 8 * tokens(1).numel() * widths and saved[2] == saved[1]


def test_a_slot_given_to_another_owner_starts_from_nothing():
    config = VeraConfig(rank=4, targets="all-linear")
    _vera, fleet, optimizer = together(config)
    fleet.remove("ann")
    fleet.add("new")
    assert optimizer.steps_of("new") == 0
    assert fleet.free == 1
    assert optimizer.state_of("new")["exp_avg"].abs().max() == 0
    assert torch.equal(fleet.bank.row(fleet.slot("new")), fleet._start)


def test_a_saved_state_goes_on_bit_for_bit():
    config = VeraConfig(rank=4, targets="all-linear")
    vera, fleet, optimizer = together(config)
    start, state = vera.adapter("ann"), optimizer.state_of("ann")
    fleet.remove("bob")
    fleet.add("twin", start=start)
    optimizer.load_state_of("twin", state)
    ids = batch_of("ann", 99)
    owners = ["ann"] * 2 + ["twin"] * 2
    for name in ("ann", "twin"):
        optimizer.plan(name, 12)
    with vera.rows(owners):
        owner_loss(vera.model(input_ids=torch.cat([ids, ids])).logits, torch.cat([ids, ids]), owners).backward()
    optimizer.step()
    torch.testing.assert_close(fleet.bank.row(fleet.slot("ann")), fleet.bank.row(fleet.slot("twin")), rtol=1e-12, atol=1e-12)


def test_accumulated_over_two_batches_is_the_whole_step():
    config = VeraConfig(rank=4, targets="all-linear")
    rows = {}
    for split in (1, 2):
        vera = attach(tiny_llama().double())
        fleet = vera.fleet(config, slots=2, dtype=torch.float64).add(["ann", "bob"])
        optimizer = FleetAdamW(fleet, lr=0.05)
        ids, owners = tokens(6, 9), ["ann", "bob"] * 3
        for part in torch.arange(6).chunk(split):
            mine = [owners[i] for i in part]
            with vera.rows(mine):
                logits = vera.model(input_ids=ids[part]).logits
            owner_loss(logits, ids[part], mine, counts={"ann": 24, "bob": 24}).backward()
        optimizer.step()
        rows[split] = fleet.bank.table.clone()
    torch.testing.assert_close(rows[1], rows[2], rtol=0, atol=1e-10)


def test_one_owners_nan_leaves_the_others_bit_equal():
    config = VeraConfig(rank=4, targets="all-linear")
    ends = {}
    for poisoned in (False, True):
        vera = attach(tiny_llama())
        fleet = vera.fleet(config, slots=3).add(["ann", "bob", "cat"])
        optimizer = FleetAdamW(fleet, lr=0.05)
        for step in range(3):
            owners = ["ann", "bob", "cat"]
            ids = tokens(3, 9, seed=step)
            if poisoned and step == 1:
                fleet.bank.row(fleet.slot("bob"))[:4] = float("inf")
            with vera.rows(owners):
                owner_loss(vera.model(input_ids=ids).logits, ids, owners).backward()
            report = optimizer.step()
            optimizer.zero_grad()
            if poisoned and step == 1:
                assert report.diverged == ("bob",)
                assert report.moved == ("ann", "cat")
                fleet.reset("bob")
        ends[poisoned] = {n: fleet.bank.row(fleet.slot(n)).clone() for n in ("ann", "cat")}
    for name in ("ann", "cat"):
        assert torch.equal(ends[False][name], ends[True][name])


def test_an_overflow_under_a_loss_scale_is_that_owners_alone():
    vera = attach(tiny_llama())
    fleet = vera.fleet(VeraConfig(rank=4, targets="all-linear"), slots=2).add(["ann", "bob"])
    optimizer = FleetAdamW(fleet, lr=0.05, loss_scale=1024.0)
    ids = tokens(2, 9)
    with vera.rows(["ann", "bob"]):
        losses = owner_losses(vera.model(input_ids=ids).logits, ids, ["ann", "bob"])
    (losses["ann"] * optimizer.loss_scales["ann"] + losses["bob"] * float("inf")).backward()
    report = optimizer.step()
    assert report == type(report)(moved=("ann",), skipped=("bob",))
    assert (optimizer.steps_of("ann"), optimizer.steps_of("bob")) == (1, 0)
    assert optimizer.loss_scales == {"ann": 1024.0, "bob": 512.0}


def test_owners_mix_with_resident_adapters_and_the_base(tmp_path):
    vera, _fleet, _ = together(VeraConfig(rank=8, targets="all-linear"), dtype=torch.float32)
    vera.save(tmp_path / "ann.safetensors", name="ann")
    vera.load(tmp_path / "ann.safetensors", name="resident")
    ids = tokens(4, 9)
    with torch.no_grad():
        with vera.rows(["ann", "resident", None, "bob"]):
            mixed = vera.model(input_ids=ids).logits
        for i, name in enumerate(["ann", "resident", None, "bob"]):
            vera.use(name)
            torch.testing.assert_close(vera.model(input_ids=ids[i : i + 1]).logits[0], mixed[i], rtol=1e-4, atol=1e-5)
        vera.use(None)
        assert torch.equal(vera.model(input_ids=ids).logits[2], mixed[2])
    assert torch.equal(load_adapter(tmp_path / "ann.safetensors").vectors["model.layers.0.self_attn.q_proj"][1],
                       vera.adapter("resident").vectors["model.layers.0.self_attn.q_proj"][1])  # fmt: skip


def test_gradient_checkpointing_gives_the_same_gradient():
    tables = []
    for checkpointed in (False, True):
        vera = attach(tiny_llama())
        if checkpointed:
            vera.model.train()
            vera.model.gradient_checkpointing_enable()
            vera.model.enable_input_require_grads()
        fleet = vera.fleet(VeraConfig(rank=8, targets="all-linear"), slots=3).add(["ann", "bob"])
        ids, owners = tokens(4, 9), ["bob", "ann", "bob", None]
        with vera.rows(owners):
            loss = owner_loss(vera.model(input_ids=ids).logits, ids, owners)
        loss.backward()
        tables.append(fleet.bank.gradients.clone())
    assert tables[0].abs().max() > 0
    torch.testing.assert_close(tables[0], tables[1])


def test_detach_gives_the_plain_model_back():
    plain = tiny_llama()
    vera, _, _ = together(VeraConfig(rank=4, targets="all-linear"), dtype=torch.float32)
    model = vera.detach()
    ids = tokens()
    assert torch.equal(model(input_ids=ids).logits, plain(input_ids=ids).logits)
    assert type(model) is type(plain)


def test_bad_inputs():
    vera = attach(tiny_llama())
    config = VeraConfig(rank=4, targets="all-linear")
    with pytest.raises(ConfigError, match="dropout"):
        vera.fleet(VeraConfig(rank=4, targets="all-linear", dropout=0.1), slots=2)
    with pytest.raises(ConfigError, match="slots"):
        vera.fleet(config, slots=0)
    fleet = vera.fleet(config, slots=2).add("ann")
    with pytest.raises(StateError, match="2 owners for 1 free slots"):
        fleet.add(["bob", "cat"])
    assert fleet.names == ("ann",)
    with pytest.raises(StateError, match="already"):
        fleet.add("ann")
    with pytest.raises(UnknownName, match="ann"):
        fleet.slot("an")
    optimizer = FleetAdamW(fleet)
    with pytest.raises(StateError, match=r"vera\.rows"):
        optimizer.step()
    with pytest.raises(UnknownName, match="cosine"):
        FleetAdamW(fleet, schedule="cosin")
    other = attach(tiny_llama(), VeraConfig(rank=8, targets="all-linear")).adapter()
    with pytest.raises(AdapterMismatch, match="rank"):
        fleet.add("bob", start=other)
    with pytest.raises(ConfigError, match="3 owners"):
        owner_loss(torch.zeros(2, 3, 4), torch.zeros(2, 3, dtype=torch.long), ["ann"] * 3)
    with pytest.raises(ConfigError, match="no owner"):
        owner_loss(torch.zeros(1, 3, 4), torch.zeros(1, 3, dtype=torch.long), [None])
    ids = tokens(1, 5)
    with vera.rows(["ann"]):
        loss, other = (owner_loss(vera.model(input_ids=ids).logits, ids, ["ann"]) for _ in range(2))
    fleet.remove("ann")
    with pytest.raises(StateError, match="between forward and backward"):
        other.backward()
    fleet.add("bob")
    with pytest.raises(StateError, match="between forward and backward"):
        loss.backward()


def test_an_owner_of_a_bf16_table_is_saved_in_float32(tmp_path):
    vera = attach(tiny_llama())
    fleet = vera.fleet(VeraConfig(rank=4, targets=["q_proj"], b_initial=0.5), slots=2, dtype=torch.bfloat16)
    fleet.add("ann")
    saved = load_adapter(vera.save(tmp_path / "ann.safetensors", name="ann"))
    for unit, vectors in saved.vectors.items():
        for vector, live in zip(vectors, vera.member("ann").vectors(unit), strict=True):
            assert live.dtype == torch.bfloat16 and vector.dtype == torch.float32 and torch.equal(vector, live.float())
