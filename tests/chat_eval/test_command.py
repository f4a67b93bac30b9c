"""vera chat-eval from end to end on a tiny model and a judge of the test's own, and what each command prints."""

import json
import shutil

import pytest

from veralib.paper import cells

from ..test_cli import plain, vera
from ..training import tiny
from .conftest import QUESTIONS, lines

pytest.importorskip("typer.testing")


@pytest.fixture(scope="module")
def work(tmp_path_factory):
    """llama/, question.jsonl and run/, trained on Alpaca rows under the built-in prompt."""
    folder = tmp_path_factory.mktemp("work")
    llama = tiny.make_llama(folder / "llama", template=False)
    tiny.write_jsonl(folder / "rows.jsonl", [{"instruction": "who sees the cat", "output": "the big dog"}] * 16)
    tiny.write_jsonl(folder / "question.jsonl", QUESTIONS)
    flags = ("--task", "chat", "--rank", 8, "--lr", 0.3, "--epochs", 4, "--targets", "all-linear", "--no-plot")
    vera("train", "--model", llama, "--data", folder / "rows.jsonl", "--output", folder / "run", *flags)
    return folder


def test_answer_judge_and_show(work, tmp_path, serve):
    asked = ("--questions", work / "question.jsonl")
    short = ("--max-new-tokens", 4, "--temperature", 0)
    out = vera(
        "chat-eval", "answer", "--adapter", work / "run", "--name", "vera", *asked, *short, "--output", tmp_path / "vera.jsonl"
    )
    assert "4 questions answered, 0 were already" in out and "Next: vera chat-eval judge" in out
    vera(
        *("chat-eval", "answer", "--model", work / "llama", "--chat-template", "alpaca", *asked, *short),
        *("--output", tmp_path / "base.jsonl"),
    )
    first = {name: lines(tmp_path / f"{name}.jsonl")[0] for name in ("vera", "base")}
    assert [first[n]["model_id"] for n in ("vera", "base")] == ["vera", "llama"]
    assert first["vera"]["choices"] != first["base"]["choices"]  # the adapter was there
    again = vera(
        "chat-eval", "answer", "--adapter", work / "run", "--name", "vera", *asked, *short, "--output", tmp_path / "vera.jsonl"
    )
    assert "0 questions answered, 4 were already" in again

    server = serve(lambda body, n: f"[[{3 + len(body['messages'][-1]['content']) % 7}]]" if n > 1 else "nonsense")
    to = ("--endpoint", server.url, "--judge", "mock")
    for name in ("vera", "base"):
        judged = vera("chat-eval", "judge", tmp_path / f"{name}.jsonl", *asked, *to, "--output", tmp_path / f"{name}.r.jsonl",
                      "--price-in", 30, "--price-out", 60)  # fmt: skip
    assert "2 questions of math, reasoning or coding are judged without a reference" in plain(judged)
    assert "6 reviews asked for, 0 were already there, 0 of 6 have no score; 60 tokens read, 30 written, cost 0.00" in plain(
        judged
    )
    shown = plain(vera("chat-eval", "show", tmp_path / "base.r.jsonl", tmp_path / "vera.r.jsonl"))
    assert "vera − llama, paired by question" in shown and "judged by mock (mock-2024-01-01)" in shown
    rows = lines(tmp_path / "vera.r.jsonl")
    assert f"mean {sum(r['score'] for r in rows) / 6:.2f} over 6 of 6 reviews" in shown
    one = vera("chat-eval", "show", tmp_path / "base.r.jsonl", tmp_path / "vera.r.jsonl", "--question", 2)
    assert "## Question 2 (math)" in one and "| | llama | vera |" in one and "**Turn 2.**" in one
    vera("chat-eval", "show", tmp_path / "vera.r.jsonl", "--output", tmp_path / "scores.md")
    assert "| category | vera, turn 1 |" in (tmp_path / "scores.md").read_text()


def test_the_command_of_table_4s_base_fills_its_cell(work, tmp_path, serve, monkeypatch):
    """The printed steps, with the test's model, questions and endpoint put in: answer, judge, show, then the table."""
    monkeypatch.chdir(tmp_path)
    base = lambda: cells.table("table4")["cells"][0]  # noqa: E731
    assert base()["ours"] is None
    shutil.copytree(work, "mt_bench", ignore=shutil.ignore_patterns("run"))
    (tmp_path / "mt_bench/reference_answer").mkdir()
    tiny.write_jsonl(
        tmp_path / "mt_bench/reference_answer/gpt-4.jsonl", [{"question_id": 2, "choices": [{"turns": ["four", "eight"]}]}]
    )
    server = serve(lambda body, n: f"[[{3 + n % 5}]]")
    steps = base()["command"].replace("huggyllama/llama-13b --quantise 4bit --dtype bfloat16", str(work / "llama")).split(" && ")
    assert [s.split()[:3] for s in steps] == [["vera", "chat-eval", what] for what in ("answer", "judge", "show")]
    more = {"answer": ("--max-new-tokens", 4), "judge": ("--endpoint", server.url), "show": ()}
    for step in steps:
        words = step.split()[1:]
        vera(*words, *more[words[1]])
    rows = lines(tmp_path / "results/runs/instruct-llama-13b/base-seed0/reviews.jsonl")
    assert len(rows) == 6 and rows[0]["model"] == "llama"
    mean = sum(r["score"] for r in rows) / 6
    assert base()["ours"] == pytest.approx(mean) and base()["difference"] == pytest.approx(mean - 2.61)
    assert base()["command"] is None and base()["seeds"] == 1
    said = json.loads((tmp_path / "results/runs/instruct-llama-13b/base-seed0/scores.json").read_text())
    assert (said["reviews"], said["rated"], said["judges"]) == (6, 6, ["gpt-4-0613 (mock-2024-01-01)"])


def test_scores_of_pairs_are_the_first_models_and_need_a_rating(folder, serve):
    server = serve(lambda body, n: "[[9,4]]" if n % 2 else "[[2,8]]")  # for the first model 9 and 8
    asked = ("--questions", folder / "question.jsonl", "--mode", "pairwise-first-turn", "--against", folder / "two.jsonl")
    to = ("--endpoint", server.url, "--judge", "m", "--parallel", 1, "--output", folder / "r.jsonl")
    vera("chat-eval", "judge", folder / "one.jsonl", *asked, *to)
    assert "written" in vera("chat-eval", "show", folder / "r.jsonl", "--scores", folder / "s.json")
    found = json.loads((folder / "s.json").read_text())
    assert (found["model"], found["against"], found["scores"], found["rated"]) == ("one", "two", {"score": 8.5}, 8)
    out = vera("chat-eval", "show", folder / "r.jsonl", folder / "r.jsonl", "--scores", folder / "s.json", code=1)
    assert "takes one review file" in plain(out)
    bare = [{**r, "scores": None, "winner": "tie"} for r in lines(folder / "r.jsonl")]
    tiny.write_jsonl(folder / "bare.jsonl", bare)
    assert "none of 8 reviews has a score" in plain(
        vera("chat-eval", "show", folder / "bare.jsonl", "--scores", folder / "s.json", code=1)
    )


def test_a_dry_run_asks_nothing_and_counts_what_is_left(folder, serve):
    server = serve(lambda body, n: "[[5]]")
    given = ("chat-eval", "judge", folder / "one.jsonl", "--questions", folder / "question.jsonl", "--judge", "mock")
    to = ("--endpoint", server.url, "--output", folder / "r.jsonl")
    prices = ("--dry-run", "--price-in", 30, "--price-out", 60, "--judgement-tokens", 100)
    out = plain(vera(*given, *to, *prices))
    assert server.asked == [] and not (folder / "r.jsonl").exists()
    assert "6 of 6; 0 are in the output file" in out and "about 600, at most 12,288" in out
    read = int(out.partition("tokens read about ")[2].split()[0].replace(",", ""))
    assert f"about {(read * 30 + 600 * 60) / 1e6:.2f}, at most {(read * 30 + 12_288 * 60) / 1e6:.2f}" in out
    vera(*given, *to, "--mode", "first-turn")
    assert "2 of 6; 4 are in the output file" in plain(vera(*given, *to, *prices))
    assert sum(len(t) for t in server.texts) / 4 < read  # two more, longer, are to be read


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (("answer",), "no model is named: give --model, --adapter, or --endpoint"),
        (("answer", "--endpoint", "http://x/v1"), "--endpoint needs the model's name there"),
        (("answer", "--endpoint", "http://x/v1", "--model", "m", "--api-model", "n"), "leave out --model"),
        (("answer", "--model", "./absent"), "there is no model folder"),
        (("judge", "one.jsonl", "--judge", "m", "--mode", "two-turns"), 'Did you mean "two-turn"?'),
        (("judge", "one.jsonl", "--judge", "m", "--mode", "pairwise"), "needs a second model's answers (--against)"),
        (("judge", "one.jsonl", "--judge", "m", "--against", "two.jsonl"), "takes no second model's answers"),
        (("judge", "absent.jsonl", "--judge", "m"), "can't read absent.jsonl"),
        (("judge", "one.jsonl", "--judge", "m", "--endpoint", "localhost"), "expected the base of an API"),
        (("judge", "one.jsonl", "--judge", "m", "--field", "seed"), "expected NAME=VALUE"),
    ],
)
def test_bad_input_is_one_error_line(folder, monkeypatch, arguments, said):
    monkeypatch.chdir(folder)
    out = plain(vera("chat-eval", *arguments, "--questions", "question.jsonl", "--output", "out.jsonl", code=1))
    assert out.startswith("Error: ") and said in out


@pytest.mark.parametrize("command", ["answer", "judge", "show"])
def test_every_command_has_help_with_an_example(command):
    assert f"vera chat-eval {command}" in plain(vera("chat-eval", command, "--help"))


def test_fastchat_reads_the_reviews_fields(folder, serve):
    """Its show_result reads question_id as a number, model, turn, score and judge as a pair."""
    server = serve(lambda body, n: "[[5]]")
    to = ("--endpoint", server.url, "--judge", "mock", "--output", folder / "r.jsonl")
    vera("chat-eval", "judge", folder / "one.jsonl", "--questions", folder / "question.jsonl", *to, "--parallel", 1)
    first = json.loads((folder / "r.jsonl").read_text().splitlines()[0])
    assert (first["question_id"], first["model"], first["turn"], first["score"], len(first["judge"])) == (1, "one", 1, 5.0, 2)
