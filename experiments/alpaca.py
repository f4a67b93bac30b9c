"""Instruction tuning, small: Alpaca's rows on a small language model: the base, LoRA r=1 and r=8, VeRA; then the judge's path.

    python -m experiments.alpaca ALPACA.jsonl [--rows 800] [--epochs 1] [--questions question.jsonl] [--model models/books-4m]

ALPACA is jsonl (also .xz) with instruction, input, output. `rows` rows are drawn by seed 0, a quarter as many each for
choosing the rate and for the test. The figure is the loss a token of the answers alone: a model of 4 million parameters answers
nothing, so no judge could rank it. With --questions (FastChat's question.jsonl) the best VeRA run answers two of them and a local
server that always says [[5]] judges the answers: plumbing, which shows that the path works; the score means nothing.
"""

import argparse
import json
import lzma
import random
import subprocess
import sys
import tempfile
import threading
from collections.abc import Sequence
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

from .e2e import at_edge, table

RESULTS = Path(__file__).parents[1] / "results" / "alpaca"
GRID: dict[str, tuple[dict[str, Any], tuple[float, ...]]] = {
    "LoRA r=1": ({"method": "lora", "rank": 1}, (3e-3, 1e-2, 3e-2, 1e-1)),
    "LoRA r=8": ({"method": "lora", "rank": 8}, (3e-3, 1e-2, 3e-2)),
    "VeRA r=256": ({"method": "vera", "rank": 256}, (3e-2, 1e-1, 3e-1)),
}
# The VeRA paper's Table 9: all linears, cosine, a warm-up of a tenth, one epoch; its batch of 16 rows.
COMMON: dict[str, Any] = {
    **{
        "task": "chat",
        "targets": "all-linear",
        "batch_size": 16,
        "schedule": "cosine",
        "warmup": 0.1,
        "chat_template": "alpaca",
        "test": "test",
    },
    **{"max_length": 256, "group_by_length": True, "evaluate_every": "never", "save_every": "never", "plot": False},
}
JUDGED_QUESTIONS = 2


def main(arguments: list[str] | None = None) -> None:
    """Trains every rate, scores the chosen ones on the test rows, writes alpaca.json and README.md."""
    from veralib.training import Settings, train
    from veralib.training.data import sha256_file
    from veralib.training.result import hardware, versions

    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("data", type=Path)
    parser.add_argument("--model", type=Path, default=Path("models/books-4m"))
    parser.add_argument("--rows", type=int, default=800)
    parser.add_argument("--epochs", type=float, default=1)
    parser.add_argument("--questions", type=Path, help="FastChat's question.jsonl: answer and judge a few of them")
    parser.add_argument("--results", type=Path, default=RESULTS)
    a = parser.parse_args(arguments)
    methods: list[dict[str, Any]] = []
    with tempfile.TemporaryDirectory() as scratch:
        place = Path(scratch)
        counts = split(a.data, place, a.rows)
        given = {**COMMON, "model": a.model, "data": place, "epochs": a.epochs}
        best_vera = None
        for name, (fields, rates) in GRID.items():
            runs = {rate: train(Settings(**given, **fields, lr=rate, output=place / f"{name}-{rate:g}")) for rate in rates}
            tried = [{"lr": rate, "validation_loss": run.metrics["eval_loss"]} for rate, run in runs.items()]
            lr = min(tried, key=lambda t: t["validation_loss"])["lr"]
            done = runs[lr]
            row = {
                "method": name,
                "lr": lr,
                "tried": tried,
                "test_loss": done.metrics["test_loss"],
                "seconds": done.train_seconds,
            }
            methods.append({**row, "parameters": done.adapter_parameters, "bytes": done.adapter_bytes, "steps": done.steps})
            print(json.dumps(methods[-1]), flush=True)
            best_vera = Path(done.output) if fields["method"] == "vera" else best_vera
        found: dict[str, Any] = {
            **{"base": a.model.name, "rows": counts, "epochs": a.epochs, "data": sha256_file(a.data)},
            **{"base_test_loss": base_loss(Settings(**given)), "methods": methods},
            **{"plumbing": plumbing(best_vera, a.questions, place) if a.questions and best_vera else None},
            **{"versions": versions(), "hardware": hardware()},
        }
    a.results.mkdir(parents=True, exist_ok=True)
    (a.results / "alpaca.json").write_text(json.dumps(found, indent=1) + "\n", encoding="utf-8")
    (a.results / "README.md").write_text(render(found), encoding="utf-8")
    print(render(found))


def split(data: Path, place: Path, rows: int) -> dict[str, int]:
    """Writes train, validation and test.jsonl there, drawn by seed 0; how many each."""
    opened = lzma.open if data.suffix == ".xz" else open
    with opened(data, "rt", encoding="utf-8") as lines:
        all_rows = [json.loads(line) for line in lines]
    all_rows = [r for r in all_rows if r.get("source", "random_9k") == "random_9k" and r["output"].strip()]
    sizes = {"train": rows, "validation": rows // 4, "test": rows // 4}
    picked = random.Random(0).sample(all_rows, sum(sizes.values()))
    for name, size in sizes.items():
        texts = [json.dumps({k: r.get(k, "") for k in ("instruction", "input", "output")}) for r in picked[:size]]
        (place / f"{name}.jsonl").write_text("\n".join(texts) + "\n", encoding="utf-8")
        picked = picked[size:]
    return sizes


def base_loss(settings: Any) -> float:
    """The base's own loss a counted token on the test rows."""
    import torch

    from veralib.training.data import load_data
    from veralib.training.loading import load_base
    from veralib.training.tokens import chat_template, collator, encode

    base = load_base(settings)
    chat_template(settings, base.tokenizer)
    rows = encode(load_data(settings).test, base.tokenizer, settings, (), base.max_length, "the test data")
    collate = collator(base.tokenizer.pad_token_id or 0)
    total = count = 0.0
    with torch.inference_mode():
        for start in range(0, len(rows), 16):
            batch = collate(rows[start : start + 16])
            tokens = int((batch["labels"][:, 1:] >= 0).sum())
            total += base.model.eval()(**batch).loss.item() * tokens
            count += tokens
    return total / count


def plumbing(run: Path, questions: Path, place: Path) -> dict[str, Any]:
    """Answers a few questions with a run and lets a server that always says [[5]] judge them; what came back."""
    few = place / "questions.jsonl"
    few.write_text("".join(questions.read_text(encoding="utf-8").splitlines(keepends=True)[:JUDGED_QUESTIONS]), encoding="utf-8")
    answers, reviews = place / "answers.jsonl", place / "reviews.jsonl"
    to = ["--questions", str(few)]
    vera("answer", "--adapter", str(run), *to, "--output", str(answers), "--max-new-tokens", "32")
    server = ThreadingHTTPServer(("127.0.0.1", 0), _Fives)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    endpoint = f"http://127.0.0.1:{server.server_address[1]}/v1"
    try:
        judged = ["--endpoint", endpoint, "--judge", "mock", "--output", str(reviews)]
        vera("judge", str(answers), *to, *judged)
    finally:
        server.shutdown()
    said = [json.loads(line) for line in reviews.read_text(encoding="utf-8").splitlines()]
    kept = answers.read_text(encoding="utf-8").splitlines()
    return {"answers": len(kept), "reviews": len(said), "scores": [r["score"] for r in said]}


def vera(*arguments: str) -> None:
    """Runs a command of `vera chat-eval`."""
    subprocess.run([sys.executable, "-m", "veralib.cli", "chat-eval", *arguments], check=True)


class _Fives(BaseHTTPRequestHandler):
    """A judge that gives everything a five."""

    def do_POST(self) -> None:
        self.rfile.read(int(self.headers["Content-Length"]))
        message = {"role": "assistant", "content": "Rating: [[5]]"}
        usage = {"prompt_tokens": 1, "completion_tokens": 1, "total_tokens": 2}
        body = json.dumps({"model": "mock", "choices": [{"message": message, "finish_reason": "stop"}], "usage": usage}).encode()
        self.send_response(200)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, *_: Any) -> None:
        """Nothing."""


def render(found: dict[str, Any]) -> str:
    """The Markdown page."""
    head = ["method", "trained parameters", "adapter bytes", "learning rate", "validation loss", "test loss", "seconds"]
    rows: list[Sequence[str]] = [["base", "0", "0", "", "", f"{found['base_test_loss']:.3f}", ""]]
    for m in found["methods"]:
        chosen = min(t["validation_loss"] for t in m["tried"])
        lr = f"{m['lr']:g}{' (the edge of what was tried)' if at_edge(m) else ''}"
        numbers = [f"{m['parameters']:,}", f"{m['bytes']:,}", lr, f"{chosen:.3f}", f"{m['test_loss']:.3f}", f"{m['seconds']:.0f}"]
        rows.append([m["method"], *numbers])
    tried = [[m["method"], f"{t['lr']:g}", f"{t['validation_loss']:.3f}"] for m in found["methods"] for t in m["tried"]]
    lines = [
        "# Alpaca with a small language model",
        "",
        "Rendered by `python -m experiments.alpaca`; nothing here is typed.",
        "",
        f"Base: {found['base']}, all linears. {found['rows']['train']:,} rows of Alpaca, {found['epochs']:g} epoch, "
        f"{found['methods'][0]['steps']} steps of {COMMON['batch_size']} rows, cosine. Loss in nats a token of the answers; the "
        f"rate is the one with the smallest on {found['rows']['validation']} other rows, the test is {found['rows']['test']} "
        "more. One seed: small differences mean nothing, and a model of this size answers no question.",
        "",
        *table(head, rows),
        "",
        "## Every learning rate",
        "",
        *table(["method", "learning rate", "validation loss"], tried),
        "",
    ]
    if p := found["plumbing"]:
        lines += [
            f"Plumbing: the VeRA run answered {p['answers']} MT-Bench questions, both turns, and a local server that gives every "
            f"answer a five judged them: {p['reviews']} reviews, scores {', '.join(f'{s:g}' for s in p['scores'])}. That "
            "the path works is all it says.",
            "",
        ]
    where = found["hardware"].get("gpu") or f"{found['hardware']['processor']}, {found['hardware']['threads']} threads"
    lines += [f"Run on {where}; {', '.join(f'{k} {v}' for k, v in found['versions'].items())}.", ""]
    return "\n".join(lines)


if __name__ == "__main__":
    main()
