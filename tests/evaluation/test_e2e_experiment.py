"""The E2E experiment on a toy: each method's best rate writes texts, the page is rendered from the files, no path is written."""

import json

import pytest

from experiments import e2e
from tests.training import tiny
from veralib.evaluation import meteor
from veralib.training.e2e import FILES

pytest.importorskip("sacrebleu")
pytest.importorskip("pycocoevalcap.cider")
pytest.importorskip("peft")


@pytest.fixture
def toy(tmp_path, monkeypatch):
    """A release of a few lines, and a grid of the base and two methods with two rates."""
    folder = tmp_path / "release"
    folder.mkdir()
    animals = [f"{a} {b}" for a in ("red", "blue", "small") for b in ("cat", "dog")]
    lines = [f'"name[the {a}], area[big tree]",the {a} sees a {c}' for a in animals for c in ("house", "tree")]
    for name in FILES.values():
        (folder / name).write_text("mr,ref\n" + "\n".join(lines) + "\n")
    names = ("base", "LoRA r=1", "VeRA r=256")
    monkeypatch.setattr(e2e, "GRID", {n: (e2e.GRID[n][0], e2e.GRID[n][1][:2]) for n in names})
    monkeypatch.setattr(meteor.shutil, "which", lambda name: None)
    tiny.make_llama(tmp_path / "llama")
    return tmp_path


def test_the_experiment_runs_and_renders_without_paths(toy, capsys):
    results = toy / "results"
    given = [str(toy / "release"), "--model", str(toy / "llama"), "--results", str(results)]
    e2e.main([*given, "--rows", "8", "--epochs", "1", "--limit-test", "3"])
    files = sorted(results.glob("*.json"))
    assert [f.name for f in files] == ["base.json", "lora-r1.json", "vera-r256.json"]
    page = (results / "README.md").read_text()
    assert all(f"| {name} |" in page for name in e2e.GRID) and "METEOR (exact+stem)" in page
    for text in [page, *(f.read_text() for f in files)]:
        assert str(toy) not in text and "/tmp" not in text
    report = json.loads(files[2].read_text())
    assert report["rows"] == {"train": 8, "validation": 2} and report["texts"] == 3 and report["references"] == 6
    assert report["lr"] == min(report["tried"], key=lambda t: t["validation_loss"])["lr"] and len(report["tried"]) == 2
    before = [f.stat().st_mtime_ns for f in files]
    e2e.main([*given, "--rows", "8", "--epochs", "1", "--limit-test", "3"])
    assert [f.stat().st_mtime_ns for f in files] == before
    with pytest.raises(SystemExit):  # results of different sizes don't mix in one table
        e2e.main([*given, "--rows", "9", "--epochs", "1", "--limit-test", "3"])
    assert "holds results of {'rows': 8" in capsys.readouterr().err


def test_prepare_only_writes_the_rows(toy, capsys):
    e2e.main([str(toy / "release"), "--prepare", str(toy / "rows")])
    assert "12 train rows, 12 validation rows, 6 test rows" in capsys.readouterr().out
    assert sorted(p.name for p in (toy / "rows").iterdir()) == ["test.jsonl", "train.jsonl", "validation.jsonl"]
