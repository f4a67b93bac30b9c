"""What is kept between forwards (selections, vectors, A x, records) is never another call's."""

import threading
from dataclasses import dataclass

import pytest
import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

from tests.conftest import randomise, tiny_llama, tokens
from veralib import StateError, UnknownName, VeraConfig, attach


def two(model=None, targets="all-linear"):
    vera = attach(model or tiny_llama())
    for seed, name in enumerate("ab"):
        vera.add(VeraConfig(rank=4, targets=targets, seed=seed), name=name)
        randomise(vera, name, seed)
    return vera


def test_inference_mode_before_training():
    vera = two()
    ids = tokens(2)
    with torch.inference_mode(), vera.rows(["a", "b"]):
        vera.model(input_ids=ids)
    with vera.rows(["a", "b"]):
        vera.model(input_ids=ids, labels=ids).loss.backward()
    file = vera.adapter("a")
    with torch.inference_mode():
        vera.load(file, name="inside")
    vera.load(file, name="outside")
    assert torch.equal(
        vera.adapter("inside").vectors["model.layers.0.mlp.up_proj"][1], file.vectors["model.layers.0.mlp.up_proj"][1]
    )


def test_rows_see_a_state_that_was_loaded_into_residents():
    source = two()
    vera = attach(tiny_llama())
    vera.load(source.adapter("a"), name="a")
    ids = tokens(2)
    with torch.no_grad(), vera.rows(["a", None]):
        before = vera.model(input_ids=ids).logits
        state = {f"{u}.{k}": t * 2 for u, pair in source.adapter("a").vectors.items() for k, t in zip("db", pair, strict=True)}
        vera.model.load_state_dict(state)
        after = vera.model(input_ids=ids).logits
    vera.use("a")
    with torch.no_grad():
        torch.testing.assert_close(after[0], vera.model(input_ids=ids).logits[0], rtol=1e-4, atol=1e-5)
    assert not torch.equal(before[0], after[0]) and torch.equal(before[1], after[1])


@pytest.mark.parametrize("plan", ["merged-tokens", "apart-tokens", "merged-weights", "apart-weights"])
def test_a_transposed_x_isnt_taken_for_x(plan):
    torch.manual_seed(0)
    x = torch.randn(6, 6)
    grads = {}
    for which in (plan, "factored"):
        torch.manual_seed(1)
        model = nn.ModuleDict({"a": nn.Linear(6, 6), "b": nn.Linear(6, 6)})
        vera = attach(model, VeraConfig(rank=3, targets=["a", "b"]))
        randomise(vera, "default")
        vera.runtime.plan = which
        (model["a"](x).square().sum() + model["b"](x.t()).pow(3).sum()).backward()
        grads[which] = [p.grad for n, p in sorted(model.named_parameters()) if p.grad is not None]
    for one, other in zip(grads[plan], grads["factored"], strict=True):
        torch.testing.assert_close(one, other, rtol=1e-3, atol=1e-3)


class Checkpointed(nn.Module):
    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.first, self.backbone = nn.Linear(6, 6), nn.Sequential(nn.Linear(6, 6), nn.Tanh(), nn.Linear(6, 6))

    def inner(self, x):
        return checkpoint(self.backbone, x, use_reentrant=False)

    def forward(self, x):
        return self.inner(self.first(x))


def test_a_record_ends_with_its_backward():
    vera = two(Checkpointed())
    model, x = vera.model, torch.randn(3, 6)
    gradients = []
    for before in (False, True):
        model.zero_grad()
        if before:
            vera.use("a")
            model(x).sum().backward()
            model.zero_grad()
        vera.use("b")
        model.inner(x.clone().requires_grad_()).square().sum().backward()
        gradients.append([p.grad.clone() for p in vera.parameter_groups(name="b")[0]["params"] if p.grad is not None])
    assert gradients[0] and all(torch.equal(one, other) for one, other in zip(*gradients, strict=True))


class Towers(nn.Module):
    """Two encoders that are called by themselves, never through forward, each a checkpointed segment."""

    def __init__(self, reentrant):
        super().__init__()
        torch.manual_seed(0)
        self.backbone, self.reentrant = nn.Sequential(nn.Linear(6, 6), nn.Tanh(), nn.Linear(6, 6)), reentrant

    def encode(self, x):
        return self.backbone(x) if self.reentrant is None else checkpoint(self.backbone, x, use_reentrant=self.reentrant)


def by_parts(reentrant, name, forwards=1, before=None):
    """The gradients of both adapters after the backward of `forwards` calls of a part, its with having ended."""
    vera = two(Towers(reentrant))
    vera.model.train()
    vera.use("b")
    if before is not None:
        before(vera)
    loss = torch.tensor(0.0)
    for k in range(forwards):
        with vera.using(name):
            loss = loss + vera.model.encode(torch.full((3, 6), 0.1 * (k + 1), requires_grad=True)).square().sum()
    loss.backward()
    return [p.grad for owner in "ab" for p in vera.parameter_groups(name=owner)[0]["params"]]


@pytest.mark.parametrize("reentrant", [True, False])
@pytest.mark.parametrize("name, forwards", [("a", 1), ("a", 2), (None, 1)])
def test_a_checkpointed_part_called_by_itself_trains_as_without_checkpointing(reentrant, name, forwards):
    for one, other in zip(by_parts(None, name, forwards), by_parts(reentrant, name, forwards), strict=True):
        assert (one is None) == (other is None)
        if one is not None:
            torch.testing.assert_close(one, other)


@pytest.mark.parametrize("retained", [True, False])
@pytest.mark.parametrize("reentrant", [True, False])
def test_two_backwards_of_checkpointed_parts_follow_the_adapter_of_their_forwards(reentrant, retained):
    gradients = []
    for way in (None, reentrant):
        vera = two(Towers(way))
        vera.model.train()
        with vera.using("b"):
            vera.model.encode(torch.ones(3, 6, requires_grad=True)).sum().backward()
        vera.model.zero_grad()
        with vera.using("a"):
            outs = [vera.model.encode(torch.full((3, 6), x, requires_grad=True)) for x in (0.1, 0.2)]
        vera.use(None)
        for k in range(2):
            (outs[0] if retained else outs[k]).square().sum().backward(retain_graph=retained and reentrant is False)
            if retained and reentrant:
                break  # a reentrant checkpoint has one backward
        gradients.append([p.grad for owner in "ab" for p in vera.parameter_groups(name=owner)[0]["params"]])
    for one, other in zip(*gradients, strict=True):
        assert (one is None) == (other is None)
        if one is not None:
            torch.testing.assert_close(one, other)


def test_the_root_after_a_part_with_another_adapter_is_no_backward_of_both():
    vera = two(Checkpointed())
    with vera.using("b"):
        vera.model.inner(torch.ones(3, 6, requires_grad=True)).sum().backward()
    vera.model.zero_grad()
    with vera.using("a"):
        vera.model(torch.ones(3, 6)).sum().backward()
    assert all(p.grad is not None for p in vera.parameter_groups(name="a")[0]["params"])


@pytest.mark.parametrize("reentrant", [True, False])
def test_an_evaluation_of_another_adapter_between_is_no_forward_of_the_backward(reentrant):
    def look(vera):
        vera.model.eval()
        with torch.no_grad(), vera.using("b"):
            vera.model.backbone(torch.ones(2, 6))
        vera.model.train()

    for one, other in zip(by_parts(None, "a"), by_parts(reentrant, "a", before=look), strict=True):
        assert (one is None) == (other is None)
        if one is not None:
            torch.testing.assert_close(one, other)


@dataclass
class Output:
    """Whose tensors no hook of the root's finds."""

    loss: torch.Tensor


class Pair(nn.Module):
    """Two towers, called by themselves or one after the other; each plain (way None) or a checkpointed segment."""

    def __init__(self, first, second):
        super().__init__()
        torch.manual_seed(0)
        make = lambda: nn.Sequential(nn.Linear(6, 6), nn.Tanh(), nn.Linear(6, 6))  # noqa: E731
        self.first, self.second, self.ways = make(), make(), {"first": first, "second": second}

    def encode(self, which, x):
        tower, way = getattr(self, which), self.ways[which]
        return tower(x) if way is None else checkpoint(tower, x, use_reentrant=way)

    def forward(self, x):
        return Output(self.encode("second", self.encode("first", x)).square().sum())


def ones(size=1.0):
    return torch.full((3, 6), size, requires_grad=True)


def part(vera, name, which="first", size=1.0):
    with vera.using(name):
        return vera.model.encode(which, ones(size)).square().sum()


def parts_of_two_adapters(vera):
    (part(vera, "a") + part(vera, "b")).backward()


def interleaved(vera):
    first, second = part(vera, "a", size=0.1), part(vera, "a", size=0.2)
    first.backward()
    third = part(vera, "b", size=0.3)
    second.backward()
    third.backward()


def another_part_before(vera):
    part(vera, "a", "first").backward()
    part(vera, "b", "second").backward()


def two_parts_at_once(vera):
    (part(vera, "a", "first") + part(vera, "b", "second")).backward()


def a_target_in_train_mode(vera):
    with torch.no_grad(), vera.using(None):
        target = vera.model.encode("second", ones())
    with vera.using("b"):
        (vera.model.encode("second", ones()) - target).square().sum().backward()


def a_root_whose_output_is_of_its_own_kind(vera):
    vera.use("b")
    with vera.using("a"):
        out = vera.model(ones())
    out.loss.backward()


def a_root_and_a_part(vera):
    with vera.using("a"):
        out = vera.model(ones())
    (out.loss + part(vera, "b")).backward()


def another_thread_meanwhile(vera):
    """An answer of the model, in a thread of its own, while the backward runs."""
    vera.use("b")
    with vera.using("a"):
        out = vera.model(ones())

    def answer(g):
        thread = threading.Thread(target=lambda: torch.no_grad()(vera.model)(torch.ones(2, 6)))
        thread.start()
        thread.join()

    loss = out.loss * 1
    loss.register_hook(answer)
    loss.backward()


def a_backward_that_failed(vera):
    def fail(g):
        raise KeyError("on purpose")

    out = vera.model(ones()).loss * 1
    out.register_hook(fail)
    with pytest.raises(KeyError):
        out.backward()
    part(vera, "a").backward()


def a_with_inside_a_segment(vera):
    def run(x):
        with vera.using("a"):
            x = vera.model.first(x)
        with vera.using("b"):
            return vera.model.second(x)

    way = vera.model.ways["first"]
    (run(ones()) if way is None else checkpoint(run, ones(), use_reentrant=way)).square().sum().backward()


def a_segment_within_a_segment(vera):
    def run(x):
        return vera.model.encode("second", vera.model.first(x))

    way = vera.model.ways["first"]
    with vera.using("a"):
        out = run(ones()) if way is None else checkpoint(run, ones(), use_reentrant=way)
    vera.use("b")
    out.square().sum().backward()


SCENES = [
    parts_of_two_adapters,
    interleaved,
    another_part_before,
    two_parts_at_once,
    a_target_in_train_mode,
    a_root_whose_output_is_of_its_own_kind,
    a_root_and_a_part,
    another_thread_meanwhile,
    a_backward_that_failed,
    a_with_inside_a_segment,
    a_segment_within_a_segment,
]


@pytest.mark.parametrize("ways", [(True, True), (False, False), (None, True), (None, False), (True, False), (False, True)])
@pytest.mark.parametrize("scene", SCENES)
def test_a_checkpointed_segment_follows_what_its_forward_followed(scene, ways):
    gradients = []
    for first, second in ((None, None), ways):
        vera = two(Pair(first, second))
        vera.model.train()
        vera.use(None)
        scene(vera)
        gradients.append([p.grad for owner in "ab" for p in vera.parameter_groups(name=owner)[0]["params"]])
    assert any(g is not None for g in gradients[0])
    for one, other in zip(*gradients, strict=True):
        assert (one is None) == (other is None)
        if one is not None:
            torch.testing.assert_close(one, other)


def test_a_segment_that_followed_two_adapters_without_a_with_of_its_own_is_refused():
    vera = two(Pair(None, None))

    def run(x):
        vera.use("a")
        x = vera.model.first(x)
        vera.use("b")
        return vera.model.second(x)

    out = checkpoint(run, ones(), use_reentrant=False)
    with pytest.raises(StateError, match="its forward followed several"):
        out.sum().backward()


def test_one_adapter_chosen_twice_under_one_checkpointed_backward_is_one():
    vera = two(Checkpointed())
    gradients = []
    for checkpointed in (False, True):
        vera.model.zero_grad()
        if not checkpointed:
            vera.model.inner = vera.model.backbone
        losses = []
        for k in range(2):
            with vera.using("a"):
                losses.append(vera.model(torch.full((3, 6), k + 1.0)).square().sum())
        vera.model.__dict__.pop("inner", None)
        sum(losses).backward()
        gradients.append([p.grad.clone() for p in vera.parameter_groups(name="a")[0]["params"]])
    for one, other in zip(*gradients, strict=True):
        torch.testing.assert_close(one, other)


def test_banks_of_adapters_that_left_are_freed():
    vera = attach(tiny_llama())
    for seed in range(12):
        other = attach(tiny_llama(), VeraConfig(rank=4, targets=["q_proj"], seed=seed)).adapter()
        vera.load(other, name="x")
        vera.remove("x")
    assert len(vera.inside.banks) <= 4 and len(vera.inside.layouts) <= 8


@pytest.mark.parametrize("kind", ["rows", "tokens", "using"])
def test_rows_made_before_a_removal_arent_served_with_who_took_the_place(kind):
    vera, files = two(), two()
    for name in "ab":
        vera.remove(name)
    vera.load(files.adapter("a"), name="ann")
    made = vera.using("ann") if kind == "using" else getattr(vera, kind)(["ann"] * 7)
    selection = vera._one(vera.member("ann"))
    vera.remove("ann")
    vera.load(files.adapter("b"), name="bob")
    with pytest.raises((StateError, UnknownName), match="ann"), made:
        vera.model(input_ids=tokens(7))
    with pytest.raises(StateError, match="was removed"), vera.runtime.override(selection):
        pass
    assert vera.runtime.overrides == 0
    vera.load(files.adapter("a"), name="ann")
    with pytest.raises(StateError, match="was removed"), vera.runtime.override(selection):
        pass


def test_a_removal_waits_while_a_selection_is_made(monkeypatch):
    """Else the selection of an adapter that went meanwhile would be kept under its name, for whoever has that name next."""
    vera, files, ids = two(), two(), tokens(1)
    for name in "ab":
        vera.remove(name)
    vera.load(files.adapter("a"), name="ann")
    find = vera.member

    def exchange():
        vera.remove("ann")
        vera.load(files.adapter("b"), name="bob")
        vera.load(files.adapter("a"), name="ann")

    other = threading.Thread(target=exchange)

    def slow(name):
        found = find(name)
        if threading.current_thread() is not other and not other.ident:
            other.start()
            other.join(0.3)
        return found

    monkeypatch.setattr(vera, "member", slow)
    made = vera.rows(["ann"])
    other.join()
    monkeypatch.undo()
    with pytest.raises(StateError, match="was removed"), made:
        pass
    with torch.no_grad():
        with vera.rows(["ann"]):
            rows = vera.model(input_ids=ids).logits
        with vera.using("ann"):
            torch.testing.assert_close(vera.model(input_ids=ids).logits, rows, rtol=1e-4, atol=1e-5)


class Branches(nn.Module):
    """Two checkpointed segments that read one x, as the cross attention of BART's layers does."""

    def __init__(self, checkpointed):
        super().__init__()
        torch.manual_seed(0)
        self.a, self.b, self.c = (nn.Linear(6, 6) for _ in "abc")
        self.run = (lambda f, x: checkpoint(f, x, use_reentrant=False)) if checkpointed else lambda f, x: f(x)

    def forward(self, x):
        one = self.run(lambda x: torch.tanh(self.a(x)) * self.b(x), x)
        return one + self.run(lambda x: torch.tanh(self.c(x)), x)


@pytest.mark.parametrize("rows", [False, True])
@pytest.mark.parametrize("tokens_of_x", [2, 40])
def test_checkpointed_segments_that_read_one_x_train_as_without_checkpointing(rows, tokens_of_x):
    gradients = []
    for checkpointed in (False, True):
        model = Branches(checkpointed)
        vera = two(model, targets=["a", "b", "c"])
        vera.use("a")
        x = torch.ones(tokens_of_x, 6, requires_grad=True)
        with vera.rows(["a"] * tokens_of_x) if rows else vera.using("a"):
            model(x).square().sum().backward()
        gradients.append([x.grad, *(p.grad for p in vera.parameter_groups(name="a")[0]["params"])])
    for one, other in zip(*gradients, strict=True):
        torch.testing.assert_close(one, other)
