"""transformers' Trainer, accelerate, DataParallel and DistributedDataParallel train the adapter as they train a model."""

import os

import pytest
import torch
from torch import nn

from tests.conftest import randomise, tiny_llama, tokens
from tests.trainers import QV, causal_rows, make_trainer, same, vectors
from veralib import StateError, VeraConfig, attach, handle


def sgd(model, lr=0.5):
    return torch.optim.SGD(handle(model).parameter_groups(lr=lr))


def trained_with(tmp_path, **changes):
    """The vectors after 2 steps of SGD, and how far they moved."""
    model = tiny_llama()
    attach(model, VeraConfig(rank=8, targets="all-linear"))
    randomise(handle(model), "default", size=0.1)
    start = vectors(model)
    make_trainer(model, tmp_path, optimizer=sgd(model), **(dict(max_steps=2) | changes)).train()
    end = vectors(model)
    return torch.cat(list(end.values())), torch.cat([end[k] - start[k] for k in end]).norm()


def test_accumulated_gradients_equal_a_larger_batch(tmp_path):
    batch, moved = trained_with(tmp_path)
    accumulated, _ = trained_with(tmp_path, per_device_train_batch_size=2, gradient_accumulation_steps=2)
    alone, _ = trained_with(tmp_path, per_device_train_batch_size=2)
    assert (batch - accumulated).norm() < 1e-4 * moved
    assert (batch - alone).norm() > 1e-2 * moved


def test_max_grad_norm_clips_the_vectors_gradients(tmp_path):
    _, free = trained_with(tmp_path, max_grad_norm=0.0)
    _, clipped = trained_with(tmp_path, max_grad_norm=1e-2)
    assert clipped <= 2 * 0.5 * 1e-2 * 1.001 and free > 3 * clipped  # 2 steps of 0.5 · 0.01


def test_a_models_first_step_has_the_bits_of_any_later_one():
    # A resumed process's first step is another's hundredth: no plan may depend on the forwards before it.
    model = tiny_llama()
    attach(model, VeraConfig(rank=8, targets="all-linear"))
    randomise(handle(model), "default", size=0.1)
    gradients = []
    for _ in range(2):
        model.zero_grad()
        model.train()(input_ids=tokens(4, 6), labels=tokens(4, 6)).loss.backward()
        gradients.append(torch.cat([p.grad for p in model.parameters() if p.requires_grad]))
    assert torch.equal(*gradients)


@pytest.mark.parametrize("reentrant", [True, False])
def test_gradient_checkpointing_in_the_arguments_trains_alike(tmp_path, reentrant):
    plain, moved = trained_with(tmp_path)
    checkpointed, _ = trained_with(
        tmp_path, gradient_checkpointing=True, gradient_checkpointing_kwargs={"use_reentrant": reentrant}
    )
    assert (plain - checkpointed).norm() < 1e-4 * moved


def test_bf16_leaves_vectors_gradients_and_moments_in_float32(tmp_path):
    from transformers import TrainerCallback

    seen = {}

    class Watch(TrainerCallback):
        def on_pre_optimizer_step(self, args, state, control, model=None, optimizer=None, **kwargs):
            trained = [p for p in model.parameters() if p.requires_grad]
            seen["dtypes"] = {t.dtype for p in trained for t in (p, p.grad)}
            seen["norm"] = sum(float(p.grad.norm()) for p in trained)

    model = tiny_llama()
    attach(model, QV)
    trainer = make_trainer(model, tmp_path, bf16=True, callbacks=[Watch()])
    inner = []
    model.model.layers[0].self_attn.q_proj.register_forward_hook(lambda m, a, out: inner.append(out.dtype))
    trainer.train()
    assert seen["dtypes"] == {torch.float32} and seen["norm"] > 0
    assert torch.bfloat16 in inner  # autocast was on
    moments = [t for state in trainer.optimizer.state.values() for t in state.values() if t.dim()]
    assert moments and {t.dtype for t in moments} == {torch.float32}


def test_vectors_that_a_trainer_cast_are_float32_again_before_the_first_step_and_when_resumed(tmp_path):
    from safetensors.torch import load_file

    model = tiny_llama()
    randomise(attach(model, QV), "default")
    model.save_pretrained(tmp_path)
    saved = vectors(model)

    def cast():
        for p in model.parameters():
            if p.requires_grad:
                p.data = p.data.to(torch.bfloat16)  # trl 1.16 does so where the base is quantised

    cast()
    optimizer = torch.optim.AdamW(handle(model).parameter_groups(lr=1e-2))
    model.train()(input_ids=tokens(), labels=tokens()).loss.backward()
    trained = [p for p in model.parameters() if p.requires_grad]
    assert {t.dtype for p in trained for t in (p, p.grad)} == {torch.float32}
    optimizer.step()
    assert {t.dtype for state in optimizer.state.values() for t in state.values()} == {torch.float32}
    cast()
    model.load_state_dict(load_file(tmp_path / "model.safetensors"), strict=False)
    assert same(vectors(model), saved)


# accelerate and more than one device


def test_accelerate_prepares_and_trains(tmp_path):
    from accelerate import Accelerator
    from torch.utils.data import DataLoader

    model = tiny_llama()
    vera = attach(model, QV)
    start = vectors(model)
    accelerator = Accelerator(cpu=True, mixed_precision="bf16")
    loader = DataLoader(causal_rows(8), batch_size=4)
    wrapped, optimizer, loader = accelerator.prepare(model, torch.optim.AdamW(vera.parameter_groups(lr=1e-2)), loader)
    assert handle(wrapped) is vera
    for batch in loader:
        accelerator.backward(wrapped.train()(**batch).loss)
        accelerator.clip_grad_norm_(wrapped.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
    assert not same(vectors(model), start)
    plain = accelerator.unwrap_model(wrapped)
    plain.save_pretrained(tmp_path, is_main_process=accelerator.is_main_process)
    assert {f.name for f in tmp_path.iterdir()} == {"model.safetensors"}
    assert type(vera.detach()) is type(tiny_llama())


def replica_of(model: nn.Module) -> nn.Module:
    """What nn.DataParallel makes for one device (torch/nn/parallel/replicate.py), here on the CPU."""
    modules = list(model.modules())
    copies = {m: m._replicate_for_data_parallel() for m in modules}
    for module, made in copies.items():
        for key, child in module._modules.items():
            setattr(made, key, copies[child])
        for key, p in module._parameters.items():
            setattr(made, key, None if p is None else p * 1)  # a broadcast: no leaf, but a path for the gradient
    return copies[model]


def test_one_adapter_trains_in_data_parallel_replicas_and_rows_raises_there():
    model = tiny_llama()
    vera = attach(model, QV)
    randomise(vera, "default")
    ids = tokens()
    model.train()(input_ids=ids, labels=ids).loss.backward()
    trained = [p for p in model.parameters() if p.requires_grad]
    want = torch.cat([p.grad for p in trained])
    model.zero_grad()
    replica = replica_of(model)
    assert replica.model.layers[0].self_attn.q_proj._is_replica
    theirs = replica.model.layers[1].self_attn.q_proj.vera_0_b
    theirs.retain_grad()
    replica(input_ids=ids, labels=ids).loss.backward()
    assert theirs.grad.norm() > 0  # on another device the original's vectors wouldn't do
    assert (torch.cat([p.grad for p in trained]) - want).norm() < 1e-5 * want.norm()
    with vera.rows(["default"] * 4), pytest.raises(StateError, match="DistributedDataParallel"):
        replica(input_ids=ids)


class Plain(nn.Module):
    """No transformers, so that the spawned processes start quickly."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.layers = nn.Sequential(nn.Linear(6, 8), nn.Tanh(), nn.Linear(8, 3))

    def forward(self, x):
        return self.layers(x)


def plain_with_adapter(seed: int):
    model = Plain()
    vera = attach(model, VeraConfig(rank=4, targets="all-linear"))
    randomise(vera, "default", seed=seed)
    return model, vera, torch.optim.SGD(vera.parameter_groups(lr=0.1))


def halves():
    x = torch.randn(8, 6, generator=torch.Generator().manual_seed(3))
    return x[:4], x[4:]


def ddp_worker(rank: int, folder: str) -> None:
    torch.set_num_threads(1)
    os.environ |= {"GLOO_SOCKET_IFNAME": "lo"}
    torch.distributed.init_process_group("gloo", init_method=f"file://{folder}/rendezvous", rank=rank, world_size=2)
    model, vera, optimizer = plain_with_adapter(seed=rank)  # rank 1 starts elsewhere; DDP hands it rank 0's vectors
    ddp = nn.parallel.DistributedDataParallel(model)
    assert not list(ddp.named_buffers()) and handle(ddp) is vera
    for _ in range(3):
        optimizer.zero_grad()
        ddp(halves()[rank]).square().mean().backward()
        optimizer.step()
    torch.save({"vectors": vectors(model), "synced": len(list(ddp.parameters()))}, f"{folder}/{rank}.pt")
    torch.distributed.destroy_process_group()


@pytest.mark.slow
def test_two_processes_of_ddp_end_with_the_adapter_of_one_process_and_broadcast_no_basis(tmp_path):
    torch.multiprocessing.spawn(ddp_worker, args=(str(tmp_path),), nprocs=2)
    results = [torch.load(tmp_path / f"{rank}.pt") for rank in (0, 1)]
    assert same(results[0]["vectors"], results[1]["vectors"])
    model, vera, optimizer = plain_with_adapter(seed=0)
    for _ in range(3):
        optimizer.zero_grad()
        model(torch.cat(halves())).square().mean().backward()
        optimizer.step()
    for unit, right in vectors(model).items():
        assert (results[0]["vectors"][unit] - right).norm() < 1e-5 * right.norm()
    assert results[0]["synced"] == len(list(Plain().parameters())) + 2 * len(vera.member("default").layout.units)
