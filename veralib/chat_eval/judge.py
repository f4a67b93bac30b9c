"""The judge: which requests a set of answers needs, and the reviews that come back, one line of the output file each.

A review holds question_id, category, turn, model, judge ([name, prompt]), score (null where the judge gave none, and then
reason), judgment, and the question and answers it is about. A review of two models has also against, order ("ab": the model's
answer stood first) and scores or winner.
"""

import math
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from ..errors import DataError, EndpointError
from .endpoint import Endpoint, NoCompletion
from .prompts import REFERENCE_GUIDED, JudgePrompt, Kind, Unclear, built_in, find, rating
from .questions import Answers, Question
from .records import Log, Record, digest, in_parallel, pending, plain_id, read_log

Mode = Literal["two-turn", "first-turn", "pairwise", "pairwise-first-turn"]
WARMER = 0.2
"""The temperature from a judgement's second try on: at 0 the judge would mostly say the same again."""
MODES = ("two-turn", "first-turn", "pairwise", "pairwise-first-turn")


@dataclass(frozen=True)
class Ask:
    """One review to ask for. order: "" for one model, "ab" or "ba" for two."""

    question: Question
    turn: int
    order: str
    prompt: JudgePrompt
    messages: Sequence[Mapping[str, str]]
    answers: Mapping[str, Sequence[str]]

    @property
    def key(self) -> tuple[str, int, str]:
        """What the ask is about."""
        return self.question.id, self.turn, self.order


@dataclass(frozen=True)
class Reviewed:
    """What a run of the judge did. unrated: reviews in the file without a score; before: those that were there already."""

    asked: int
    before: int
    unrated: int
    input_tokens: int
    output_tokens: int


def plan(
    questions: Sequence[Question],
    answers: Answers,
    mode: Mode = "two-turn",
    against: Answers | None = None,
    prompts: Mapping[Kind, JudgePrompt] | None = None,
) -> list[Ask]:
    """The reviews that a set of answers needs, in the questions' order.

    two-turn: a review of each turn, the second with the first in view. pairwise: both models' answers in one request, twice, with
    the places swapped. Errors: DataError where answers are missing, or two models of one name are compared.
    """
    prompts = built_in() if prompts is None else prompts
    models = [answers] if against is None else [answers, against]
    if len({m.model for m in models}) < len(models):
        raise DataError(f'both files hold answers of "{answers.model}": give one of them another name (answer --name)')
    for m in models:
        short = [q.id for q in questions if len(m.turns.get(q.id, ())) < (1 if "first" in mode else len(q.turns))]
        if short:
            raise DataError(
                f"{m.path} lacks answers to {len(short)} of {len(questions)} questions: {', '.join(short[:8])}"
                f"{' …' if len(short) > 8 else ''}. Run vera chat-eval answer again with the same output: it adds those."
            )
    asks = []
    for q in questions:
        for turn in range(1, 2 if "first" in mode else len(q.turns) + 1):
            guided = q.category in REFERENCE_GUIDED and len(q.reference) >= turn
            prompt = find(prompts, (len(models) == 2, turn == 2, guided))
            for order in ("ab", "ba") if len(models) == 2 else ("",):
                shown = [m.turns[q.id] for m in (models[::-1] if order == "ba" else models)]
                messages = prompt.messages(_values(q, shown, turn, guided))
                asks.append(Ask(q, turn, order, prompt, messages, {m.model: m.turns[q.id] for m in models}))
    return asks


def _values(q: Question, shown: Sequence[Sequence[str]], turn: int, guided: bool) -> dict[str, str]:
    """What a template may name: FastChat's slots."""
    letters = ("",) if len(shown) == 1 else ("_a", "_b")
    values = {f"answer{letter}": texts[0] for letter, texts in zip(letters, shown, strict=True)}
    values["question"] = q.turns[0]
    for i in range(turn if turn == 2 else 1):
        values[f"question_{i + 1}"] = q.turns[i]
        values |= {f"answer{letter}_{i + 1}": texts[i] for letter, texts in zip(letters, shown, strict=True)}
        if guided:
            values[f"ref_answer_{i + 1}"] = q.reference[i]
    return values


def missing(
    asks: Sequence[Ask], endpoint_model: str, parameters: Mapping[str, Any], output: str | Path, again: bool
) -> list[Ask]:
    """The asks whose review isn't in the output file; again: also those whose review has no score."""
    marks = {a.key: _mark(a, endpoint_model, parameters) for a in asks}
    keys = pending(output, marks.items(), review_key, "reviews")
    if again:
        keys |= {key for key, r in reviews_by_key(read_log(output)[0]).items() if key in marks and r.get("reason")}
    return [a for a in asks if a.key in keys]


def _mark(ask: Ask, model: str, parameters: Mapping[str, Any]) -> str:
    return digest([model, list(ask.messages), dict(parameters)])


def review_key(record: Record) -> tuple[str, int, str]:
    """What a review is about: question, turn, order."""
    return str(record.get("question_id")), int(record.get("turn") or 1), str(record.get("order") or "")


def reviews_by_key(records: Sequence[Record]) -> dict[tuple[str, int, str], Record]:
    """The last review of each key."""
    return {review_key(r): r for r in records}


def judge(
    asks: Sequence[Ask],
    endpoint: Endpoint,
    output: str | Path,
    *,
    parameters: Mapping[str, Any] | None = None,
    parallel: int = 4,
    tries: int = 3,
    again: bool = False,
    progress: Callable[[str], None] = lambda line: None,
) -> Reviewed:
    """Asks for the reviews that the output file lacks and appends each as it comes; what is there isn't asked again.

    tries: how often a judgement without a rating is asked for in all, from the second time at WARMER at least; after them, or
    where the endpoint refuses one conversation or answers it with no completion at all, a review without a score is written.
    Errors: EndpointError, with what is kept and how to go on; ConfigError where the file holds reviews of something else.
    """
    parameters = {"temperature": 0.0, "max_tokens": 2048, **(parameters or {})}
    marked = {**parameters, **endpoint.fields}
    todo = missing(asks, endpoint.model, marked, output, again)
    endpoint.works |= any(r.get("judgment") for r in read_log(output)[0])
    used = [0, 0]
    count = 0
    held: list[Record] = []

    with Log(output) as log:

        def keep(record: Record) -> None:
            held.append(record)
            if record["judgment"] or not record.get("reason"):  # so what was refused was those conversations' own
                write_held()

        def write_held() -> None:
            while held:
                write(held.pop(0))

        def write(record: Record) -> None:
            nonlocal count
            log.write(record)
            count += 1
            used[0] += record["usage"]["prompt_tokens"]
            used[1] += record["usage"]["completion_tokens"]
            if record.get("reason"):
                progress(f"  question {record['question_id']}, turn {record['turn']}: no score: {record['reason']}")
            if count % max(1, math.ceil(len(todo) / 10)) == 0:
                progress(f"  {count} of {len(todo)} reviews")

        def work(ask: Ask) -> Record:
            return _review(ask, endpoint, parameters, tries, _mark(ask, endpoint.model, marked))

        try:
            in_parallel(todo, work, keep, parallel, endpoint.stop)
            if held and not endpoint.works:
                raise EndpointError(held[0]["reason"])
            write_held()
        except EndpointError as e:
            there = len(asks) - len(todo) + count
            raise EndpointError(
                f"{e} {there} of {len(asks)} reviews are in {output}; start the same command again to go on."
            ) from e
    known = reviews_by_key(read_log(output)[0])
    unrated = sum(bool(known[a.key].get("reason")) for a in asks)
    return Reviewed(len(todo), len(asks) - len(todo), unrated, *used)


def _review(ask: Ask, endpoint: Endpoint, parameters: Mapping[str, Any], tries: int, mark: str) -> Record:
    found: Any = None
    reason, text, version = "", "", endpoint.model
    used = {"prompt_tokens": 0, "completion_tokens": 0}
    asked = dict(parameters)
    for number in range(tries):
        if number:
            asked["temperature"] = max(WARMER, asked.get("temperature") or 0.0)
        try:
            reply = endpoint.chat(ask.messages, **asked)
        except NoCompletion as e:
            reason = str(e)
            break
        used = {
            "prompt_tokens": used["prompt_tokens"] + reply.input_tokens,
            "completion_tokens": used["completion_tokens"] + reply.output_tokens,
        }
        text, version = reply.text, reply.model
        try:
            found, reason = rating(ask.prompt.format, reply.text), ""
            break
        except Unclear as e:
            reason = str(e) + (" (it was cut off at max_tokens)" if reply.finish == "length" else "")
    return {
        "question_id": plain_id(ask.question.id),
        "category": ask.question.category,
        "turn": ask.turn,
        "model": next(iter(ask.answers)),
        **_result(ask, found),
        **({"reason": reason} if reason else {}),
        "judgment": text,
        "judge": [endpoint.model, ask.prompt.name],
        "judge_version": version,
        "temperature": endpoint.request(ask.messages, asked).get("temperature"),
        "question": list(ask.question.turns),
        "answers": {model: list(turns) for model, turns in ask.answers.items()},
        "usage": used,
        "request": mark,
        "tstamp": round(time.time(), 3),
    }


def _result(ask: Ask, found: Any) -> Record:
    if not ask.order:
        return {"score": found}
    models = list(ask.answers)
    shown = models if ask.order == "ab" else models[::-1]
    scores = dict(zip(shown, found, strict=True)) if isinstance(found, list) else None
    if scores:
        best = max(shown, key=lambda m: scores[m])
        winner: str | None = "tie" if len(set(scores.values())) == 1 else best
    else:
        winner = {"A": shown[0], "B": shown[1], "tie": "tie", None: None}[found]
    return {"against": models[1], "order": ask.order, "scores": scores, "winner": winner}


def without_reference(asks: Sequence[Ask]) -> list[str]:
    """The questions of math, reasoning and coding that are judged without a reference answer."""
    return list(dict.fromkeys(
        a.question.id for a in asks if a.question.category in REFERENCE_GUIDED and len(a.question.reference) < a.turn
    ))  # fmt: skip
