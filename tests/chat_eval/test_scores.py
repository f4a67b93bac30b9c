"""Means, paired differences and their intervals, against numbers worked out by hand and scipy's bootstrap."""

import numpy as np
import pytest

from veralib.chat_eval import compare, read_reviews, show
from veralib.chat_eval.cost import estimate, money
from veralib.chat_eval.scores import duel, mean, scores
from veralib.errors import DataError, UnknownName

from ..training.tiny import write_jsonl


def review(question, turn, score, model="one", category="writing", **more):
    return {
        "question_id": question,
        "category": category,
        "turn": turn,
        "model": model,
        "score": score,
        "judge": ["gpt-4", "single"],
        "judge_version": "gpt-4-0613",
        "judgment": f"review of {model}",
        "question": [f"ask {question}", "and then | a\nline <b>"],
        "answers": {model: [f"{model} to {question}", f"{model} again"]},
        **({"reason": "no rating"} if score is None else {}),
        **more,
    }


@pytest.fixture
def files(tmp_path):
    one = [review(1, 1, 6.0), review(1, 2, 4.0), review(2, 1, 8.0, category="math"), review(2, 2, None, category="math")]
    two = [review(1, 1, 7.0, "two"), review(1, 2, 7.0, "two"), review(2, 1, 6.0, "two", "math"), review(2, 2, 9.0, "two", "math")]
    return [read_reviews(write_jsonl(tmp_path / f"{n}.jsonl", rows)) for n, rows in (("one", one), ("two", two))]


def test_means_leave_out_what_has_no_score_and_say_so(files):
    m = mean(scores(files[0]))
    assert (m.value, m.count, m.of) == (6.0, 3, 4)
    text = "\n".join(show.remarks(files))
    assert "one: mean 6.00 over 3 of 4 reviews, judged by gpt-4 (gpt-4-0613)" in text
    assert "without a score: question 2, turn 2: no rating" in text


def test_differences_pair_questions_and_leave_out_unrated_turns(files):
    d = compare(scores(files[0]), scores(files[1]))
    # Question 1: (1 + 3) / 2 = 2; question 2: −2, its second turn has no score of the first model.
    assert (d.value, d.count) == (0.0, 2) and (d.low, d.high) == (-2.0, 2.0)
    one = compare(scores(files[0], "math"), scores(files[1], "math"))
    assert (one.value, one.count) == (-2.0, 1) and np.isnan(one.low)


def test_the_interval_is_scipys():
    from scipy.stats import bootstrap

    rng = np.random.default_rng(1)
    first, second = rng.uniform(1, 10, 80), rng.uniform(1, 10, 80)
    d = compare({(str(i), 1): a for i, a in enumerate(first)}, {(str(i), 1): b for i, b in enumerate(second)})
    theirs = bootstrap((second - first,), np.mean, method="percentile", n_resamples=10_000, rng=0).confidence_interval
    assert d.value == pytest.approx(np.mean(second - first))
    assert (d.low, d.high) == pytest.approx((theirs.low, theirs.high), abs=0.05)


def test_tables_have_a_row_for_each_category_and_a_column_for_each_turn(files):
    (_, columns, rows), (title, _, differences) = show.tables(files)
    assert columns == ["category", *(f"{m}, {t}" for m in ("one", "two") for t in ("turn 1", "turn 2", "all"))]
    assert rows[0] == ["writing", "6.00", "4.00", "5.00", "7.00", "7.00", "7.00"]
    assert rows[2] == ["all", "7.00", "4.00 (1 of 2)", "6.00 (3 of 4)", "6.50", "8.00", "7.25"]
    assert "two − one" in title and differences[0] == ["writing", "1", "+1.00", "+3.00", "+2.00"]
    assert "| all | 7.00 | 4.00 (1 of 2) |" in show.markdown(show.tables(files))


def test_a_question_in_full_has_answers_reviews_and_scores_side_by_side(files):
    text = show.question(files, "2").splitlines()
    assert text[0] == "## Question 2 (math)" and "**Turn 1.** ask 2" in text
    assert "| | one | two |" in text and "| answer | one to 2 | two to 2 |" in text
    assert "| review | review of one | review of two |" in text and "| score | 8 | 6 |" in text
    assert "| score | none: no rating | 9 |" in text
    assert "**Turn 2.** and then \\| a<br>line &lt;b&gt;" in text
    with pytest.raises(UnknownName, match='no question "7"'):
        show.question(files, "7")


def test_other_judges_are_pointed_out(files, tmp_path):
    rows = [{**review(1, 1, 5.0, "three"), "judge_version": "gpt-4-1106"}]
    other = read_reviews(write_jsonl(tmp_path / "three.jsonl", rows))
    assert any("aren't on one scale" in line for line in show.remarks([files[0], other]))
    assert not any("aren't on one scale" in line for line in show.remarks(files))


def test_a_model_wins_where_both_orders_say_so(tmp_path):
    def pair(question, order, winner):
        return review(question, 1, 0.0) | {"against": "two", "order": order, "winner": winner, "scores": None}

    both = [("one", "one"), ("two", "two"), ("one", "two"), ("tie", "one"), ("tie", "tie"), (None, "one")]
    rows = [pair(i, order, w) for i, ws in enumerate(both) for order, w in zip(("ab", "ba"), ws, strict=True)]
    found = read_reviews(write_jsonl(tmp_path / "p.jsonl", rows))
    d = duel(found)
    assert (d.won, d.lost, d.tied, d.unrated, d.swayed) == (1, 1, 3, 1, 1)
    (_, _, table), *_ = show.tables([found])
    assert table[-1] == ["all", "1", "3", "1", "1", "1"]


def test_files_that_dont_belong_together_are_refused(files, tmp_path):
    (tmp_path / "empty.jsonl").touch()
    with pytest.raises(DataError, match="holds no reviews"):
        read_reviews(tmp_path / "empty.jsonl")
    with pytest.raises(DataError, match="reviews of 2 models"):
        read_reviews(write_jsonl(tmp_path / "x.jsonl", [review(1, 1, 5.0), review(2, 1, 5.0, "two")]))


def test_the_last_review_of_a_question_counts(tmp_path):
    found = read_reviews(write_jsonl(tmp_path / "x.jsonl", [review(1, 1, None), review(1, 1, 5.0)]))
    assert scores(found) == {("1", 1): 5.0}


def test_the_estimate_is_characters_and_prices():
    class Ask:
        def __init__(self, *lengths):
            self.messages = [{"content": "x" * n} for n in lengths]

    e = estimate([Ask(100, 300), Ask(401)], 250, 2048, price_in=30.0, price_out=60.0)  # 100 + 101 tokens read, 500 written
    assert (e.requests, e.input_tokens, e.output_tokens, e.output_tokens_at_most) == (2, 201, 500, 4096)
    assert e.cost == pytest.approx(0.03603) and e.cost_at_most == pytest.approx(0.25179)
    assert estimate([Ask(4)], 250, 2048).cost is None and money(1_000_000, 1_000_000, 2.0, 3.0) == 5.0
