"""transformers' Trainer, accelerate, DataParallel and DistributedDataParallel on a model with adapters."""

import os

import pytest
import torch
from torch import nn

from tests.conftest import randomise, tiny_bert, tiny_llama, tokens
from veralib import AdapterFileError, AdapterMismatch, StateError, VeraConfig, attach, handle, load_adapter

QV = VeraConfig(rank=8, targets=["q_proj", "v_proj"])
NOT_THE_MODEL = {"optimizer.pt", "scheduler.pt", "rng_state.pth", "trainer_state.json", "training_args.bin"}


def causal_rows(count: int = 16):
    ids = tokens(count, 6, seed=1)
    return [{"input_ids": row, "labels": row} for row in ids]


def labelled_rows(count: int = 16):
    ids = tokens(count, 6, seed=1)
    return [{"input_ids": row, "labels": int(row[0]) % 3} for row in ids]


def make_trainer(model, folder, data=None, cls=None, optimizer=None, callbacks=None, compute_metrics=None, **changes):
    """A Trainer on the CPU; without an optimizer, AdamW over the handle's groups."""
    from transformers import Trainer, TrainingArguments

    settings = dict(
        output_dir=str(folder), max_steps=4, per_device_train_batch_size=4, use_cpu=True, report_to="none", disable_tqdm=True,
        logging_strategy="no", save_strategy="no", lr_scheduler_type="constant",
    )  # fmt: skip
    data = data or causal_rows()
    return (cls or Trainer)(
        model,
        TrainingArguments(**(settings | changes)),
        train_dataset=data,
        eval_dataset=data[:4],
        optimizers=(optimizer or torch.optim.AdamW(handle(model).parameter_groups(lr=1e-2)), None),
        callbacks=callbacks,
        compute_metrics=compute_metrics,
    )


def vectors(model, name: str = "default"):
    return {unit: torch.cat(pair) for unit, pair in handle(model).adapter(name).vectors.items()}


def same(left, right) -> bool:
    return left.keys() == right.keys() and all(torch.equal(left[k], right[k]) for k in left)


def logits(model, ids):
    with torch.no_grad():
        return model.eval()(input_ids=ids).logits


# Checkpoints


def test_checkpoint_is_the_adapter_file_and_nothing_else_of_the_model(tmp_path):
    model = tiny_llama()
    vera = attach(model, QV)
    make_trainer(model, tmp_path, save_strategy="steps", save_steps=4).train()
    checkpoint = tmp_path / "checkpoint-4"
    names = {f.name for f in checkpoint.rglob("*") if f.is_file()}
    assert names - NOT_THE_MODEL == {"model.safetensors"}
    alone = vera.save(tmp_path / "adapter")
    assert (checkpoint / "model.safetensors").read_bytes() == alone.read_bytes()
    # Two moments for each entry of d and b, and pickle's overhead: none for A, B or the base.
    assert (checkpoint / "optimizer.pt").stat().st_size < 2 * 4 * vera.adapter().parameters + 20_000


def test_from_pretrained_refuses_a_checkpoint_and_vera_load_takes_it(tmp_path):
    from transformers import AutoModelForCausalLM

    model = tiny_llama()
    vera = attach(model, QV)
    make_trainer(model, tmp_path, save_strategy="steps", save_steps=4).train()
    checkpoint = tmp_path / "checkpoint-4"
    with pytest.raises((OSError, ValueError)):  # no config.json: no chance of a base model of random weights
        AutoModelForCausalLM.from_pretrained(checkpoint)
    assert load_adapter(checkpoint).config == QV
    other = tiny_llama()
    attach(other).load(checkpoint, name="trained")
    handle(other).use("trained")
    assert torch.equal(logits(other, tokens()), logits(model, tokens())) and vera.names == ("default",)


def test_a_base_models_folder_is_no_adapter(tmp_path):
    tiny_llama().save_pretrained(tmp_path)
    with pytest.raises(AdapterFileError, match=r"model.safetensors .* no veralib adapter"):
        attach(tiny_llama()).load(tmp_path)


def build_classifier():
    model = tiny_bert()
    attach(model, VeraConfig(rank=8, dropout=0.2, train_modules=["classifier"]))
    return model


def test_resumed_run_ends_with_the_bits_of_the_uninterrupted_one(tmp_path):
    whole, resumed = build_classifier(), build_classifier()
    options = dict(data=labelled_rows(), max_steps=6, save_strategy="steps", save_steps=3)
    make_trainer(whole, tmp_path, **options).train()
    make_trainer(resumed, tmp_path, **options).train(resume_from_checkpoint=str(tmp_path / "checkpoint-3"))
    assert same(vectors(whole), vectors(resumed))
    heads = [handle(m).adapter().modules["classifier"] for m in (whole, resumed)]
    assert same(*heads) and not same(heads[0], tiny_bert().classifier.state_dict())
    halfway = load_adapter(tmp_path / "checkpoint-3")
    assert not same(vectors(whole), {unit: torch.cat(pair) for unit, pair in halfway.vectors.items()})
    assert same(load_adapter(tmp_path / "checkpoint-6").modules["classifier"], heads[0])


def test_load_best_model_at_end_brings_the_best_adapter_and_head_back(tmp_path):
    model, scores = build_classifier(), iter([0.1, 0.9, 0.2, 0.3])
    trainer = make_trainer(
        model, tmp_path, data=labelled_rows(), compute_metrics=lambda _: {"score": next(scores)}, eval_strategy="steps",
        eval_steps=1, save_strategy="steps", save_steps=1, load_best_model_at_end=True, metric_for_best_model="score",
    )  # fmt: skip
    trainer.train()
    assert trainer.state.best_model_checkpoint.endswith("checkpoint-2")
    best, last = load_adapter(tmp_path / "checkpoint-2"), load_adapter(tmp_path / "checkpoint-4")
    assert same(vectors(model), {unit: torch.cat(pair) for unit, pair in best.vectors.items()})
    assert not same(vectors(model), {unit: torch.cat(pair) for unit, pair in last.vectors.items()})
    assert same(handle(model).adapter().modules["classifier"], best.modules["classifier"])


@pytest.mark.parametrize(
    ("config", "says"),
    [
        (VeraConfig(rank=8, targets=["q_proj"]), r'has "model.layers.0.self_attn.v_proj.b", .* doesn\'t train'),
        (VeraConfig(rank=8, targets="all-linear"), r'has no "model.layers.0.*", which this model trains'),
        (VeraConfig(rank=4, targets=["q_proj", "v_proj"]), r"shape \[8\], this model's \[4\]"),
    ],
)
def test_resuming_with_other_settings_raises_and_changes_nothing(tmp_path, config, says):
    model = tiny_llama()
    randomise(attach(model, QV), "default")
    model.save_pretrained(tmp_path / "checkpoint-1")
    other = tiny_llama()
    attach(other, config)
    before = vectors(other)
    from safetensors.torch import load_file

    with pytest.raises(AdapterMismatch, match=says):
        other.load_state_dict(load_file(tmp_path / "checkpoint-1" / "model.safetensors"), strict=False)
    assert same(vectors(other), before)


def test_the_bases_own_state_dict_still_loads_and_leaves_the_adapter(tmp_path):
    model, donor = tiny_llama(), tiny_llama(seed=5)
    vera = attach(model, QV)
    randomise(vera, "default")
    kept = vectors(model)
    result = model.load_state_dict(donor.state_dict())
    assert not result.missing_keys and not result.unexpected_keys and same(vectors(model), kept)
    vera.use(None)
    assert torch.equal(logits(model, tokens()), logits(donor, tokens()))


def two_adapters():
    model = tiny_llama()
    vera = attach(model)
    vera.add(QV, "ann")
    vera.add(VeraConfig(rank=4, seed=3, targets="all-linear"), "ben")
    return model


def rows_trainer():
    from transformers import Trainer

    class RowsTrainer(Trainer):
        """Rows in turn belong to ann and to ben."""

        def compute_loss(self, model, inputs, return_outputs=False, **kwargs):
            with handle(model).rows(["ann", "ben"] * (len(inputs["input_ids"]) // 2)):
                outputs = model(**inputs)
            return (outputs.loss, outputs) if return_outputs else outputs.loss

    return RowsTrainer


def test_a_checkpoint_of_two_trained_adapters_resumes_both_and_says_that_it_is_none_to_load(tmp_path):
    whole, resumed = two_adapters(), two_adapters()
    options = dict(cls=rows_trainer(), save_strategy="steps", save_steps=2)
    make_trainer(whole, tmp_path, **options).train()
    make_trainer(resumed, tmp_path, **options).train(resume_from_checkpoint=str(tmp_path / "checkpoint-2"))
    for name in ("ann", "ben"):
        assert same(vectors(whole, name), vectors(resumed, name))
        assert any(not torch.equal(v, vectors(two_adapters(), name)[unit]) for unit, v in vectors(whole, name).items())
    checkpoint = tmp_path / "checkpoint-2"
    assert {f.name for f in checkpoint.rglob("*") if f.is_file()} - NOT_THE_MODEL == {"model.safetensors"}
    size = sum(handle(whole).save(tmp_path / name, name=name).stat().st_size for name in ("ann", "ben"))
    assert (checkpoint / "model.safetensors").stat().st_size <= 1.1 * size
    with pytest.raises(AdapterFileError, match=r"several adapters \(ann, ben\)"):
        attach(tiny_llama()).load(checkpoint)


def test_residents_beside_the_trained_adapter_are_not_in_its_checkpoint(tmp_path):
    model = tiny_llama()
    vera = attach(model, QV, name="mine")
    randomise(vera, "mine")
    vera.load(vera.adapter("mine"), name="another")
    model.save_pretrained(tmp_path)
    assert (tmp_path / "model.safetensors").read_bytes() == vera.save(tmp_path / "alone", name="mine").read_bytes()


def test_save_pretrained_writes_on_the_main_process_alone_and_pushes_no_adapter(tmp_path):
    model = tiny_llama()
    randomise(attach(model, QV), "default")
    model.save_pretrained(tmp_path / "other_rank", is_main_process=False)
    assert not (tmp_path / "other_rank").exists()
    with pytest.raises(StateError, match=r"vera\.push"):
        model.save_pretrained(tmp_path / "pushed", push_to_hub=True)
    with pytest.raises(StateError, match="no adapter to save"):
        empty = tiny_llama()
        attach(empty)
        empty.save_pretrained(tmp_path / "empty")


def test_trained_and_merged_model_is_one_that_plain_transformers_loads(tmp_path):
    from transformers import AutoModelForCausalLM

    model = tiny_llama()
    vera = attach(model, QV)
    trainer = make_trainer(model, tmp_path / "run")
    trainer.train()
    adapted = logits(model, tokens())
    vera.merge()
    trainer.save_model(str(tmp_path / "merged"))
    plain = AutoModelForCausalLM.from_pretrained(tmp_path / "merged")
    assert type(plain).__module__.startswith("transformers.") and not any("vera" in k for k in plain.state_dict())
    assert torch.equal(logits(plain, tokens()), logits(model, tokens()))
    assert (logits(plain, tokens()) - adapted).abs().max() < 1e-5


# What TrainingArguments ask for


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
