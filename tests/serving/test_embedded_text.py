"""Text as it comes, and how a token is chosen: beside plain references."""

import random
from pathlib import Path

import pytest
import torch

from veralib.serving.embedded.request import Running
from veralib.serving.embedded.sampling import Chooser, Sampling, choose, draw
from veralib.serving.embedded.text import Detokenizer, TextStream

BOOKS = Path(__file__).parents[2] / "models" / "books-4m"
TEXTS = ["Plain words, and more.", "naïve café — “quoted” …", "日本語のテキスト", "🙂👩‍👩‍👧 family", "a\n\n  b\t", "\ud7ff é́", ""]


@pytest.fixture(scope="module")
def tokenizer():
    from transformers import AutoTokenizer

    return AutoTokenizer.from_pretrained(BOOKS)


def test_pieces_are_whole_characters_and_add_up(tokenizer):
    for text in TEXTS:
        tokens = tokenizer.encode(text, add_special_tokens=False)
        for step in (1, 2, 5):
            stream = Detokenizer(tokenizer)
            pieces = [stream.feed(tokens[i : i + step], i + step >= len(tokens)) for i in range(0, len(tokens), step)]
            assert "".join(pieces) == tokenizer.decode(tokens, skip_special_tokens=True) == text
            assert not any("\ufffd" in p for p in pieces)


def test_random_tokens_lose_nothing(tokenizer):
    """A model may well say bytes that are no character: they're shown as broken, and what follows isn't held back."""
    chance = random.Random(0)
    for _ in range(20):
        tokens = [chance.randrange(3, 4096) for _ in range(60)]
        stream = Detokenizer(tokenizer)
        pieces = [stream.feed([t], i == 59) for i, t in enumerate(tokens)]
        assert "".join(pieces) == tokenizer.decode(tokens, skip_special_tokens=True)


STOPS = [((" dog",), "the quick"), (("uic", "zzz"), "the q"), (("xyz",), "the quick dog ran"), (("n",), "the quick dog ra")]


@pytest.mark.parametrize("stop,shown", STOPS)
def test_stop_strings_are_never_shown(tokenizer, stop, shown):
    tokens = tokenizer.encode("the quick dog ran", add_special_tokens=False)
    stream, text = TextStream(tokenizer, stop), ""
    for i, token in enumerate(tokens):
        text += stream.feed([token], i == len(tokens) - 1)
        assert "the quick dog ran".startswith(text) and shown.startswith(text)
    assert text == shown and stream.stopped == (shown != "the quick dog ran")


def reference(logits, s):
    """The probabilities that are left, one step after another."""
    p = torch.softmax(logits.double() / s.temperature, -1)
    order = p.argsort(descending=True).tolist()
    kept, total = [], 0.0
    for place, token in enumerate(order):
        small = p[token] < s.min_p * p[order[0]]
        if place and (total >= s.top_p or small or (s.top_k > 0 and place >= s.top_k)):
            break
        kept.append(token)
        total += float(p[token])
    out = torch.zeros_like(p)
    out[kept] = p[kept]
    return out / out.sum()


@pytest.mark.parametrize(
    "settings", [{}, {"top_p": 0.7}, {"top_k": 3}, {"min_p": 0.2}, {"temperature": 0.4, "top_p": 0.9, "top_k": 5}]
)
def test_draws_follow_the_probabilities(settings):
    sampling = Sampling(**({"temperature": 1.0} | settings))
    logits = torch.randn(12, generator=torch.Generator().manual_seed(1)) * 2
    choosers = [Chooser(Sampling(**({"temperature": 1.0, "seed": k} | settings))) for k in range(4000)]
    drawn = draw(logits.expand(4000, -1), choosers)
    counts = torch.bincount(drawn, minlength=12) / 4000
    expected = reference(logits, sampling)
    assert (counts - expected).abs().max() < 0.03 and not counts[expected == 0].any()


def test_a_negative_seed_is_a_seed_of_its_own():
    numbers = [Chooser(Sampling(temperature=1.0, seed=seed)).random.random() for seed in (1, -1, 7, -7, 2**63 - 1, -(2**63))]
    assert len(set(numbers)) == 6
    assert numbers[2] == random.Random(7).random() and Chooser(Sampling(seed=-1)).random.random() == numbers[1]


def test_a_stop_token_is_no_text_also_before_the_request_is_done(tokenizer):
    tokens, stop = tokenizer.encode("Once upon a time"), tokenizer.encode("king")[0]
    running = Running("r", None, (1,), Sampling(), frozenset([stop]), lambda: None, Chooser(Sampling()), TextStream(tokenizer))
    running.tokens += tokens
    first = running.take()
    running.tokens.append(stop)  # the loop's thread appends, and only then says that it is done
    second = running.take()
    assert (first.text + second.text, first.finish, second.finish) == ("Once upon a time", "", "stop")
    assert second.tokens == (stop,)


def test_greedy_sampled_and_failed_rows_of_one_step():
    logits = torch.tensor([[1.0, 3.0, 2.0], [5.0, 0.0, 0.0], [float("nan"), 1.0, 2.0], [0.0, 4.0, 3.9]])
    penalised = Chooser(Sampling(frequency_penalty=1.0), tokens=[1])
    choosers = [Chooser(Sampling()), Chooser(Sampling(temperature=1.0, top_k=1, logprobs=2)), Chooser(Sampling()), penalised]
    tokens = choose(logits.clone(), choosers)
    assert tokens.tolist()[:2] == [1, 0] and tokens[3] == 2
    assert [c.failed for c in choosers] == [False, False, True, False]
    said = choosers[1].logprobs[0]
    expected = torch.log_softmax(logits[1], -1)
    assert (
        said.token == 0
        and said.logprob == pytest.approx(float(expected[0]))
        and said.top[0] == (0, pytest.approx(float(expected[0])))
    )
