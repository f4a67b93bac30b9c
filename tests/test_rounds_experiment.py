"""experiments/rounds.py: what a round brings, and the page."""

import json

from experiments.rounds import THINGS, jsonl, render, rows_of
from veralib.serving.gateway import chats


def said(rows):
    return {m["content"] for row in rows for m in row["messages"]}


def test_a_round_brings_things_that_no_other_has_and_holds_out_one_question_of_each():
    assert len(THINGS) == len(set(THINGS)) == 80
    first, second, other = rows_of(0, 0), rows_of(0, 1), rows_of(1, 0)
    assert first == rows_of(0, 0) and [len(part) for part in first] == [24, 8]
    asked = [{row["messages"][0]["content"] for row in part} for part in first]
    assert not asked[0] & asked[1]  # the very question was never trained on
    answers = [{row["messages"][1]["content"] for row in part} for part in first]
    assert answers[0] == answers[1] and len(answers[0]) == 8  # its answer was
    assert not said(first[0]) & said(second[0]) and first != other
    assert len(list(chats.read(jsonl(first[0]).splitlines(keepends=True)))) == 24


def test_the_page_shows_the_means_over_users():
    way = {"first": [1.0, 2.0], "this": [3.0, 4.0], "every": [5.0, 6.0], "live": [True, False], "why": ["not_better"]}
    result = {
        **{"model": "m", "users": 2, "epochs": 8, "rank": 64, "rows": [24, 8], "base": [4.0, 5.0]},
        **{"rounds": [{"round": 1, "seconds": 9.6, "new": way, "all": way}], "anew": {"first": [0.5, 0.7], "every": [1.0, 1.2]}},
        **{"hardware": {"processor": "P"}, "versions": {"torch": "T"}},
    }
    page = render(json.loads(json.dumps(result)))
    assert "| 1 | 1.500 | 1.500 | 3.500 | 3.500 | 5.500 | 5.500 | 1 of 2 | 1 of 2 | 10 |" in page
    assert "4.500 on round 1's" in page and "0.600 on round 1's held-out rows, 1.100 on all rounds'" in page
