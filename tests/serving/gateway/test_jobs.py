"""Fine-tuning jobs: the official client's whole loop, many users in one run, and what the job says when something is wrong."""

import json
import threading
import time
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from openai import BadRequestError, NotFoundError, RateLimitError

from tests.serving.gateway.workplace import BASE, Workplace, chats, flat, make_adapter
from veralib import StoreError
from veralib.fleet.run import train_fleet
from veralib.fleet.settings import FleetSettings
from veralib.serving.gateway import runs as runs_module
from veralib.serving.gateway.paging import new_id


@pytest.mark.slow
def test_upload_job_personal_model_and_on(place, model, tmp_path):
    """The loop, with the runner's thread and the real process. What is live equals what `vera fleet train` gives."""
    client = place.openai()
    runner = place.runner()
    runner.start()
    try:
        content = chats(12, animal="cat")
        file = client.files.create(file=("cats.jsonl", content), purpose="fine-tune")
        job = client.fine_tuning.jobs.create(model=BASE, training_file=file.id, suffix="ann", seed=5, metadata={"who": "ann"})
        assert job.status in ("queued", "running") and job.fine_tuned_model is None and job.seed == 5
        seen = {job.status}
        deadline = time.monotonic() + 400
        while (job := client.fine_tuning.jobs.retrieve(job.id)).status in ("queued", "running"):
            seen.add(job.status)
            assert time.monotonic() < deadline
            time.sleep(0.1)
        assert job.status == "succeeded" and job.fine_tuned_model == "acme:ann" and job.error is None and "running" in seen
        assert job.finished_at >= job.created_at and job.trained_tokens > 100 and job.metadata == {"who": "ann"}
        assert job.hyperparameters.n_epochs == 2 and job.method.supervised.hyperparameters.batch_size == 4
        events = list(client.fine_tuning.jobs.list_events(job.id, limit=2))
        assert events[-1].message.startswith("Created") and "Version 1 is live" in events[0].message
        steps = [e for e in events if e.type == "metrics" and "train_loss" in e.data]
        assert steps and steps[0].data["total_steps"] >= 4 and all(e.data["train_loss"] > 0 for e in steps)
        assert list(client.fine_tuning.jobs.checkpoints.list(job.id)) == []
        # The same rows through the fleet's own command.
        rows = [{"owner": "acme:ann", **json.loads(line)} for line in content.splitlines()]
        (tmp_path / "own.jsonl").write_text("".join(json.dumps(r) + "\n" for r in rows))
        fields = dict(task="chat", rank=8, epochs=2, lr=2e-2, owner_rows=4, batch_rows=8, seed=5, slots=4, plot=False)
        own = train_fleet(FleetSettings(model=model, data=tmp_path / "own.jsonl", output=tmp_path / "own", **fields))
        from veralib.store import open_store

        torch.testing.assert_close(
            flat(place.store, "acme:ann"), flat(open_store(tmp_path / "own/store"), "acme:ann"), rtol=1e-4, atol=1e-6
        )
        notes = place.store.versions("acme:ann")[0].notes
        assert notes["job"] == job.id and float(notes["loss_after"]) == pytest.approx(
            own.owners["acme:ann"]["loss_after"], rel=1e-4
        )
        # And on from there, by the name of the model.
        again = client.fine_tuning.jobs.create(model="acme:ann", training_file=file.id)
        while (again := client.fine_tuning.jobs.retrieve(again.id)).status in ("queued", "running"):
            time.sleep(0.1)
        assert again.status == "succeeded" and again.fine_tuned_model == "acme:ann", again.error
        notes = place.store.versions("acme:ann")[1].notes
        assert notes["went_on_from"] == "version 1" and [j.id for j in client.fine_tuning.jobs.list(limit=1)] == [
            again.id,
            job.id,
        ]
    finally:
        runner.stop()
    assert not list(place.folder.glob("state/runs/*")) and not list(place.folder.glob("state/waiting/*"))


@pytest.mark.slow
def test_jobs_of_many_users_share_one_run_and_each_fails_for_itself(place):
    """One step of the runner: those alike train together; another batch size, another run."""
    acme, evil = place.openai(), place.openai("evil")
    create = lambda client, key, content, **more: client.fine_tuning.jobs.create(  # noqa: E731
        model=BASE, training_file=place.upload(content, key), **more
    )
    cat = create(acme, "acme", chats(8), suffix="cat")
    later = create(acme, "acme", chats(8, 1), suffix="cat")  # the same adapter: after the first
    dog = create(evil, "evil", chats(8, animal="dog"), suffix="cat")
    long = b'{"messages": [{"role": "user", "content": "%s"}, {"role": "assistant", "content": "red"}]}\n' % (b"the " * 400)
    bad = create(evil, "evil", long * 3)
    other = create(acme, "acme", chats(8), suffix="other", method={"type": "supervised", "supervised": {"hyperparameters": {
        "batch_size": 2, "n_epochs": 1, "learning_rate_multiplier": 0.5}}})  # fmt: skip
    gone = create(acme, "acme", chats(8), suffix="gone")
    acme.files.delete(gone.training_file)
    runner = place.runner()
    runner.runs.gather()
    (run,) = runner.runs.all()
    assert {e.name for e in run.entries} == {
        "acme:cat",
        "evil:cat",
        *(e.name for e in run.entries if e.name.startswith("evil:ft-")),
    }
    assert len(run.entries) == 3
    runner.runs.gather()
    assert [len(r.entries) for r in runner.runs.all()] == [3, 1]  # the other settings; the second of one adapter waits
    status = lambda client, job: client.fine_tuning.jobs.retrieve(job.id)  # noqa: E731
    assert status(acme, cat).status == status(acme, other).status == "running" and status(acme, later).status == "queued"
    failed = status(acme, gone)
    assert failed.status == "failed" and failed.error.code == "file_deleted" and failed.fine_tuned_model is None
    acme.fine_tuning.jobs.cancel(other.id)
    place.work()
    assert [status(c, j).status for c, j in ((acme, cat), (acme, later), (evil, dog))] == ["succeeded"] * 3
    failed = status(evil, bad)
    assert failed.status == "failed" and failed.error.code == "unusable_data"
    assert "no row of the rows of owner" in failed.error.message and "acme" not in failed.error.message
    assert sorted(place.store.names()) == ["acme:cat", "evil:cat"]
    assert [v.notes["job"] for v in place.store.versions("acme:cat")] == [cat.id, later.id]
    assert not torch.equal(flat(place.store, "acme:cat"), flat(place.store, "evil:cat"))


def test_validation_file_and_another_adapter_to_begin_from(place, model):
    client = place.openai()
    place.store.put("acme:ann", make_adapter(model))
    train, held = place.upload(chats(6, 1)), place.upload(chats(3, 2))
    fields = dict(training_file=train, validation_file=held, hyperparameters={"n_epochs": 3})
    job = client.fine_tuning.jobs.create(model="acme:ann", suffix="bob", **fields)
    with pytest.raises(BadRequestError) as e:
        client.fine_tuning.jobs.create(model="acme:ann", training_file=train, suffix="ann:x/y")
    assert e.value.response.json()["error"]["param"] == "suffix"
    place.work()
    job = client.fine_tuning.jobs.retrieve(job.id)
    assert job.status == "succeeded" and job.fine_tuned_model == "acme:bob" and job.hyperparameters.n_epochs == 3
    notes = place.store.versions("acme:bob")[0].notes
    assert (notes["examples"], notes["held_out"], notes["went_on_from"]) == ("6", "3", "acme:ann")
    assert place.store.current("acme:ann") == 1
    with pytest.raises(BadRequestError, match='There is a "acme:bob" already'):
        client.fine_tuning.jobs.create(model="acme:ann", training_file=train, suffix="bob")


def test_a_cancelled_job_never_goes_live(place):
    client = place.openai()
    waits = client.fine_tuning.jobs.create(model=BASE, training_file=place.upload(chats(8)), suffix="waits")
    assert client.fine_tuning.jobs.cancel(waits.id).status == "cancelled"
    runs = client.fine_tuning.jobs.create(model=BASE, training_file=place.upload(chats(8)), suffix="runs")
    stays = client.fine_tuning.jobs.create(model=BASE, training_file=place.upload(chats(8)), suffix="stays")
    runner = place.runner()
    runner.runs.gather()
    assert client.fine_tuning.jobs.cancel(runs.id).status == "cancelled"
    place.work()
    assert list(place.store.names()) == ["acme:stays"]
    assert client.fine_tuning.jobs.retrieve(stays.id).status == "succeeded"
    assert client.fine_tuning.jobs.retrieve(runs.id).status == "cancelled"
    with pytest.raises(BadRequestError, match="has succeeded already"):
        client.fine_tuning.jobs.cancel(stays.id)
    with pytest.raises(BadRequestError, match="has cancelled already"):
        client.fine_tuning.jobs.cancel(runs.id)


def test_a_run_whose_jobs_are_all_cancelled_stops(place):
    client = place.openai()
    job = client.fine_tuning.jobs.create(
        model=BASE, training_file=place.upload(chats(8)), suffix="ann", hyperparameters={"n_epochs": 100}
    )
    thread = threading.Thread(target=place.work)
    thread.start()
    deadline = time.monotonic() + 300
    while not list(place.folder.glob("state/runs/*/process.lock")):
        assert time.monotonic() < deadline
        time.sleep(0.05)
    client.fine_tuning.jobs.cancel(job.id)
    thread.join(60)
    assert not thread.is_alive() and not list(place.folder.glob("state/runs/*")) and not list(place.store.names())


# Bad input


@pytest.fixture
def quiet(tmp_path) -> Workplace:
    return Workplace(tmp_path, max_waiting=3)


def refused(place: Workplace, body, key: str = "acme") -> tuple[int, dict]:
    answer = place.http(key).post("/v1/fine_tuning/jobs", **({"json": body} if isinstance(body, dict) else {"content": body}))
    assert 400 <= answer.status_code < 500, answer.text
    return answer.status_code, answer.json()["error"]


def test_bad_requests(quiet):
    file = quiet.upload(chats(4))
    good = {"model": BASE, "training_file": file}
    for changes, param in [
        ({"suffix": "a/b"}, "suffix"), ({"suffix": "../x"}, "suffix"), ({"suffix": "a\x00"}, "suffix"),
        ({"suffix": "а"}, "suffix"),
        ({"suffix": "acme:ann"}, "suffix"),
        ({"suffix": ""}, "suffix"), ({"suffix": "x" * 65}, "suffix"), ({"suffix": "a@1-0"}, "suffix"), ({"suffix": 5}, "suffix"),
        ({"seed": -1}, "seed"), ({"seed": 1.5}, "seed"), ({"seed": True}, "seed"), ({"seed": 10**30}, "seed"),
        ({"hyperparameters": {"n_epochs": 0}}, "n_epochs"), ({"hyperparameters": {"n_epochs": "many"}}, "n_epochs"),
        ({"hyperparameters": {"batch_size": 1e9}}, "batch_size"), ({"hyperparameters": {"batch_size": True}}, "batch_size"),
        ({"hyperparameters": {"learning_rate_multiplier": -1}}, "learning_rate_multiplier"),
        ({"hyperparameters": {"rank": 4}}, "rank"), ({"hyperparameters": []}, "hyperparameters"),
        ({"method": {"type": "dpo", "dpo": {}}}, "method"), 
        ({"method": {"type": "supervised"}, "hyperparameters": {}}, "hyperparameters"),
        ({"integrations": [{"type": "wandb"}]}, "integrations"), ({"metadata": {str(i): "" for i in range(17)}}, "metadata"),
        ({"model": "evil:x"}, "model"), ({"model": "acme:none"}, "model"), ({"model": "../.."}, "model"),
        ({"model": None}, "model"),
        ({"training_file": "file-none"}, "training_file"), ({"training_file": "../../keys/x"}, "training_file"),
        ({"validation_file": "file-" + "0" * 40}, "validation_file"), ({"nonsense": 1}, "nonsense"),
    ]:  # fmt: skip
        status, error = refused(quiet, {**good, **changes})
        assert param in (error["param"] or ""), (changes, error)
        assert status == (404 if param in ("model", "training_file", "validation_file") and changes[param] else 400), (
            changes,
            status,
        )
    error = refused(quiet, {**good, "hyperparameters": {"n_epochs": 0, "batch_size": 9**9}})[1]
    assert (error["param"], error["message"]) == (
        "hyperparameters.n_epochs",
        "hyperparameters.n_epochs: Input should be 'auto', or Input should be greater than or equal to 1; "
        "hyperparameters.batch_size: Input should be 'auto', or Input should be less than or equal to 256",
    )
    for body in (
        b"",
        b"{",
        b"[]",
        b"\xff\xfe",
        b'{"model": NaN}',
        b'{"hyperparameters": {"learning_rate_multiplier": Infinity}}',
    ):
        refused(quiet, body)
    status, error = refused(quiet, {**good, "training_file": quiet.upload(chats(1))})
    assert (status, error["code"]) == (400, "too_few_rows")
    assert list(quiet.openai().fine_tuning.jobs.list()) == [] and not list(quiet.folder.glob("state/jobs/*/*"))


def test_a_job_of_too_many_examples(tmp_path):
    place = Workplace(tmp_path, max_examples=10)
    file = place.upload(chats(4))
    body = {"model": BASE, "training_file": file, "hyperparameters": {"n_epochs": 3}}
    status, error = refused(place, body)
    assert (status, error["code"]) == (400, "too_many_examples")
    assert error["message"].startswith("4 rows in 3 epochs are 12 examples, expected at most 10:")
    assert place.openai().fine_tuning.jobs.create(model=BASE, training_file=file).hyperparameters.n_epochs == 2
    assert refused(place, {"model": BASE, "training_file": place.upload(chats(6))})[1]["code"] == "too_many_examples"


def test_runs_are_taken_in_turn_by_tenant(tmp_path):
    """acme came first, with jobs of which no two may share a run."""
    place = Workplace(tmp_path)
    for key, count in (("acme", 4), ("evil", 2)):
        file = place.upload(chats(4), key)
        for seed in range(count):
            seed += 10 * (key == "evil")
            place.openai(key).fine_tuning.jobs.create(model=BASE, training_file=file, suffix=f"s{seed}", seed=seed)
    runs, gathered = place.runner().runs, []
    while (run := runs.gather()) is not None:
        gathered += [entry.name for entry in run.entries]
    assert gathered == ["acme:s0", "evil:s10", "acme:s1", "evil:s11", "acme:s2", "acme:s3"]


def test_a_run_with_room_for_few_takes_from_every_tenant(tmp_path):
    place = Workplace(tmp_path, max_owners=2)
    for key in ("acme", "acme", "acme", "evil"):
        place.openai(key).fine_tuning.jobs.create(model=BASE, training_file=place.upload(chats(4), key))
    run = place.runner().runs.gather()
    assert run is not None and [entry.folder for entry in run.entries] == ["acme=3a", "evil=3a"]


def test_gathering_ends_in_time(tmp_path, monkeypatch):
    """Deletions wait for it."""
    monkeypatch.setattr(runs_module, "HOLD_SECONDS", 0.0)
    place = Workplace(tmp_path)
    file = place.upload(chats(4))
    for _ in range(2):
        place.openai().fine_tuning.jobs.create(model=BASE, training_file=file)
    runs = place.runner().runs
    assert [len(run.entries) for run in (runs.gather(), runs.gather()) if run is not None] == [1, 1]


def test_too_many_waiting_jobs(quiet):
    client = quiet.openai()
    file = quiet.upload(chats(4))
    made = [client.fine_tuning.jobs.create(model=BASE, training_file=file) for _ in range(3)]
    with pytest.raises(RateLimitError) as e:
        client.fine_tuning.jobs.create(model=BASE, training_file=file)
    assert e.value.response.headers["retry-after"] == "30"
    quiet.openai("evil").fine_tuning.jobs.create(model=BASE, training_file=quiet.upload(chats(4), "evil"))
    client.fine_tuning.jobs.cancel(made[0].id)
    client.fine_tuning.jobs.create(model=BASE, training_file=file)


def test_what_a_crash_left_among_the_waiting_does_not_count_for_ever(quiet, monkeypatch):
    """Killed between the entry and the job, and between the job's end and the removal of the entry."""
    client, jobs = quiet.openai(), quiet.learning.jobs
    file = quiet.upload(chats(4))
    ended = client.fine_tuning.jobs.create(model=BASE, training_file=file).id
    client.fine_tuning.jobs.cancel(ended)
    hour_ago = f"ftjob-{time.time_ns() - 3601 * 10**9:016x}" + "0" * 24
    young = new_id("ftjob")
    for id in (ended, hour_ago, young):
        quiet.learning.records.write(f"waiting/{id}", {"tenant": "acme=3a"})
    with pytest.raises(RateLimitError):
        client.fine_tuning.jobs.create(model=BASE, training_file=file)
    assert jobs.waiting() == [] and quiet.learning.records.names("waiting") == [young]
    for _ in range(2):
        client.fine_tuning.jobs.create(model=BASE, training_file=file)


def test_jobs_that_come_at_once_are_all_counted(quiet):
    http, file = quiet.http(), quiet.upload(chats(4))
    ask = lambda _: http.post("/v1/fine_tuning/jobs", json={"model": BASE, "training_file": file}).status_code  # noqa: E731
    with ThreadPoolExecutor(12) as threads:
        codes = list(threads.map(ask, range(12)))
    assert sorted(codes) == [200] * 3 + [429] * 9


def test_a_page_of_jobs_reads_its_own_jobs_alone(tmp_path, monkeypatch):
    place = Workplace(tmp_path)
    client = place.openai()
    file = place.upload(chats(4))
    made = [client.fine_tuning.jobs.create(model=BASE, training_file=file).id for _ in range(6)]
    (place.folder / "state/jobs/acme=3a" / new_id("ftjob")).mkdir()  # its maker was killed, or it is being made
    read, asked = place.learning.records.read, []
    monkeypatch.setattr(place.learning.records, "read", lambda path, *needed: asked.append(path) or read(path, *needed))
    page = place.http().get("/v1/fine_tuning/jobs?limit=2").json()
    assert [job["id"] for job in page["data"]] == made[:-3:-1] and page["has_more"]
    assert not any(made[0] in path for path in asked) and sum("job.json" in path for path in asked) <= 4
    assert [job.id for job in client.fine_tuning.jobs.list(limit=3)] == made[::-1]
    assert not place.http().get("/v1/fine_tuning/jobs?limit=6").json()["has_more"]


@pytest.mark.parametrize("call", ["get", "stamp"])
def test_a_store_that_cannot_be_read_fails_the_job_without_a_word_of_where(tmp_path, model, monkeypatch, call):
    place = Workplace(tmp_path)
    place.store.put("acme:ann", make_adapter(model))
    client = place.openai()
    bad = client.fine_tuning.jobs.create(model="acme:ann", training_file=place.upload(chats(4))).id
    good = client.fine_tuning.jobs.create(model=BASE, training_file=place.upload(chats(4)), suffix="bob").id
    inner = getattr(place.store, call)

    def fail(name, *given):
        if name == "acme:ann":
            raise StoreError(f"can't read {tmp_path}/store/adapters/x: Input/output error.")
        return inner(name, *given)

    monkeypatch.setattr(place.store, call, fail)
    run = place.runner().runs.gather()
    assert run is not None and [entry.job for entry in run.entries] == [good]  # nobody else waits for it
    error = client.fine_tuning.jobs.retrieve(bad).error
    assert error.code == "adapter_damaged" and error.message == '"acme:ann" can\'t be read from the store.'
    assert str(tmp_path) not in place.http().get(f"/v1/fine_tuning/jobs/{bad}/events").text


@pytest.mark.parametrize("what", ["waiting/{job}", "jobs/acme=3a/{job}/job.json", "files/acme=3a/{file}.json", "turns/acme=3a"])
def test_a_damaged_record_stops_nobody_else(quiet, what):
    file = quiet.upload(chats(4))
    bad = quiet.openai().fine_tuning.jobs.create(model=BASE, training_file=file).id
    good = quiet.openai("evil").fine_tuning.jobs.create(model=BASE, training_file=quiet.upload(chats(4), "evil")).id
    path = quiet.folder / "state" / what.format(job=bad, file=file)
    path.parent.mkdir(exist_ok=True)
    path.write_bytes(b"\x00")
    run = quiet.runner().runs.gather()
    assert run is not None and good in [entry.job for entry in run.entries]
    if "files" in what:
        assert quiet.openai().fine_tuning.jobs.retrieve(bad).error.code == "file_damaged"
    assert (bad in [entry.job for entry in run.entries]) == ("turns" in what)


def test_another_tenants_job_is_answered_like_one_that_never_was(quiet):
    file = quiet.upload(chats(4))
    job = quiet.openai().fine_tuning.jobs.create(model=BASE, training_file=file, suffix="ann").id
    assert quiet.openai("acme2").fine_tuning.jobs.retrieve(job).id == job
    assert quiet.openai("admin").fine_tuning.jobs.retrieve(job).id == job
    evil, never = quiet.http("evil"), job[:-4] + ("aaaa" if not job.endswith("aaaa") else "bbbb")
    for method, path in (("GET", ""), ("GET", "/events"), ("GET", "/checkpoints"), ("POST", "/cancel")):
        answers = [evil.request(method, f"/v1/fine_tuning/jobs/{i}{path}") for i in (job, never)]
        assert [a.status_code for a in answers] == [404, 404]
        assert answers[0].text.replace(job, "X") == answers[1].text.replace(never, "X")
    assert (
        evil.get("/v1/fine_tuning/jobs").json()["data"] == []
        and evil.get(f"/v1/fine_tuning/jobs?after={job}").json()["data"] == []
    )
    status, error = refused(quiet, {"model": BASE, "training_file": file}, "evil")
    assert status == 404 and error["code"] == "file_not_found"
    assert quiet.openai().fine_tuning.jobs.retrieve(job).status == "queued"
    with pytest.raises(NotFoundError):
        quiet.openai().fine_tuning.jobs.retrieve("ftjob-none")
