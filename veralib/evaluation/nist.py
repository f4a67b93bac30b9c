"""NIST (Doddington, 2002) of a corpus with several references a text, as mteval-v13a.pl and the E2E challenge count it.

nltk's corpus_nist isn't used: it keeps each order's best single reference where mteval matches against all of them, and takes
that one's length for the average (nltk, pull request 3901). With one reference a text the two agree, which the tests use.
"""

import math
from collections import Counter
from collections.abc import Sequence

ORDER = 5
# The length penalty is 1/2 where the output has 2/3 of the references' words.
BETA = math.log(2) / math.log(1.5) ** 2

Tokens = Sequence[str]


def nist(hypotheses: Sequence[Tokens], references: Sequence[Sequence[Tokens]], order: int = ORDER) -> float:
    """NIST: information of the matched n-grams over the number of n-grams, summed over orders, times a length penalty.

    An n-gram's information is log2(count of its first n-1 words / its count), counted over all references; n = 1: over all their
    words. A match counts as often as the n-gram stands in one reference at most. The penalty compares the words of all
    hypotheses with the sum of each text's mean reference length.
    """
    texts = [r for rs in references for r in rs]
    counts = Counter(gram for text in texts for gram in _grams(text, order))
    counts[()] = sum(map(len, texts))
    gained, made = [0.0] * (order + 1), [0] * (order + 1)
    for hypothesis, rs in zip(hypotheses, references, strict=True):
        most: Counter[tuple[str, ...]] = Counter()
        for reference in rs:
            most |= Counter(_grams(reference, order))
        for gram, count in (Counter(_grams(hypothesis, order)) & most).items():
            gained[len(gram)] += count * math.log2(counts[gram[:-1]] / counts[gram])
        for n in range(1, order + 1):
            made[n] += max(0, len(hypothesis) - n + 1)
    wanted = sum(sum(map(len, rs)) / len(rs) for rs in references)
    return length_penalty(made[1], wanted) * sum(g / max(m, 1) for g, m in zip(gained, made, strict=True))


def length_penalty(words: float, wanted: float) -> float:
    """1 for outputs as long as the references are on average, or longer; 1/2 at 2/3 of their length; 0 for nothing."""
    if not words:
        return 0.0
    return math.exp(-BETA * math.log(min(1.0, words / wanted)) ** 2) if wanted else 1.0


def _grams(tokens: Tokens, order: int) -> list[tuple[str, ...]]:
    return [tuple(tokens[i : i + n]) for n in range(1, order + 1) for i in range(len(tokens) - n + 1)]
