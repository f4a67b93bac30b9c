"""Tables of reviews, and one question as in the paper's appendix F: both answers, reviews and scores side by side."""

import html
import math
from collections.abc import Sequence

from ..errors import DataError, unknown_name
from .scores import TURNS, Difference, Mean, Reviews, compare, duel, groups, mean, scores

Table = tuple[str, list[str], list[list[str]]]
"""(title, columns, rows)"""


def tables(reviews: Sequence[Reviews]) -> list[Table]:
    """Scores by category and turn, and of several files the differences to the first; of pairwise reviews, who won."""
    if len({r.pairwise for r in reviews}) > 1:
        raise DataError("some of these files hold reviews of one model and some of two: show them apart")
    if reviews[0].pairwise:
        return [_duels(r) for r in reviews]
    names = labels(reviews)
    rows = [
        [group, *(_mean(mean(scores(r, group, turns))) for r in reviews for turns in TURNS.values())] for group in groups(reviews)
    ]
    made: list[Table] = [("scores, 1 to 10", ["category", *(f"{n}, {t}" for n in names for t in TURNS)], rows)]
    for other, name in zip(reviews[1:], names[1:], strict=True):
        rows = []
        for group in groups(reviews):
            found = [compare(scores(reviews[0], group, t), scores(other, group, t)) for t in TURNS.values()]
            rows.append([group, str(found[-1].count), *map(_difference, found)])
        made.append((f"{name} − {names[0]}, paired by question, with 95 % intervals", ["category", "questions", *TURNS], rows))
    return made


def remarks(reviews: Sequence[Reviews]) -> list[str]:
    """What a reader of the tables must know: who judged, and which reviews have no score."""
    lines = []
    for r, name in zip(reviews, labels(reviews), strict=True):
        rated = len(r.records) - len(r.unrated)
        what = "verdicts in" if r.pairwise else f"mean {mean(scores(r)).value:.2f} over" if rated else "scores in"
        lines.append(f"{name}: {what} {rated} of {len(r.records)} reviews, judged by {', '.join(r.judges)}")
        for record in r.unrated[:5]:
            lines.append(
                f"  without a score: question {record['question_id']}, turn {record.get('turn', 1)}: {record.get('reason')}"
            )
    judges = {judge for r in reviews for judge in r.judges}
    if len(judges) > 1:
        lines.append("Different judges or versions: their scores aren't on one scale, and differences between them mean nothing.")
    prompts = {frozenset((r.get("judge") or ["", ""])[1] for r in each.records) for each in reviews}
    if len(prompts) > 1:
        lines.append(f"Judged with different prompts: {'; '.join(', '.join(sorted(p)) for p in prompts)}.")
    return lines


def labels(reviews: Sequence[Reviews]) -> list[str]:
    """A name for each file: the model's, with the path where two are of one model."""
    names = [r.model for r in reviews]
    return [n if names.count(n) == 1 else f"{n} ({r.path})" for n, r in zip(names, reviews, strict=True)]


def markdown(made: Sequence[Table]) -> str:
    """The tables as Markdown."""
    lines = []
    for title, columns, rows in made:
        lines += [f"**{title}**", "", "| " + " | ".join(map(_cell, columns)) + " |", "|---" * len(columns) + "|"]
        lines += ["| " + " | ".join(map(_cell, row)) + " |" for row in rows] + [""]
    return "\n".join(lines)


def question(reviews: Sequence[Reviews], wanted: str) -> str:
    """One question as Markdown: for each turn the answers, reviews and scores of all models, side by side."""
    found = [[r for r in each.records if str(r["question_id"]) == wanted] for each in reviews]
    if not any(found):
        raise unknown_name("question", wanted, sorted({str(r["question_id"]) for each in reviews for r in each.records}))
    first = next(r for each in found for r in each)
    lines = [f"## Question {wanted} ({first.get('category', 'general')})", ""]
    for turn, text in enumerate(first.get("question") or [], 1):
        columns = [
            column
            for each, name in zip(found, labels(reviews), strict=True)
            for r in each
            if int(r.get("turn") or 1) == turn
            for column in _columns(r, name, turn)
        ]
        if not columns:
            continue
        lines += [f"**Turn {turn}.** {_cell(text)}", ""]
        lines += ["| | " + " | ".join(_cell(c[0]) for c in columns) + " |", "|---" * (len(columns) + 1) + "|"]
        for k, row in enumerate(("answer", "review", "score"), 1):
            lines.append(f"| {row} | " + " | ".join(_cell(c[k]) for c in columns) + " |")
        lines.append("")
    return "\n".join(lines)


def _columns(r: dict, name: str, turn: int) -> list[tuple[str, str, str, str]]:
    """(title, answer, review, score) of each model in a review."""
    answers = r.get("answers") or {}
    said = {model: (turns[turn - 1] if len(turns) >= turn else "") for model, turns in answers.items()}
    if "against" not in r:
        score = f"none: {r.get('reason', '')}" if r.get("score") is None else f"{r['score']:g}"
        return [(name, said.get(str(r.get("model")), ""), str(r.get("judgment", "")), score)]
    models = [str(r["model"]), str(r["against"])]
    shown = models if r.get("order") == "ab" else models[::-1]
    given = r.get("scores") or {}
    verdict = (
        f"none: {r.get('reason', '')}" if r.get("winner") is None else "tie" if r["winner"] == "tie" else f"{r['winner']} wins"
    )
    return [
        (f"{m} (shown {'first' if k == 0 else 'second'})", said.get(m, ""), str(r.get("judgment", "")),
         f"{given[m]:g}" if m in given else verdict)
        for k, m in enumerate(shown)
    ]  # fmt: skip


def _duels(r: Reviews) -> Table:
    rows = []
    for group in groups([r]):
        d = duel(r, group)
        rows.append([group, *map(str, (d.won, d.tied, d.lost, d.swayed, d.unrated))])
    other = r.records[0]["against"]
    columns = ["category", f"{r.model} wins", "ties", f"{other} wins", "of the ties, decided by the order", "without a verdict"]
    return f"{r.model} against {other}, each pair judged in both orders", columns, rows


def _mean(m: Mean) -> str:
    if not m.of:
        return ""
    return ("–" if math.isnan(m.value) else f"{m.value:.2f}") + (f" ({m.count} of {m.of})" if m.count < m.of else "")


def _difference(d: Difference) -> str:
    if not d.count:
        return ""
    return f"{d.value:+.2f}" + ("" if math.isnan(d.low) else f" [{d.low:+.2f}, {d.high:+.2f}]")


def _cell(text: str) -> str:
    """A text in one cell of a Markdown table: as it is read, not as markup."""
    return html.escape(str(text).strip(), quote=False).replace("|", "\\|").replace("\r", "").replace("\n", "<br>")
