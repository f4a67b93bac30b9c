"""Answers: what generate writes, both turns, resumed without repeats; and over HTTP."""

from dataclasses import replace

import pytest
import torch

import veralib
from veralib.chat_eval import answer_locally, answer_over_http, read_answers, read_questions
from veralib.chat_eval.answers import Sampling
from veralib.chat_eval.endpoint import Endpoint
from veralib.chat_eval.local import load_local
from veralib.errors import ConfigError, DataError, EndpointError, VeraWarning

from ..training.tiny import CHAT_TEMPLATE, make_llama, write_jsonl
from .conftest import lines

GREEDY = Sampling(temperature=0.0, max_new_tokens=5)
ASKED = [
    {"question_id": 1, "category": "writing", "turns": ["who sees the cat", "and the bird"]},
    {"question_id": 2, "category": "math", "turns": ["a dog"]},
    {"question_id": 3, "category": "math", "turns": ["the big red house and the tree", "not small"]},
]


@pytest.fixture(scope="module")
def llama(tmp_path_factory):
    return make_llama(tmp_path_factory.mktemp("llama"))


@pytest.fixture
def questions(tmp_path):
    return read_questions(write_jsonl(tmp_path / "q.jsonl", ASKED))


def by_hand(model, tokenizer, turns, new=5):
    """The answers through generate alone, one conversation at a time, prompts written out."""
    text, said = "", []
    for turn in turns:
        text += f"<user> {turn} <end> <assistant> "
        ids = tokenizer(text, return_tensors="pt", add_special_tokens=False)["input_ids"]
        made = model.generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=new, do_sample=False, pad_token_id=0)
        said.append(tokenizer.decode(made[0, ids.shape[1] :], skip_special_tokens=True).strip())
        text += f"{said[-1]} <end> "
    return tuple(said)


class Counting:
    """A LocalModel that counts the conversations it answers."""

    def __init__(self, local, stop_after=10**9):
        self.local, self.count, self.stop_after = local, 0, stop_after

    def answer(self, talks, *rest):
        if self.count >= self.stop_after:
            raise KeyboardInterrupt
        self.count += len(talks)
        return self.local.answer(talks, *rest)


def test_both_turns_are_what_generate_writes(llama, questions, tmp_path):
    local, about = load_local(str(llama), None)
    assert answer_locally(questions, local, tmp_path / "a.jsonl", name="tiny", about=about, sampling=GREEDY, batch_size=3) == 3
    found = read_answers(tmp_path / "a.jsonl")
    assert found.model == "tiny"
    for row in ASKED:
        assert found.turns[str(row["question_id"])] == by_hand(local.model, local.tokenizer, row["turns"])
    assert [r["question_id"] for r in lines(tmp_path / "a.jsonl")] == [1, 2, 3]


def test_an_adapter_changes_the_answers(llama, questions, tmp_path):
    from transformers import AutoModelForCausalLM, AutoTokenizer

    model, tokenizer = AutoModelForCausalLM.from_pretrained(llama).eval(), AutoTokenizer.from_pretrained(llama)
    vera = veralib.attach(model, veralib.VeraConfig(rank=4, targets="all-linear"))
    with torch.no_grad():
        for d, b in (vera.member("default").vectors(u.unit) for u in vera.member("default").layout.units):
            d.normal_()
            b.normal_()
    vera.save(tmp_path / "x.safetensors")
    local, about = load_local(str(llama), str(tmp_path / "x.safetensors"))
    answer_locally(questions, local, tmp_path / "a.jsonl", name="x", about=about, sampling=GREEDY)
    found = read_answers(tmp_path / "a.jsonl").turns
    plain, _ = load_local(str(llama), None)
    for row in ASKED:
        assert found[str(row["question_id"])] == by_hand(model, tokenizer, row["turns"])
    assert any(found[str(r["question_id"])] != by_hand(plain.model, tokenizer, r["turns"]) for r in ASKED)
    assert len(lines(tmp_path / "a.jsonl")[0]["generation"]["adapter_sha256"]) == 64


def test_an_interrupted_file_is_gone_on_with(llama, questions, tmp_path):
    local, about = load_local(str(llama), None)
    given = dict(name="t", about=about, sampling=GREEDY, batch_size=1)
    answer_locally(questions, local, tmp_path / "whole.jsonl", **given)
    cut = Counting(local, stop_after=3)
    with pytest.raises(KeyboardInterrupt):
        answer_locally(questions, cut, tmp_path / "a.jsonl", **given)
    assert len(lines(tmp_path / "a.jsonl")) == 2
    with open(tmp_path / "a.jsonl", "a") as f:
        f.write('{"question_id": 3, "choi')
    rest = Counting(local)
    assert answer_locally(questions, rest, tmp_path / "a.jsonl", **given) == 1 and rest.count == 2
    assert read_answers(tmp_path / "a.jsonl").turns == read_answers(tmp_path / "whole.jsonl").turns
    with pytest.raises(ConfigError, match="already holds answers that were made otherwise"):
        answer_locally(questions, local, tmp_path / "a.jsonl", **{**given, "sampling": Sampling(0.0, 9)})


def test_ids_with_leading_zeros_stay_texts_and_nothing_is_asked_twice(llama, tmp_path):
    asked = [{**question, "question_id": f"00{i}"} for i, question in enumerate(ASKED[1:], 1)]
    questions = read_questions(write_jsonl(tmp_path / "q.jsonl", asked))
    local, about = load_local(str(llama), None)
    given = {"name": "t", "about": about, "sampling": GREEDY}
    assert answer_locally(questions, local, tmp_path / "a.jsonl", **given) == 2
    assert answer_locally(questions, local, tmp_path / "a.jsonl", **given) == 0
    assert {line["question_id"] for line in lines(tmp_path / "a.jsonl")} == {"001", "002"}


def test_temperatures_are_fastchats_and_the_seed_repeats_them(llama, tmp_path):
    heats = {
        c: Sampling().temperature_of(c)
        for c in ("writing", "roleplay", "extraction", "math", "coding", "reasoning", "stem", "humanities")
    }
    assert list(heats.values()) == [0.7, 0.7, 0, 0, 0, 0, 0.1, 0.1] and Sampling().temperature_of("fermi") == 0.7
    local, about = load_local(str(llama), None)
    questions = read_questions(write_jsonl(tmp_path / "q.jsonl", ASKED[:1]))
    drawn = {}
    for name, seed in (("a", 0), ("b", 0), ("c", 1)):
        answer_locally(questions, local, tmp_path / f"{name}.jsonl", name="t", about=about, sampling=Sampling(1.0, 12, seed=seed))
        drawn[name] = read_answers(tmp_path / f"{name}.jsonl").turns
    assert drawn["a"] == drawn["b"] != drawn["c"]


def test_a_stop_text_ends_the_answer(llama, questions, tmp_path):
    local, about = load_local(str(llama), None)
    whole = by_hand(local.model, local.tokenizer, ASKED[2]["turns"])[0]
    words = whole.split()
    assert len(words) > 3
    steps = []
    local.model.register_forward_hook(lambda *_: steps.append(1))
    one = [replace(questions[2], turns=questions[2].turns[:1])]
    answer_locally(one, local, tmp_path / "a.jsonl", name="t", about=about, sampling=Sampling(0.0, 5, stop=(words[3],)))
    assert read_answers(tmp_path / "a.jsonl").turns["3"] == (" ".join(words[:3]),)
    assert len(steps) == 4  # and not 5: generation ended with it


def test_a_conversation_longer_than_the_model_keeps_its_end(llama, tmp_path):
    local, about = load_local(str(llama), None)
    questions = read_questions(write_jsonl(tmp_path / "q.jsonl", [{"question_id": 1, "turns": ["the cat " * 60]}]))
    with pytest.warns(VeraWarning, match=r"1 of 1 conversations leave no room in the model's 64 tokens"):
        answer_locally(questions, local, tmp_path / "a.jsonl", name="t", about=about, sampling=Sampling(0.0, 1024))
    assert read_answers(tmp_path / "a.jsonl").turns["1"][0]


def test_a_model_without_a_template_takes_a_file_or_the_built_in_one(tmp_path, questions):
    bare = make_llama(tmp_path / "bare", template=False)
    with pytest.raises(DataError, match=r"has no chat template.*alpaca"):
        load_local(str(bare), None)
    (tmp_path / "t.jinja").write_text(CHAT_TEMPLATE)
    local, about = load_local(str(bare), None, chat_template=str(tmp_path / "t.jinja"))
    answer_locally(questions, local, tmp_path / "a.jsonl", name="t", about=about, sampling=GREEDY)
    assert read_answers(tmp_path / "a.jsonl").turns["2"] == by_hand(local.model, local.tokenizer, ASKED[1]["turns"])
    assert "### Instruction:" in load_local(str(bare), None, chat_template="alpaca")[0].tokenizer.chat_template
    with pytest.raises(ConfigError, match="no model is named"):
        load_local(None, None)


def test_an_endpoint_gets_the_first_answer_back_with_the_second_turn(questions, serve, tmp_path):
    server = serve(lambda body, n: f"answer to {body['messages'][-1]['content']}")
    endpoint = Endpoint(server.url, "mock", pause=0.01)
    assert answer_over_http(questions, endpoint, tmp_path / "a.jsonl", name="m", parallel=1) == 3
    assert read_answers(tmp_path / "a.jsonl").turns["1"] == ("answer to who sees the cat", "answer to and the bird")
    assert [m["role"] for m in server.asked[1]["messages"]] == ["user", "assistant", "user"]
    assert [(b["temperature"], b["max_tokens"]) for b in server.asked] == [(0.7, 1024)] * 2 + [(0.0, 1024)] * 3
    assert lines(tmp_path / "a.jsonl")[0]["version"] == "mock-2024-01-01"
    assert answer_over_http(questions, endpoint, tmp_path / "a.jsonl", name="m") == 0 and len(server.asked) == 5


def test_an_endpoint_that_goes_down_keeps_the_whole_answers(questions, serve, tmp_path):
    server = serve(lambda body, n: "fine" if n <= 3 else (503, {}, "down"))
    with pytest.raises(EndpointError, match=r"2 of 3 answers are in .*start the same command again"):
        answer_over_http(
            questions, Endpoint(server.url, "mock", retries=0, pause=0.01), tmp_path / "a.jsonl", name="m", parallel=1
        )
    assert [r["question_id"] for r in lines(tmp_path / "a.jsonl")] == [1, 2]


@pytest.mark.parametrize("which", [0, 1])
def test_a_question_that_is_refused_leaves_the_others_and_is_named(questions, serve, tmp_path, which):
    def reply(body, n):
        return (400, {}, "content_filter") if body["messages"][0]["content"] == questions[which].turns[0] else "fine"

    server, said = serve(reply), rf"1 of 3 questions have no answer, .*Question {which + 1}: .*content_filter.* {which + 1} out"
    for _ in range(2):  # the second time it is asked alone, by an endpoint that has answered nobody yet
        with pytest.raises(EndpointError, match=said):
            answer_over_http(questions, Endpoint(server.url, "mock", pause=0.01), tmp_path / "a.jsonl", name="m", parallel=1)
        assert [r["question_id"] for r in lines(tmp_path / "a.jsonl")] == [i for i in (1, 2, 3) if i != which + 1]


def test_any_number_of_questions_may_be_refused_by_an_endpoint_that_works(questions, serve, tmp_path):
    many = [questions[2], *(replace(questions[0], id=str(n)) for n in range(10, 22))]
    server = serve(lambda body, n: "fine" if body["messages"][0]["content"] == questions[2].turns[0] else (400, {}, "filter"))
    for _ in range(2):
        with pytest.raises(EndpointError, match=r"12 of 13 questions have no answer.*10, 11, .*, 21 out"):
            answer_over_http(many, Endpoint(server.url, "mock", pause=0.01), tmp_path / "a.jsonl", name="m", parallel=1)
    assert len(lines(tmp_path / "a.jsonl")) == 1 and len(server.asked) == 2 + 2 * 12


def test_a_seed_is_sent_where_one_is_given_and_is_in_the_record(questions, serve, tmp_path):
    server = serve(lambda body, n: "fine")
    endpoint = Endpoint(server.url, "mock", pause=0.01)
    for name, sampling in (("with", Sampling(seed=7)), ("without", Sampling())):
        answer_over_http(questions[:1], endpoint, tmp_path / name, name="m", sampling=sampling)
    assert [body.get("seed") for body in server.asked] == [7, 7, None, None] and "seed" not in server.asked[-1]
    assert [lines(tmp_path / name)[0]["generation"]["seed"] for name in ("with", "without")] == [7, None]
    # what was made before a seed could be left out was marked with 0, and none was sent
    assert answer_over_http(questions[:1], endpoint, tmp_path / "without", name="m", sampling=Sampling(seed=0)) == 0
