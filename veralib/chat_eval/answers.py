"""Answers of a model to the questions: FastChat's answer file, one line a question, from a local model or an endpoint."""

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from ..errors import EndpointError
from .endpoint import Endpoint, NoCompletion
from .questions import Question
from .records import Log, Record, digest, in_parallel, pending, plain_id, read_log

# FastChat's temperatures; a category that isn't listed gets OTHER.
TEMPERATURES = {
    **dict.fromkeys(("writing", "roleplay"), 0.7),
    **dict.fromkeys(("extraction", "math", "coding", "reasoning"), 0.0),
    **dict.fromkeys(("stem", "humanities"), 0.1),
}
OTHER = 0.7


@dataclass(frozen=True)
class Sampling:
    """How answers are drawn.

    temperature: one for all questions; None: by category. stop: an answer ends before such a text. seed: None is 0 for a local
    model, and sent to no endpoint.
    """

    temperature: float | None = None
    max_new_tokens: int = 1024
    stop: tuple[str, ...] = ()
    seed: int | None = None

    def temperature_of(self, category: str) -> float:
        """The temperature of a category's questions; 0 is greedy."""
        return TEMPERATURES.get(category, OTHER) if self.temperature is None else self.temperature


Progress = Callable[[str], None]


def answer_locally(
    questions: Sequence[Question],
    model: Any,
    output: str | Path,
    *,
    name: str,
    about: Mapping[str, Any],
    sampling: Sampling = Sampling(),
    batch_size: int = 8,
    progress: Progress = lambda line: None,
) -> int:
    """How many questions were answered now; those that have their answer in the file are skipped.

    model: a LocalModel, which about names. A batch holds questions of one temperature; it is written when its last turn is done.
    """
    sampling = replace(sampling, seed=sampling.seed or 0)
    marks = _marks(questions, about, sampling)
    todo = pending(output, marks.items(), _key, "answers")
    done = 0
    with Log(output) as log:
        for batch in _batches(questions, sampling, batch_size):
            left = [q for q in batch if q.id in todo]
            if not left:
                continue
            talks: list[list[dict[str, str]]] = [[] for _ in left]
            said: list[list[str]] = [[] for _ in left]
            for turn in range(max(len(q.turns) for q in left)):
                asked = [i for i, q in enumerate(left) if turn < len(q.turns)]
                for i in asked:
                    talks[i].append({"role": "user", "content": left[i].turns[turn]})
                heat = sampling.temperature_of(left[0].category)
                texts = model.answer([talks[i] for i in asked], heat, sampling, f"{left[0].id}/{turn}")
                for i, text in zip(asked, texts, strict=True):
                    talks[i].append({"role": "assistant", "content": text})
                    said[i].append(text)
            for q, turns in zip(left, said, strict=True):
                log.write(_record(q, name, turns, about, sampling, marks[q.id]))
            done += len(left)
            progress(f"  {done} of {len(todo)} questions answered")
    return done


def answer_over_http(
    questions: Sequence[Question],
    endpoint: Endpoint,
    output: str | Path,
    *,
    name: str,
    sampling: Sampling = Sampling(),
    parallel: int = 4,
    progress: Progress = lambda line: None,
) -> int:
    """The same from an OpenAI-compatible endpoint.

    A question that a working endpoint refuses leaves the others to be answered. Errors: EndpointError, with what is kept and how
    to go on.
    """
    about = {"api_model": endpoint.model, "fields": endpoint.fields}
    marks = _marks(questions, about, sampling)
    todo = pending(output, marks.items(), _key, "answers")
    endpoint.works |= bool(read_log(output)[0])
    endpoint.patient = True
    sent = {"max_tokens": sampling.max_new_tokens, "stop": list(sampling.stop) or None, "seed": sampling.seed}
    refused: dict[str, NoCompletion] = {}
    done = 0

    def work(q: Question) -> Record | None:
        talk: list[dict[str, str]] = []
        said: list[str] = []
        version = ""
        for text in q.turns:
            talk.append({"role": "user", "content": text})
            try:
                reply = endpoint.chat(talk, temperature=sampling.temperature_of(q.category), **sent)
            except NoCompletion as e:
                refused[q.id] = e
                progress(f"  question {q.id} has no answer: {e}")
                return None
            talk.append({"role": "assistant", "content": reply.text})
            said.append(reply.text)
            version = reply.model
        return {**_record(q, name, said, about, sampling, marks[q.id]), "version": version}

    with Log(output) as log:

        def keep(record: Record | None) -> None:
            nonlocal done
            if record is None:
                return
            log.write(record)
            done += 1
            progress(f"  {done} of {len(todo)} questions answered")

        try:
            in_parallel([q for q in questions if q.id in todo], work, keep, parallel, endpoint.stop)
        except EndpointError as e:
            there = len(questions) - len(todo) + done
            raise EndpointError(
                f"{e} {there} of {len(questions)} answers are in {output}; start the same command again to go on."
            ) from e
    if refused:
        first = next(q.id for q in questions if q.id in refused)
        raise EndpointError(
            f"{len(refused)} of {len(questions)} questions have no answer, the others are in {output}. Question {first}: "
            f"{refused[first]} Start the same command again to ask once more, or judge with a questions file that leaves "
            f"{', '.join(q.id for q in questions if q.id in refused)} out."
        )
    return done


def _batches(questions: Sequence[Question], sampling: Sampling, size: int) -> list[list[Question]]:
    """Batches of one temperature each; they don't depend on what is answered already."""
    heats: dict[float, list[Question]] = {}
    for q in questions:
        heats.setdefault(sampling.temperature_of(q.category), []).append(q)
    return [same[i : i + size] for same in heats.values() for i in range(0, len(same), size)]


def _marks(questions: Sequence[Question], about: Mapping[str, Any], sampling: Sampling) -> dict[str, str]:
    how = {k: v for k, v in asdict(sampling).items() if k != "temperature"} | {"seed": sampling.seed or 0}
    return {q.id: digest([dict(about), how, sampling.temperature_of(q.category), list(q.turns)]) for q in questions}


def _key(record: Record) -> str:
    return str(record.get("question_id"))


def _record(q: Question, name: str, turns: Sequence[str], about: Mapping[str, Any], sampling: Sampling, mark: str) -> Record:
    return {
        "question_id": plain_id(q.id),
        "answer_id": mark,
        "model_id": name,
        "choices": [{"index": 0, "turns": list(turns)}],
        "category": q.category,
        "generation": {**about, **asdict(sampling), "temperature": sampling.temperature_of(q.category)},
        "request": mark,
        "tstamp": round(time.time(), 3),
    }
