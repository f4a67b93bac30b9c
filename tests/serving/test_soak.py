"""The soak's own judgement: a wrong answer is seen, and what could not be known is not called wrong."""

import pytest

from benchmarks import measure
from benchmarks.soak import growth
from benchmarks.soak_world import BROKEN, MISSING, Answer, Timeline, World, judge
from veralib.store import open_store

INFINITE = float("inf")


@pytest.fixture(scope="module")
def world():
    return World(measure.ROOT / "models" / "books-4m", 16, 6)


def text(world, name, revision, prompt=0):
    return world.expected([(name, revision, prompt)])[name, revision, prompt][0]


def test_states_that_a_request_could_meet():
    times = Timeline()
    for begin, end, state in ((1, 2, 0), (5, 6, 1), (8, 9, MISSING), (10, INFINITE, BROKEN)):
        times.add("ann", begin, end, state)
    cases = {(0, 0.5): {MISSING}, (1.5, 1.6): {MISSING, 0}, (3, 4): {0}, (4, 5.5): {0, 1}, (3, 7): {0, 1}, (7, 7.5): {1}}
    cases |= {(9.5, 9.6): {MISSING}, (11, 12): {MISSING, BROKEN}}
    for (began, ended), states in cases.items():
        assert times.possible("ann", began, ended) == states, (began, ended)
    assert times.possible("nobody", 0, 9) == {MISSING}
    times.add("ann", 20, 21, 2)  # what was never acknowledged is over too
    assert times.possible("ann", 20.5, 22) == {MISSING, BROKEN, 2} and times.possible("ann", 22, 23) == {2}


def test_two_versions_of_a_name_say_different_things_and_the_store_gives_them_back(world, tmp_path):
    store = open_store(tmp_path)
    world.fill(store, ["ann", "bob"])
    kept = store.get("ann")
    assert all((kept.vectors[u][0] == world.adapter("ann", 0).vectors[u][0]).all() for u in kept.vectors)
    texts = [text(world, "ann", 0, p) + text(world, "ann", 1, p) for p in range(4)]
    assert any(text(world, "ann", 0, p) != text(world, "ann", 1, p) for p in range(4)), texts


def test_every_kind_of_answer_is_judged(world):
    prompt = next(p for p in range(8) if len({text(world, n, r, p) for n, r in (("ann", 0), ("ann", 1), ("bob", 0))}) == 3)
    times = Timeline()
    for name, begin, end, state in (("ann", 0, 1, 0), ("ann", 10, 11, 1), ("bob", 0, 1, 0), ("bob", 20, 21, MISSING)):
        times.add(name, begin, end, state)
    old, new, bob = text(world, "ann", 0, prompt), text(world, "ann", 1, prompt), text(world, "bob", 0, prompt)
    cases = [
        (Answer("ann", prompt, 2, 3, old), "right"),
        (Answer("ann", prompt, 2, 3, old[:3], partial=True), "right"),
        (Answer("ann", prompt, 2, 3, old[:3]), "wrong"),
        (Answer("ann", prompt, 2, 3, new), "wrong"),
        (Answer("ann", prompt, 2, 3, bob), "wrong"),
        (Answer("ann", prompt, 9, 12, old), "right"),
        (Answer("ann", prompt, 9, 12, new), "right"),
        (Answer("ann", prompt, 12, 13, old), "wrong"),
        (Answer("bob", prompt, 22, 23, 404), "refused"),
        (Answer("bob", prompt, 2, 3, 404), "wrong"),
        (Answer("bob", prompt, 22, 23, bob), "wrong"),
        (Answer("bob", prompt, 2, 3, 503), "unavailable"),
        (Answer("bob", prompt, 40, 41, 503), "while down"),
        (Answer(None, prompt, 2, 3, text(world, None, 0, prompt)), "right"),
        (Answer(None, prompt, 2, 3, old), "wrong"),
    ]
    for answer, kind in cases:
        found = judge(world, times, [answer], [(39, 42)])
        assert found[kind] == 1 and found["answers"] == 1, (answer, kind, found)


def test_growth_is_told_for_each_process_alone():
    samples = [(t, 1, (100 + t) * 2**20) for t in range(6)] + [(t, 2, 50 * 2**20) for t in range(9)] + [(20, 3, 1)]
    first, second = growth(samples)
    assert first.pop("course") == [(round(t / 60, 2), 100 + t) for t in range(6)] and len(second.pop("course")) == 9
    assert first == {"after_a_third": 102, "at_the_end": 105, "most": 105}
    assert second == {"after_a_third": 50, "at_the_end": 50, "most": 50}


@pytest.mark.slow
def test_a_short_soak_has_no_wrong_answer(tmp_path):
    """Half a minute of what `python -m benchmarks.soak` does for half an hour, the two kills included."""
    pytest.importorskip("fastapi")
    pytest.importorskip("psutil")
    from benchmarks import soak

    found = soak.main(["--minutes", "0.5", "--clients", "6", "--adapters", "60", "--results", str(tmp_path)])
    assert found["wrong"] == 0 and found["unavailable"] == 0 and found["right"] > 20 and found["unlike_the_base"] > 0.5
    assert len(found["down_seconds"]) == 2 and found["changes"]["updates"] > 5
    page = (tmp_path / "soak-embedded.md").read_text()
    assert "| **0** |" in page and str(tmp_path) not in page
