"""Runs of a grid compared: the rate chosen on held-out rows, the mean of the seeds, differences paired by seed."""

import math
import statistics
from collections import defaultdict
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from ..training.metrics import LOWER_IS_BETTER

MARGIN = 1.0
"""Points on the 0 to 100 scale within which two methods count as on par: our choice, the same on every page."""

FEWEST = 3
"""Seeds below which no interval is drawn."""


def finite(of: Callable[[Iterable[float]], float]) -> Callable[[Iterable[float]], float]:
    """A statistic that is NaN where a run diverged; those of Python's own library fail on NaN, or sort it anywhere."""

    def run(values: Iterable[float]) -> float:
        known = list(values)
        return of(known) if all(math.isfinite(v) for v in known) else math.nan

    return run


spread = finite(statistics.stdev)
"""The standard deviation of two or more scores."""


@dataclass(frozen=True)
class Line:
    """One method on one task at its chosen rate. held_out, scores: by seed, × 100."""

    task: str
    name: str
    rate: str
    value: float
    parameters: int
    bytes: int
    held_out: dict[int, float]
    scores: dict[int, float]
    seconds_per_step: float
    lower: bool = False
    """Whether less is better."""
    edge: str = ""
    """"lowest" or "highest" where the chosen rate is that of several that were tried: a better one may lie beyond."""


def chosen(results: Sequence[dict[str, Any]], metric: str) -> list[Line]:
    """A line for each method of one task: of its rates, the one with the best mean held-out score over the seeds that all its
    rates have run; where they share none, over all. A score that isn't finite is the worst. The scores are the chosen rate's.

    Of loss, perplexity and mse the lowest is the best.
    """
    lower = metric in LOWER_IS_BETTER
    by: dict[str, dict[float, list[dict[str, Any]]]] = defaultdict(lambda: defaultdict(list))
    for r in results:
        by[r["name"]][r["value"]].append(r)
    lines = []
    for name, rates in by.items():
        shared = set.intersection(*({r["seed"] for r in runs} for runs in rates.values()))

        def held_out(value: float, rates: Any = rates, shared: set[int] = shared) -> float:
            scores = [r["metrics"][f"eval_{metric}"] for r in rates[value] if not shared or r["seed"] in shared]
            middle = statistics.mean(scores) * (-1 if lower else 1)
            return middle if math.isfinite(middle) else -math.inf

        value = max(rates, key=held_out)
        runs = rates[value]
        lines.append(
            Line(
                **{"task": runs[0]["task"], "name": name, "rate": runs[0]["rate"], "value": value},
                **{"parameters": runs[0]["adapter_parameters"], "bytes": max(r["adapter_bytes"] for r in runs)},
                held_out={r["seed"]: 100 * r["metrics"][f"eval_{metric}"] for r in runs},
                scores={r["seed"]: 100 * r["metrics"][f"test_{metric}"] for r in runs},
                seconds_per_step=statistics.median(r["seconds_per_step"] for r in runs),
                lower=lower,
                edge={min(rates): "lowest", max(rates): "highest"}.get(value, "") if len(rates) > 1 else "",
            )
        )
    return lines


def over_tasks(by_task: Mapping[str, Sequence[Line]], names: Sequence[str]) -> list[Line]:
    """A line for each method with its mean over the tasks, seed by seed, as the last column of the paper's Table 2.

    Of the tasks on which all of `names` have a line; empty where these are fewer than two, or where less is better on some and
    more on others. The rate and the bytes differ from task to task and are no part of it.
    """
    whole = {t: {line.name: line for line in lines} for t, lines in by_task.items() if {line.name for line in lines} >= {*names}}
    if len(whole) < 2 or len({line.lower for lines in whole.values() for line in lines.values()}) > 1:
        return []
    means = []
    for name in names:
        lines = [of_task[name] for of_task in whole.values()]
        means.append(replace(lines[0], task=", ".join(whole), held_out={}, scores=_mean_scores(lines)))
    return means


def _mean_scores(lines: Sequence[Line]) -> dict[int, float]:
    seeds = set.intersection(*({*line.scores} for line in lines))
    return {seed: statistics.mean(line.scores[seed] for line in lines) for seed in sorted(seeds)}


def interval(differences: Sequence[float]) -> tuple[float, float] | None:
    """The 95 % t interval of a mean of paired differences; None of fewer than three: two scores of few hundred rows are often the
    same, and their interval a point."""
    from scipy import stats

    if len(differences) < FEWEST:
        return None
    middle, error = statistics.mean(differences), stats.sem(differences)
    half = float(stats.t.ppf(0.975, len(differences) - 1)) * float(error)
    return middle - half, middle + half


def paired(one: Line, other: Line) -> tuple[float, tuple[float, float] | None, int]:
    """(mean, 95 % interval, seeds) of one's score minus the other's, over the seeds that both ran."""
    seeds = sorted(one.scores.keys() & other.scores.keys())
    differences = [one.scores[s] - other.scores[s] for s in seeds]
    return (statistics.mean(differences) if differences else float("nan")), interval(differences), len(seeds)


def verdict(low_high: tuple[float, float] | None, margin: float = MARGIN, lower: bool = False) -> str:
    """What an interval of a difference says: better, worse, on par (all of it within the margin), or undecided.

    lower: whether less is better.
    """
    if low_high is None:
        return "fewer than three seeds say nothing"
    low, high = (-low_high[1], -low_high[0]) if lower else low_high
    if -margin <= low and high <= margin:
        return "on par"
    if low > 0:
        return "better"
    return "worse" if high < 0 else "undecided"
