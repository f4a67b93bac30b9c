"""Chats in three published forms give the same messages, and bad rows are named."""

import json
import lzma

import pytest

from veralib.errors import ConfigError, DataError
from veralib.training import Settings, train
from veralib.training.chats import ALPACA_TEMPLATE, conversations
from veralib.training.predict import find_source, predict
from veralib.training.tokens import IGNORED, chat_template, encode

from .tiny import CHAT_TEMPLATE, make_llama, make_tokenizer, write_jsonl

OPENAI = {
    "messages": [
        {"role": "system", "content": "not big"},
        {"role": "user", "content": "who sees the cat"},
        {"role": "assistant", "content": "the dog"},
        {"role": "user", "content": "and the bird"},
        {"role": "assistant", "content": "a fish"},
    ]
}
SHAREGPT = {
    "conversations": [
        {"from": "system", "value": "not big"},
        {"from": "human", "value": "who sees the cat"},
        {"from": "gpt", "value": "the dog"},
        {"from": "human", "value": "and the bird"},
        {"from": "gpt", "value": "a fish"},
    ]
}
ALPACA = {"instruction": "who sees the cat", "input": "the house", "output": "the dog"}


@pytest.fixture
def tokenizer(tmp_path):
    return make_tokenizer(tmp_path / "tokenizer", causal=True)


def settings(**fields):
    return Settings(model="m", data="d", task="chat", **fields)


def counted(tokenizer, example):
    return tokenizer.decode([t for t in example["labels"] if t != IGNORED])


def test_sharegpt_trains_the_same_tokens_as_openais_messages(tokenizer):
    tokenizer.chat_template = CHAT_TEMPLATE
    one, two = (encode([row], tokenizer, settings(), (), 64, "rows")[0] for row in (OPENAI, SHAREGPT))
    assert one == two
    assert counted(tokenizer, one) == "the dog <end> a fish <end>"


def test_alpaca_under_a_tokenizers_own_template_is_one_turn(tokenizer):
    tokenizer.chat_template = CHAT_TEMPLATE
    example = encode([ALPACA], tokenizer, settings(), (), 64, "rows")[0]
    assert tokenizer.decode(example["input_ids"]) == "<user> who sees the cat the house <end> <assistant> the dog <end>"
    assert counted(tokenizer, example) == "the dog <end>"


@pytest.mark.parametrize("empty", ["", None, "  ", "absent"])
def test_the_built_in_prompt_leaves_out_an_empty_input(tokenizer, empty):
    row = {k: v for k, v in {**ALPACA, "input": empty}.items() if v != "absent"}
    assert chat_template(settings(), tokenizer, [row]).chat_template == "alpaca"
    text = tokenizer.apply_chat_template(conversations([row], (), "rows")[0], tokenize=False)
    assert text.endswith("\n\n### Instruction:\nwho sees the cat\n\n### Response:\nthe dog</s>") and "### Input:" not in text


def test_the_built_in_prompt_has_alpacas_sections_and_counts_the_answer_and_its_end(tokenizer):
    chat_template(settings(), tokenizer, [ALPACA])
    text = tokenizer.apply_chat_template(conversations([ALPACA], (), "rows")[0], tokenize=False)
    head, _, rest = text.partition("### Instruction:\n")
    assert rest == "who sees the cat\n\n### Input:\nthe house\n\n### Response:\nthe dog</s>" and head.startswith("<s>")
    assert counted(tokenizer, encode([ALPACA], tokenizer, settings(), (), 64, "rows")[0]) == "the dog </s>"


def test_several_turns_under_the_built_in_prompt(tokenizer):
    chat_template(settings(chat_template="alpaca"), tokenizer)
    example = encode([SHAREGPT], tokenizer, settings(), (), 64, "rows")[0]
    assert counted(tokenizer, example) == "the dog </s> a fish </s>"


def test_a_template_file_wins_over_the_built_in_prompt(tokenizer, tmp_path):
    (tmp_path / "t.jinja").write_text(CHAT_TEMPLATE)
    kept = chat_template(settings(chat_template=str(tmp_path / "t.jinja")), tokenizer, [ALPACA])
    assert tokenizer.chat_template == CHAT_TEMPLATE and kept.chat_template.endswith("t.jinja")
    assert counted(tokenizer, encode([ALPACA], tokenizer, settings(), (), 64, "rows")[0]) == "the dog <end>"


def test_a_tokenizers_own_template_stays(tokenizer):
    tokenizer.chat_template = CHAT_TEMPLATE
    assert chat_template(settings(), tokenizer, [ALPACA]).chat_template is None
    assert tokenizer.chat_template == CHAT_TEMPLATE


def test_columns_of_other_names(tokenizer):
    named = conversations([{"q": "who", "a": "the dog"}], ("q", "a"), "rows")[0]
    assert [(m["role"], m["content"]) for m in named] == [("user", "who"), ("assistant", "the dog")]
    three = conversations([{"q": "who", "with": "a cat", "a": "the dog"}], ("q", "with", "a"), "rows")[0]
    assert three[0]["content"] == "who\n\na cat"
    assert conversations([{"talk": SHAREGPT["conversations"]}], ("talk",), "rows") == [OPENAI["messages"]]
    with pytest.raises(ConfigError, match="text names 4 columns, and task chat reads 1 or 2 or 3"):
        settings(text=("a", "b", "c", "d"))


@pytest.mark.parametrize(
    ("row", "said"),
    [
        ({**ALPACA, "output": ""}, 'row 2 of rows has no answer in "output"'),
        ({**ALPACA, "output": None}, 'row 2 of rows has no answer in "output"'),
        ({**ALPACA, "instruction": " "}, 'row 2 of rows has nothing in "instruction"'),
    ],
)
def test_alpaca_rows_without_a_part_are_named(row, said):
    with pytest.raises(DataError) as e:
        conversations([ALPACA, row], (), "rows")
    assert said in str(e.value)


@pytest.mark.parametrize(
    ("turns", "said"),
    [
        ([{"from": "humam", "value": "a"}], 'row 2 of rows, turn 1: there is no speaker ("from") "humam". Did you mean "human"?'),
        ([{"from": "human", "value": 3}], "row 2 of rows, turn 1: expected a text"),
        ([{"from": "human", "value": "a"}], "row 2 of rows: no message is the assistant's"),
        ([{"from": "human", "value": "a"}, {"from": "gpt", "value": " "}], "row 2 of rows: no message is the assistant's"),
        ([{"role": "asistant", "content": "a"}], 'turn 1: there is no role "asistant". Did you mean "assistant"?'),
        ([], "row 2 of rows: expected a list"),
        (None, "row 2 of rows: expected a list"),
    ],
)
def test_bad_turns_are_named_with_what_was_expected(turns, said):
    with pytest.raises(DataError) as e:
        conversations([SHAREGPT, {"conversations": turns}], (), "rows")
    assert said in str(e.value)


def test_rows_of_no_known_form_are_told_the_three_forms():
    with pytest.raises(DataError, match=r'no column "messages" .OpenAI., "conversations" .ShareGPT. or "instruction"'):
        conversations([{"text": "a"}], (), "rows")


def test_an_answer_whose_first_token_spans_the_border_is_tokenised_apart(tmp_path):
    tokenizer = make_tokenizer(tmp_path / "t", causal=True)
    tokenizer.chat_template = "{% for m in messages %}{{ m.content }}{% endfor %}"  # "the ho" + "use" joins to a word
    rows = [[{"role": "user", "content": "the ho"}, {"role": "assistant", "content": "use the dog"}]]
    example = encode([{"messages": m} for m in rows], tokenizer, settings(), (), 64, "rows")[0]
    head = tokenizer("the ho", add_special_tokens=False)["input_ids"]
    assert example["input_ids"][: len(head)] == head and example["labels"][: len(head)] == [IGNORED] * len(head)
    assert counted(tokenizer, example) == "<unk> the dog"


def test_a_run_on_alpaca_rows_predicts_under_the_prompt_it_was_trained_with(tmp_path):
    llama = make_llama(tmp_path / "llama", template=False)
    file = write_jsonl(tmp_path / "rows.jsonl", [ALPACA] * 8)
    run = tmp_path / "run"
    result = train(Settings(model=llama, data=file, output=run, task="chat", rank=4, lr=0.3, epochs=3, plot=False))
    assert result.settings["chat_template"] == "alpaca"
    alone = find_source(run / "adapter_model.safetensors")  # the file says it too
    assert alone.settings.chat_template == "alpaca" and alone.settings.text == ()
    asked = {"instruction": "who sees the cat", "input": "the house"}
    same = {"messages": conversations([asked], (), "rows", answered=False)[0]}
    plain = [next(iter(predict(run, [row], max_new_tokens=5)))["prediction"] for row in (asked, same)]
    assert plain[0] == plain[1]


def test_a_fleets_owners_may_have_alpaca_rows(tmp_path):
    from veralib.fleet.data import read_owners
    from veralib.fleet.settings import FleetSettings

    file = write_jsonl(tmp_path / "rows.jsonl", [{**ALPACA, "owner": "ann"}, {**ALPACA, "owner": "bob"}])
    assert list(read_owners(FleetSettings(model="m", data=file, task="chat")).rows) == ["ann", "bob"]
    with pytest.raises(DataError, match='has no column "reply"'):
        read_owners(FleetSettings(model="m", data=file, task="chat", text=("instruction", "reply")))


@pytest.mark.slow
def test_real_alpaca_rows_train_on_their_outputs_alone(data):
    from transformers import GPT2Tokenizer

    folder = data / "gpt2_bpe"
    tokenizer = GPT2Tokenizer(str(folder / "vocab.json"), str(folder / "merges.txt"))
    with lzma.open(data / "alpaca" / "alpaca_subset.jsonl.xz", "rt", encoding="utf-8") as f:
        rows = [row for row in (json.loads(line) for _, line in zip(range(600), f, strict=False)) if row["output"].strip()]
    tokenizer.chat_template = ALPACA_TEMPLATE
    examples = encode(rows, tokenizer, settings(), (), 4096, "rows")
    assert len(examples) == len(rows) > 500
    for row, example in zip(rows, examples, strict=True):
        assert counted(tokenizer, example) == row["output"].strip() + tokenizer.eos_token


def test_alpaca_rows_may_lack_an_input_in_the_first_row_alone():
    rows = [{"instruction": "Say a.", "output": "a"}, {"instruction": "Say", "input": "the letter b", "output": "b"}]
    for text in ((), ("instruction", "input", "output")):
        found = conversations(rows, text, "the data")
        assert "the letter b" in found[1][0]["content"] and found[0][0]["content"] == "Say a."
