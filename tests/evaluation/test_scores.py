"""Every score against another implementation, a published number, or a computation by hand."""

import importlib.util
import math
import random
import shutil
from collections import Counter

import pytest

from veralib.errors import DataError, MissingPackage
from veralib.evaluation import meteor, score, scores
from veralib.evaluation.nist import length_penalty, nist
from veralib.evaluation.tokens import mteval_tokens, treebank_tokens

pytest.importorskip("sacrebleu")
pytest.importorskip("pycocoevalcap.cider")
nltk = pytest.importorskip("nltk")

# The example in the documentation of nltk.translate.
GUIDE = [
    "It is a guide to action that ensures that the military will forever heed Party commands",
    "It is the guiding principle which guarantees the military forces always being under the command of the Party",
    "It is the practical guide for the army always to heed the directions of the party",
]
WRITTEN = {
    5.0379: "It is a guide to action which ensures that the military always obeys the commands of the party",
    2.1139: "It is to insure the troops forever hearing the activity guidebook that party direct",
}
needs_java = pytest.mark.skipif(not shutil.which("java"), reason="needs java")


def corpus(texts=40, most=4, seed=0, length=(3, 14)):
    """(hypotheses, references) of random words, the common ones far more often; a varying number of references each."""
    rng = random.Random(seed)
    words = [f"w{i}" for i in range(30)]
    weights = [1 / (i + 1) for i in range(30)]

    def text():
        return " ".join(rng.choices(words, weights, k=rng.randint(*length)))

    references = [[text() for _ in range(rng.randint(1, most))] for _ in range(texts)]
    # Parts of a reference, so that long n-grams match.
    return [" ".join((rs[0].split() + text().split())[rng.randint(0, 2) :][:9]) for rs in references], references


def split(references):
    return [[r.split() for r in rs] for rs in references]


def test_bleu_by_hand():
    # 1 to 4-grams found in a reference: 5 of 6 ("the" once, not twice), 5 of 5, 3 of 4, 1 of 3; both references have 6 words.
    value = scores.bleu(["The cat sat on the mat"], [["the cat sat on a mat", "a cat was on the mat"]])
    assert value == pytest.approx(100 * (5 / 6 * 1 * 3 / 4 * 1 / 3) ** 0.25)


def test_bleu_equals_nltks_with_as_many_references_as_each_text_has():
    from nltk.translate.bleu_score import corpus_bleu

    hypotheses, references = corpus()
    expected = corpus_bleu(split(references), [h.split() for h in hypotheses])
    assert len({len(rs) for rs in references}) == 4 and 0.1 < expected < 0.9
    assert scores.bleu(hypotheses, references) == pytest.approx(100 * expected, rel=1e-9)


@pytest.mark.parametrize("published", WRITTEN)
def test_nist_with_three_references_is_what_mteval_v13a_prints(published):
    """The numbers are mteval-v13a.pl's with -c, as nltk's pull request 3901 reports them; nltk's own are 3.3709 and 1.4619."""
    assert nist([WRITTEN[published].split()], [[r.split() for r in GUIDE]]) == pytest.approx(published, abs=5e-5)


def test_nist_with_one_reference_equals_nltks():
    from nltk.translate.nist_score import corpus_nist

    for seed, length in ((0, (3, 14)), (1, (9, 20))):  # the second makes references longer than the texts: a length penalty
        hypotheses, references = corpus(most=1, seed=seed, length=length)
        hypotheses = [h.split() for h in hypotheses]
        expected = corpus_nist(split(references), hypotheses)
        assert nist(hypotheses, split(references)) == pytest.approx(expected, rel=1e-9)
    assert sum(map(len, hypotheses)) < 0.9 * sum(len(r.split()) for rs in references for r in rs)


def test_nist_by_hand():
    # Counts: a 2, b 1, c 1 of 4 words; a b 1, a c 1. "a": log2(4/2) = 1 bit; "b": 2; "a b": log2(2/1) = 1. 3/2 + 1/1.
    assert nist([["a", "b"]], [[["a", "b"], ["a", "c"]]]) == pytest.approx(2.5)
    # "a" twice, though each reference has it once: it counts once, 1 bit of 2 words.
    assert nist([["a", "a"]], [[["a", "b"], ["a", "c"]]]) == pytest.approx(0.5)
    assert length_penalty(2, 3) == pytest.approx(0.5) and length_penalty(4, 3) == 1 and length_penalty(0, 3) == 0
    assert nist([[], []], [[["a"]], [["b"]]]) == 0


def test_rouge_l_takes_the_best_precision_and_the_best_recall_by_hand():
    # Longest common subsequences 2 ("red fish") of 3 words, and 4 of 8: precision max(2/4, 4/4), recall max(2/3, 4/8).
    hypothesis = "one red big fish"
    references = ["red small fish", "one red big fish swims under water today"]
    p, r = 1.0, 2 / 3
    expected = (1 + 1.2**2) * p * r / (r + 1.2**2 * p)
    assert scores.rouge_l([hypothesis.split()], split([references])) == pytest.approx(expected)
    both = scores.rouge_l([hypothesis.split(), ["dog"]], split([references, ["cat"]]))
    assert both == pytest.approx(expected / 2)


def plain_cider_d(hypotheses, references):
    """CIDEr-D from its definition (Vedantam et al., 2015), but for the length, which coco-caption counts in bigrams."""

    def grams(words, n):
        return Counter(tuple(words[i : i + n]) for i in range(len(words) - n + 1))

    total = 0.0
    for n in range(1, 5):
        documents = Counter(g for rs in references for g in {g for r in rs for g in grams(r, n)})

        def weigh(words, n=n, documents=documents):
            return {g: c * math.log(len(references) / max(1, documents[g])) for g, c in grams(words, n).items()}

        def norm(vector):
            return math.sqrt(sum(v * v for v in vector.values())) or 1.0

        for h, rs in zip(hypotheses, references, strict=True):
            for r in rs:
                x, y = weigh(h), weigh(r)
                dot = sum(min(v, y[g]) * y[g] for g, v in x.items() if g in y)
                gap = max(len(h) - 1, 0) - max(len(r) - 1, 0)
                total += 10 / 4 * math.exp(-(gap**2) / 72) * dot / (norm(x) * norm(y)) / len(rs)
    return total / len(hypotheses)


def test_cider_is_cider_d():
    hypotheses, references = corpus(texts=25, seed=3)
    hypotheses = [h.split() for h in hypotheses]
    expected = plain_cider_d(hypotheses, split(references))
    assert 0.5 < expected < 9 and scores.cider(hypotheses, split(references)) == pytest.approx(expected, rel=1e-9)
    alone = [["one", "red", "big", "fish"], ["two", "blue", "old", "hats"]]
    assert scores.cider(alone, [[a] for a in alone]) == pytest.approx(10)
    assert scores.cider(alone[:1], [alone[:1]]) == 0


def test_meteor_by_exact_words_and_stems_by_hand():
    # "the" and "sat" are equal, "cats" and "cat" share a stem: all 3 words match in one chunk; 1 - 0.5 (1/3)³.
    expected = 1 - 0.5 / 27
    texts = [["the", "cats", "sat"], ["large"]]
    references = [[["nothing"], ["the", "cat", "sat"]], [["big"]]]  # the best reference; no synonyms
    assert meteor.exact_and_stem(texts, references) == pytest.approx(expected / 2)
    # 2 of 3 words, apart: precision = recall = 2/3, so Fmean 2/3; two chunks of two matches: penalty 0.5.
    assert meteor.exact_and_stem([["the", "cat", "sat"]], [[["the", "dog", "sat"]]]) == pytest.approx(2 / 3 * 0.5)
    assert meteor.exact_and_stem([[]], [[["a"]]]) == 0


@needs_java
@pytest.mark.slow
def test_meteor_by_java_by_hand():
    """METEOR 1.5's English parameters: α 0.85, β 0.2, γ 0.6, δ 0.75; words weigh δ, function words such as "the" 1 - δ."""
    texts, references = [["the", "cat", "sat"], []], [[["the", "dog", "sat"], ["nothing"]], [["a", "dog"]]]
    matched = 0.25 + 0.75  # "the" and "sat"
    p = matched / (0.25 + 2 * 0.75 + 0.75)  # the empty text stands as one word that nothing matches
    r = matched / (0.25 + 2 * 0.75 + 0.25 + 0.75)
    expected = p * r / (0.85 * p + 0.15 * r) * (1 - 0.6 * (2 / 2) ** 0.2)  # two chunks of two matches
    assert meteor.java_meteor(texts, references) == pytest.approx(expected, abs=1e-6)


def test_the_name_says_which_meteor_it_is(monkeypatch):
    monkeypatch.setattr(meteor.shutil, "which", lambda name: None)
    found = score(["The cats sat."], [["the cat sat"]])
    assert list(found) == ["BLEU", "NIST", "METEOR (exact+stem)", "ROUGE-L", "CIDEr"]
    assert found["METEOR (exact+stem)"] == pytest.approx(100 * (1 - 0.5 / 27))


def test_tokens_of_the_two_scripts():
    text = "The Vaults, a \"family-friendly\" pub near Café Adriatic. It's £20-25, isn't it?"
    expected = "the vaults , a \" family-friendly \" pub near café adriatic . it's £20 - 25 , isn't it ?"
    assert " ".join(mteval_tokens(text)) == expected
    expected = "the vaults a family-friendly pub near café adriatic it 's # 20-25 is n't it"
    assert " ".join(treebank_tokens(text)) == expected


@needs_java
def test_treebank_tokens_are_those_of_coco_caption(data):
    """Of the E2E test set's references; its tokenizer is Stanford's, in Java."""
    from pycocoevalcap.tokenizer.ptbtokenizer import PTBTokenizer

    from veralib.training.e2e import read_e2e

    texts = [r for row in read_e2e(data / "e2e" / "e2e-dataset.zip", "test") for r in row["references"]][::4]
    theirs = PTBTokenizer().tokenize({i: [{"caption": t}] for i, t in enumerate(texts)})
    same = sum(theirs[i][0].split() == treebank_tokens(t) for i, t in enumerate(texts))
    assert len(texts) > 1000 and same / len(texts) > 0.99


@pytest.mark.parametrize(
    ("hypotheses", "references", "said"),
    [
        ([], [], "nothing to score"),
        (["a"], [["a"], ["b"]], "1 hypotheses and 2 sets"),
        (["a", "b"], [["a"], []], "set 2 of the references"),
        (["a"], [["a", " "]], "none of them empty"),
        ("a", [["a"]], "a text in place of a list"),
        (["a"], ["a"], "a text in place of a list"),
    ],
)
def test_bad_input_is_a_data_error(hypotheses, references, said):
    with pytest.raises(DataError, match=said):
        score(hypotheses, references)


def test_a_missing_package_is_named_before_anything_is_generated(monkeypatch):
    find = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None if name == "sacrebleu" else find(name))
    with pytest.raises(MissingPackage, match=r"sacrebleu: pip install 'veralib\[nlg\]'"):
        scores.check_installed()
