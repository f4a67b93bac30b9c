"""All of an owner or of a tenant can be removed: adapters, jobs, files, its part of a run; what others have stays."""

import fcntl
import time

import pytest

from tests.serving.gateway.conftest import small_adapter
from tests.serving.gateway.workplace import BASE, Workplace, chats, wait
from veralib.serving.gateway import deletion, runner, training
from veralib.serving.gateway import jobs as gateway_jobs
from veralib.serving.gateway.deletion import delete_jobs, delete_tenant, expire
from veralib.serving.gateway.deletions import Deletions, mark
from veralib.serving.gateway.keys import Keys
from veralib.serving.gateway.learning import Learning, LearningSettings
from veralib.serving.gateway.paging import new_id
from veralib.serving.gateway.runs import Runs
from veralib.store import open_store

JOBS = "rank: 8\nlr: 0.02\ngather_seconds: 0.0\nprogress_seconds: 0.0\nthreads: 1\nnice: 0\nbatch_rows: 8\nslots: 4\n"


@pytest.mark.slow
def test_nothing_of_a_deleted_owner_is_left_anywhere(world, tmp_path, model, adapter):
    """Over HTTP, with the gateway's own runner: not in files, jobs, versions, a run that trains or the engine. What others have
    stays, and their training goes on."""
    (tmp_path / "jobs.yaml").write_text(JOBS)
    url = world.gateway(model=str(model), model_name=BASE, jobs=str(tmp_path / "jobs.yaml"))
    client, http = world.client(url), world.http(url)
    secret = b"zebra7zebra7"
    upload = lambda content: client.files.create(file=("rows.jsonl", content), purpose="fine-tune").id  # noqa: E731
    mine = lambda: upload(chats(8).replace(b"cat", secret))  # noqa: E731
    shared = upload(chats(8, 3))
    for name in ("acme:secret-ann", "acme:bob"):
        world.store.put(name, adapter)
        client.completions.create(model=name, prompt="x")
    hyper = {"hyperparameters": {"n_epochs": 60}}
    ended = client.fine_tuning.jobs.create(model=BASE, training_file=mine(), suffix="secret-ann", **hyper)
    client.fine_tuning.jobs.cancel(ended.id)
    client.fine_tuning.jobs.create(model="acme:secret-ann", training_file=mine(), validation_file=shared, **hyper)
    other = client.fine_tuning.jobs.create(model="acme:bob", training_file=shared, **hyper)

    def texts() -> bytes:
        """All bytes of all files, and their names."""
        found = list(tmp_path.rglob("*"))
        return b"\n".join(str(p).encode() + b"\n" + (p.read_bytes() if p.is_file() else b"") for p in found)

    def left() -> list[bytes]:
        there = texts() + b"".join(name.encode() for name in world.fake.loaded)
        return [word for word in (secret, b"secret-ann", ended.id.encode()) if word in there]

    wait(lambda: list(tmp_path.glob("state/runs/*/fleet/progress-0.jsonl")))
    assert len(left()) == 3
    answer = http.delete("/v1/models/acme:secret-ann", timeout=400).json()
    assert answer["removed"].pop("runs", 1) == 1  # none where it had just trained to its end
    assert answer["removed"] == {"versions": 1, "jobs": 2, "files": 2, "loaded": 1}
    assert left() == []
    wait(lambda: client.fine_tuning.jobs.retrieve(other.id).status not in ("queued", "running"))
    assert client.fine_tuning.jobs.retrieve(other.id).status == "succeeded"
    wait(lambda: not list(tmp_path.glob("state/runs/*")))
    assert left() == []
    assert [f.id for f in client.files.list()] == [shared] and [j.id for j in client.fine_tuning.jobs.list()] == [other.id]
    assert [m.id for m in client.models.list()] == [BASE, "acme:ann", "acme:bob"]
    assert http.delete("/v1/models/acme:secret-ann").status_code == 404


@pytest.mark.parametrize("killed_at", ["remove", "forget"])
def test_a_deletion_that_was_killed_is_carried_to_its_end_by_the_next(settling, monkeypatch, killed_at):
    place = settling.place
    settling.job(), settling.job()
    uploads, jobs = place.learning.uploads, place.learning.jobs
    owner, calls = {"remove": uploads, "forget": jobs}[killed_at], []
    inner = getattr(owner, killed_at)

    def kill(what):
        if calls:
            raise KeyboardInterrupt
        calls.append(inner(what))

    with monkeypatch.context() as m:
        m.setattr(owner, killed_at, kill)
        with pytest.raises(KeyboardInterrupt):
            delete_jobs(place.learning, "acme:ann")
    delete_jobs(place.learning, "acme:ann")
    assert not [
        p for part in ("files", "jobs", "waiting", "owners") for p in place.folder.glob(f"state/{part}/**/*") if p.is_file()
    ]


def test_a_deletion_leaves_the_file_of_another_tenant(tmp_path):
    """An admin may train acme's adapter on evil's file; that acme deletes the adapter is nothing to evil."""
    place = Workplace(tmp_path)
    theirs, admins = place.upload(chats(4), "evil"), place.upload(chats(4), "admin")
    for file in (theirs, admins):
        place.openai("admin").fine_tuning.jobs.create(model=BASE, training_file=file, suffix="acme:ann")
    assert delete_jobs(place.learning, "acme:ann")["files"] == 1
    assert [f.id for f in place.openai("evil").files.list()] == [theirs]
    assert [f.id for f in place.openai("admin").files.list()] == [theirs]


def test_deletion_without_a_runner_takes_the_owner_out_of_a_run_that_waits(place):
    client = place.openai()
    for suffix in ("ann", "bob"):
        client.fine_tuning.jobs.create(model=BASE, training_file=place.upload(chats(8)), suffix=suffix)
    place.runner().runs.gather()
    assert delete_jobs(place.learning, "acme:ann") == {"jobs": 1, "files": 1, "runs": 1, "runs_pending": 0}
    (run,) = Runs(place.learning).all()
    assert [e.name for e in run.entries] == ["acme:bob"] and b"acme:ann" not in place.texts()
    assert delete_jobs(place.learning, "acme:bob")["runs"] == 1 and not Runs(place.learning).all()


def test_a_run_that_cannot_be_stopped_here_is_pending(tmp_path, monkeypatch):
    """Its process runs on another machine, whose gateway died."""
    place = Workplace(tmp_path)
    for suffix in ("ann", "bob"):
        place.openai().fine_tuning.jobs.create(model=BASE, training_file=place.upload(chats(4)), suffix=suffix)
    run = place.runner().runs.gather()
    folder = tmp_path / "state" / run.folder
    (folder / "process.json").write_text('{"pid": 1, "host": "another"}')
    monkeypatch.setattr(deletion, "WAIT_SECONDS", 0.5)
    with open(folder / "process.lock", "ab") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        counts = delete_jobs(place.learning, "acme:ann")
        assert (counts["runs"], counts["runs_pending"]) == (0, 1) and (folder / "data/acme:ann.jsonl").exists()
    assert deletion._take_out(place.learning, {run.entries[0].job}, "acme:ann".__eq__) == {"runs": 1, "runs_pending": 0}
    assert not (folder / "data/acme:ann.jsonl").exists() and (folder / "data/acme:bob.jsonl").exists()


def test_a_run_whose_record_is_damaged_is_pending_for_its_owners_alone_until_a_runner_ends_it(tmp_path):
    place = Workplace(tmp_path)
    keys, deletions = Keys(tmp_path / "state"), Deletions(tmp_path / "state")
    for suffix in ("ann", "bob"):
        place.openai().fine_tuning.jobs.create(model=BASE, training_file=place.upload(chats(4)), suffix=suffix)
    folder = tmp_path / "state" / place.runner().runs.gather().folder
    (folder / "run.json").write_text("{")
    assert delete_jobs(place.learning, "acme:ann") == {"jobs": 1, "files": 1, "runs": 0, "runs_pending": 1}
    assert delete_jobs(place.learning, "acme:eve")["runs_pending"] == 0
    assert delete_tenant(place.learning, keys, deletions, "evil:")[0]["runs_pending"] == 0
    assert delete_tenant(place.learning, keys, deletions, "acme:")[0]["runs_pending"] == 1
    place.runner().step()
    assert not folder.exists() and delete_jobs(place.learning, "acme:bob")["runs_pending"] == 0


def test_an_owner_whose_part_of_a_run_cannot_be_removed_is_pending(tmp_path, adapter, monkeypatch):
    """And goes when the run is taken up; one who isn't in the fleet's folder yet is no failure."""
    place = Workplace(tmp_path)
    for suffix in ("ann", "bob", "eve"):
        place.openai().fine_tuning.jobs.create(model=BASE, training_file=place.upload(chats(4)), suffix=suffix)
    run = place.runner().runs.gather()
    fleet = tmp_path / "state" / run.folder / "fleet"
    staged = open_store(fleet / "store")
    for suffix in ("ann", "bob"):
        staged.put(f"acme:{suffix}", adapter)
    (fleet / "run.json").write_text('{"settings": {"store": null}, "labels": []}')
    with monkeypatch.context() as m:
        m.setattr(training.sys, "executable", "/bin/false")
        counts = delete_jobs(place.learning, "acme:ann")
    assert (counts["runs"], counts["runs_pending"]) == (0, 1) and "acme:ann" in staged
    runs = Runs(place.learning)
    assert [entry.name for entry in runs.read(run.id).entries] == ["acme:ann", "acme:bob", "acme:eve"]
    worker = place.runner()
    runner._Carrying(worker, runs.read(run.id))._drop_deleted()
    place.learning.records.release(run.lease, worker.id)
    assert [entry.name for entry in runs.read(run.id).entries] == ["acme:bob", "acme:eve"] and "acme:ann" not in staged
    assert delete_jobs(place.learning, "acme:eve")["runs"] == 1


def test_all_of_a_tenant_goes_and_nothing_of_others(tmp_path, adapter):
    """Its files without a job too, and what an admin did for it."""
    place = Workplace(tmp_path)
    keys, deletions = Keys(tmp_path / "state"), Deletions(tmp_path / "state")
    for prefix in ("acme:", "acme:", "evil:"):
        keys.add(prefix)
    keys.add(admin=True)
    for name in ("acme:ann", "acme:ann", "acme:bob", "evil:ann"):
        place.store.put(name, adapter)
    acme, evil, admin = (place.openai(key) for key in ("acme", "evil", "admin"))
    running = acme.fine_tuning.jobs.create(model="acme:ann", training_file=place.upload(chats(4)))
    stays = evil.fine_tuning.jobs.create(model="evil:ann", training_file=place.upload(chats(4), "evil"))
    run = place.runner().runs.gather()
    assert run is not None and {entry.job for entry in run.entries} == {running.id, stays.id}
    admins = [place.upload(chats(4), "admin") for _ in range(2)]
    admin.fine_tuning.jobs.create(model=BASE, training_file=admins[0], suffix="acme:new")
    acme.fine_tuning.jobs.create(model=BASE, training_file=place.upload(chats(4)))
    place.upload(chats(4))
    place.upload(chats(4), "evil")
    counts, names = delete_tenant(place.learning, keys, deletions, "acme:")
    assert counts == {"keys": 2, "jobs": 3, "files": 4, "runs": 1, "runs_pending": 0, "versions": 3}
    assert sorted(names) == ["acme:ann", "acme:bob"]
    left = place.texts()
    assert b"acme" not in left.replace(str(tmp_path).encode(), b""), "a file or a file's name tells of it"
    assert {path.name for path in (tmp_path / "state/deleted").iterdir()} == {mark(name) for name in names}
    assert list(place.store.names()) == ["evil:ann"] and [key.prefix for key in keys.list()] == ["", "evil:"]
    assert [job.id for job in admin.fine_tuning.jobs.list()] == [stays.id] and len(list(evil.files.list())) == 2
    assert admins[1] in [file.id for file in admin.files.list()] and evil.fine_tuning.jobs.retrieve(stays.id).status == "running"
    counts, names = delete_tenant(place.learning, keys, deletions, "acme:")
    assert not names and not any(counts.values())


def test_what_comes_while_its_tenant_is_erased_is_refused_and_not_kept(world, tmp_path, monkeypatch):
    """An upload whose body is under way, and a job whose key was good when it came."""
    url = world.gateway(trains=False, model="nowhere", model_name=BASE)
    keys, other = Keys(world.state), Learning(world.state, world.store, LearningSettings(None, ""))
    client, http, jobs = world.client(url), world.http(url), world.apps[0].state.learning.jobs
    erase = lambda: delete_tenant(other, keys, Deletions(world.state), "acme:")  # noqa: E731
    file = client.files.create(file=("rows.jsonl", chats(4)), purpose="fine-tune").id
    add = jobs.add

    def late(*given):
        erase()
        return add(*given)

    monkeypatch.setattr(jobs, "add", late)
    answer = http.post("/v1/fine_tuning/jobs", json={"model": BASE, "training_file": file, "suffix": "zebra"})
    assert answer.status_code == 401 and answer.json()["error"]["code"] == "invalid_api_key"
    world.keys["acme"] = keys.add("acme:")[0]
    field = 'Content-Disposition: form-data; name="%s"'

    def body():
        yield f"--x\r\n{field % 'purpose'}\r\n\r\nfine-tune\r\n--x\r\n{field % 'file'}; filename=zebra\r\n\r\n".encode() + chats(
            2
        )
        time.sleep(0.5)
        erase()
        yield chats(2) + b"\r\n--x--\r\n"

    headers = {"Content-Type": "multipart/form-data; boundary=x"}
    answer = world.http(url).post("/v1/files", content=body(), headers=headers)
    assert answer.status_code == 401 and answer.json()["error"]["code"] == "invalid_api_key"
    left = [
        path
        for path in (tmp_path / "state").rglob("*")
        if "acme" in path.name or (path.is_file() and b"acme" in path.read_bytes())
    ]
    assert left == []
    world.keys["acme"] = keys.add("acme:")[0]
    assert not list(world.client(url).files.list()) and not list(world.client(url).fine_tuning.jobs.list())
    assert world.client(url).files.create(file=("rows.jsonl", chats(4)), purpose="fine-tune").id


@pytest.mark.parametrize("damage", [b"", b"[]"])
def test_a_damaged_record_hinders_no_deletion_and_no_other_tenants_retention(tmp_path, damage):
    """Of a file, of a job and of a job's end."""
    place = Workplace(tmp_path, job_days=2.0)
    keys, deletions, state = Keys(tmp_path / "state"), Deletions(tmp_path / "state"), tmp_path / "state"
    create = lambda who, file, name: place.openai(who).fine_tuning.jobs.create(model=BASE, training_file=file, suffix=name).id  # noqa: E731
    bad = {who: [place.upload(chats(4), who) for _ in range(3)] for who in ("acme", "evil")}
    jobs = {who: [create(who, file, f"u{n}") for n, file in enumerate(bad[who])] for who in bad}
    sound = place.upload(chats(4))
    old = create("acme", sound, "old")
    for job in (jobs["acme"][0], old):
        place.openai().fine_tuning.jobs.cancel(job)
    path = state / f"jobs/acme=3a/{old}/end.json"
    path.write_text(path.read_text().replace('"at": 1', '"at": 0.'))
    place.openai().files.delete(sound)
    (state / f"jobs/acme=3a/{jobs['acme'][0]}/end.json").write_bytes(damage)
    for who in bad:
        (state / f"files/{who}=3a/{bad[who][1]}.json").write_bytes(damage)
        (state / f"jobs/{who}=3a/{jobs[who][2]}/job.json").write_bytes(damage)
    assert expire(place.learning) == 1 and not path.exists()
    assert [file.id for file in place.openai().files.list()] == [bad["acme"][2], bad["acme"][0]]
    assert [job.id for job in place.openai().fine_tuning.jobs.list()] == [jobs["acme"][1]]
    assert delete_jobs(place.learning, "acme:u1")["files"] == 1 and not list(state.glob(f"files/*/{bad['acme'][1]}*"))
    counts = delete_jobs(place.learning, "acme:u2")
    assert (counts["jobs"], counts["files"]) == (1, 1) and not list(state.glob(f"jobs/*/{jobs['acme'][2]}"))
    assert not list(state.glob(f"files/*/{bad['acme'][2]}*"))
    assert not [path for path in state.rglob("*") if "u2" in path.name and "acme" in path.name]
    counts, _ = delete_tenant(place.learning, keys, deletions, "evil:")
    assert (counts["files"], counts["jobs"]) == (3, 3)
    assert not [path for path in state.rglob("*") if "evil" in path.name or path.name in (*bad["evil"], *jobs["evil"])]
    assert [file.id for file in place.openai().files.list()] == [bad["acme"][0]]


def test_whoever_cant_be_taken_out_of_a_run_ends_it_and_the_others_train_in_another(tmp_path, monkeypatch):
    place = Workplace(tmp_path)
    jobs = {
        who: place.openai().fine_tuning.jobs.create(model=BASE, training_file=place.upload(chats(4)), suffix=who).id
        for who in ("ann", "bob")
    }
    run = place.runner().runs.gather()

    def no_memory(folder, name):
        raise training.ForgetFailed("no memory to import torch")

    monkeypatch.setattr(training, "forget", no_memory)
    assert delete_jobs(place.learning, "acme:ann")["runs_pending"] == 1
    place.runner().step()
    assert not (tmp_path / "state" / run.folder).exists() and not list((tmp_path / "state").rglob("*ann*"))
    again = place.runner().runs.gather()
    assert again.id != run.id and [entry.job for entry in again.entries] == [jobs["bob"]] and again.attempts == 0


def test_a_record_without_its_fields_stops_no_queue_and_no_list(tmp_path):
    place = Workplace(tmp_path)
    create = lambda who: place.openai().fine_tuning.jobs.create(model=BASE, training_file=place.upload(chats(4)), suffix=who).id  # noqa: E731
    bad, ended, good = (create(who) for who in ("a", "b", "c"))
    place.openai().fine_tuning.jobs.cancel(ended)
    state = tmp_path / "state"
    (state / f"waiting/{bad}").write_text("{}")
    (state / f"jobs/acme=3a/{ended}/end.json").write_text("{}")
    assert create("d")
    assert next(iter(place.learning.jobs.waiting())).id == good
    listed = {job.id for job in place.openai().fine_tuning.jobs.list()}
    assert {bad, good} < listed and ended not in listed


def test_an_erased_tenants_damaged_adapters_go_whose_names_only_their_records_know(tmp_path):
    place = Workplace(tmp_path)
    for name in ("acme:" + "A" * 50, "evil:" + "A" * 50, "acme:ann"):
        place.store.put(name, small_adapter())
    for file in place.store.files.root.glob("adapters/*/*~*/*.vera"):
        file.write_bytes(file.read_bytes()[:-1])
    counts, _ = delete_tenant(place.learning, Keys(tmp_path / "state"), Deletions(tmp_path / "state"), "acme:")
    left = [path.parent.name for path in place.store.files.root.glob("adapters/*/*/*.vera")]
    assert counts["versions"] == 2 and len(left) == 1 and left[0].startswith("evil=3a")


def test_a_file_that_an_admins_job_waits_for_stays(tmp_path):
    place = Workplace(tmp_path)
    file = place.upload(chats(4))
    place.store.put("acme:two", small_adapter())
    place.openai().fine_tuning.jobs.create(model=BASE, training_file=file, suffix="ann")
    place.openai("admin").fine_tuning.jobs.create(model="acme:two", training_file=file)
    counts = delete_jobs(place.learning, "acme:ann")
    assert (counts["jobs"], counts["files"]) == (1, 0) and [f.id for f in place.openai().files.list()] == [file]


def test_what_a_killed_deletion_left_in_an_adapters_list_goes_with_the_next(tmp_path, monkeypatch):
    place = Workplace(tmp_path)
    place.openai().fine_tuning.jobs.create(model=BASE, training_file=place.upload(chats(4)), suffix="ann")
    records, real = place.learning.records, place.learning.records.remove

    def killed(path):
        real(path)
        if path.startswith("jobs/"):
            raise KeyboardInterrupt

    monkeypatch.setattr(records, "remove", killed)
    with pytest.raises(KeyboardInterrupt):
        delete_jobs(place.learning, "acme:ann")
    monkeypatch.setattr(records, "remove", real)
    delete_jobs(place.learning, "acme:ann")
    assert list((tmp_path / "state/owners").rglob("*ann*"))  # young: its job may just be written
    monkeypatch.setattr(gateway_jobs, "STALE_SECONDS", 0.0)
    delete_jobs(place.learning, "acme:ann")
    assert not list((tmp_path / "state/owners").rglob("*ann*"))


def test_jobs_that_ended_long_ago_are_forgotten(tmp_path):
    """But not what a deletion needs: an adapter's last job with a file that is there."""
    place = Workplace(tmp_path, job_days=2.0)
    client, records = place.openai(), place.learning.records
    kept, gone = place.upload(chats(4)), place.upload(chats(4))

    def make(file: str, suffix: str, days: float | None) -> str:
        job = client.fine_tuning.jobs.create(model=BASE, training_file=file, suffix=suffix).id
        if days is not None:
            client.fine_tuning.jobs.cancel(job)
            path = f"jobs/acme=3a/{job}/end.json"
            end = records.read(path)
            assert end is not None
            records.write(path, {**end, "at": time.time() - days * 86400})
        return job

    old = [make(kept, "ann", 3.0), make(kept, "ann", 3.0), make(gone, "ann", 3.0), make(kept, "bob", 3.0)]
    young = [make(gone, "ann", 1.0), make(kept, "ann", None)]
    client.files.delete(gone)
    last = make(kept, "bob", 3.0)
    damaged = place.folder / "state/jobs/_all" / new_id("ftjob")
    damaged.mkdir(parents=True)
    (damaged / "job.json").write_bytes(b"\x00")
    assert expire(place.learning) == 4
    assert [job.id for job in client.fine_tuning.jobs.list()] == [last, *young[::-1]]
    assert not [path for path in place.folder.rglob("*") if any(job in path.name for job in old)]
    assert expire(place.learning) == 0
    client.fine_tuning.jobs.cancel(young[1])
    delete_jobs(place.learning, "acme:bob")
    assert [file.id for file in client.files.list()] == [kept] and delete_jobs(place.learning, "acme:ann")["files"] == 1
