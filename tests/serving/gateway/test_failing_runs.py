"""Runs that fail: a model that isn't there, a job that kills the training, records that are damaged or can't be read."""

import json

import pytest

from tests.serving.gateway.workplace import BASE, RESULT, Workplace, chats
from veralib.serving.gateway import runner, training
from veralib.serving.gateway.runs import Runs
from veralib.store import open_store


def test_a_run_that_always_fails_fails_its_job(tmp_path, model, monkeypatch):
    monkeypatch.setattr(runner, "BACKOFF_SECONDS", 0.0)
    broken = Workplace(tmp_path, tmp_path / "no-such-model", attempts=1)
    job = broken.openai().fine_tuning.jobs.create(model=BASE, training_file=broken.upload(chats(4)), suffix="ann")
    broken.work()
    job = broken.openai().fine_tuning.jobs.retrieve(job.id)
    assert job.status == "failed" and job.error.code == "training_failed" and "no-such-model" not in job.error.message
    assert not list(tmp_path.glob("state/runs/*"))


class Ended:
    """A process that has ended with this code."""

    pid = None

    def __init__(self, code: int) -> None:
        self.code = code

    def wait(self) -> int:
        return self.code

    poll = wait


def test_a_job_that_kills_the_training_fails_alone(tmp_path, adapter, monkeypatch):
    monkeypatch.setattr(runner, "BACKOFF_SECONDS", 0.0)
    place, started = Workplace(tmp_path, attempts=2), []

    def train(folder, _):
        names = sorted(path.stem for path in (folder / "data").iterdir())
        started.append(names)
        if "acme:poison" in names:
            return Ended(-9)
        staged = open_store(folder / "fleet/store")
        for name in names:
            staged.put(name, adapter)
        lines = [json.dumps({**RESULT, "name": name}) for name in names]
        (folder / "fleet/owners-0.jsonl").write_text("\n".join(lines) + "\n")
        (folder / "fleet/fleet.json").write_text('{"unusable": {}}')
        return Ended(0)

    monkeypatch.setattr(training, "start", train)
    jobs = {}
    for key, suffix in (("acme", "a"), ("acme", "poison"), ("acme", "b"), ("evil", "c"), ("evil", "d")):
        job = place.openai(key).fine_tuning.jobs.create(model=BASE, training_file=place.upload(chats(4), key), suffix=suffix)
        jobs[f"{key}:{suffix}"] = job.id
    place.work()
    ended = {name: place.openai("admin").fine_tuning.jobs.retrieve(job) for name, job in jobs.items()}
    assert {name for name, job in ended.items() if job.status == "succeeded"} == set(jobs) - {"acme:poison"}
    assert ended["acme:poison"].error.code == "training_failed"
    assert started[:2] == [sorted(jobs)] * 2 and started.count(["acme:poison"]) == 2 and not Runs(place.learning).all()
    assert "smaller runs" in place.http().get(f"/v1/fine_tuning/jobs/{jobs['acme:a']}/events").text


@pytest.mark.parametrize("content", [b"{", b"[]", b'{"id": 1, "attempts": 0}'])
def test_a_damaged_run_fails_its_jobs_and_stops_nobody(tmp_path, monkeypatch, content):
    place = Workplace(tmp_path)
    worker, (bad, good) = place.runner(), [[], []]
    for key, jobs in (("acme", bad), ("evil", good)):
        jobs.append(place.openai(key).fine_tuning.jobs.create(model=BASE, training_file=place.upload(chats(4), key)).id)
        worker.runs.gather()
    run = next(run for run in worker.runs.all() if run.entries[0].job == bad[0])
    for damaged in ("run.json", "lease.json"):
        (worker.runs.path(run) / damaged).write_bytes(content)
    carried = []
    monkeypatch.setattr(runner._Carrying, "to_its_end", lambda self: carried.append(self.run.entries[0].job))
    assert worker.step() and carried == good and not worker.runs.path(run).exists()
    job = place.openai().fine_tuning.jobs.retrieve(bad[0])
    assert job.status == "failed" and job.error.code == "run_damaged" and "record of its run" in job.error.message
    assert "record of its run" in place.http().get(f"/v1/fine_tuning/jobs/{bad[0]}/events").text


def test_a_run_that_cannot_be_read_now_waits_and_stops_nobody(tmp_path, monkeypatch):
    place = Workplace(tmp_path)
    worker, jobs = place.runner(), []
    for key in ("acme", "evil"):
        jobs.append(place.openai(key).fine_tuning.jobs.create(model=BASE, training_file=place.upload(chats(4), key)).id)
        worker.runs.gather()
    path = worker.runs.path(worker.runs.all()[0], "run.json")
    path.rename(path.with_name("aside"))
    path.mkdir()
    carried = []
    monkeypatch.setattr(runner._Carrying, "to_its_end", lambda self: carried.append(self.run.entries[0].job))
    assert worker.step() and carried == jobs[1:] and len(worker.runs.all()) == 1
    assert place.openai().fine_tuning.jobs.retrieve(jobs[0]).status == "running"  # in its run still, and in no second one
    path.rmdir()
    path.with_name("aside").rename(path)
    assert place.runner().step() and carried == jobs[::-1]
