"""Owners that begin from an adapter of their own, rows that are marked as held out, and a run that is asked to stop."""

import json
import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from typer.testing import CliRunner

from tests.training import tiny
from veralib import ConfigError, DataError, StoreError
from veralib.cli import build
from veralib.fleet import folder as files
from veralib.fleet.data import read_owners
from veralib.fleet.folder import forget_owner
from veralib.fleet.run import train_fleet
from veralib.fleet.settings import FleetSettings
from veralib.store import open_store

ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="module")
def base(tmp_path_factory) -> Path:
    return tiny.make_llama(tmp_path_factory.mktemp("llama"))


def sentences(owner: str, count: int) -> list[dict]:
    chooser = random.Random(owner)
    animal = ["cat", "dog", "bird"][len(owner) % 3]
    word = lambda: ["the", animal, "likes", "the", chooser.choice(["red", "blue"]), "house"]  # noqa: E731
    return [{"owner": owner, "text": " ".join(w for _ in range(chooser.randint(1, 4)) for w in word())} for _ in range(count)]


@pytest.fixture
def make(base, tmp_path):
    """Settings for these rows, in an output folder of this name."""

    def of(rows: list[dict], output: str, **changes) -> FleetSettings:
        data = tiny.write_jsonl(tmp_path / f"{output}.jsonl", rows)
        fields = dict(rank=8, epochs=2, slots=3, batch_rows=8, lr=2e-2, seed=3, plot=False)
        return FleetSettings(model=base, data=data, output=tmp_path / output, **(fields | changes))

    return of


def flat(store, name: str) -> torch.Tensor:
    return torch.cat([t for pair in store.get(name).vectors.values() for t in pair])


def test_who_is_in_start_from_goes_on_and_the_others_begin_anew(make, tmp_path):
    rows = [r for owner in ("ann", "bob", "eve") for r in sentences(owner, 12)]
    first = train_fleet(make([r for r in rows if r["owner"] != "eve"], "first"))
    second = train_fleet(make(rows, "second", start_from=tmp_path / "first/store"))
    assert not second.unusable
    for name in ("ann", "bob"):  # the same held-out rows: it stands where it ended
        assert second.owners[name]["loss_before"] == pytest.approx(first.owners[name]["loss_after"], rel=1e-5)
        assert second.owners[name]["loss_after"] < first.owners[name]["loss_after"]
        assert second.owners[name]["tokens"] > 100
    anew = train_fleet(make([r for r in rows if r["owner"] == "eve"], "alone"))
    stores = [open_store(tmp_path / f / "store") for f in ("second", "alone")]
    torch.testing.assert_close(flat(stores[0], "eve"), flat(stores[1], "eve"), rtol=1e-3, atol=2e-5)
    assert anew.owners["eve"]["loss_before"] == pytest.approx(second.owners["eve"]["loss_before"], rel=1e-5)


def test_an_adapter_of_another_shape_leaves_its_owner_out_alone(make, tmp_path):
    train_fleet(make(sentences("ann", 6), "first", rank=4))
    result = train_fleet(make(sentences("ann", 6) + sentences("bo", 6), "second", start_from=tmp_path / "first/store"))
    assert set(result.owners) == {"bo"} and "doesn't fit this fleet" in result.unusable["ann"]


def test_start_from_with_a_shared_frozen_head_is_refused(make):
    with pytest.raises(ConfigError, match="set head_per_owner"):
        make(sentences("ann", 6), "x", task="classification", shared_epochs=1, start_from="store")


def test_marked_rows_measure_and_all_others_train(make):
    marked = [{**r, "only": i % 3 == 0} for i, r in enumerate(sentences("ann", 12))]
    text = [{**r, "only": "1" if i < 2 else ""} for i, r in enumerate(sentences("bo", 8))]
    drawn = [{**r, "only": None} for r in sentences("eve", 10)]
    result = train_fleet(make(marked + text + drawn, "run", held_out_column="only", held_out=0.3))
    counts = {n: (o["examples"], o["held_out"]) for n, o in result.owners.items()}
    assert counts["ann"] == (8, 4) and counts["bo"] == (6, 2)
    assert sum(counts["eve"]) == 10 and 1 <= counts["eve"][1] < 8  # none is marked: drawn by the hash
    # The very rows: their loss under the base model is what was measured before.
    from transformers import AutoModelForCausalLM, AutoTokenizer

    settings = make(marked, "again")
    model, tokenizer = (
        AutoModelForCausalLM.from_pretrained(settings.model).eval(),
        AutoTokenizer.from_pretrained(settings.model),
    )
    summed = labelled = 0.0
    for row in (r for r in marked if r["only"]):
        ids = torch.tensor([[2, *tokenizer(row["text"], add_special_tokens=False)["input_ids"], 3]])
        with torch.no_grad():
            summed += float(model(input_ids=ids, labels=ids).loss) * (ids.numel() - 1)
        labelled += ids.numel() - 1
    assert result.owners["ann"]["loss_before"] == pytest.approx(summed / labelled, rel=1e-4)


def test_bad_marks_leave_their_owner_out(make):
    rows = [{**r, "only": "maybe"} for r in sentences("ann", 4)] + [{**r, "only": True} for r in sentences("bo", 4)]
    result = train_fleet(make(rows + [{**r, "only": False} for r in sentences("eve", 4)], "run", held_out_column="only"))
    assert "'maybe', expected true" in result.unusable["ann"] and "every row" in result.unusable["bo"]
    assert set(result.owners) == {"eve"}
    with pytest.raises(DataError):
        read_owners(make([], "none"))


def command(settings: FleetSettings) -> list[str]:
    given = {n: v for n, v in settings.to_dict().items() if n in settings.model_fields_set}
    path = Path(settings.output + ".yaml")
    path.write_text(json.dumps(given))  # JSON is YAML
    return [sys.executable, "-m", "veralib.cli", "fleet", "train", str(path)]


def test_sigterm_saves_where_everyone_stands(make, tmp_path):
    rows = [r for owner in ("ann", "bob", "gone") for r in sentences(owner, 10)]
    settings = make(rows, "run", epochs=60, progress_seconds=0)
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
    process = subprocess.Popen(command(settings), env=environment, cwd=ROOT, stdout=subprocess.DEVNULL)
    progress = tmp_path / "run/progress-0.jsonl"
    deadline = time.monotonic() + 120
    while not progress.exists() or len(progress.read_text().splitlines()) < 5:
        assert process.poll() is None and time.monotonic() < deadline
        time.sleep(0.02)
    process.send_signal(signal.SIGTERM)
    assert process.wait(60) == 143
    line = json.loads(progress.read_text().splitlines()[-1])
    assert line["owners"]["ann"]["of"] == 120 and line["owners"]["ann"]["loss"] > 0
    stood = files.standing(tmp_path / "run")
    assert set(stood) == {"ann", "bob", "gone"} and stood["ann"]["taken"] >= 4
    assert not (tmp_path / "run/fleet.json").exists()
    # One of them is deleted meanwhile: nothing of it stays, and the others end where they would have ended.
    assert "2 things" in CliRunner().invoke(build(), ["fleet", "forget", str(tmp_path / "run"), "gone"]).output
    assert set(files.standing(tmp_path / "run")) == {"ann", "bob"}
    left = [r for r in rows if r["owner"] != "gone"]
    result = train_fleet(make(left, "run", epochs=60, progress_seconds=0))
    assert set(result.owners) == {"ann", "bob"}
    train_fleet(make(left, "whole", epochs=60))
    stores = [open_store(tmp_path / f / "store") for f in ("run", "whole")]
    for name in ("ann", "bob"):
        torch.testing.assert_close(flat(stores[0], name), flat(stores[1], name), rtol=1e-2, atol=1e-3)
        assert result.owners[name]["steps"] == 120


def test_nothing_stays_of_an_owner_that_is_forgotten(make, tmp_path):
    train_fleet(make(sentences("ann", 6) + sentences("zebra7", 6), "run", progress_seconds=0))
    folder = tmp_path / "run"
    before = flat(open_store(folder / "store"), "ann")
    assert any(b"zebra7" in p.read_bytes() for p in folder.rglob("*") if p.is_file())
    assert forget_owner(folder, "zebra7") == 4  # a version, kept rows, a line, the entry of fleet.json
    assert not [p for p in folder.rglob("*") if "zebra7" in p.name or (p.is_file() and b"zebra7" in p.read_bytes())]
    assert torch.equal(flat(open_store(folder / "store"), "ann"), before) and set(files.ended(folder)) == {"ann"}
    printed = CliRunner().invoke(build(), ["fleet", "forget", str(folder), "zebra7"])
    assert printed.exit_code == 1 and "holds nothing of" in printed.output


def test_a_mistyped_start_or_mark_is_named_and_nothing_is_written(make, tmp_path):
    rows = [{**r, "only": False} for r in sentences("ann", 4)]
    with pytest.raises(StoreError, match=r"there is no store at .*/first/stor: name"):
        train_fleet(make(rows, "first", start_from=tmp_path / "first/stor"))
    with pytest.raises(DataError, match=r'no row of .* has the column "onyl"\. Did you mean "only"\?'):
        train_fleet(make(rows, "first", held_out_column="onyl"))
    assert not (tmp_path / "first").exists()


def test_a_model_that_cant_be_loaded_binds_no_folder_to_it(make, tmp_path):
    rows = sentences("ann", 4)
    with pytest.raises(ConfigError, match="there is no model folder"):
        train_fleet(make(rows, "first").model_copy(update={"model": str(tmp_path / "bsae")}))
    assert not (tmp_path / "first").exists()
    assert set(train_fleet(make(rows, "first", epochs=1)).owners) == {"ann"}
