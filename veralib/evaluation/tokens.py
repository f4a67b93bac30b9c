"""Texts to tokens, in the two ways of the E2E challenge's scripts."""

import functools
import re
from typing import Any

from ..errors import need

# What coco-caption drops after tokenising. Round brackets too, which it keeps by oversight: its list says -LRB-, its text -lrb-.
PUNCTUATION = frozenset(["''", "'", "``", "`", "(", ")", "{", "}", ".", "?", "!", ",", ":", "-", "--", "...", ";"])
# nltk leaves these to a sentence splitter, or doesn't know them: a full stop or dash inside a text, a word's opening quote,
# pounds, which Stanford's tokenizer writes as "#".
APART = (
    (re.compile(r"(?<=[^\s.])([.-])(?=\s)"), r" \1"),
    (re.compile(r"(?<!\S)([.'])(?=\w)"), r"\1 "),
    (re.compile(r"(?<=\d)-(?=£)"), " - "),
    (re.compile(r"£"), " # "),
)


def mteval_tokens(text: str) -> list[str]:
    """Tokens as mteval-v13a.pl makes them, in lower case."""
    return _thirteen()(text.lower()).split()


def treebank_tokens(text: str) -> list[str]:
    """Penn Treebank tokens in lower case without punctuation, as coco-caption makes them with Stanford's tokenizer in Java.

    On E2E's texts the same but for a handful; elsewhere curly quotes, dashes, abbreviations such as U.S., round brackets and web
    addresses come out otherwise, so scores of other data don't compare with the Java scripts' to the last digit.
    """
    text = " ".join(text.split())
    for pattern, spaced in APART:
        text = pattern.sub(spaced, text)
    return [token.lower() for token in _treebank().tokenize(text) if token not in PUNCTUATION]


@functools.cache
def _thirteen() -> Any:
    try:
        from sacrebleu.tokenizers.tokenizer_13a import Tokenizer13a
    except ImportError as e:
        raise need("sacrebleu", "nlg", "BLEU and NIST") from e
    return Tokenizer13a()


@functools.cache
def _treebank() -> Any:
    try:
        from nltk.tokenize import TreebankWordTokenizer
    except ImportError as e:
        raise need("nltk", "nlg", "METEOR, ROUGE-L and CIDEr") from e
    return TreebankWordTokenizer()
