"""The ViT experiment on a toy: pretraining goes on to the same weights, and its grid runs on what it wrote."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch
import yaml
from safetensors.torch import load_file

from experiments import vit, vit_pretrain
from veralib.training import Settings
from veralib.training.data import load_data
from veralib.training.grid import read_grid
from veralib.training.sweep import load_results, run_cell

from . import tiny

pytest.importorskip("PIL")
ROOT = Path(vit.__file__).parents[1]


@pytest.fixture
def toy(tmp_path, monkeypatch):
    """photos.npz with six classes, and a ViT of one narrow layer."""
    shades = {f"{shade}{name}": images for shade in "ab" for name, images in tiny.jpegs(8, seed=ord(shade)).items()}
    tiny.write_npz(tmp_path / "photos.npz", [shades, {name: images[:2] for name, images in shades.items()}])
    small = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 16}
    monkeypatch.setattr(vit_pretrain, "MODEL", {**vit_pretrain.MODEL, **small})
    monkeypatch.setattr(vit_pretrain, "TRAINING", {**vit_pretrain.TRAINING, "batch": 8})
    return tmp_path


def pretrain(toy, name):
    vit.main(["--data", str(toy / "photos.npz"), "--output", str(toy / name), "--epochs", "4"])
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
    line = ["--data", str(toy / "photos.npz"), "--output", str(toy / "parts")]
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


def test_the_grid_runs_on_what_pretraining_wrote(toy, monkeypatch):
    pretrain(toy, "out/vit")
    monkeypatch.chdir(toy)
    raw = yaml.safe_load((ROOT / "experiments" / "images.yaml").read_text())
    raw["common"] |= {"shots": 4, "validation": "0.25", "batch_size": 4, "epochs": 1}
    raw |= {"seeds": [0, 1], "methods": {n: raw["methods"][n] for n in ("head only", "VeRA r=64")}}
    (toy / "grid.yaml").write_text(yaml.safe_dump(raw))
    grid = read_grid("grid.yaml")
    cells = [c for c in grid.cells if c.value in (1e-3, 3e-2)]  # of the head, of VeRA
    assert len(cells) == 4 and [c.settings["split_seed"] for c in cells] == [0, 1, 0, 1]
    for cell in cells:
        run_cell(cell, grid.output)
    reports = load_results(grid.output)
    assert [r["rows"] for r in reports] == [{"train": 12, "validation": 6, "test": 6}] * 4
    assert all("test_accuracy" in r["metrics"] and r["base"]["name"] == "vit" for r in reports)
