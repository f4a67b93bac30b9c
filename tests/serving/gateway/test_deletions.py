"""All of an owner can be removed: adapters, jobs, files, its part of a run; what others have stays."""

import pytest

from tests.serving.gateway.workplace import BASE, Workplace, chats, wait
from veralib.serving.gateway.deletion import delete_owner
from veralib.serving.gateway.runs import Runs


@pytest.mark.slow
def test_nothing_of_a_deleted_owner_is_left_anywhere(place, adapter):
    """Not in files, jobs, versions or a run that trains; what others have stays, and their training goes on."""
    client = place.openai()
    secret = b"zebra7zebra7"
    mine = lambda: chats(8).replace(b"cat", secret)  # noqa: E731
    shared = place.upload(chats(8, 3))
    for name in ("acme:secret-ann", "acme:bob"):
        place.store.put(name, adapter)
    waiting = client.fine_tuning.jobs.create(model=BASE, training_file=place.upload(mine()), suffix="secret-ann")
    hyper = {"hyperparameters": {"n_epochs": 60}}
    client.fine_tuning.jobs.cancel(waiting.id)
    client.fine_tuning.jobs.create(model="acme:secret-ann", training_file=place.upload(mine()), validation_file=shared, **hyper)
    other = client.fine_tuning.jobs.create(model="acme:bob", training_file=shared, **hyper)
    worker = place.runner()
    worker.start()
    try:
        wait(lambda: list(place.folder.glob("state/runs/*/fleet/progress-0.jsonl")))
        assert secret in place.texts() and b"secret-ann" in place.texts()
        removed = delete_owner(place.learning, "acme:secret-ann")
        assert removed == {"versions": 1, "jobs": 2, "files": 2, "runs": 1, "runs_pending": 0}
        left = place.texts()
        assert secret not in left and b"secret-ann" not in left and b"secret=2dann" not in left and b"secret-ann" not in left
        wait(lambda: client.fine_tuning.jobs.retrieve(other.id).status not in ("queued", "running"))
    finally:
        worker.stop()
    assert client.fine_tuning.jobs.retrieve(other.id).status == "succeeded"
    assert list(place.store.names()) == ["acme:bob"] and [f.id for f in client.files.list()] == [shared]
    left = place.texts()
    assert secret not in left and b"secret-ann" not in left
    assert delete_owner(place.learning, "acme:secret-ann") == dict.fromkeys(removed, 0)


@pytest.mark.parametrize("killed_at", ["delete", "forget"])
def test_a_deletion_that_was_killed_is_carried_to_its_end_by_the_next(settling, monkeypatch, killed_at):
    place = settling.place
    settling.job(), settling.job()
    uploads, jobs = place.learning.uploads, place.learning.jobs
    owner, calls = {"delete": uploads, "forget": jobs}[killed_at], []
    inner = getattr(owner, killed_at)

    def kill(what):
        if calls:
            raise KeyboardInterrupt
        calls.append(inner(what))

    with monkeypatch.context() as m:
        m.setattr(owner, killed_at, kill)
        with pytest.raises(KeyboardInterrupt):
            delete_owner(place.learning, "acme:ann")
    delete_owner(place.learning, "acme:ann")
    assert not [
        p for part in ("files", "jobs", "waiting", "owners") for p in place.folder.glob(f"state/{part}/**/*") if p.is_file()
    ]


def test_a_deletion_leaves_the_file_of_another_tenant(tmp_path):
    """An admin may train acme's adapter on evil's file; that acme deletes the adapter is nothing to evil."""
    place = Workplace(tmp_path)
    theirs, admins = place.upload(chats(4), "evil"), place.upload(chats(4), "admin")
    for file in (theirs, admins):
        place.openai("admin").fine_tuning.jobs.create(model=BASE, training_file=file, suffix="acme:ann")
    assert delete_owner(place.learning, "acme:ann")["files"] == 1
    assert [f.id for f in place.openai("evil").files.list()] == [theirs]
    assert [f.id for f in place.openai("admin").files.list()] == [theirs]


def test_deletion_without_a_runner_takes_the_owner_out_of_a_run_that_waits(place):
    client = place.openai()
    for suffix in ("ann", "bob"):
        client.fine_tuning.jobs.create(model=BASE, training_file=place.upload(chats(8)), suffix=suffix)
    place.runner().runs.gather()
    assert delete_owner(place.learning, "acme:ann") == {"versions": 0, "jobs": 1, "files": 1, "runs": 1, "runs_pending": 0}
    (run,) = Runs(place.learning).all()
    assert [e.name for e in run.entries] == ["acme:bob"] and b"acme:ann" not in place.texts()
    assert delete_owner(place.learning, "acme:bob")["runs"] == 1 and not Runs(place.learning).all()
