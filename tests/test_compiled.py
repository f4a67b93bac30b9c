"""torch.compile: the same numbers, and no graph anew for a switch or a row pattern."""

from pathlib import Path

import pytest
import torch
from torch import nn
from torch._dynamo.testing import CompileCounterWithBackend

import veralib
from tests.conftest import randomise, tiny_llama, tokens
from tests.reference import logits, three_adapters
from veralib import StateError, VeraConfig, attach


@pytest.fixture(autouse=True)
def fresh():
    torch._dynamo.reset()


@pytest.mark.slow
@pytest.mark.parametrize("backend", ["aot_eager", "inductor"])
def test_twenty_switches_and_twenty_row_patterns_compile_at_most_three_graphs(backend):
    model, ids = tiny_llama(), tokens(4)
    vera = three_adapters(model)
    for name in vera.names[:2]:
        vera.load(vera.adapter(name), name=f"resident {name}")
    names = [*vera.names, None]
    counter = CompileCounterWithBackend(backend)
    compiled = torch.compile(model, backend=counter)
    for k in range(20):
        vera.use(names[k % len(names)])
        assert (logits(compiled, ids) - logits(model, ids)).abs().max() < 1e-5
    for k in range(20):
        with vera.rows([names[(k * j + j) % len(names)] for j in range(4)]):
            assert (logits(compiled, ids) - logits(model, ids)).abs().max() < 1e-5
    assert 1 <= counter.frame_count <= 3


@pytest.mark.slow
def test_compiled_training_step_has_the_eager_gradients():
    def gradients(compile):
        model = tiny_llama()
        vera = attach(model, VeraConfig(rank=8, targets="all-linear"))
        randomise(vera, "default", size=0.1)
        call = torch.compile(model, backend="inductor") if compile else model
        model.train()
        call(input_ids=tokens(), labels=tokens()).loss.backward()
        return torch.cat([p.grad for p in model.parameters() if p.requires_grad])

    eager = gradients(False)
    assert (gradients(True) - eager).norm() < 1e-4 * eager.norm()


@pytest.mark.parametrize("context", ["rows", "using"])
def test_compiled_training_inside_rows_and_using_is_what_it_is_without_compiling(context):
    gradients = []
    for compile_it in (False, True):
        model = tiny_llama(num_hidden_layers=1)
        vera = attach(model, VeraConfig(rank=8, targets=["q_proj"]), name="a")
        vera.add(VeraConfig(rank=8, targets=["q_proj"], seed=1), name="b")
        for seed, name in enumerate("ab"):
            randomise(vera, name, seed)
        run = torch.compile(model, backend="aot_eager") if compile_it else model
        with vera.rows(["b", None]) if context == "rows" else vera.using("b"):
            run(input_ids=tokens(2), labels=tokens(2)).loss.backward()
        gradients.append([p.grad for name in "ab" for p in vera.parameter_groups(name=name)[0]["params"]])
    assert all(g is None for g in gradients[0][:2]) and gradients[0][3] is not None
    for eager, compiled in zip(*gradients, strict=True):
        assert (eager is None) == (compiled is None)
        if eager is not None:
            torch.testing.assert_close(compiled, eager)


@pytest.mark.parametrize("plan", ["factored", "merged-tokens", "apart-weights"])
@pytest.mark.parametrize("context", ["rows", "using"])
def test_where_a_graph_cant_hold_an_adapter_nothing_of_ours_is_traced(context, plan):
    """A compiler that takes our functions one by one has had wrong gradients for them (torch 2.11)."""
    x, gradients, traced = torch.randn(4, 16), [], []

    def backend(graph, inputs):
        traced.extend(node.meta.get("stack_trace") or "" for node in graph.graph.nodes)
        return graph.forward

    for compile_it in (False, True):
        model = Residual()
        vera = attach(model, VeraConfig(rank=4, targets="all-linear"), name="a")
        vera.add(VeraConfig(rank=4, targets="all-linear", seed=7), name="b")
        for name in "ab":
            randomise(vera, name)
        vera.runtime.plan = plan
        run = torch.compile(model, backend=backend) if compile_it else model
        with vera.rows(["b", None, "a", "b"]) if context == "rows" else vera.using("b"):
            run(x).square().sum().backward()
        gradients.append(torch.cat([p.grad for p in vera.parameter_groups(name="b")[0]["params"]]))
    torch.testing.assert_close(gradients[1], gradients[0])
    ours = str(Path(veralib.__file__).parent)
    assert not any(ours in trace.rpartition("File ")[2] for trace in traced)


class Residual(nn.Module):
    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.layers = nn.ModuleList(nn.Linear(16, 16) for _ in range(4))

    def forward(self, x):
        for layer in self.layers:
            x = x + torch.tanh(layer(x))
        return x


def test_layers_whose_inputs_share_a_buffer_share_no_product_with_A():
    model = Residual()
    vera = attach(model, VeraConfig(rank=4, targets="all-linear"), name="a")
    randomise(vera, "a")
    compiled, x = torch.compile(model, backend="inductor"), torch.randn(2, 5, 16)
    with torch.no_grad():
        plain = vera.reference()(x)
        with vera.rows(["a", "a"]):
            expected = model(x)
            torch.testing.assert_close(compiled(x), expected)
    assert (expected - plain).abs().max() > 0.1


@pytest.mark.parametrize("then", ["b", None])
def test_a_switch_between_a_compiled_forward_and_its_backward_changes_no_gradient(then):
    x, gradients = torch.randn(8, 16), []
    for compile_it in (False, True):
        model = Residual()
        vera = attach(model, VeraConfig(rank=4, targets="all-linear"), name="a")
        vera.add(VeraConfig(rank=4, targets="all-linear", seed=7), name="b")
        for name in "ab":
            randomise(vera, name)
        run = torch.compile(model, backend="aot_eager") if compile_it else model
        vera.use("a")
        loss = run(x).square().sum()
        vera.use(then)
        loss.backward()
        gradients.append(torch.cat([p.grad for p in vera.parameter_groups(name="a")[0]["params"]]))
    torch.testing.assert_close(gradients[1], gradients[0])


def test_an_adapter_removed_between_a_compiled_forward_and_its_backward_is_named():
    model = Residual()
    vera = attach(model, VeraConfig(rank=4, targets="all-linear"), name="a")
    loss = torch.compile(model, backend="aot_eager")(torch.randn(8, 16)).sum()
    vera.remove("a")
    with pytest.raises(StateError, match="remove it after"):
        loss.backward()
