"""The embedded engine: greedy tokens beside merged models', adapters on demand, streams, limits, death."""

from pathlib import Path

import pytest
import torch

from tests.conftest import randomise, tiny_gpt2, tiny_llama
from veralib import VeraConfig, attach
from veralib.serving.embedded import EmbeddedEngine, Sampling
from veralib.store import open_store

BOOKS = Path(__file__).parents[2] / "models" / "books-4m"
GREEDY = Sampling(max_tokens=12, ignore_eos=True)


class Letters:
    """A tokenizer of 64 tokens, one character each."""

    def encode(self, text, add_special_tokens=True):
        return [ord(c) - 48 for c in text]

    def decode(self, tokens, skip_special_tokens=True, clean_up_tokenization_spaces=False):
        return "".join(chr(48 + t) for t in tokens)


CONFIGS = {
    "a": VeraConfig(rank=8, targets="all-linear"),
    "b": VeraConfig(rank=5, seed=7, targets=["q_proj", "v_proj"]),
    "c": VeraConfig(rank=6, basis="peft", targets="all-linear"),
    "d": VeraConfig(rank=8, targets="all-linear"),
    "e": VeraConfig(rank=4, sharing="unique", targets=["down_proj", "o_proj"]),
}


def fill(model, store, configs, size=0.7):
    """Adapters with vectors as if trained, in the store and, by name, out of the model again."""
    vera = attach(model)
    adapters = {}
    for seed, (name, config) in enumerate(configs.items()):
        vera.add(config, name)
        randomise(vera, name, seed, size)
        adapters[name] = vera.adapter(name)
        store.put(name, adapters[name])
    vera.detach()
    return adapters


def merged_tokens(model, adapters, prompts, tokens=12):
    """(adapter or None, prompt) -> the tokens that transformers' generate makes with the merged model."""
    vera, out = attach(model), {}
    for name in (None, *adapters):
        if name is not None:
            vera.load(adapters[name], name)
            vera.merge(name)
        for prompt in prompts:
            ids = torch.tensor([prompt])
            made = model.generate(
                input_ids=ids, attention_mask=torch.ones_like(ids), max_new_tokens=tokens, do_sample=False, eos_token_id=None,
                pad_token_id=0,
            )  # fmt: skip
            out[name, tuple(prompt)] = tuple(made[0, len(prompt) :].tolist())
        if name is not None:
            vera.unmerge()
    vera.detach()
    return out


@pytest.fixture(scope="module")
def store(tmp_path_factory):
    return open_store(tmp_path_factory.mktemp("store"))


@pytest.fixture(scope="module")
def adapters(store):
    return fill(tiny_llama(), store, CONFIGS)


@pytest.fixture(scope="module")
def engine(store, adapters):
    with EmbeddedEngine(tiny_llama(), store, tokenizer=Letters(), name="tiny", max_batch_tokens=24) as engine:
        yield engine


PROMPTS = [[5, 9, 22], [3, 4, 5, 6, 7, 8, 9, 10, 11, 60], [40], list(range(3, 33))]  # the last is longer than a step takes


def test_mixed_batch_equals_merged_models(engine, adapters):
    """Ranks 4 to 8, two seeds, a PEFT basis, unique bases, two sets of targets, base rows; GQA; prompts in several parts."""
    expected = merged_tokens(tiny_llama(), adapters, PROMPTS)
    keys = [(name, tuple(p)) for p in PROMPTS for name in (None, *CONFIGS)]
    for _ in range(2):
        answers = engine.generate([k[1] for k in keys], [k[0] for k in keys], GREEDY)
        assert [a.tokens for a in answers] == [expected[k] for k in keys]
    assert len(set(expected.values())) >= 20


@pytest.mark.parametrize(
    "build", [tiny_gpt2, lambda: tiny_llama(tie_word_embeddings=True), lambda: tiny_llama(attention_bias=True)]
)
def test_other_models_equal_their_merged_selves(tmp_path, build):
    """Fused c_attn and Conv1D; tied embeddings; biases."""
    store = open_store(tmp_path)
    adapters = fill(build(), store, {n: VeraConfig(rank=k, targets="all-linear") for n, k in (("x", 4), ("y", 7))}, 0.5)
    prompts = PROMPTS[:3]
    expected = merged_tokens(build(), adapters, prompts)
    keys = [(name, tuple(p)) for p in prompts for name in (None, "x", "y")]
    with EmbeddedEngine(build(), store, tokenizer=Letters()) as engine:
        answers = engine.generate([k[1] for k in keys], [k[0] for k in keys], GREEDY)
    assert [a.tokens for a in answers] == [expected[k] for k in keys]


def test_one_adapter_alone_equals_itself_in_a_crowd(engine, adapters):
    alone = engine.generate([PROMPTS[1]], "a", GREEDY)[0]
    crowd = engine.generate([PROMPTS[1]] * 3, ["a", None, "c"], GREEDY)
    assert crowd[0] == alone and len({c.tokens for c in crowd}) == 3
