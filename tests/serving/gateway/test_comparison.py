"""What a new version is compared with before it goes live: the one that was served when its training began, and is still."""

import json
import math
from dataclasses import replace

import pytest

from tests.serving.gateway.workplace import BASE, RESULT, Settling, Workplace, chats
from veralib.serving.gateway import promotion
from veralib.store import open_store


def test_what_is_worse_stays_out(settling):
    store = settling.place.store
    worse = settling.settle(settling.job(), loss_after=3.0001)
    assert worse.status == "failed" and worse.error.code == "not_better" and "the base model's: 3.0000" in worse.error.message
    assert worse.fine_tuned_model is None and "acme:ann" not in store and worse.trained_tokens == 60
    assert settling.settle(settling.job(), loss_after=3.0).status == "succeeded"  # not worse is enough
    worse = settling.settle(settling.job(), loss_after=3.5)
    assert "version 1, which stays live" in worse.error.message and store.current("acme:ann") == 1
    for changes, code in [
        ({"status": "diverged"}, "diverged"), ({"held_out": 0}, "nothing_held_out"), ({"loss_after": None}, "not_measured"),
        ({"loss_before": None}, "not_measured"),
    ]:  # fmt: skip
        assert settling.settle(settling.job(), **changes).error.code == code
    assert store.current("acme:ann") == 1


@pytest.mark.parametrize(
    "losses", [(math.inf, math.inf), (math.inf, 2.0), (3.0, math.inf), (math.nan, math.nan), (3.0, math.nan)]
)
def test_a_loss_that_is_not_finite_goes_not_live_and_not_into_an_answer(settling, losses):
    job = settling.job()
    error = settling.settle(job, loss_before=losses[0], loss_after=losses[1]).error
    assert error.code == "not_measured" and "isn't finite" in error.message and "acme:ann" not in settling.place.store
    answer = settling.place.http().get(f"/v1/fine_tuning/jobs/{job.id}/events")
    data = json.loads(answer.text, parse_constant=lambda word: pytest.fail(f"{word} is no JSON"))["data"]
    assert data[0]["data"]["held_out_loss"] == (losses[1] if math.isfinite(losses[1]) else None)


def test_a_version_that_went_live_meanwhile_is_not_overtaken(settling, adapter):
    job = settling.job()
    before = settling.entry(job)
    settling.place.store.put("acme:ann", adapter)
    assert settling.settle(job, before).error.code == "superseded"
    job = settling.job()
    before = settling.entry(job)
    settling.place.store.delete("acme:ann")
    assert settling.settle(job, before).error.code == "model_deleted"
    assert list(settling.place.store.names()) == []


def test_a_packed_store_that_is_compacted_supersedes_nothing(tmp_path, adapter):
    """The version lies elsewhere then. One of its number that came after a deletion isn't it."""
    place = Workplace(tmp_path, kind="packed")
    store, settling = place.store, Settling(place, adapter)
    store.put("acme:ann", replace(adapter, vectors={u: (2 * d, b) for u, (d, b) in adapter.vectors.items()}))
    store.rollback("acme:ann", store.put("acme:ann", adapter))
    client, file = place.openai(), place.upload(chats(4))

    def gathered():
        client.fine_tuning.jobs.create(model=BASE, training_file=file, suffix="ann")
        runs = place.runner().runs
        run = runs.gather()
        assert run is not None
        runs.remove(run)
        return place.learning.jobs.find("acme=3a", run.entries[0].job), run.entries[0]

    job, entry = gathered()
    open_store(store.root).compact()
    assert repr(store.stamp("acme:ann")) != entry.served
    assert settling.settle(job, entry).status == "succeeded"
    job, entry = gathered()
    store.delete("acme:ann")
    for _ in range(entry.version):
        store.put("acme:ann", adapter)
    assert store.current("acme:ann") == entry.version
    assert settling.settle(job, entry).error.code == "superseded"


def test_two_jobs_from_another_adapter_for_one_new_name_make_one_version(tmp_path, adapter):
    """The second began from ann and would be compared with ann, not with the bob that the first one made."""
    place = Workplace(tmp_path)
    place.store.put("acme:ann", adapter)
    client, file = place.openai(), place.upload(chats(4))
    first, second = (
        client.fine_tuning.jobs.create(model="acme:ann", training_file=file, suffix="bob", seed=seed).id for seed in (1, 2)
    )
    worker = place.runner()
    run = worker.runs.gather()
    assert run is not None and [entry.job for entry in run.entries] == [first]
    staged = open_store(tmp_path / "staged")
    staged.put("acme:bob", adapter)
    promotion.settle(place.learning, place.learning.jobs.find("acme=3a", first), run.entries[0], RESULT, staged)
    worker.runs.remove(run)
    assert worker.runs.gather() is None and place.store.current("acme:bob") == 1
    error = client.fine_tuning.jobs.retrieve(second).error
    assert error.code == "name_taken" and '"acme:bob" by now' in error.message
