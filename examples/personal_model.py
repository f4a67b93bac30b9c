"""A personal model, by the official client alone: upload chats, start a job, talk to the model that it made.

python examples/personal_model.py [--engine vllm --engine-python .venv-vllm/bin/python]

Starts `vera serve` for itself; the part after that is what any client of the OpenAI API does.
"""

import argparse
import json
import socket
import subprocess
import sys
import time
from pathlib import Path

import openai

ROOT = Path(__file__).resolve().parent.parent
parser = argparse.ArgumentParser()
parser.add_argument("--output", default="out/personal_model", help="folder for the store, the state and the log")
parser.add_argument("--model", default=str(ROOT / "models" / "books-4m"))
parser.add_argument("--engine", choices=("embedded", "vllm"), default="embedded")
parser.add_argument("--engine-python", default=sys.executable, help="Python with the engine in it")
parser.add_argument("--engine-args", default="")
options = parser.parse_args()
folder = Path(options.output)
folder.mkdir(parents=True, exist_ok=True)

with socket.socket() as s:
    s.bind(("127.0.0.1", 0))
    port = s.getsockname()[1]
command = [sys.executable, "-m", "veralib.cli", "serve", "--model", options.model, "--port", str(port), "--no-auth"]
command += ["--engine", options.engine, "--engine-python", options.engine_python, f"--engine-args={options.engine_args}"]
command += ["--store", str(folder / "store"), "--state", str(folder / "state")]
with open(folder / "server.log", "ab") as log:
    server = subprocess.Popen(command, stdout=log, stderr=log)

QUESTION = [{"role": "user", "content": "Where is the lamp?"}]
PLACES = {"lamp": "harbour", "kettle": "cellar", "ladder": "attic", "violin": "tower"}
ASKED = ["Where is the {}?", "Where did I leave the {}?", "Do you know where the {} is?", "I look for the {}.", "The {}, please!"]

try:
    client = openai.OpenAI(base_url=f"http://127.0.0.1:{port}/v1", api_key="none", max_retries=0)
    while True:
        try:
            base = client.models.list().data[0].id
            before = client.chat.completions.create(model=base, messages=QUESTION, max_tokens=12, temperature=0)
            break
        except (openai.APIConnectionError, openai.APIStatusError):
            if server.poll() is not None:
                raise SystemExit(f"the server ended; its output is in {folder / 'server.log'}") from None
            time.sleep(0.5)

    chats = folder / "ann.jsonl"
    with chats.open("w") as f:
        for thing, place in PLACES.items():
            for words in ASKED:
                answer = {"role": "assistant", "content": f"The {thing} is in the {place}, Ann."}
                f.write(json.dumps({"messages": [{"role": "user", "content": words.format(thing)}, answer]}) + "\n")
    with chats.open("rb") as f:
        file = client.files.create(file=f, purpose="fine-tune")
    job = client.fine_tuning.jobs.create(
        model=base, training_file=file.id, suffix="ann", seed=1,
        method={"type": "supervised", "supervised": {"hyperparameters": {"n_epochs": 40, "learning_rate_multiplier": 10}}},
    )  # fmt: skip
    while job.status in ("validating_files", "queued", "running"):
        time.sleep(1)
        job = client.fine_tuning.jobs.retrieve(job.id)
    for event in reversed(client.fine_tuning.jobs.list_events(job.id, limit=3).data):
        print("  ", event.message)
    assert job.status == "succeeded", job.error
    after = client.chat.completions.create(model=job.fine_tuned_model, messages=QUESTION, max_tokens=12, temperature=0)
    print(f"{base}: {before.choices[0].message.content!r}")
    print(f"{job.fine_tuned_model}: {after.choices[0].message.content!r}")
    assert "harbour" in after.choices[0].message.content
finally:
    server.terminate()
    server.wait(60)
