"""FSDP2 (fully_shard): a sharded model trains, saves and answers as the whole one does."""

import os
import warnings

import pytest
import torch

from tests.conftest import randomise, tiny_bert, tiny_gpt2, tiny_llama, tokens
from tests.trainers import same
from veralib import AdapterMismatch, StateError, VeraConfig, VeraWarning, attach, handle, load_adapter

PLANS = ("factored", "merged-tokens", "merged-weights", "apart-tokens", "apart-weights")
CASES = [*PLANS, "bf16", "policy", "checkpointing", "gpt2", "head", "two"]
LINEARS = VeraConfig(rank=8, targets="all-linear")


def build(case: str):
    """A model with a trainable adapter ("two": two), its handle, the blocks to shard, and the loss of half a batch."""
    if case == "head":
        model = tiny_bert()
        attach(model, VeraConfig(rank=8, targets=["query", "value"], train_modules=["classifier"]))
        loss = lambda half: model(input_ids=half, labels=half[:, 0] % 3).loss  # noqa: E731
        blocks = [*model.bert.encoder.layer, model.classifier]
    else:
        model = tiny_gpt2(resid_pdrop=0.0, embd_pdrop=0.0, attn_pdrop=0.0) if case == "gpt2" else tiny_llama()
        attach(model, LINEARS)
        loss = lambda half: model(input_ids=half, labels=half).loss  # noqa: E731
        blocks = list(model.transformer.h if case == "gpt2" else model.model.layers)
    vera = handle(model)
    vera.runtime.plan = case if case in PLANS else None
    randomise(vera, "default", size=0.1)
    if case == "two":
        vera.add(LINEARS, "second")
        randomise(vera, "second", size=0.1, seed=1)
    if case == "bf16":
        model.to(torch.bfloat16)
    if case == "checkpointing":
        model.gradient_checkpointing_enable({"use_reentrant": False})
    return model.train(), vera, blocks, loss


def train(vera, loss, halves) -> None:
    """Three steps on the mean loss of the halves that this process has."""
    optimizer = torch.optim.SGD(vera.parameter_groups(lr=0.5, lr_head=0.5))
    for _ in range(3):
        optimizer.zero_grad()
        (sum(loss(half) for half in halves) / len(halves)).backward()
        optimizer.step()


@torch.no_grad()
def outputs(model) -> torch.Tensor:
    return model.eval()(input_ids=tokens(4, 6)).logits.float()


def sharded(case: str):
    from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard

    model, vera, blocks, loss = build(case)
    if case == "policy":  # casts for each forward; the vectors are the root's own
        fully_shard(model, mp_policy=MixedPrecisionPolicy(param_dtype=torch.bfloat16, reduce_dtype=torch.float32))
        return model, vera, loss
    for block in blocks:
        fully_shard(block)
    fully_shard(model)
    return model, vera, loss


def worker(rank: int, folder: str) -> None:
    from torch.distributed.checkpoint.state_dict import StateDictOptions, get_model_state_dict

    torch.set_num_threads(1)
    os.environ |= {"GLOO_SOCKET_IFNAME": "lo"}
    torch.distributed.init_process_group("gloo", init_method=f"file://{folder}/rendezvous", rank=rank, world_size=2)
    halves = tokens(4, 6).chunk(2)
    for case in CASES:
        model, vera, loss = sharded(case)
        train(vera, loss, [halves[rank]])
        torch.save(outputs(model), f"{folder}/{case}-{rank}.pt")
        if case != "two":
            vera.save(f"{folder}/{case}", "default")
        model.save_pretrained(f"{folder}/{case}-all", is_main_process=rank == 0)
        assert all(isinstance(p, torch.distributed.tensor.DTensor) for p in model.parameters() if p.requires_grad)
        state = get_model_state_dict(model, options=StateDictOptions(full_state_dict=True, cpu_offload=True))
        assert bool(state) == (rank == 0)  # one process has it and saves alone: nothing may be gathered
        model.save_pretrained(f"{folder}/{case}-one", state_dict=state)
        if rank == 0:
            frozen_left_out = {k: v for k, v in state.items() if not k.endswith("_d")}
            with pytest.raises(StateError, match="of which this process has a piece: give a full one"):
                model.save_pretrained(f"{folder}/never", state_dict=frozen_left_out)
        torch.distributed.barrier()
    other_times(rank, folder, halves)
    torch.distributed.destroy_process_group()


def other_times(rank: int, folder: str, halves) -> None:
    """What is not a training step: refusals, a checkpoint coming back, evaluation in between, adapters of others by row."""
    from safetensors.torch import load_file

    model, vera, _ = sharded("factored")
    with torch.no_grad():
        model.eval()(input_ids=halves[rank])  # leaves the root's tensors whole
    assert all(isinstance(p, torch.distributed.tensor.DTensor) for g in vera.parameter_groups() for p in g["params"])
    for call in (lambda: vera.add(LINEARS, "late"), lambda: vera.load(f"{folder}/bf16", "late", trainable=True)):
        with pytest.raises(StateError, match="before fully_shard"):
            call()
    with_head = lambda: vera.load(f"{folder}/head", "head")  # noqa: E731
    for call in (vera.merge, vera.detach, lambda: vera.push("owner/adapter"), lambda: vera.remove("default"), with_head):
        with pytest.raises(StateError, match="sharded over processes"):
            call()
    assert vera.active == "default" and vera.names == ("default",)
    merged, its, _, _ = build("factored")
    its.merge(keep=None)
    torch.distributed.fsdp.fully_shard(merged)
    with pytest.raises(StateError, match="sharded over processes"):
        its.detach()
    assert its.merged == "default"
    elsewhere, base, _, _ = build("factored")  # the base's weights come after attach, those of another model
    elsewhere.load_state_dict(tiny_llama(seed=5).state_dict())
    torch.distributed.fsdp.fully_shard(elsewhere)
    base.save(f"{folder}/elsewhere")
    late, _, _, _ = build("factored")
    handle(late).detach()
    torch.distributed.fsdp.fully_shard(late)
    with pytest.raises(StateError, match="before fully_shard"):
        attach(late, LINEARS)

    model.load_state_dict(load_file(f"{folder}/factored-all/model.safetensors"))
    vera.save(f"{folder}/back")
    vera.load(f"{folder}/bf16", "bf16")
    vera.load(f"{folder}/checkpointing", "checkpointing")
    vera.use("bf16")
    torch.distributed.barrier()
    with torch.no_grad(), vera.rows(["default", None, "bf16", "checkpointing"]):
        torch.save(model(input_ids=tokens(4, 6)).logits, f"{folder}/rows-{rank}.pt")


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """What two processes leave behind."""
    path = tmp_path_factory.mktemp("sharded")
    torch.multiprocessing.spawn(worker, args=(str(path),), nprocs=2)
    return path


def tensors(adapter) -> dict[str, torch.Tensor]:
    heads = {f"{n}.{k}": t for n, state in adapter.modules.items() for k, t in state.items()}
    return {u: torch.cat(pair) for u, pair in adapter.vectors.items()} | heads


def apart(left, right) -> float:
    """The norm of the difference of two adapters."""
    left, right = tensors(left), tensors(right)
    assert left.keys() == right.keys()
    return torch.cat([(left[k] - right[k]).flatten() for k in left]).norm().item()


@pytest.mark.slow
@pytest.mark.parametrize("case", [c for c in CASES if c != "two"])
def test_a_sharded_model_trains_to_the_adapter_of_one_process(folder, case):
    model, vera, _, loss = build(case)
    start, first = vera.adapter(), outputs(model)
    train(vera, loss, tokens(4, 6).chunk(2))
    right, found = vera.adapter(), load_adapter(folder / case)
    assert apart(found, right) < {"bf16": 2e-2, "policy": 0.2}.get(case, 1e-5) * apart(right, start)
    last = outputs(model)
    for rank in (0, 1):  # the policy's forwards are in bf16, and are of the trained vectors all the same
        off = torch.load(folder / f"{case}-{rank}.pt") - last
        assert off.norm() < {"bf16": 2e-2, "policy": 0.5}.get(case, 1e-5) * (last - first).norm()
    assert found.base.hashes == right.base.hashes and right.base.hashes


@pytest.mark.slow
@pytest.mark.parametrize("case", CASES)
def test_save_pretrained_writes_the_same_from_all_processes_and_from_a_full_state_on_one(folder, case):
    from safetensors.torch import load_file

    together, alone = (load_file(folder / f"{case}-{how}" / "model.safetensors") for how in ("all", "one"))
    assert same(together, alone)
    if case == "two":
        assert {k.partition("/")[0] for k in together} == {"default", "second"}
    else:
        assert apart(load_adapter(folder / case), load_adapter(folder / f"{case}-all" / "model.safetensors")) == 0


@pytest.mark.slow
def test_a_checkpoint_comes_back_into_a_sharded_model(folder):
    assert apart(load_adapter(folder / "back"), load_adapter(folder / "factored")) == 0


@pytest.mark.slow
def test_a_bases_hashes_are_those_of_the_weights_that_it_was_sharded_with(folder):
    model = tiny_llama(seed=5)
    vera = attach(model)
    vera.load(folder / "elsewhere", "a")
    assert load_adapter(folder / "elsewhere").base.hashes == vera.adapter("a").base.hashes
    with pytest.raises(AdapterMismatch, match="other weights"):
        attach(tiny_llama()).load(folder / "elsewhere", "a")


@pytest.mark.slow
def test_rows_of_a_sharded_model_are_those_of_the_whole_one(folder):
    model, vera, _, _ = build("factored")
    vera.runtime.plan = None
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", VeraWarning)
        for name in ("back", "bf16", "checkpointing"):
            vera.load(folder / name, name)
    with torch.no_grad(), vera.rows(["back", None, "bf16", "checkpointing"]):
        right = model.eval()(input_ids=tokens(4, 6)).logits
    for rank in (0, 1):
        found = torch.load(folder / f"rows-{rank}.pt")
        assert (found - right).norm() < 1e-5 * right.norm()
    assert len({tuple(row.flatten().tolist()) for row in right}) == 4


def test_a_layer_that_tensor_parallelism_has_split_is_refused():
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.tensor import Shard, distribute_tensor

    torch.distributed.init_process_group("gloo", store=torch.distributed.HashStore(), rank=0, world_size=1)
    try:
        model = tiny_llama()
        layer = model.model.layers[1].self_attn.o_proj
        pieces = distribute_tensor(layer.weight.detach(), init_device_mesh("cpu", (1,)), [Shard(1)])
        layer.weight = torch.nn.Parameter(pieces)
        plain = type(model)
        with pytest.raises(StateError, match=r"layers\.1\.self_attn\.o_proj.*tensor parallelism isn't supported"):
            attach(model, LINEARS)
        assert type(model) is plain and type(layer) is torch.nn.Linear
        attach(model, VeraConfig(rank=4, targets=["q_proj"]))
    finally:
        torch.distributed.destroy_process_group()
