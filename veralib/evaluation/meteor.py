"""METEOR: version 1.5, a Java program that pycocoevalcap carries; without Java, exact and stem matches by nltk alone.

The second is another metric: no synonyms, no paraphrases, METEOR 1.0's weights, the mean over texts. It goes by another name
wherever it is shown.
"""

import shutil
import statistics
from collections.abc import Sequence
from typing import Any

from ..errors import ConfigError, need

FULL, PARTIAL = "METEOR", "METEOR (exact+stem)"
NOTHING = "∅"  # the Java program takes no empty text; no reference holds this token

Tokens = Sequence[str]


def meteor(hypotheses: Sequence[Tokens], references: Sequence[Sequence[Tokens]]) -> tuple[str, float]:
    """(name, value from 0 to 1): METEOR 1.5 where Java and its program are there, else exact and stem matches."""
    if shutil.which("java"):
        return FULL, java_meteor(hypotheses, references)
    return PARTIAL, exact_and_stem(hypotheses, references)


def java_meteor(hypotheses: Sequence[Tokens], references: Sequence[Sequence[Tokens]]) -> float:
    """METEOR 1.5 for English, normalised, from the sums over all texts; the best reference for each."""
    try:
        from pycocoevalcap.meteor.meteor import Meteor
    except ImportError as e:
        raise need("pycocoevalcap", "nlg", "METEOR") from e
    truth = {i: [" ".join(r) or NOTHING for r in rs] for i, rs in enumerate(references)}
    try:
        value, _ = Meteor().compute_score(truth, {i: [" ".join(h) or NOTHING] for i, h in enumerate(hypotheses)})
    except (ValueError, OSError) as e:  # it died, and its answer is an empty line or a broken pipe
        raise ConfigError(
            "METEOR's Java program gave no score: it needs Java 8 or later and 2 GB of memory. Without java on the PATH, "
            f"{PARTIAL} is counted instead."
        ) from e
    return float(value)


def exact_and_stem(hypotheses: Sequence[Tokens], references: Sequence[Sequence[Tokens]]) -> float:
    """METEOR 1.0's formula over equal words and equal Porter stems; the best reference for each text, the mean over texts."""
    try:
        from nltk.translate.meteor_score import meteor_score
    except ImportError as e:
        raise need("nltk", "nlg", "METEOR") from e
    return statistics.mean(
        meteor_score(rs, h, wordnet=_NoSynonyms()) if h else 0.0 for h, rs in zip(hypotheses, references, strict=True)
    )


class _NoSynonyms:
    """In WordNet's place, which nltk would have to download."""

    def synsets(self, word: str) -> list[Any]:
        return []
