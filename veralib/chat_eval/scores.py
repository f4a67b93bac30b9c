"""Scores of reviews: means by category and turn, and differences between models, paired by question."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from ..errors import DataError
from .judge import reviews_by_key
from .records import Record, read_log

TURNS = {"turn 1": (1,), "turn 2": (2,), "all": (1, 2)}


@dataclass(frozen=True)
class Reviews:
    """The reviews in one file, the last of each question, turn and order."""

    path: str
    records: Sequence[Record]

    @property
    def pairwise(self) -> bool:
        """Whether each review is of two models."""
        return "against" in self.records[0]

    @property
    def model(self) -> str:
        """Whose answers were reviewed; of two models, the first."""
        return str(self.records[0].get("model"))

    @property
    def judges(self) -> list[str]:
        """Who judged: the name asked for, and the versions that answered."""
        return sorted({f"{(r.get('judge') or ['?'])[0]} ({r.get('judge_version', 'version unknown')})" for r in self.records})

    @property
    def unrated(self) -> list[Record]:
        """The reviews without a score."""
        return [r for r in self.records if (r.get("winner") if self.pairwise else r.get("score")) is None]


@dataclass(frozen=True)
class Mean:
    """A mean over `count` of `of` reviews; nan where there is none."""

    value: float
    count: int
    of: int


@dataclass(frozen=True)
class Difference:
    """The mean difference over `count` questions and its 95 % bootstrap interval over them; nan where there are too few."""

    value: float
    low: float
    high: float
    count: int


def read_reviews(path: str | Path) -> Reviews:
    """The Reviews of a file. DataError where there are none, or they are of several models or kinds."""
    records = list(reviews_by_key(read_log(path)[0]).values())
    if not records:
        raise DataError(f"{path} holds no reviews: vera chat-eval judge writes them")
    kinds = {(r.get("model"), r.get("against")) for r in records}
    if len(kinds) > 1:
        raise DataError(
            f"{path} holds reviews of {len(kinds)} models or pairs, {sorted(map(str, kinds))}: expected a file for each"
        )
    return Reviews(str(path), records)


def groups(reviews: Sequence[Reviews]) -> list[str]:
    """The categories in the order in which they appear, and "all"."""
    return [*dict.fromkeys(str(r.get("category") or "general") for each in reviews for r in each.records), "all"]


def scores(reviews: Reviews, group: str = "all", turns: Sequence[int] = (1, 2)) -> dict[tuple[str, int], float | None]:
    """(question, turn) -> score, None without one, of a category's reviews."""
    return {
        (str(r["question_id"]), int(r.get("turn") or 1)): r.get("score")
        for r in reviews.records
        if group in ("all", str(r.get("category") or "general")) and int(r.get("turn") or 1) in turns
    }


def mean(found: Mapping[tuple[str, int], float | None]) -> Mean:
    """The Mean of scores; those without one are counted, not averaged."""
    rated = [s for s in found.values() if s is not None]
    return Mean(float(np.mean(rated)) if rated else float("nan"), len(rated), len(found))


def summary(reviews: Reviews) -> dict[str, object]:
    """What `vera reproduce table4` reads: {"scores": {"score": mean over all turns}}, and of what. Of a pairwise file it is the
    first model's, over both orders. DataError where no review has a score."""
    model = reviews.model
    given = [(r.get("scores") or {}).get(model) if reviews.pairwise else r.get("score") for r in reviews.records]
    rated = [float(s) for s in given if s is not None]
    if not rated:
        raise DataError(f"{reviews.path}: none of {len(given)} reviews has a score")
    prompts = sorted({(r.get("judge") or ["", ""])[1] for r in reviews.records})
    about = {"model": model, **({"against": reviews.records[0]["against"]} if reviews.pairwise else {})}
    counts = {"reviews": len(given), "rated": len(rated)}
    return {**about, "scores": {"score": float(np.mean(rated))}, **counts, "judges": reviews.judges, "prompts": prompts}


def compare(
    first: Mapping[tuple[str, int], float | None],
    second: Mapping[tuple[str, int], float | None],
    samples: int = 10_000,
    seed: int = 0,
) -> Difference:
    """second − first, over the questions and turns that both have a score of: the mean over questions of the mean over turns.

    The interval redraws questions, because the turns of one aren't independent.
    """
    by_question: dict[str, list[float]] = {}
    for key, a in first.items():
        b = second.get(key)
        if a is not None and b is not None:
            by_question.setdefault(key[0], []).append(b - a)
    values = np.array([np.mean(v) for v in by_question.values()])
    if len(values) == 0:
        return Difference(float("nan"), float("nan"), float("nan"), 0)
    low, high = interval(values, lambda drawn: drawn.mean(1), samples, seed) if len(values) > 1 else (float("nan"), float("nan"))
    return Difference(float(values.mean()), low, high, len(values))


def interval(values: np.ndarray, statistic: Callable[[np.ndarray], np.ndarray], samples: int, seed: int) -> tuple[float, float]:
    """The 2.5th and 97.5th percentile of a statistic of redrawn values (percentile bootstrap)."""
    drawn = np.random.default_rng(seed).integers(0, len(values), (samples, len(values)))
    low, high = np.percentile(statistic(values[drawn]), (2.5, 97.5))
    return float(low), float(high)


@dataclass(frozen=True)
class Duel:
    """Questions and turns judged in both orders: won by the model, by the other, by neither; and those the judge left open."""

    won: int
    lost: int
    tied: int
    unrated: int
    swayed: int
    """Of the ties, those where each order had another winner."""


def duel(reviews: Reviews, group: str = "all") -> Duel:
    """The Duel of a category. A model wins where both orders say so; one win and one tie is a tie, as in FastChat."""
    verdicts: dict[tuple[str, int], dict[str, str | None]] = {}
    for r in reviews.records:
        if group in ("all", str(r.get("category") or "general")):
            verdicts.setdefault((str(r["question_id"]), int(r.get("turn") or 1)), {})[str(r["order"])] = r.get("winner")
    model, other = reviews.model, str(reviews.records[0]["against"])
    both = [(v.get("ab"), v.get("ba")) for v in verdicts.values()]
    unrated = sum(None in pair for pair in both)
    won, lost = both.count((model, model)), both.count((other, other))
    swayed = sum(set(pair) == {model, other} for pair in both)
    return Duel(won, lost, len(both) - won - lost - unrated, unrated, swayed)
