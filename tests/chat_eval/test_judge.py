"""The judge asks what it must, once, and nothing that came back is lost."""

import signal
import threading
import time

import pytest

from veralib.chat_eval import judge, plan, read_answers, read_questions
from veralib.chat_eval.endpoint import Endpoint
from veralib.chat_eval.judge import without_reference
from veralib.chat_eval.prompts import built_in, read_prompts
from veralib.errors import ConfigError, DataError, EndpointError

from ..training.tiny import write_jsonl
from .conftest import lines

TURNS = 6  # two questions of two turns, two of one


def asks(folder, mode="two-turn", references=True, **given):
    questions = read_questions(folder / "question.jsonl", folder / "reference.jsonl" if references else None)
    return plan(questions, read_answers(folder / "one.jsonl"), mode, **given)


def endpoint(server, retries=3, **given):
    return Endpoint(server.url, "mock", retries=retries, pause=0.01, **given)


def test_two_turns_are_two_reviews_and_first_turn_is_one(folder, serve):
    server = serve(lambda body, n: "Fine. Grade: [[7.5]]")
    done = judge(asks(folder), endpoint(server), folder / "r.jsonl", parallel=1)
    assert (done.asked, done.before, done.unrated) == (TURNS, 0, 0) and (done.input_tokens, done.output_tokens) == (60, 30)
    rows = lines(folder / "r.jsonl")
    assert [(r["question_id"], r["turn"]) for r in rows] == [(1, 1), (1, 2), (2, 1), (2, 2), (3, 1), (4, 1)]
    assert {r["score"] for r in rows} == {7.5} and {r["judge_version"] for r in rows} == {"mock-2024-01-01"}
    first, second = server.texts[:2]
    assert "one says who sees the cat" in first and "and the bird" not in first
    assert "one says who sees the cat" in second and "one says and the bird" in second
    assert server.asked[0]["temperature"] == 0 and server.asked[0]["model"] == "mock"
    assert len(asks(folder, "first-turn")) == 4


def test_the_reference_is_shown_for_math_reasoning_and_coding_alone(folder, serve):
    everything = [{"question_id": i, "choices": [{"turns": ["REF four", "REF eight"]}]} for i in (1, 2, 3, 4)]
    write_jsonl(folder / "reference.jsonl", everything)
    server = serve(lambda body, n: "[[5]]")
    judge(asks(folder), endpoint(server), folder / "r.jsonl", parallel=1)
    assert ["REF four" in t for t in server.texts] == [False, False, True, True, True, False]
    assert ["REF eight" in t for t in server.texts] == [False, False, False, True, False, False]


def test_a_missing_reference_falls_back_and_is_named(folder):
    assert without_reference(asks(folder)) == ["3"]
    assert without_reference(asks(folder, references=False)) == ["2", "3"]
    prompts = {a.question.id: a.prompt.name for a in asks(folder, "first-turn")}
    assert prompts == {"1": "vera-single", "2": "vera-single-reference", "3": "vera-single", "4": "vera-single"}


def test_a_rate_limit_is_waited_for_as_long_as_it_asks(folder, serve):
    server = serve(lambda body, n: (429, {"Retry-After": "0.4"}, "slow down") if n == 1 else "[[3]]")
    begun = time.monotonic()
    done = judge(asks(folder), endpoint(server), folder / "r.jsonl", parallel=1)
    assert time.monotonic() - begun >= 0.4
    assert len(server.asked) == TURNS + 1 and done.unrated == 0 and len(lines(folder / "r.jsonl")) == TURNS


@pytest.mark.parametrize("status", [500, 503])
def test_server_errors_pass(folder, serve, status):
    server = serve(lambda body, n: (status, {}, "oops") if n <= 2 else "[[3]]")
    judge(asks(folder), endpoint(server), folder / "r.jsonl", parallel=1)
    assert len(server.asked) == TURNS + 2 and len(lines(folder / "r.jsonl")) == TURNS


def test_a_reply_that_never_comes_is_asked_for_again(folder, serve):
    def slow(body, n):
        if n == 1:
            time.sleep(0.6)
        return "[[3]]"

    server = serve(slow)
    judge(asks(folder, "first-turn"), endpoint(server, timeout=0.2), folder / "r.jsonl", parallel=1)
    assert len(server.asked) == 5 and len(lines(folder / "r.jsonl")) == 4


def test_an_endpoint_that_goes_down_keeps_what_came_and_goes_on_without_repeats(folder, serve):
    up = serve(lambda body, n: "[[8]]" if n <= 2 else (503, {}, "down"))
    with pytest.raises(EndpointError) as e:
        judge(asks(folder), endpoint(up, retries=1), folder / "r.jsonl", parallel=1)
    assert "HTTP 503: down" in str(e.value) and "2 of 6 reviews are in" in str(e.value)
    assert "start the same command again to go on" in str(e.value) and len(lines(folder / "r.jsonl")) == 2
    again = serve(lambda body, n: "[[8]]")
    done = judge(asks(folder), endpoint(again), folder / "r.jsonl", parallel=1)
    assert (len(again.asked), done.asked, done.before) == (4, 4, 2)
    assert up.texts[:2] + again.texts == [a.messages[-1]["content"] for a in asks(folder)]
    nothing = serve(lambda body, n: "[[8]]")
    judge(asks(folder), endpoint(nothing), folder / "r.jsonl")
    assert nothing.asked == []


def test_an_endpoint_that_isnt_there_says_what_to_do(folder):
    nobody = Endpoint("http://127.0.0.1:9/v1", "mock", retries=1, pause=0.01)
    with pytest.raises(EndpointError, match=r"gave no answer in 2 tries.*ConnectError.*Is it running.*0 of 6 reviews"):
        judge(asks(folder), nobody, folder / "r.jsonl")


def test_an_interrupt_keeps_the_reviews_under_way(folder, serve):
    main, interrupted = threading.get_ident(), []

    def reply(body, n):
        if n == 3:
            signal.pthread_kill(main, signal.SIGINT)
        if n >= 3 and not interrupted:
            time.sleep(0.7)  # requests are under way when it arrives, and a busy machine has time to deliver it
        return "[[8]]"

    server = serve(reply)
    before = signal.signal(signal.SIGINT, signal.default_int_handler)  # a job in the background is started with SIGINT ignored
    try:
        with pytest.raises(KeyboardInterrupt):
            judge(asks(folder), endpoint(server), folder / "r.jsonl", parallel=2)
    finally:
        signal.signal(signal.SIGINT, before)
    interrupted.append(True)
    assert 3 <= len(server.asked) == len(lines(folder / "r.jsonl")) < TURNS
    judge(asks(folder), endpoint(server), folder / "r.jsonl", parallel=2)
    assert len(server.asked) == TURNS and len(lines(folder / "r.jsonl")) == TURNS


def test_a_line_cut_in_the_middle_is_dropped_and_asked_for_again(folder, serve):
    server = serve(lambda body, n: "[[8]]")
    judge(asks(folder), endpoint(server), folder / "r.jsonl", parallel=1)
    whole = (folder / "r.jsonl").read_bytes()
    (folder / "r.jsonl").write_bytes(whole[:-40])
    judge(asks(folder), endpoint(server), folder / "r.jsonl", parallel=1)
    assert len(server.asked) == TURNS + 1 and server.texts[-1] == server.texts[TURNS - 1]
    assert len(lines(folder / "r.jsonl")) == TURNS
    (folder / "r.jsonl").write_bytes(whole[:-1])  # whole but for its line end: it stays
    judge(asks(folder), endpoint(server), folder / "r.jsonl", parallel=1)
    assert len(server.asked) == TURNS + 1 and len(lines(folder / "r.jsonl")) == TURNS


def test_a_damaged_line_in_the_middle_is_named(folder, serve):
    (folder / "r.jsonl").write_text('{"question_id": 1\n{"question_id": 2}\n')
    with pytest.raises(DataError, match=r"r.jsonl, line 1 is no JSON"):
        judge(asks(folder), endpoint(serve(lambda body, n: "[[8]]")), folder / "r.jsonl")


def test_nonsense_is_asked_again_and_then_kept_without_a_score(folder, serve):
    said = []
    server = serve(lambda body, n: "I like turtles" if "who sees" in body["messages"][-1]["content"] else "[[8]]")
    done = judge(asks(folder), endpoint(server), folder / "r.jsonl", parallel=1, tries=3, progress=said.append)
    assert len(server.asked) == 3 + 3 + 4 and done.unrated == 2
    first = lines(folder / "r.jsonl")[0]
    assert first["score"] is None and first["judgment"] == "I like turtles" and first["usage"]["prompt_tokens"] == 30
    assert first["reason"] == "no rating in double square brackets in 'I like turtles'"
    assert f"  question 1, turn 1: no score: {first['reason']}" in said
    judge(asks(folder), endpoint(server), folder / "r.jsonl")
    assert len(server.asked) == 10  # it was asked often enough, unless one wants it
    better = serve(lambda body, n: "[[2]]")
    assert judge(asks(folder), endpoint(better), folder / "r.jsonl", again=True).unrated == 0
    assert len(better.asked) == 2


def test_a_second_try_may_bring_the_rating(folder, serve):
    server = serve(lambda body, n: "hm" if n == 1 else "[[42]]" if n == 2 else "[[8]]")
    done = judge(asks(folder, "first-turn"), endpoint(server), folder / "r.jsonl", parallel=1)
    first, second = lines(folder / "r.jsonl")[:2]
    assert done.unrated == 0 and len(server.asked) == 4 + 2 and first["score"] == 8
    assert [body["temperature"] for body in server.asked] == [0, 0.2, 0.2, 0, 0, 0]
    assert (first["temperature"], second["temperature"]) == (0.2, 0)
    hot = serve(lambda body, n: "hm" if n == 1 else "[[8]]")
    judge(asks(folder, "first-turn"), endpoint(hot), folder / "hot.jsonl", parallel=1, parameters={"temperature": 0.7})
    own = serve(lambda body, n: "hm" if n == 1 else "[[8]]")
    judge(asks(folder, "first-turn"), endpoint(own, fields={"temperature": 1}), folder / "own.jsonl", parallel=1)
    assert {b["temperature"] for b in hot.asked} == {0.7} and {b["temperature"] for b in own.asked} == {1}


@pytest.mark.parametrize("body", ["<html>busy</html>", '{"error": {"code": 529}}', '{"choices": []}', "[]"])
def test_an_answer_that_is_no_completion_is_asked_for_again_and_then_kept_as_a_line(folder, serve, body):
    once = serve(lambda asked, n: (200, {}, body) if n in (1, 2) else "[[8]]")
    assert judge(asks(folder), endpoint(once), folder / "once.jsonl", parallel=1).unrated == 0 and len(once.asked) == TURNS + 2
    said = []
    server = serve(lambda asked, n: (200, {}, body) if "what is 2" in asked["messages"][-1]["content"] else "[[8]]")
    done = judge(asks(folder), endpoint(server), folder / "r.jsonl", parallel=1, progress=said.append)
    rows = lines(folder / "r.jsonl")
    assert done.unrated == 2 and len(rows) == TURNS and len(server.asked) == 4 + 2 * 3
    assert [r["score"] for r in rows] == [8, 8, None, None, 8, 8]
    assert "not with a chat completion (3 tries)" in rows[2]["reason"] and any(rows[2]["reason"] in line for line in said)
    better = serve(lambda asked, n: "[[2]]")
    assert judge(asks(folder), endpoint(better), folder / "r.jsonl", again=True).unrated == 0 and len(better.asked) == 2


def test_the_order_of_parallel_replies_doesnt_matter(folder, serve):
    def by_content(body, n):
        time.sleep(0.02 * (n % 3))
        return f"[[{1 + len(body['messages'][-1]['content']) % 9}]]"

    for name, parallel in (("a", 1), ("b", 6)):
        judge(asks(folder), endpoint(serve(by_content)), folder / f"{name}.jsonl", parallel=parallel)
    scores = [{(r["question_id"], r["turn"]): r["score"] for r in lines(folder / f"{n}.jsonl")} for n in ("a", "b")]
    assert scores[0] == scores[1] and len(scores[0]) == TURNS and len(set(scores[0].values())) > 1


def test_reviews_of_other_answers_or_by_another_judge_are_not_mixed(folder, serve):
    server = serve(lambda body, n: "[[8]]")
    judge(asks(folder), endpoint(server), folder / "r.jsonl")
    (folder / "one.jsonl").write_text((folder / "one.jsonl").read_text().replace("one says", "one shouts"))
    with pytest.raises(ConfigError, match=r"already holds reviews that were made otherwise.*Name another output"):
        judge(asks(folder), endpoint(server), folder / "r.jsonl")
    assert len(server.asked) == TURNS


def test_the_key_goes_to_the_endpoint_and_nowhere_else(folder, serve, monkeypatch, capsys):
    monkeypatch.setenv("OPENAI_API_KEY", "sk-secret-123")
    server = serve(lambda body, n: "[[8]]" if n in (1, 3) else (400 if n == 2 else 404, {}, "no: Bearer sk-secret-123"))
    with pytest.raises(EndpointError) as e:
        judge(asks(folder), endpoint(server), folder / "r.jsonl", parallel=1, progress=print)
    assert server.headers[0]["Authorization"] == "Bearer sk-secret-123"
    written = "".join(p.read_text() for p in folder.iterdir())
    assert "sk-secret" not in written + str(e.value) + "".join(capsys.readouterr())
    assert "refuses the request (HTTP 404): no: Bearer …" in str(e.value) and "(HTTP 400): no: Bearer …" in written
    monkeypatch.setenv("OPENAI_API_KEY", "sk-secret\nX: y")
    with pytest.raises(ConfigError, match="holds no key") as bad:
        endpoint(server)
    assert "sk-secret" not in str(bad.value)


@pytest.mark.parametrize(
    ("answer", "said"),
    [
        ((401, {}, "who are you"), "wants a key, and there is none in the environment variable OPENAI_API_KEY"),
        ((404, {}, "no such model"), 'Does it know the model "mock"?'),
        ((429, {}, '{"error": {"code": "insufficient_quota"}}'), "refuses the request (HTTP 429)"),
        ((429, {"Retry-After": "86400"}, "tomorrow"), "asks to wait 86400 seconds"),
    ],
)
def test_what_trying_again_cant_mend_is_said_at_once(folder, serve, answer, said):
    server = serve(lambda body, n: answer)
    with pytest.raises(EndpointError) as e:
        judge(asks(folder), endpoint(server), folder / "r.jsonl", parallel=1)
    assert said in str(e.value) and len(server.asked) == 1


def test_an_endpoint_that_never_gave_a_completion_is_the_wrong_address(folder, serve):
    server = serve(lambda body, n: (200, {}, "<html>hello</html>"))
    with pytest.raises(EndpointError, match=r"\(3 tries\): '<html>hello</html>'.*mostly ends in /v1.*0 of 6 reviews are in"):
        judge(asks(folder), endpoint(server), folder / "r.jsonl", parallel=1)
    assert len(server.asked) == 3


@pytest.mark.parametrize("status", [400, 413, 422])
def test_a_conversation_that_is_refused_has_no_score_and_the_others_have(folder, serve, status):
    def filtered(body, n):
        return (status, {}, "content_filter") if "what is 2" in body["messages"][-1]["content"] else "[[8]]"

    server = serve(filtered)
    done = judge(asks(folder), endpoint(server), folder / "r.jsonl", parallel=1)
    rows = lines(folder / "r.jsonl")
    assert done.unrated == 2 and [r["score"] for r in rows] == [8, 8, None, None, 8, 8] and len(server.asked) == TURNS
    assert f"refuses the request (HTTP {status}): content_filter" in rows[2]["reason"] and rows[2]["judgment"] == ""
    # A new process knows from the file that the endpoint works; from a file of refusals alone it doesn't.
    first = serve(filtered)
    assert judge(asks(folder), endpoint(first), folder / "r.jsonl", again=True, parallel=1).unrated == 2 and len(first.asked) == 2
    write_jsonl(folder / "bad.jsonl", rows[2:3])
    with pytest.raises(EndpointError, match="content_filter"):
        judge(asks(folder)[2:4], endpoint(first), folder / "bad.jsonl", parallel=1)


def test_an_endpoint_that_refuses_everything_from_some_time_on_ends_the_command(folder, serve):
    server = serve(lambda body, n: "[[8]]" if n == 1 else (400, {}, "your credit is used up"))
    many = [ask for ask in asks(folder) for _ in range(3)]
    with pytest.raises(EndpointError, match=r"credit is used up.* 8 requests in a row were refused"):
        judge(many, endpoint(server), folder / "r.jsonl", parallel=1)
    assert len(server.asked) == 9 and len(lines(folder / "r.jsonl")) == 1  # nothing that is refused is kept as a review
    nothing = serve(lambda body, n: (400, {}, "no such field"))
    with pytest.raises(EndpointError, match=r"\(HTTP 400\): no such field.* 0 of 6 reviews are in"):
        judge(asks(folder), endpoint(nothing), folder / "n.jsonl", parallel=1)
    assert lines(folder / "n.jsonl") == []


def test_the_first_conversation_may_be_the_refused_one(folder, serve):
    server = serve(lambda body, n: (400, {}, "content_filter") if n == 1 else "[[8]]")
    assert judge(asks(folder), endpoint(server), folder / "r.jsonl", parallel=1).unrated == 1
    assert [r["score"] for r in lines(folder / "r.jsonl")] == [None, 8, 8, 8, 8, 8]


def test_a_body_that_cant_be_decoded_is_asked_for_again(folder, serve):
    server = serve(lambda body, n: (200, {"Content-Encoding": "gzip"}, "no gzip") if n == 1 else "[[8]]")
    assert judge(asks(folder), endpoint(server), folder / "r.jsonl", parallel=1).unrated == 0 and len(server.asked) == TURNS + 1


def test_fields_are_added_and_taken_out(folder, serve):
    server = serve(lambda body, n: "[[8]]")
    given = {"max_tokens": None, "max_completion_tokens": 99, "temperature": 1}
    judge(asks(folder, "first-turn"), endpoint(server, fields=given), folder / "r.jsonl", parallel=1)
    body = server.asked[0]
    assert "max_tokens" not in body and (body["max_completion_tokens"], body["temperature"]) == (99, 1)


def test_pairs_are_judged_in_both_orders_and_scores_go_to_their_models(folder, serve):
    server = serve(lambda body, n: "[[9,4]]")  # whoever stands first is better
    pair = asks(folder, "pairwise-first-turn", against=read_answers(folder / "two.jsonl"))
    judge(pair, endpoint(server), folder / "r.jsonl", parallel=1)
    assert len(server.asked) == 8
    one, two = lines(folder / "r.jsonl")[:2]
    assert (one["scores"], one["winner"]) == ({"one": 9, "two": 4}, "one")
    assert (two["scores"], two["winner"]) == ({"two": 9, "one": 4}, "two")
    texts = server.texts[:2]
    assert [t.index("one says") < t.index("two says") for t in texts] == [True, False]


def test_missing_answers_are_named(folder):
    write_jsonl(folder / "one.jsonl", [{"question_id": 1, "choices": [{"turns": ["only one"]}]}])
    with pytest.raises(DataError, match=r"one.jsonl lacks answers to 4 of 4 questions: 1, 2, 3, 4"):
        asks(folder)
    with pytest.raises(DataError, match="lacks answers to 3 of 4 questions: 2, 3, 4"):
        asks(folder, "first-turn")


def test_own_prompts_are_chosen_by_what_they_show(folder, serve):
    own = [
        {"name": "s", "system_prompt": "S", "prompt_template": "Q {question} A {answer}", "output_format": "[[rating]]"},
        {"name": "m", "prompt_template": "R {ref_answer_1} {question} {answer} {{}}", "output_format": "[[rating]]"},
    ]
    prompts = read_prompts(write_jsonl(folder / "p.jsonl", own))
    found = asks(folder, "first-turn", prompts=prompts)
    assert [a.prompt.name for a in found] == ["s", "m", "s", "s"]
    assert found[0].messages == [
        {"role": "system", "content": "S"},
        {"role": "user", "content": "Q who sees the cat A one says who sees the cat"},
    ]
    assert found[1].messages[0]["content"].startswith("R REF four") and found[1].messages[0]["content"].endswith("{}")
    with pytest.raises(DataError, match=r"have none for one model, two turns, without a reference\. There: s, m"):
        asks(folder, prompts=prompts)
    write_jsonl(folder / "p.jsonl", [{**own[0], "prompt_template": "{question} {reply}"}])
    with pytest.raises(DataError, match=r'"s" can.t be filled in .KeyError'):
        asks(folder, "first-turn", references=False, prompts=read_prompts(folder / "p.jsonl"))


def test_the_built_in_prompts_are_eight_and_ask_for_their_rating():
    prompts = built_in()
    assert len({p.name for p in prompts.values()}) == 8
    for (pair, turns, reference), p in prompts.items():
        assert ("[[4,7]]" in p.template) == pair and ("[[5]]" in p.template) != pair
        assert ("{question_2}" in p.template) == turns and ("{ref_answer_1}" in p.template) == reference


def test_fastchats_files_make_the_published_number_of_requests(data):
    mt = read_questions(data / "chat_eval" / "mt_bench" / "question.jsonl", data / "chat_eval" / "mt_bench" / "reference_answer")
    prompts = read_prompts(data / "chat_eval" / "judge_prompts.jsonl")
    from veralib.chat_eval.questions import Answers

    given = Answers("m", {q.id: ("first", "second") for q in mt}, "answers.jsonl")
    found = plan(mt, given, prompts=prompts)
    assert len(mt) == 80 and len(found) == 160 and len(plan(mt, given, "first-turn")) == 80
    by_name = {n: sum(a.prompt.name == n for a in found) for n in {a.prompt.name for a in found}}
    guided = {"single-math-v1": 30, "single-math-v1-multi-turn": 30}
    assert by_name == {"single-v1": 50, "single-v1-multi-turn": 50, **guided} and without_reference(found) == []
    other = Answers("n", given.turns, "n.jsonl")
    assert len(plan(mt, given, "pairwise", other, prompts)) == 320
    vicuna = read_questions(data / "chat_eval" / "vicuna_bench" / "question.jsonl")
    assert len(vicuna) == 80 and len(plan(vicuna, Answers("m", {q.id: ("a",) for q in vicuna}, "v"), prompts=prompts)) == 80
