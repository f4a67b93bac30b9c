"""Questions, reference answers and models' answers, in FastChat's jsonl files.

{"question_id": 81, "category": "writing", "turns": ["…", "…"]}                      a question, of one or two turns
{"question_id": 81, "model_id": "…", "choices": [{"index": 0, "turns": ["…", "…"]}]}   an answer, or a reference
"""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ..errors import DataError
from ..training.rows import read_rows


@dataclass(frozen=True)
class Question:
    """One question. reference: the reference answer's turns, where there is one."""

    id: str
    category: str
    turns: tuple[str, ...]
    reference: tuple[str, ...] = ()


@dataclass(frozen=True)
class Answers:
    """One model's answers, by question. path: where they were read."""

    model: str
    turns: Mapping[str, tuple[str, ...]]
    path: str


def read_questions(path: str | Path, references: str | Path | None = None) -> list[Question]:
    """The questions of a file in its order, each with its reference answer. references: a file, or a folder with one file.

    Errors: DataError names the file, the line and what was expected.
    """
    given = _references(Path(references)) if references is not None else {}
    questions: dict[str, Question] = {}
    for number, row in enumerate(read_rows(path), 1):
        at = f"row {number} of {path}"
        key = _id(row, at)
        if key in questions:
            raise DataError(f"{at} repeats question {key}: each question_id may stand once")
        turns = _texts(row.get("turns"), f'{at} has "turns"')
        if len(turns) > 2:
            raise DataError(f"{at} has {len(turns)} turns, expected one or two: the judge's prompts show no more")
        questions[key] = Question(key, str(row.get("category") or "general"), turns, given.get(key, ()))
    return list(questions.values())


def read_answers(path: str | Path) -> Answers:
    """The answers of one model; of a question that stands twice, the last. DataError where a row isn't an answer."""
    turns: dict[str, tuple[str, ...]] = {}
    models: dict[str, None] = {}
    for number, row in enumerate(read_rows(path), 1):
        at = f"row {number} of {path}"
        turns[_id(row, at)] = _choice(row, at)
        models[str(row.get("model_id") or Path(path).stem)] = None
    if len(models) > 1:
        raise DataError(f"{path} holds answers of {len(models)} models, {', '.join(models)}: expected a file for each model")
    return Answers(next(iter(models)), turns, str(path))


def _references(path: Path) -> dict[str, tuple[str, ...]]:
    if path.is_dir():
        files = sorted(path.glob("*.jsonl"))
        if len(files) != 1:
            raise DataError(f"{path} has {len(files)} jsonl files, expected one with the reference answers: name the file")
        path = files[0]
    found = {}
    for number, row in enumerate(read_rows(path), 1):
        at = f"row {number} of {path}"
        found[_id(row, at)] = _choice(row, at)
    return found


def _id(row: Mapping[str, Any], at: str) -> str:
    if row.get("question_id") in (None, ""):
        raise DataError(f'{at} has no "question_id". Fields there: {", ".join(map(str, row))}')
    return str(row["question_id"])


def _choice(row: Mapping[str, Any], at: str) -> tuple[str, ...]:
    choices = row.get("choices")
    first = choices[0] if isinstance(choices, list) and choices else None
    if not isinstance(first, Mapping):
        raise DataError(f'{at} has no "choices": expected [{{"index": 0, "turns": ["…"]}}], found {str(choices)[:80]!r}')
    return _texts(first.get("turns"), f'{at} has choices with "turns"', empty=True)


def _texts(value: Any, what: str, empty: bool = False) -> tuple[str, ...]:
    good = isinstance(value, list) and value and all(isinstance(t, str) and (empty or t.strip()) for t in value)
    if not good:
        raise DataError(f"{what} {str(value)[:80]!r}, expected a list of texts, one a turn")
    return tuple(value)
