"""score: BLEU, NIST, METEOR, ROUGE-L and CIDEr of a corpus, counted as the E2E challenge's scripts count them.

BLEU and NIST read text as mteval-v13a does: its tokens, lower case. The others read it as coco-caption does: Penn Treebank
tokens, lower case, without punctuation. CIDEr is what coco-caption gives that name, and papers report: CIDEr-D, with clipped
counts and a Gaussian penalty on the difference of lengths (σ = 6), times 10. It weighs n-grams by the references of the corpus
at hand: scores of different sets, or of parts of one, don't compare, and the score of one single text is always 0.
"""

import importlib
import importlib.util
from collections.abc import Sequence
from typing import Any

from ..errors import DataError, need
from . import meteor
from .nist import nist
from .tokens import mteval_tokens, treebank_tokens

PACKAGES = ("sacrebleu", "nltk", "pycocoevalcap")


def score(hypotheses: Sequence[str], references: Sequence[Sequence[str]]) -> dict[str, float]:
    """The corpus scores by name: BLEU, NIST, METEOR, ROUGE-L, CIDEr. BLEU, METEOR and ROUGE-L in percent.

    hypotheses: a text each. references: one text or more for each hypothesis; their number may differ.
    METEOR is called "METEOR (exact+stem)" where Java is missing: another metric, whose numbers don't compare (meteor.py).
    Errors: DataError where the two don't fit together; MissingPackage.
    """
    _check(hypotheses, references)
    plain = [mteval_tokens(h) for h in hypotheses]
    plain_references = [[mteval_tokens(r) for r in rs] for rs in references]
    words = [treebank_tokens(h) for h in hypotheses]
    word_references = [[treebank_tokens(r) for r in rs] for rs in references]
    name, value = meteor.meteor(words, word_references)
    return {
        "BLEU": bleu(hypotheses, references),
        "NIST": nist(plain, plain_references),
        name: 100 * value,
        "ROUGE-L": 100 * rouge_l(words, word_references),
        "CIDEr": cider(words, word_references),
    }


def check_installed() -> None:
    """MissingPackage where one of the metrics' packages is missing, ConfigError where METEOR's program fails: to be asked before
    a long generation."""
    for package in PACKAGES:
        if importlib.util.find_spec(package) is None:
            raise need(package, "nlg", "Scoring texts")
    meteor.meteor([["a", "cat"]], [[["a", "cat"]]])  # a Java that is too old says so now, not after the texts are written


def bleu(hypotheses: Sequence[str], references: Sequence[Sequence[str]]) -> float:
    """BLEU of raw texts in percent: 13a tokens, lower case, length of the closest reference, no smoothing."""
    try:
        import sacrebleu
    except ImportError as e:
        raise need("sacrebleu", "nlg", "BLEU") from e
    most = max(map(len, references))
    streams: Any = [[rs[i] if i < len(rs) else None for rs in references] for i in range(most)]
    # force: E2E's own references are partly tokenised, which sacrebleu would warn of.
    return sacrebleu.corpus_bleu(hypotheses, streams, smooth_method="none", lowercase=True, tokenize="13a", force=True).score


def rouge_l(hypotheses: Sequence[Sequence[str]], references: Sequence[Sequence[Sequence[str]]]) -> float:
    """ROUGE-L of tokens, 0 to 1: a text's F (β = 1.2) of its best precision and its best recall over the references; the mean."""
    return _coco("rouge.rouge", "Rouge", hypotheses, references)


def cider(hypotheses: Sequence[Sequence[str]], references: Sequence[Sequence[Sequence[str]]]) -> float:
    """CIDEr-D of tokens, 0 to 10: n-grams of 1 to 4, document frequencies over the sets of references."""
    return _coco("cider.cider", "Cider", hypotheses, references)


def _coco(module: str, name: str, hypotheses: Sequence[Sequence[str]], references: Sequence[Sequence[Sequence[str]]]) -> float:
    try:
        metric = getattr(importlib.import_module(f"pycocoevalcap.{module}"), name)()
    except ImportError as e:
        raise need("pycocoevalcap", "nlg", "ROUGE-L and CIDEr") from e
    truth = {i: [" ".join(r) for r in rs] for i, rs in enumerate(references)}
    value, _ = metric.compute_score(truth, {i: [" ".join(h)] for i, h in enumerate(hypotheses)})
    return float(value)


def _check(hypotheses: Sequence[str], references: Sequence[Sequence[str]]) -> None:
    if isinstance(hypotheses, str) or any(isinstance(rs, str) for rs in references):
        raise DataError("score takes a list of texts, and a list of references for each; found a text in place of a list")
    if not hypotheses:
        raise DataError("there is nothing to score: no hypotheses")
    if len(hypotheses) != len(references):
        raise DataError(f"there are {len(hypotheses)} hypotheses and {len(references)} sets of references; give one set for each")
    for number, rs in enumerate(references, 1):
        if not rs or not all(isinstance(r, str) and r.strip() for r in rs):
            raise DataError(f"set {number} of the references is {list(rs)!r}, expected one text or more, none of them empty")
