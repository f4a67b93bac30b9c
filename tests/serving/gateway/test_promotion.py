"""A new version goes live only if it isn't worse, once, whatever dies in between; and all of an owner can be removed."""

import contextlib
import json
import math
import os
import signal
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from tests.serving.gateway.workplace import BASE, RESULT, Workplace, chats, flat, wait
from veralib import StoreError
from veralib.serving.gateway import promotion, runner, training
from veralib.serving.gateway.records import RecordError, Records
from veralib.serving.gateway.runs import Runs
from veralib.store import open_store
from veralib.store.names import key_of

ROOT = Path(__file__).parents[3]


def test_a_training_loss_that_is_not_finite_is_null_in_an_answer(tmp_path, adapter):
    place = Workplace(tmp_path)
    carried = Carried(place, adapter)
    owners = {"acme:ann": {"steps": 1, "of": 2, "loss": math.inf}}
    (tmp_path / "state" / carried.run.folder / "fleet/progress-0.jsonl").write_text(json.dumps({"owners": owners}) + "\n")
    carrying = runner._Carrying(carried.worker, carried.run)
    carrying.shown = 0
    carrying._show_progress()
    answer = place.http().get(f"/v1/fine_tuning/jobs/{carried.jobs[0]}/events")
    assert '"train_loss": null' in answer.text and "Infinity" not in answer.text and "training loss=inf" in answer.text


def test_settled_again_nothing_happens(settling, monkeypatch):
    store, job = settling.place.store, settling.job()
    entry = settling.entry(job)
    end = settling.place.learning.jobs.end

    def crash(*_, **__):
        raise KeyboardInterrupt

    monkeypatch.setattr(settling.place.learning.jobs, "end", crash)
    with pytest.raises(KeyboardInterrupt):  # after the put, before the mark
        settling.settle(job, entry)
    assert store.current("acme:ann") == 1 and settling.place.openai().fine_tuning.jobs.retrieve(job.id).status == "queued"
    monkeypatch.setattr(settling.place.learning.jobs, "end", end)
    answer = settling.place.http().post(f"/v1/fine_tuning/jobs/{job.id}/cancel")
    assert answer.status_code == 400 and answer.json()["error"]["code"] == "job_ended" and "Version 1, " in answer.text
    for _ in range(2):
        assert settling.settle(job, entry).status == "succeeded"
    assert store.current("acme:ann") == 1 and store.versions("acme:ann")[0].notes["job"] == job.id
    store.put("acme:ann", store.get("acme:ann"))
    store.rollback("acme:ann", 1)
    assert promotion.version_of(store, job) == 1 and store.versions("acme:ann")[-1].notes["job"] == job.id


def test_after_a_rollback_the_next_job_goes_on_from_the_version_that_is_live(place, adapter):
    place.store.put("acme:ann", adapter)
    place.store.put("acme:ann", replace(adapter, vectors={u: (2 * d, b) for u, (d, b) in adapter.vectors.items()}))
    place.store.rollback("acme:ann", 1)
    place.openai().fine_tuning.jobs.create(model=BASE, training_file=place.upload(chats(8, 2)), suffix="ann")
    worker = place.runner()
    worker.runs.gather()
    (run,) = worker.runs.all()
    assert run.entries[0].version == 3
    start = open_store(place.folder / "state" / run.folder / "start")
    assert torch.equal(flat(start, "acme:ann"), flat(place.store, "acme:ann", 1))
    assert not torch.equal(flat(start, "acme:ann"), flat(place.store, "acme:ann", 2))


def damage(store, name: str, version: int) -> None:
    """One bit of one version's file."""
    (path,) = store.files.root.glob(f"adapters/*/{key_of(name)}/{version:012d}-*.vera")
    data = bytearray(path.read_bytes())
    data[-20] ^= 1
    path.write_bytes(data)


def test_a_damaged_earlier_version_is_no_hindrance(settling, adapter, monkeypatch):
    store = settling.place.store
    for _ in range(2):
        store.put("acme:ann", adapter)
    damage(store, "acme:ann", 1)
    job = settling.job()
    entry = settling.entry(job)
    with monkeypatch.context() as m:
        m.setattr(settling.place.learning.jobs, "end", lambda *_, **__: None)  # a crash before the mark
        settling.settle(job, entry)
    assert settling.settle(job, entry).status == "succeeded" and store.current("acme:ann") == 3  # once all the same


class Carried:
    """A run of two jobs whose adapters are in the staging store, without the training."""

    def __init__(self, place: Workplace, adapter) -> None:
        client, self.worker = place.openai(), place.runner()
        file = place.upload(chats(4))
        self.jobs = [client.fine_tuning.jobs.create(model=BASE, training_file=file, suffix=s).id for s in ("ann", "bob")]
        self.worker.runs.gather()
        (self.run,) = self.worker.runs.all()
        folder = place.learning.records.path(self.run.folder) / "fleet"
        staged = open_store(folder / "store")
        lines = []
        for entry in self.run.entries:
            staged.put(entry.name, adapter)
            lines.append(json.dumps({**RESULT, "name": entry.name}))
        (folder / "owners-0.jsonl").write_text("\n".join(lines) + "\n")
        (folder / "fleet.json").write_text('{"unusable": {}}')

    def status(self, place: Workplace) -> list[str]:
        found = [place.openai().fine_tuning.jobs.retrieve(job) for job in self.jobs]
        return [f"{job.status} {job.error.code}" if job.error is not None else job.status for job in found]


@pytest.mark.parametrize("failures", [2, 99])
def test_a_store_that_refuses_one_version_fails_its_job_and_no_other(tmp_path, adapter, monkeypatch, failures):
    monkeypatch.setattr(runner, "BACKOFF_SECONDS", 0.0)
    place = Workplace(tmp_path)
    carried, put, tries = Carried(place, adapter), place.store.put, []

    def refuse(name, *given):
        if name == "acme:ann" and len(tries) < failures:
            tries.append(name)
            raise StoreError("can't write it")
        return put(name, *given)

    monkeypatch.setattr(place.store, "put", refuse)
    place.work()
    assert carried.status(place) == ["succeeded" if failures == 2 else "failed not_stored", "succeeded"]
    assert len(tries) == min(failures, 3) and not Runs(place.learning).all()


def test_a_run_that_fails_on_the_gateways_side_lets_others_go_first(tmp_path, adapter, monkeypatch):
    place = Workplace(tmp_path)
    bad = Carried(place, adapter)

    def fail(*_):
        raise OSError("no such device")

    with monkeypatch.context() as m:
        m.setattr(runner, "settle", fail)
        with pytest.raises(OSError):
            bad.worker.step()
    Runs(place.learning).write(replace(bad.run, attempts=0))
    client = place.openai()
    good = client.fine_tuning.jobs.create(model=BASE, training_file=place.upload(chats(4)), suffix="eve")
    carried = []
    monkeypatch.setattr(runner._Carrying, "to_its_end", lambda self: carried.append(self.run.entries[0].job))
    assert bad.worker.step() and carried == [good.id]


def test_a_full_disk_of_the_state_folder_fails_no_job_whose_version_is_live(tmp_path, adapter, monkeypatch):
    place = Workplace(tmp_path, attempts=1)
    carried, add_line = Carried(place, adapter), Records.add_line
    monkeypatch.setattr(runner, "PUT_OFF_SECONDS", 0.0)

    def full(self, path, *given, **more):
        with monkeypatch.context() as m:
            m.setattr(Records, "_ends_in_newline", lambda *_: (_ for _ in ()).throw(OSError(28, "No space left on device")))
            add_line(self, path, *given, **more)

    with monkeypatch.context() as m:
        m.setattr(Records, "add_line", full)
        with pytest.raises(RecordError, match="No space left"):
            place.work()
        assert place.store.current("acme:ann") == 1
        answer = place.http().post(f"/v1/fine_tuning/jobs/{carried.jobs[1]}/cancel")
        assert answer.status_code == 503 and answer.json()["error"]["code"] == "state_unavailable"
        assert str(tmp_path) not in answer.text
    Runs(place.learning).write(replace(carried.run, attempts=0))
    place.work()
    assert carried.status(place) == ["succeeded"] * 2 and place.store.current("acme:ann") == 1


def test_a_lease_is_held_while_the_process_is_stopped(tmp_path, adapter, monkeypatch):
    """Stopping and taking out take longer than a lease lasts."""
    place = Workplace(tmp_path, lease_seconds=0.2)
    carried, others = Carried(place, adapter), []

    def slow(*_):
        time.sleep(0.5)
        others.append(place.runner()._claim(carried.run))
        return True

    monkeypatch.setattr(training, "stop", slow)
    place.learning.jobs.forget(place.learning.jobs.find("acme=3a", carried.jobs[0]))
    place.work()
    assert others == [False] * 2
    assert place.openai().fine_tuning.jobs.retrieve(carried.jobs[1]).status == "succeeded"


def test_a_process_that_begins_is_not_taken_for_an_earlier_one(tmp_path, monkeypatch):
    """Killed before the new pid is written, the old one would be what a stop kills."""
    (tmp_path / "process.json").write_text('{"pid": 1, "host": "x"}')

    def killed(*_, **__):
        raise KeyboardInterrupt

    monkeypatch.setattr(training.subprocess, "Popen", killed)
    with pytest.raises(KeyboardInterrupt):
        training.start(tmp_path, Workplace(tmp_path / "place").settings)
    assert not (tmp_path / "process.json").exists()


@pytest.mark.parametrize("model", ["nowhere", None])
def test_sweeping_goes_on_while_the_gateway_runs_also_without_a_model_to_train(tmp_path, monkeypatch, model):
    place, swept, took = Workplace(tmp_path, model), [], []
    assert len(place.app.state.background) == 1
    monkeypatch.setattr(runner, "SWEEP_SECONDS", 0.0)
    monkeypatch.setattr(runner, "POLL_SECONDS", 0.01)
    monkeypatch.setattr(place.learning.uploads, "sweep", lambda: swept.append(1))
    worker = place.runner()
    monkeypatch.setattr(worker, "step", lambda: bool(took.append(1)))
    worker.start()
    wait(lambda: len(swept) > 2)
    worker.stop()
    assert bool(took) == (model is not None)


# Crashes


GATEWAY = """
import sys
from tests.serving.gateway.workplace import Workplace
from pathlib import Path
place = Workplace(Path(sys.argv[1]), sys.argv[2], lease_seconds=3.0)
print("up", flush=True)
place.work()
"""


@contextlib.contextmanager
def gateway(folder: Path, model: Path):
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
    process = subprocess.Popen([sys.executable, "-c", GATEWAY, str(folder), str(model)], env=environment, cwd=ROOT)
    try:
        yield process
    finally:
        process.kill()
        process.wait()


@pytest.mark.slow
def test_killed_with_its_training_neither_loses_a_job_nor_promotes_twice(tmp_path, model):
    place = Workplace(tmp_path, model, lease_seconds=3.0)
    client = place.openai()
    fields = dict(model=BASE, training_file=place.upload(chats(12)), hyperparameters={"n_epochs": 100})
    jobs = [client.fine_tuning.jobs.create(suffix=f"u{i}", **fields) for i in range(3)]
    progress = lambda: list(tmp_path.glob("state/runs/*/fleet/progress-0.jsonl"))  # noqa: E731
    with gateway(tmp_path, model) as process:
        wait(progress)
        process.send_signal(signal.SIGKILL)
        process.wait()
    (run,) = Runs(place.learning).all()
    folder = place.learning.records.path(run.folder)
    # Its training lives on; a second gateway waits for the lease, then for that process, and starts none beside it.
    assert training.is_alive(folder)
    second = place.runner()
    assert not second._claim(run)
    pid = (folder / "process.json").read_text()
    second.start()
    try:
        wait(lambda: second.id in (folder / "lease.json").read_text())
        time.sleep(1.0)
        if training.is_alive(folder):
            assert (folder / "process.json").read_text() == pid
            training.stop(folder)  # and this one dies too
        wait(lambda: not Runs(place.learning).all())
    finally:
        second.stop()
    assert [client.fine_tuning.jobs.retrieve(j.id).status for j in jobs] == ["succeeded"] * 3
    assert [[v.notes["job"] for v in place.store.versions(f"acme:u{i}")] for i in range(3)] == [[j.id] for j in jobs]
    assert not list(tmp_path.glob("state/runs/*")) and not list(tmp_path.glob("state/waiting/*"))


@pytest.mark.slow
def test_two_gateways_on_one_folder_share_the_work_and_promote_once(tmp_path, model):
    places = [Workplace(tmp_path, model), Workplace(tmp_path, model)]
    jobs = {}
    for k, place in enumerate(places):
        for n in range(2):
            fields = dict(suffix=f"u{k}{n}", hyperparameters={"n_epochs": 2 + n})
            made = place.openai().fine_tuning.jobs.create(model=BASE, training_file=place.upload(chats(6)), **fields)
            jobs[f"acme:u{k}{n}"] = made.id
    runners = [place.runner() for place in places]
    for each in runners:
        each.start()
    try:
        wait(lambda: len(list(places[0].store.names())) == 4 and not Runs(places[0].learning).all())
    finally:
        for each in runners:
            each.stop()
    assert {n: [v.notes["job"] for v in places[0].store.versions(n)] for n in jobs} == {n: [i] for n, i in jobs.items()}
    assert {j.status for j in places[0].openai().fine_tuning.jobs.list()} == {"succeeded"}


@pytest.mark.slow
def test_stopped_in_order_it_goes_on_where_it_stood(place):
    client = place.openai()
    job = client.fine_tuning.jobs.create(
        model=BASE, training_file=place.upload(chats(12)), suffix="ann", hyperparameters={"n_epochs": 30}
    )
    worker = place.runner()
    worker.start()
    wait(lambda: list(place.folder.glob("state/runs/*/fleet/progress-0.jsonl")))
    worker.stop()
    (run,) = worker.runs.all()
    folder = place.learning.records.path(run.folder)
    assert not training.is_alive(folder) and list(folder.glob("fleet/standing-0.safetensors"))
    assert client.fine_tuning.jobs.retrieve(job.id).status == "running" and not (folder / "lease.json").exists()
    place.work()
    assert client.fine_tuning.jobs.retrieve(job.id).status == "succeeded" and place.store.current("acme:ann") == 1
