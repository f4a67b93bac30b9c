"""A personal model that keeps learning: ten rounds of updates for each user, through the gateway's own API.

    python -m experiments.rounds [--model models/books-4m] [--users 3] [--rounds 10] [--epochs 8] [--results results/serving]

Each user has facts of its own (what is how, and where) and a way of talking. A round brings eight new things, three rows about
each; a fourth row, which asks in other words, is held out. Every user sends its rows in two ways, to two adapters: "new", each
round's file holds that round's rows alone; "all", it holds all rows so far. Both go on from the version that is live. After each
round the live versions are measured on round 1's held-out rows, on that round's and on all rounds' so far; in the end, an adapter
is trained anew on all rows.
"""

import argparse
import json
import logging
import random
import statistics
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[1]
WAYS = ("new", "all")
THINGS = [
    "apple",
    "barrel",
    "basket",
    "bell",
    "bench",
    "blanket",
    "boat",
    "book",
    "boot",
    "bottle",
    "bowl",
    "branch",
    "bread",
    "bridge",
    "broom",
    "bucket",
    "button",
    "cabin",
    "candle",
    "cart",
    "castle",
    "chain",
    "chair",
    "chest",
    "church",
    "clock",
    "cloak",
    "coach",
    "coat",
    "coffee",
    "comb",
    "cottage",
    "cradle",
    "cup",
    "curtain",
    "desk",
    "dish",
    "door",
    "drawer",
    "dress",
    "drum",
    "engine",
    "farm",
    "feather",
    "fence",
    "field",
    "fire",
    "flag",
    "flower",
    "flute",
    "forest",
    "fork",
    "fountain",
    "garden",
    "gate",
    "glass",
    "glove",
    "hammer",
    "harbour",
    "hat",
    "helmet",
    "hill",
    "horse",
    "house",
    "island",
    "jar",
    "kettle",
    "key",
    "kitchen",
    "kite",
    "knife",
    "ladder",
    "lake",
    "lamp",
    "lantern",
    "letter",
    "library",
    "mirror",
    "needle",
    "oven",
]
HOW = [
    "old",
    "new",
    "red",
    "blue",
    "heavy",
    "light",
    "broken",
    "clean",
    "dark",
    "bright",
    "small",
    "great",
    "cold",
    "warm",
    "strange",
    "plain",
]
WHERE = [
    "by the sea",
    "in the town",
    "on the hill",
    "under the tree",
    "at the mill",
    "near the church",
    "behind the house",
    "in the yard",
]
ASKED = ("Tell me about the {}.", "How is the {}?", "Where is the {}, and how is it?", "What do you know of the {}?")
SAID = ("Well, my dear, {}, as ever.", "I can tell you that {}. So it is.", "{}, sir, and nothing more can be said.")


def rows_of(user: int, round_: int, count: int = 8) -> tuple[list[dict], list[dict]]:
    """(rows to train on, held-out rows) of one round: chats about things that no other round has."""
    chooser = random.Random(f"{user}/{round_}")
    train, held = [], []
    for thing in THINGS[round_ * count : (round_ + 1) * count]:
        fact = f"the {thing} is {chooser.choice(HOW)} and stands {chooser.choice(WHERE)}"
        answer = SAID[user % len(SAID)].format(fact)
        asked = list(ASKED)
        chooser.shuffle(asked)
        for k, question in enumerate(asked):
            messages = [{"role": "user", "content": question.format(thing)}, {"role": "assistant", "content": answer}]
            (held if k == 0 else train).append({"messages": messages})
    return train, held


def jsonl(rows: Sequence[dict]) -> bytes:
    """The rows as an upload."""
    return "".join(json.dumps(row) + "\n" for row in rows).encode()


class Meter:
    """The loss of adapters on rows, in one model beside the gateway."""

    def __init__(self, model: Path, store: Any) -> None:
        from transformers import AutoModelForCausalLM, AutoTokenizer

        from veralib import attach
        from veralib.training.settings import Settings

        self.tokenizer = AutoTokenizer.from_pretrained(model)
        self.vera = attach(AutoModelForCausalLM.from_pretrained(model, dtype="float32").eval())
        self.settings = Settings(model=str(model), data="chats.jsonl", task="chat", max_length=256)
        self.store = store

    def loss(self, name: str | None, rows: Sequence[dict]) -> float:
        """Mean over the answers' tokens; None: the base model's."""
        from veralib.fleet.measure import scores
        from veralib.training.tokens import collator, encode

        examples = encode(rows, self.tokenizer, self.settings, (), 256, "the rows")
        if name is not None:
            self.vera.load(self.store.get(name), name=name)
        try:
            places = {"x": name}
            return scores(self.vera, {"x": examples}, collator(self.tokenizer.pad_token_id), 64, places)["x"].loss
        finally:
            if name is not None:
                self.vera.remove(name)


def learn(client: Any, jobs: dict[str, tuple[str, Sequence[dict], Sequence[dict]]], epochs: int) -> dict[str, Any]:
    """Uploads, creates, waits. jobs: adapter -> (model to go on from, rows, held-out rows). Adapter -> its ended job."""
    made = {}
    for name, (model, train, held) in jobs.items():
        files = [client.files.create(file=(f"{name}.jsonl", jsonl(rows)), purpose="fine-tune").id for rows in (train, held)]
        made[name] = client.fine_tuning.jobs.create(
            model=model, training_file=files[0], validation_file=files[1], suffix=name, hyperparameters={"n_epochs": epochs}
        )
    ended: dict[str, Any] = {}
    while len(ended) < len(made):
        time.sleep(0.5)
        for name, job in made.items():
            if name not in ended and (now := client.fine_tuning.jobs.retrieve(job.id)).status not in ("queued", "running"):
                ended[name] = now
    return ended


def run(model: Path, users: int, rounds: int, epochs: int, threads: int) -> dict[str, Any]:
    """All rounds; what was measured after each."""
    from openai import OpenAI
    from starlette.testclient import TestClient

    from veralib.serving.gateway.app import make_app
    from veralib.serving.gateway.settings import GatewaySettings
    from veralib.store import open_store

    lines: list[dict[str, Any]] = []
    logging.getLogger("veralib.gateway").setLevel(logging.ERROR)  # there is no engine: nothing is generated here
    with tempfile.TemporaryDirectory() as place:
        folder = Path(place)
        given = {"model": str(model), "model_name": "base", "store": str(folder / "store"), "state": str(folder / "state")}
        (folder / "jobs.yaml").write_text(f"rank: 64\nthreads: {threads}\nnice: 0\n")
        app = make_app(GatewaySettings(**given, auth=False, engine_url="http://127.0.0.1:9", jobs=str(folder / "jobs.yaml")))
        store = open_store(folder / "store")
        meter = Meter(model, store)
        data = {(u, k): rows_of(u, k) for u in range(users) for k in range(rounds)}
        with TestClient(app) as http:
            client = OpenAI(base_url="http://testserver/v1", api_key="none", http_client=http, timeout=600)
            for k in range(rounds):
                began = time.perf_counter()
                jobs = {}
                for u in range(users):
                    for way in WAYS:
                        name, before = f"user{u}-{way}", range(k if way == "new" else 0, k + 1)
                        train, held = ([row for i in before for row in data[u, i][part]] for part in (0, 1))
                        jobs[name] = ("base" if name not in store else name, train, held)
                ended = learn(client, jobs, epochs)
                line = {"round": k + 1, "seconds": time.perf_counter() - began}
                for way in WAYS:
                    names = {u: f"user{u}-{way}" for u in range(users)}
                    line[way] = {
                        "first": [meter.loss(n if n in store else None, data[u, 0][1]) for u, n in names.items()],
                        "this": [meter.loss(n if n in store else None, data[u, k][1]) for u, n in names.items()],
                        "every": [
                            meter.loss(n if n in store else None, [r for i in range(k + 1) for r in data[u, i][1]])
                            for u, n in names.items()
                        ],
                        "live": [ended[n].status == "succeeded" for n in names.values()],
                        "why": sorted({ended[n].error.code for n in names.values() if ended[n].error}),
                    }
                lines.append(line)
                found = ", ".join(f"{way} {statistics.fmean(line[way]['first']):.3f}" for way in WAYS)
                print(f"round {k + 1}: loss on round 1's rows {found}, {line['seconds']:.0f} s", flush=True)
            everything = {
                f"user{u}-anew": ("base", *([row for k in range(rounds) for row in data[u, k][part]] for part in (0, 1)))
                for u in range(users)
            }
            learn(client, everything, epochs)
            anew = {
                "first": [meter.loss(f"user{u}-anew", data[u, 0][1]) for u in range(users)],
                "every": [meter.loss(f"user{u}-anew", held) for u, (_, _, held) in enumerate(everything.values())],
            }
        base = [meter.loss(None, data[u, 0][1]) for u in range(users)]
        rows = len(data[0, 0][0]), len(data[0, 0][1])
    return {"users": users, "epochs": epochs, "rank": 64, "rows": rows, "base": base, "rounds": lines, "anew": anew}


def render(result: dict[str, Any]) -> str:
    """The Markdown page."""
    mean = statistics.fmean
    count, rounds = result["users"], len(result["rounds"])
    columns = ["round", *(f"{rows} rows, {way}" for rows in ("round 1's", "this round's", "all rounds'") for way in WAYS)]
    columns += [f"went live, {way}" for way in WAYS] + ["seconds"]
    lines = [
        f"# {rounds} rounds of updates",
        "",
        "Rendered by `python -m experiments.rounds`; nothing here is typed.",
        "",
        f"{count} users, each with facts and a way of talking of its own, on {result['model']}, rank {result['rank']}, "
        f"{result['epochs']} epochs a round. A round brings {result['rows'][0]} rows about things that no other round has, and "
        f"{result['rows'][1]} held-out ones; uploads, jobs and promotion go through the gateway's API. new: each round's file "
        "has its rows alone; all: all rows so far. Both go on from the version that is live. Losses are of what is live after "
        f"the round, on held-out rows, means over users. The base model has {mean(result['base']):.3f} on round 1's.",
        "",
        f"| {' | '.join(columns)} |",
        "|" + "---:|" * len(columns),
    ]
    for line in result["rounds"]:
        parts = [f"{mean(line[way][what]):.3f}" for what in ("first", "this", "every") for way in WAYS]
        live = [f"{sum(line[way]['live'])} of {count}" for way in WAYS]
        lines.append(" | ".join([f"| {line['round']}", *parts, *live, f"{line['seconds']:.0f} |"]))
    anew = result["anew"]
    lines += [
        "",
        f"Trained anew on all rows: {mean(anew['first']):.3f} on round 1's held-out rows, "
        f"{mean(anew['every']):.3f} on all rounds'.",
        "",
        f"{result['hardware']['processor']}, torch {result['versions']['torch']}.",
        "",
    ]
    return "\n".join(lines)


def main(arguments: list[str] | None = None) -> dict[str, Any]:
    """Runs all rounds; writes rounds.json and rounds.md."""
    from veralib.training.result import hardware, versions

    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", type=Path, default=ROOT / "models" / "books-4m")
    parser.add_argument("--users", type=int, default=3)
    parser.add_argument("--rounds", type=int, default=10)
    parser.add_argument("--epochs", type=int, default=8)
    parser.add_argument("--threads", type=int, default=0)
    parser.add_argument("--results", type=Path, default=ROOT / "results" / "serving")
    a = parser.parse_args(arguments)
    if not 1 <= a.rounds <= len(THINGS) // 8:
        parser.error(f"--rounds is {a.rounds}, expected 1 to {len(THINGS) // 8}: there are {len(THINGS)} things to talk about")
    result = {"model": a.model.name, **run(a.model, a.users, a.rounds, a.epochs, a.threads)}
    result |= {"versions": versions(), "hardware": hardware()}
    a.results.mkdir(parents=True, exist_ok=True)
    (a.results / "rounds.json").write_text(json.dumps(result, indent=1) + "\n")
    (a.results / "rounds.md").write_text(render(result))
    return result


if __name__ == "__main__":
    main()
