"""`vera serve --engine vllm`: the gateway in front of real vLLM, asked by the official client."""

import json
import sys
import time

import pytest

pytest.importorskip("vllm", reason="needs vLLM: make test-vllm builds an environment with it and runs this there")

import httpx2
import openai
from prometheus_client.parser import text_string_to_metric_families

from .served import MODEL, PROMPT, Served

PLACES = {"lamp": "harbour", "kettle": "cellar"}
ASKED = ("Where is the {}?", "Where did I leave the {}?", "Do you know where the {} is?", "I look for the {}.")


class Gateway(Served):
    """Both in processes of their own, without keys."""

    def __init__(self, folder) -> None:
        super().__init__(folder)
        command = [
            sys.executable, "-m", "veralib.cli", "serve", "--no-auth", "--port", str(self.port), "--model", str(MODEL),
            "--engine", "vllm", "--store", str(folder / "store"), "--state", str(folder / "state"), "--max-rank", "64",
            "--slots", "4", "--resident", "32", "--engine-args=--dtype float32 --max-model-len 512 --enforce-eager",
        ]  # fmt: skip
        self.start(command, {}, "/ready")

    def streamed(self, name):
        """The text, put together."""
        chunks = self.client.completions.create(model=name, prompt=PROMPT, max_tokens=12, temperature=0, stream=True)
        return "".join(chunk.choices[0].text for chunk in chunks if chunk.choices)

    def metrics(self):
        """The page's samples without labels."""
        families = text_string_to_metric_families(httpx2.get(self.url + "/metrics").text)
        return {s.name: s.value for family in families for s in family.samples if not s.labels}


@pytest.fixture(scope="module")
def gateway(tmp_path_factory):
    gateway = Gateway(tmp_path_factory.mktemp("gateway"))
    for draw, name in enumerate(("ann", "bob"), start=1):
        gateway.put(name, draw)
    yield gateway
    gateway.end()


def test_answers_equal_the_merged_models_whole_and_streamed(gateway):
    texts = {name: gateway.merged(name) for name in (None, "ann", "bob")}
    assert len(set(texts.values())) == 3
    for name, text in texts.items():
        called = name or "books-4m"
        assert gateway.ask(called) == (called, text) and gateway.streamed(called) == text


def test_a_new_version_answers_the_next_request(gateway):
    old = gateway.merged("ann")
    assert gateway.ask("ann") == ("ann", old)
    gateway.put("ann", 11)
    assert gateway.ask("ann") == ("ann", gateway.merged("ann")) != ("ann", old)


def test_a_client_that_leaves_takes_its_request_out_of_the_engine(gateway):
    """Again while a whole answer was over before the client had left: an engine that never heard of it writes one each time."""
    whole, written, running, deadline = 480, 480.0, 0.0, time.monotonic() + 60
    while written == whole or running != 1:  # vLLM counts what runs after the step
        assert time.monotonic() < deadline, f"the last request wrote {written:.0f} tokens of {whole}"
        start = gateway.metrics()["vera_engine_generation_tokens_total"]
        stream = gateway.client.completions.create(
            model="bob", prompt=PROMPT, max_tokens=whole, temperature=0, stream=True, extra_body={"ignore_eos": True}
        )
        next(iter(stream))
        before = gateway.metrics()
        stream.close()
        while (now := gateway.metrics())["vera_engine_requests_running"] or now["vera_running"]:
            assert time.monotonic() < deadline
        running, written = before["vera_engine_requests_running"], now["vera_engine_generation_tokens_total"] - start
    assert 0 < written < whole and before["vera_running"] == 1
    assert now["vera_disconnects_total"] == before["vera_disconnects_total"] + 1
    time.sleep(0.5)
    assert gateway.metrics()["vera_engine_generation_tokens_total"] == start + written


def test_a_deleted_adapter_leaves_the_engine_with_all_its_versions(gateway):
    before = gateway.metrics()
    for draw in (21, 22, 23):
        gateway.put("cal", draw)
        gateway.ask("cal")
    now = gateway.metrics()
    adapters, size, missed = (f"vera_engine_{n}" for n in ("resident_adapters", "resident_bytes", "adapter_misses_total"))
    assert now[adapters] == before[adapters] + 3 and now[missed] == before[missed] + 3 and now[size] > before[size] > 0
    answer = httpx2.delete(gateway.url + "/v1/models/cal", timeout=60).json()
    assert answer["deleted"] and answer["removed"]["loaded"] == 3 and answer["removed"]["versions"] == 3
    after = gateway.metrics()
    assert (after[adapters], after[size]) == (before[adapters], before[size])
    assert gateway.refused("cal")[0] == 404


def test_upload_job_personal_model(gateway, tmp_path):
    chats = tmp_path / "dot.jsonl"
    with chats.open("w") as f:
        for thing, place in PLACES.items():
            for words in ASKED:
                answer = {"role": "assistant", "content": f"The {thing} is in the {place}, Dot."}
                f.write(json.dumps({"messages": [{"role": "user", "content": words.format(thing)}, answer]}) + "\n")
    client = gateway.client
    file = client.files.create(file=chats, purpose="fine-tune")
    job = client.fine_tuning.jobs.create(
        model="books-4m", training_file=file.id, suffix="dot", seed=1,
        method={"type": "supervised", "supervised": {"hyperparameters": {"n_epochs": 30, "learning_rate_multiplier": 10}}},
    )  # fmt: skip
    deadline = time.monotonic() + 300
    while job.status in ("validating_files", "queued", "running"):
        assert time.monotonic() < deadline
        assert gateway.ask("bob")[0] == "bob"  # generation goes on
        time.sleep(0.3)
        job = client.fine_tuning.jobs.retrieve(job.id)
    assert job.status == "succeeded", job.error
    question = [{"role": "user", "content": "Where is the lamp?"}]
    answer = client.chat.completions.create(model=job.fine_tuned_model, messages=question, max_tokens=12, temperature=0)
    assert "harbour" in answer.choices[0].message.content
    removed = httpx2.delete(f"{gateway.url}/v1/models/{job.fine_tuned_model}", timeout=100).json()["removed"]
    assert removed["files"] == removed["jobs"] == removed["versions"] == removed["loaded"] == 1
    with pytest.raises(openai.NotFoundError):
        client.fine_tuning.jobs.retrieve(job.id)
