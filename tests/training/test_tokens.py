"""What the loss counts: exactly the answers, and every token of a text once."""

import pytest
import torch

from veralib.errors import DataError, VeraWarning
from veralib.training.settings import Settings
from veralib.training.tokens import IGNORED, chat_template, collator, encode, inputs, prompt_ids

from .tiny import make_tokenizer


@pytest.fixture(scope="module")
def causal(tmp_path_factory):
    from .tiny import CHAT_TEMPLATE

    tokenizer = make_tokenizer(tmp_path_factory.mktemp("causal"), causal=True)
    tokenizer.chat_template = CHAT_TEMPLATE
    return tokenizer


@pytest.fixture(scope="module")
def masked(tmp_path_factory):
    return make_tokenizer(tmp_path_factory.mktemp("masked"), causal=False)


def settings(task, **fields):
    return Settings(model="m", data="d", task=task, **fields)


def counted(tokenizer, example):
    """The text of the tokens that the loss counts."""
    return tokenizer.decode([t for t in example["labels"] if t != IGNORED])


def test_padding_is_neither_seen_nor_counted():
    batch = collator(7)([{"input_ids": [1, 2, 3], "labels": [1, 2, 3]}, {"input_ids": [4], "labels": [4]}])
    assert batch["input_ids"].tolist() == [[1, 2, 3], [4, 7, 7]]
    assert batch["attention_mask"].tolist() == [[1, 1, 1], [1, 0, 0]]
    assert batch["labels"].tolist() == [[1, 2, 3], [4, IGNORED, IGNORED]]


def test_class_ids_are_whole_and_regression_targets_are_floats():
    collate = collator(0)
    assert collate([{"input_ids": [1], "labels": 2}])["labels"].dtype == torch.int64
    assert collate([{"input_ids": [1], "labels": 2.5}])["labels"].dtype == torch.float32


def test_pairs_are_told_apart_by_token_types(masked):
    one = inputs([{"a": "the cat", "b": "the dog sees"}], masked, ("a", "b"), 64, "rows")[0]
    assert masked.decode(one["input_ids"]) == "[CLS] the cat [SEP] the dog sees [SEP]"
    assert one["token_type_ids"] == [0, 0, 0, 0, 1, 1, 1, 1]


def test_only_the_completion_and_the_end_are_counted(causal):
    rows = [{"prompt": "the cat sees", "completion": " the dog"}, {"prompt": "", "completion": "a bird"}]
    examples = encode(rows, causal, settings("prompt-completion"), (), 64, "rows")
    assert [counted(causal, e) for e in examples] == ["the dog </s>", "a bird </s>"]
    assert causal.decode(examples[0]["input_ids"]) == "<s> the cat sees the dog </s>"
    assert examples[0]["labels"][:4] == [IGNORED] * 4


def test_a_token_across_the_border_leaves_the_prompt_as_it_is_at_inference(causal):
    # "house" is one word for the tokenizer; split between prompt and completion it must not become one token.
    example = encode([{"prompt": "the ho", "completion": "use"}], causal, settings("prompt-completion"), (), 64, "rows")[0]
    head = prompt_ids(causal, "the ho")
    assert example["input_ids"][: len(head)] == head
    assert all(label == IGNORED for label in example["labels"][: len(head)])


def test_an_end_that_the_tokenizer_adds_is_no_part_of_the_prompt(causal):
    class Ending:
        eos_token_id = causal.eos_token_id

        def __call__(self, text):
            return {"input_ids": [*causal(text)["input_ids"], causal.eos_token_id]}

    assert prompt_ids(Ending(), "the cat") == prompt_ids(causal, "the cat")


def test_every_turn_of_the_assistant_is_counted_and_nothing_else(causal):
    messages = [
        {"role": "user", "content": "who sees the cat"},
        {"role": "assistant", "content": "the dog"},
        {"role": "user", "content": "and the bird"},
        {"role": "assistant", "content": "a fish"},
        {"role": "user", "content": "not big"},
    ]
    example = encode([{"messages": messages}], causal, settings("chat"), (), 64, "rows")[0]
    assert counted(causal, example) == "the dog <end> a fish <end>"
    assert causal.decode(example["input_ids"]).startswith("<user> who sees the cat <end> <assistant> the dog <end>")


def test_a_template_that_rewrites_earlier_turns_is_refused(causal, monkeypatch):
    drops = "{% for m in messages %}{% if m.role == 'user' or loop.last %}<{{ m.role }}> {{ m.content }} {% endif %}{% endfor %}"
    monkeypatch.setattr(causal, "chat_template", drops)
    turn = [{"role": "user", "content": "a"}, {"role": "assistant", "content": "the"}]
    with pytest.raises(DataError, match="row 1 of rows: the chat template renders turn 2 differently"):
        encode([{"messages": turn * 2}], causal, settings("chat"), (), 64, "rows")


@pytest.mark.parametrize(
    ("messages", "said"),
    [
        ("hello", "expected a list"),
        ([], "expected a list"),
        ([{"role": "user"}], "expected a list"),
        ([{"role": "user", "content": "a"}], "no message is the assistant's"),
    ],
)
def test_rows_that_are_no_chat_are_named(causal, messages, said):
    with pytest.raises(DataError) as e:
        encode([{"messages": messages}], causal, settings("chat"), (), 64, "rows")
    assert said in str(e.value) and "row 1 of rows" in str(e.value)


def test_a_chat_needs_a_template(masked, causal, tmp_path):
    with pytest.raises(DataError, match="has no chat template"):
        chat_template(settings("chat"), masked)
    with pytest.raises(DataError, match="can't read the chat template"):
        chat_template(settings("chat", chat_template=str(tmp_path / "absent")), masked)


def test_a_long_text_is_cut_into_pieces_that_give_it_back(causal):
    text = "the cat sees a dog and the bird likes a big fish"
    examples = encode([{"text": text}], causal, settings("causal-lm"), (), 4, "rows")
    assert all(len(e["input_ids"]) <= 4 and e["labels"] == e["input_ids"] for e in examples)
    assert causal.decode([t for e in examples for t in e["input_ids"]]) == f"<s> {text} </s>"


def test_a_text_of_megabytes_is_tokenised_in_parts_without_loss(causal, monkeypatch):
    from veralib.training import tokens

    text = "the cat\nsees a dog\n" * 50
    whole = causal(text, add_special_tokens=False)["input_ids"]
    pieces = tokens._pieces(text, size=100)
    assert len(pieces) > 5 and "".join(pieces) == text
    assert [t for p in pieces for t in causal(p, add_special_tokens=False)["input_ids"]] == whole


def test_rows_cut_before_their_answer_are_left_out_with_a_warning(causal):
    rows = [{"prompt": "the cat sees the big red house and", "completion": "dog"}, {"prompt": "a", "completion": "cat"}]
    with pytest.warns(VeraWarning, match="1 of 2 rows of rows keep no token"):
        assert len(encode(rows, causal, settings("prompt-completion"), (), 6, "rows")) == 1
    with pytest.raises(DataError, match="no row of rows keeps a token to learn from within max_length=2"):
        encode(rows[:1], causal, settings("prompt-completion"), (), 2, "rows")
