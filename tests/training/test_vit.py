"""The ViT experiment on a toy: pretraining goes on to the same weights, every cell runs once, held-out images choose the rate."""

import json

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from experiments import vit, vit_pretrain
from experiments.cola import run_cells
from veralib.training import Settings
from veralib.training.data import load_data

from . import tiny

pytest.importorskip("PIL")


@pytest.fixture
def toy(tmp_path, monkeypatch):
    """photos.npz with six classes, and a ViT of one narrow layer."""
    shades = {f"{shade}{name}": images for shade in "ab" for name, images in tiny.jpegs(8, seed=ord(shade)).items()}
    tiny.write_npz(tmp_path / "photos.npz", [shades, {name: images[:2] for name, images in shades.items()}])
    small = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 16, "patch_size": 16}
    monkeypatch.setattr(vit_pretrain, "MODEL", {**vit_pretrain.MODEL, **small})
    monkeypatch.setattr(vit_pretrain, "TRAINING", {**vit_pretrain.TRAINING, "batch": 8})
    return tmp_path


def pretrain(toy, name):
    vit.main(["--data", str(toy / "photos.npz"), "pretrain", "--output", str(toy / name), "--epochs", "4"])
    return load_file(toy / name / "model.safetensors"), json.loads((toy / name / "training.json").read_text())


def test_pretraining_that_was_killed_or_paused_ends_with_the_same_weights(toy, monkeypatch, capsys):
    whole, facts = pretrain(toy, "whole")
    assert facts["classes"] == 3 and facts["images"] == 24 and [h["epoch"] for h in facts["history"]] == [1, 2, 3, 4]

    class Killed(BaseException):
        pass

    step = vit_pretrain.one_step

    def until_five(*a):
        if a[-1] == 5:
            raise Killed
        return step(*a)

    with monkeypatch.context() as m:
        m.setattr(vit_pretrain, "SAVE_SECONDS", -1)
        m.setattr(vit_pretrain, "one_step", until_five)
        with pytest.raises(Killed):
            pretrain(toy, "parts")
    line = ["--data", str(toy / "photos.npz"), "pretrain", "--output", str(toy / "parts")]
    vit.main([*line, "--epochs", "4", "--minutes", "0"])
    assert "paused after step 5 of 12" in capsys.readouterr().out and not (toy / "parts").exists()
    parts, more = pretrain(toy, "parts")
    assert whole.keys() == parts.keys() and all(torch.equal(whole[k], parts[k]) for k in whole)
    assert more["history"] == facts["history"]
    with pytest.raises(SystemExit, match="of another run"):
        vit.main([*line, "--epochs", "5"])


def test_the_two_halves_of_the_classes_share_no_image(toy):
    halves = [vit_pretrain.classes(toy / "photos.npz", odd) for odd in (False, True)]
    files = [{h["data"][a:b].tobytes() for a, b in zip(h["offsets"], h["offsets"][1:], strict=False)} for h in halves]
    assert [list(h["names"]) for h in halves] == [["ablue", "ared", "bgreen"], ["agreen", "bblue", "bred"]]
    assert not files[0] & files[1] and all(len(h["labels"]) == 3 * 10 for h in halves)
    np.savez(toy / "odd.npz", **halves[1])
    data = load_data(Settings(model="m", data=toy / "odd.npz", task="images", test="val"))
    red = tiny.jpegs(8, seed=ord("b"))["red"]
    assert [r["image"].read() for r in data.train if r["label"] == "bred"] == red and len(data.test) == 6


def test_the_grid_runs_and_renders_without_paths(toy, monkeypatch):
    pretrain(toy, "base")

    def inline(grid, seeds, results, jobs, one):
        for seed in seeds:
            for name, (_, rate, values) in grid.items():
                for value in values:
                    one(name, rate, value, seed)

    grid = {n: (*vit.GRID[n][:2], vit.GRID[n][2][:2]) for n in ("head only", "VeRA r=64")}
    monkeypatch.setattr(vit, "GRID", grid)
    monkeypatch.setattr(vit, "run_cells", inline)
    for name, value in (("shots", 4), ("validation", "0.25"), ("batch_size", 4)):
        monkeypatch.setitem(vit.COMMON, name, value)
    results = toy / "results"
    line = ["--data", str(toy / "photos.npz"), "grid", "--model", str(toy / "base"), "--epochs", "1", "--results", str(results)]
    vit.main([*line, "--methods", *grid, "--seeds", "0", "1"])
    files = sorted(results.glob("*.json"))
    assert len(files) == 2 * 2 * 2
    page = (results / "README.md").read_text()
    assert all(name in page for name in grid) and page.count("chosen |") == 2
    for text in [page, *(f.read_text() for f in files)]:
        assert str(toy) not in text and "/tmp" not in text
    report = json.loads(files[0].read_text())
    assert report["rows"] == {"train": 12, "validation": 6, "test": 6} and "test_accuracy" in report["metrics"]
    assert report["base"]["classes"] == 3


def test_a_run_with_a_result_file_is_not_repeated(tmp_path, monkeypatch, capsys):
    grid = {"head only": ({"method": "head"}, "lr_head", (0.1,))}
    (tmp_path / "head-only-lr_head0.1-seed0.json").write_text("{}")
    run_cells(grid, (0,), tmp_path, 1, lambda *cell: pytest.fail("it ran again"))
    assert "0 of 1 runs to do" in capsys.readouterr().out


def test_the_rate_is_chosen_on_held_out_images_and_the_test_set_is_reported():
    def run(value, seed, held_out, test):
        return {
            **{"name": "head only", "rate": "lr_head", "value": value, "seed": seed, "adapter_parameters": 0, "adapter_bytes": 9},
            "metrics": {"eval_accuracy": held_out, "test_accuracy": test},
            "base": {"parameters": 9, "epochs": 1, "images": 4, "classes": 2, "accuracy": 0.5, "sha256": "0" * 64},
            **{"settings": {"epochs": 3, "shots": 10, "batch_size": 4, "weight_decay": 0.0}, "versions": {"torch": "2"}},
            **{"rows": {"train": 9, "validation": 1, "test": 2}, "hardware": {"processor": "p", "threads": 1}},
            "seconds_per_step": 0.01,
        }

    page = vit.render([run(0.1, 0, 0.50, 0.10), run(0.1, 1, 0.60, 0.30), run(0.2, 0, 0.40, 0.90), run(0.2, 1, 0.41, 0.90)])
    (row,) = [line for line in page.splitlines() if line.startswith("| head only") and "**" in line]
    assert "lr_head 0.1" in row and "**20.0 ± 14.1**" in row and "55.0 ± 7.1" in row
