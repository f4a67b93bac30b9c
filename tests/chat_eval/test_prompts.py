"""What a judgement says, and what it doesn't; faults of the files."""

import pytest

from veralib.chat_eval import read_answers, read_questions
from veralib.chat_eval.endpoint import retry_after
from veralib.chat_eval.prompts import Unclear, rating, read_prompts
from veralib.errors import DataError

from ..training.tiny import write_jsonl


@pytest.mark.parametrize(
    ("format", "text", "value"),
    [
        ("[[rating]]", "Good. Rating: [[5]]", 5.0),
        ("[[rating]]", "[[7.5]] and later [[3]]", 7.5),
        ("[[rating]]", "[[ 10 ]]", 10.0),
        ("[[rating_a,rating_b]]", "Grades: [[4,7]]", [4.0, 7.0]),
        ("[[rating_a,rating_b]]", "[[4.5, 10]]", [4.5, 10.0]),
        ("[[A]]", "so [[B]]", "B"),
        ("[[A]]", "so [[C]]", "tie"),
    ],
)
def test_ratings_are_read(format, text, value):
    assert rating(format, text) == value


@pytest.mark.parametrize(
    ("format", "text", "said"),
    [
        ("[[rating]]", "", "no rating"),
        ("[[rating]]", "Rating: 5 of 10, see [1]", "no rating"),
        ("[[rating]]", "[[rating]]", "no rating"),
        ("[[rating]]", "[[0]]", "isn't from 1 to 10"),
        ("[[rating]]", "[[11]]", "isn't from 1 to 10"),
        ("[[rating]]", "[[4,7]]", "no rating"),
        ("[[rating_a,rating_b]]", "[[4]]", "no rating"),
        ("[[A]]", "[[D]]", "no verdict"),
    ],
)
def test_what_is_no_rating(format, text, said):
    with pytest.raises(Unclear, match=said):
        rating(format, text)


def test_retry_after_is_seconds_or_a_date():
    import time
    from email.utils import formatdate

    assert retry_after("1.5") == 1.5 and retry_after(None) == retry_after("soon") == retry_after("-3") == 0
    assert 5 < retry_after(formatdate(time.time() + 10, usegmt=True)) <= 10


@pytest.mark.parametrize(
    ("row", "said"),
    [
        ({"category": "math", "turns": ["a"]}, 'row 2 of .* has no "question_id"'),
        ({"question_id": 1, "turns": ["a"]}, "repeats question 1"),
        ({"question_id": 2}, "expected a list of texts"),
        ({"question_id": 2, "turns": ["a", " "]}, "expected a list of texts"),
        ({"question_id": 2, "turns": ["a", "b", "c"]}, "has 3 turns, expected one or two"),
    ],
)
def test_bad_questions_are_named(tmp_path, row, said):
    file = write_jsonl(tmp_path / "q.jsonl", [{"question_id": 1, "turns": ["a"]}, row])
    with pytest.raises(DataError, match=said):
        read_questions(file)


def test_bad_answers_and_prompts_are_named(tmp_path):
    with pytest.raises(DataError, match=r'row 1 of .* has no "choices"'):
        read_answers(write_jsonl(tmp_path / "a.jsonl", [{"question_id": 1}]))
    rows = [{"question_id": i, "model_id": m, "choices": [{"turns": ["x"]}]} for i, m in ((1, "a"), (2, "b"))]
    with pytest.raises(DataError, match="answers of 2 models, a, b"):
        read_answers(write_jsonl(tmp_path / "a.jsonl", rows))
    good = {"name": "n", "prompt_template": "{question}", "output_format": "[[rating]]"}
    with pytest.raises(DataError, match='output_format "stars", expected one of'):
        read_prompts(write_jsonl(tmp_path / "p.jsonl", [{**good, "output_format": "stars"}]))
    with pytest.raises(DataError, match='is for the same as "n"'):
        read_prompts(write_jsonl(tmp_path / "p.jsonl", [good, {**good, "name": "m"}]))
    with pytest.raises(DataError, match="expected texts as name"):
        read_prompts(write_jsonl(tmp_path / "p.jsonl", [{"name": "n"}]))
