"""The whole gateway: with a real key, over HTTP, from an upload to an answer by the personal model and its deletion."""

import time

import pytest

from tests.serving.gateway.workplace import chats, make_model
from veralib import ConfigError
from veralib.serving.gateway.learning import LearningSettings, read_settings
from veralib.serving.names import engine_name

JOBS = "rank: 8\nepochs: 2\nlr: 2e-2\ngather_seconds: 0.0\nthreads: 1\nnice: 0\n"


def test_upload_job_answer_and_deletion_through_the_gateway(world, tmp_path):
    (tmp_path / "jobs.yaml").write_text(JOBS.replace("2e-2", "0.02"))
    model = make_model(tmp_path / "tiny")
    url = world.gateway(model=str(model), model_name="tiny", jobs=str(tmp_path / "jobs.yaml"))
    client = world.client(url)
    file = client.files.create(file=("cats.jsonl", chats(10)), purpose="fine-tune")
    job = client.fine_tuning.jobs.create(model="tiny", training_file=file.id, suffix="dora")
    deadline = time.monotonic() + 400
    while (job := client.fine_tuning.jobs.retrieve(job.id)).status in ("queued", "running"):
        assert time.monotonic() < deadline
        client.chat.completions.create(model="acme:ann", messages=[{"role": "user", "content": "hi"}], max_tokens=4)  # meanwhile
        time.sleep(0.2)
    assert job.status == "succeeded" and job.fine_tuned_model == "acme:dora", job.error
    client.chat.completions.create(model=job.fine_tuned_model, messages=[{"role": "user", "content": "hi"}], max_tokens=4)
    assert engine_name(world.store, "acme:dora") in str(world.fake.__dict__)  # what the engine was asked for
    assert "acme:dora" in [m.id for m in client.models.list()]
    versions = world.http(url).get("/v1/models/acme:dora/versions").json()["data"]
    assert [v["notes"]["job"] for v in versions] == [job.id]
    removed = world.http(url).delete("/v1/models/acme:dora").json()["removed"]
    assert removed.pop("runs", 1) == 1  # where its run hasn't been cleared away yet
    assert removed | {"loaded": 0} == {"versions": 1, "jobs": 1, "files": 1, "loaded": 0}
    assert list(client.files.list()) == [] and list(client.fine_tuning.jobs.list()) == []
    assert world.http(url, "globex").get(f"/v1/fine_tuning/jobs/{job.id}").status_code == 404


def test_without_a_model_no_job_is_taken(world):
    client = world.client(world.gateway())
    file = client.files.create(file=("cats.jsonl", chats(10)), purpose="fine-tune")
    with pytest.raises(Exception, match="started without --model"):
        client.fine_tuning.jobs.create(model="tiny", training_file=file.id)


def test_settings_of_jobs(tmp_path):
    path = tmp_path / "jobs.yaml"
    path.write_text(JOBS)
    with pytest.raises(ConfigError, match="lr is '2e-2', expected a number"):  # YAML 1.1 reads no exponent without a point
        read_settings(path, "m", "tiny")
    path.write_text("rank: 16\n")
    assert read_settings(path, "m", "tiny") == LearningSettings("m", "tiny", rank=16)
    for text, message in (
        ("colour: red", "holds colour, expected"),
        ("- a", "holds list"),
        ("a: [", "can't read"),
        ("epochs: 0", "epochs is 0"),
        ("held_out: 0", "no version goes live unmeasured"),
        ("rank: -1", "rank is -1"),
    ):
        path.write_text(text)
        with pytest.raises(ConfigError, match=message):
            read_settings(path, "m", "tiny")
    with pytest.raises(ConfigError, match="can't read"):
        read_settings(tmp_path / "none.yaml", "m", "tiny")
