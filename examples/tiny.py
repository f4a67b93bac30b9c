"""A tiny model, tokenizer and data set of their own: the examples run in seconds on a CPU, with nothing to download."""

import itertools

import torch
from tokenizers import Tokenizer, models, pre_tokenizers, processors
from transformers import (
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    AutoTokenizer,
    BertConfig,
    LlamaConfig,
    PreTrainedTokenizerFast,
)

GOOD, BAD = ("wonderful", "moving", "funny", "clever"), ("dreadful", "boring", "clumsy", "stale")
THINGS = ("film", "book", "song", "play", "story", "game")
ANIMALS = {"cat": "meow", "dog": "woof", "cow": "moo", "duck": "quack", "sheep": "baa", "bee": "buzz"}
WORDS = ("the", "was", "says", "what", "a", "?", *GOOD, *BAD, *THINGS, *ANIMALS, *ANIMALS.values())


def tokenizer(name: str = "") -> PreTrainedTokenizerFast:
    """The tokenizer of a hub id or folder, or one that knows the words above."""
    if name:
        loaded = AutoTokenizer.from_pretrained(name)
        loaded.pad_token = loaded.pad_token or loaded.eos_token
        return loaded
    vocabulary = {word: i for i, word in enumerate(("<pad>", "<s>", "</s>", "<unk>", *WORDS))}
    words = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    words.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    words.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 1)])
    return PreTrainedTokenizerFast(
        tokenizer_object=words, pad_token="<pad>", bos_token="<s>", eos_token="</s>", unk_token="<unk>", padding_side="left"
    )


def causal(name: str = "", **options):
    """A causal language model: of a hub id or folder, or a random Llama of 2 layers, hidden size 64."""
    if name:
        return AutoModelForCausalLM.from_pretrained(name, **options)
    torch.manual_seed(0)
    return AutoModelForCausalLM.from_config(
        LlamaConfig(
            hidden_size=64, intermediate_size=96, num_hidden_layers=2, num_attention_heads=4, vocab_size=64,
            max_position_embeddings=64, pad_token_id=0, bos_token_id=1, eos_token_id=2, initializer_range=0.1,
        )
    )  # fmt: skip


def classifier(name: str = ""):
    """A classifier with 2 labels: of a hub id or folder, or a random BERT of 2 layers, hidden size 64."""
    if name:
        return AutoModelForSequenceClassification.from_pretrained(name, num_labels=2)
    torch.manual_seed(0)
    return AutoModelForSequenceClassification.from_config(
        BertConfig(
            hidden_size=64, intermediate_size=96, num_hidden_layers=2, num_attention_heads=4, vocab_size=64,
            max_position_embeddings=64, num_labels=2, pad_token_id=0, initializer_range=0.1,
        )
    )  # fmt: skip


def reviews() -> list[dict]:
    """48 rows {text, label}: 1 for praise."""
    return [
        {"text": f"the {thing} was {word}", "label": int(word in GOOD)} for thing, word in itertools.product(THINGS, GOOD + BAD)
    ]


def questions() -> list[dict]:
    """24 rows {prompt, completion}."""
    prompts = ("what says the {} ?", "what says a {} ?", "the {} says", "a {} says")
    return [{"prompt": p.format(a), "completion": f" {sound}"} for p, (a, sound) in itertools.product(prompts, ANIMALS.items())]


def answered(tokenizer, prompt: str, completion: str) -> dict:
    """{input_ids, attention_mask, labels} of one row; the loss is on the completion alone."""
    start = tokenizer(prompt)["input_ids"]
    end = tokenizer(completion, add_special_tokens=False)["input_ids"]
    return {"input_ids": start + end, "attention_mask": [1] * len(start + end), "labels": [-100] * len(start) + end}


def preferences() -> list[dict]:
    """24 rows {prompt, chosen, rejected}: the right sound, and the next animal's."""
    sounds = list(ANIMALS.values())
    following = dict(zip(sounds, sounds[1:] + sounds[:1], strict=True))
    return [
        {"prompt": row["prompt"], "chosen": row["completion"], "rejected": f" {following[row['completion'].strip()]}"}
        for row in questions()
    ]
