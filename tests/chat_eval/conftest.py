"""Questions of the tests' own, in FastChat's form, and a model's answers to them."""

import json
from pathlib import Path

import pytest

from ..training.tiny import write_jsonl
from .server import Server

QUESTIONS = [
    {"question_id": 1, "category": "writing", "turns": ["who sees the cat", "and the bird"]},
    {"question_id": 2, "category": "math", "turns": ["what is 2 + 2", "and {twice} that"]},
    {"question_id": 3, "category": "coding", "turns": ["write a loop"]},
    {"question_id": 4, "category": "generic", "turns": ["how can I sleep"]},
]
REFERENCES = [{"question_id": 2, "model_id": "gpt", "choices": [{"index": 0, "turns": ["REF four", "REF eight"]}]}]


def answers_of(model: str) -> list[dict]:
    return [
        {
            "question_id": q["question_id"],
            "model_id": model,
            "choices": [{"index": 0, "turns": [f"{model} says {t}" for t in q["turns"]]}],
        }
        for q in QUESTIONS
    ]


def lines(path: Path) -> list[dict]:
    return [json.loads(line) for line in path.read_text().splitlines()]


@pytest.fixture(autouse=True)
def no_key(monkeypatch):
    monkeypatch.delenv("OPENAI_API_KEY", raising=False)
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")


@pytest.fixture
def folder(tmp_path) -> Path:
    """question.jsonl, reference.jsonl, one.jsonl and two.jsonl."""
    write_jsonl(tmp_path / "question.jsonl", QUESTIONS)
    write_jsonl(tmp_path / "reference.jsonl", REFERENCES)
    for model in ("one", "two"):
        write_jsonl(tmp_path / f"{model}.jsonl", answers_of(model))
    return tmp_path


@pytest.fixture
def serve():
    """Starts a server for a reply function; all are stopped at the end."""
    running = []

    def start(reply) -> Server:
        running.append(Server(reply).__enter__())
        return running[-1]

    yield start
    for server in running:
        server.__exit__()
