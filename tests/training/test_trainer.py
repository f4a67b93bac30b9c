"""Data order, checkpoints that are whole or not there, early stopping."""

import json
from types import SimpleNamespace

import pytest
import torch
from torch import nn

from veralib.baselines.base import Attached
from veralib.training.trainer import SEAL, Patience, SeededOrder, delete_broken, last_checkpoint, seal


def order(epoch, **fields):
    sampler = SeededOrder(**{"rows": 103, "seed": 3, **fields})
    sampler.set_epoch(epoch)
    return list(sampler)


def test_the_order_is_a_function_of_seed_and_epoch():
    assert order(1) == order(1) != order(2)
    assert order(1, seed=4) != order(1)
    assert sorted(order(5)) == list(range(103))


def test_groups_of_like_length_hold_every_row_once_and_pad_less():
    lengths = [(i * 37) % 90 + 1 for i in range(103)]
    grouped = order(0, lengths=lengths, window=8 * 50)
    assert sorted(grouped) == list(range(103)) and grouped != order(1, lengths=lengths, window=8 * 50)

    def padding(rows):
        batches = [rows[i : i + 8] for i in range(0, len(rows), 8)]
        return sum(max(lengths[i] for i in b) * len(b) - sum(lengths[i] for i in b) for b in batches)

    assert padding(grouped) < 0.3 * padding(order(0))
    assert lengths[grouped[0]] == max(lengths)


def checkpoint(folder, step):
    path = folder / f"checkpoint-{step}"
    path.mkdir(parents=True)
    (path / "trained.safetensors").write_bytes(b"x" * 100)
    (path / "trainer_state.json").write_text(json.dumps({"global_step": step}))
    return path


def test_the_newest_whole_checkpoint_is_found(tmp_path):
    for step in (9, 10, 100):
        seal(checkpoint(tmp_path, step), {"seconds": 1.0, "stop": False})
    path, facts = last_checkpoint(tmp_path)
    assert path.name == "checkpoint-100" and facts["seconds"] == 1.0


@pytest.mark.parametrize("damage", ["no seal", "file missing", "file cut", "seal cut", "state cut"])
def test_a_half_written_checkpoint_is_ignored_and_deleted(tmp_path, damage):
    seal(checkpoint(tmp_path, 5), {"seconds": 1.0, "stop": False})
    broken = checkpoint(tmp_path, 10)
    if damage != "no seal":
        seal(broken, {"seconds": 2.0, "stop": False})
    assert damage == "no seal" or last_checkpoint(tmp_path)[0] == broken
    if damage == "file missing":
        (broken / "trained.safetensors").unlink()
    elif damage == "file cut":
        (broken / "trained.safetensors").write_bytes(b"x" * 60)
    elif damage == "seal cut":
        (broken / SEAL).write_text((broken / SEAL).read_text()[:20])
    elif damage == "state cut":
        text = (broken / "trainer_state.json").read_text()
        (broken / "trainer_state.json").write_text("{" + " " * (len(text) - 1))
    assert last_checkpoint(tmp_path)[0].name == "checkpoint-5"
    delete_broken(tmp_path)
    assert [p.name for p in tmp_path.iterdir()] == ["checkpoint-5"]


def test_patience_counts_evaluations_without_a_better_score():
    def stops(values, metric="accuracy", patience=2):
        control = SimpleNamespace(should_training_stop=False)
        Patience(metric, patience).on_evaluate(
            None, SimpleNamespace(log_history=[{f"eval_{metric}": v} for v in values]), control
        )
        return control.should_training_stop

    assert not stops([0.5, 0.4]) and stops([0.5, 0.4, 0.4]) and stops([0.5, 0.5, 0.5])
    assert not stops([0.5, 0.4, 0.6]) and not stops([0.3, 0.4, 0.5, 0.6])
    nan = float("nan")
    assert stops([nan, nan, nan]) and stops([0.5, nan, nan]) and not stops([nan, nan, 0.5]) and not stops([nan, 0.4, nan])
    assert stops([1.0, 1.1, 1.2], "loss") and not stops([1.0, 1.1, 0.9], "loss")


def test_the_two_rates_and_the_decay_reach_the_right_parameters():
    vectors = (nn.Parameter(torch.ones(3)), nn.Parameter(torch.ones(4)))
    head = nn.Linear(2, 2)
    attached = Attached(head, vectors, tuple(head.parameters()), lambda f, n: [], lambda f: None)
    groups = attached.parameter_groups(1e-2, 4e-3, weight_decay=0.1)
    found = {id(p): (g["lr"], g["weight_decay"]) for g in groups for p in g["params"]}
    assert [found[id(p)] for p in (*vectors, head.weight, head.bias)] == [(1e-2, 0.1), (1e-2, 0.1), (4e-3, 0.1), (4e-3, 0.0)]
    assert (attached.adapter_parameters, attached.head_parameters) == (7, 6)


def test_a_checkpoints_tensors_go_back_where_they_came_from():
    head = nn.Linear(2, 2)
    attached = Attached(head, (nn.Parameter(torch.arange(3.0)),), tuple(head.parameters()), lambda f, n: [], lambda f: None)
    state = {k: v.clone() for k, v in attached.state().items()}
    for p in attached.trainable:
        p.data.zero_()
    attached.load_state(state)
    assert all(torch.equal(p, state[f"{i:05d}"]) for i, p in enumerate(attached.trainable)) and head.weight.abs().sum() > 0
