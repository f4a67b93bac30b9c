"""The embedded engine: greedy tokens beside merged models', adapters on demand, streams, limits, death."""

import asyncio
import threading
import time
from dataclasses import replace
from itertools import pairwise
from pathlib import Path

import pytest
import torch

from tests.conftest import randomise, tiny_gpt2, tiny_llama
from veralib import VeraConfig, attach
from veralib.errors import UnknownName
from veralib.serving.embedded import BadAdapter, BadRequest, EmbeddedEngine, EngineBusy, EngineError, Sampling, attention
from veralib.serving.names import engine_name
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


def tiny_mistral():
    """A window of 6 tokens."""
    from transformers import MistralConfig, MistralForCausalLM

    torch.manual_seed(0)
    return MistralForCausalLM(MistralConfig(**tiny_llama().config.to_dict() | {"sliding_window": 6})).eval()


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


def test_a_sliding_window_equals_the_merged_model(tmp_path):
    """Mistral's, shorter than the prompts; the longest prompt takes several steps."""
    store = open_store(tmp_path)
    adapters = fill(tiny_mistral(), store, {"m": VeraConfig(rank=4, targets="all-linear")})
    expected = merged_tokens(tiny_mistral(), adapters, PROMPTS)
    keys = [(n, tuple(p)) for p in PROMPTS for n in (None, "m")]
    with EmbeddedEngine(tiny_mistral(), store, tokenizer=Letters(), max_batch_tokens=24) as engine:
        assert engine.model.config._attn_implementation == "veralib_paged"
        answers = engine.generate([k[1] for k in keys], [k[0] for k in keys], GREEDY)
    assert [a.tokens for a in answers] == [expected[k] for k in keys]


def test_one_adapter_alone_equals_itself_in_a_crowd(engine, adapters):
    alone = engine.generate([PROMPTS[1]], "a", GREEDY)[0]
    crowd = engine.generate([PROMPTS[1]] * 3, ["a", None, "c"], GREEDY)
    assert crowd[0] == alone and len({c.tokens for c in crowd}) == 3


def test_books_4m_equals_its_merged_self(tmp_path):
    """The model that ships here: GQA, tied embeddings, its own tokenizer, text instead of tokens."""
    from transformers import AutoModelForCausalLM, AutoTokenizer

    build = lambda: AutoModelForCausalLM.from_pretrained(BOOKS, dtype=torch.float32).eval()  # noqa: E731
    store, tokenizer = open_store(tmp_path), AutoTokenizer.from_pretrained(BOOKS)
    adapters = fill(build(), store, {"x": VeraConfig(rank=64, targets="all-linear"), "y": VeraConfig(rank=16, seed=3)})
    texts = ["Once upon a time", "She"]
    expected = merged_tokens(build(), adapters, [tokenizer.encode(t) for t in texts])
    keys = [(name, text) for text in texts for name in (None, "x", "y")]
    with EmbeddedEngine(str(BOOKS), store, dtype="float32") as engine:
        answers = engine.generate([k[1] for k in keys], [k[0] for k in keys], GREEDY)
    assert [a.tokens for a in answers] == [expected[n, tuple(tokenizer.encode(t))] for n, t in keys]
    assert [a.text for a in answers] == [tokenizer.decode(a.tokens, skip_special_tokens=True) for a in answers]


def test_an_adapted_output_layer_equals_the_merged_model(tmp_path):
    """Only the last token's logits are needed, and the index is one of each token."""
    store = open_store(tmp_path)
    adapters = fill(tiny_llama(), store, {"h": VeraConfig(rank=4, targets=["lm_head", "q_proj"])})
    expected = merged_tokens(tiny_llama(), adapters, PROMPTS[:2])
    keys = [(n, tuple(p)) for p in PROMPTS[:2] for n in (None, "h")]
    with EmbeddedEngine(tiny_llama(), store, tokenizer=Letters()) as engine:
        answers = engine.generate([k[1] for k in keys], [k[0] for k in keys], GREEDY)
    assert [a.tokens for a in answers] == [expected[k] for k in keys]


def test_more_adapters_than_slots_come_and_go(tmp_path):
    """All at once through two slots: those in use stay, unused ones go, the least recently used first."""
    store = open_store(tmp_path)
    adapters = fill(tiny_llama(), store, {f"n{k}": VeraConfig(rank=4, seed=k % 2, targets="all-linear") for k in range(9)})
    expected = merged_tokens(tiny_llama(), adapters, PROMPTS[:1])
    with EmbeddedEngine(tiny_llama(), store, tokenizer=Letters(), slots=2) as engine:
        for _ in range(2):
            answers = engine.generate([PROMPTS[0]] * 9, list(adapters), GREEDY)
            assert [a.tokens for a in answers] == [expected[n, tuple(PROMPTS[0])] for n in adapters]
        engine.generate([PROMPTS[0]], "n3", GREEDY)
        engine.generate([PROMPTS[0]], "n5", GREEDY)
        assert engine.residents.names == [engine_name(store, "n3"), engine_name(store, "n5")]
        before = engine.residents.statistics
        engine.generate([PROMPTS[0]], "n3", GREEDY)
        engine.generate([PROMPTS[0]], "n0", GREEDY)
        after = engine.residents.statistics
        assert engine.residents.names == [engine_name(store, "n3"), engine_name(store, "n0")]
        assert (after.hits - before.hits, after.misses - before.misses, after.adapters) == (1, 1, 2)


def test_a_thousand_loads_take_no_more_memory(tmp_path):
    """Other seeds, ranks and bases each time: neither tables nor matrices of those that went stay."""
    import gc
    import os

    import psutil

    store = open_store(tmp_path, kind="packed")
    model, configs = tiny_llama(), {}
    vera = attach(model)
    for k in range(200):
        config = VeraConfig(rank=2 + k % 7, seed=k % 40, targets="all-linear", basis="peft" if k % 5 == 0 else "philox-u8")
        configs[f"n{k}"] = config
    for k, (name, config) in enumerate(configs.items()):
        vera.add(config, name)
        randomise(vera, name, k)
        store.put(name, vera.adapter(name))
        vera.remove(name)
    vera.detach()
    with EmbeddedEngine(model, store, tokenizer=Letters(), slots=4) as engine:

        def everyone(rounds):
            for _ in range(rounds):
                for name in configs:
                    engine.residents.release(engine.residents.pin(name))
            engine.generate([[3]] * 8, [f"n{k}" for k in range(8)], Sampling(max_tokens=2))
            gc.collect()
            every = gc.get_objects()
            sizes = (t.numel() * t.element_size() for t in every if type(t) is torch.Tensor)  # also another test's sparse ones
            return psutil.Process(os.getpid()).memory_info().rss, len(every), sum(sizes)

        everyone(1)
        start = time.perf_counter()
        held, objects, tensors = zip(*(everyone(n) for n in (1, 2, 2, 2)), strict=True)
        assert time.perf_counter() - start < 60
        inside = engine.vera.inside
        assert engine.residents.statistics.adapters <= 8 and len(inside.members) <= 8
        assert len(inside.banks) <= 8 and len(inside.layouts) <= 16  # two keys lead to each
        # Which eight stay, and of which ranks, isn't the same each time; 1,400 that stayed would be megabytes.
        assert tensors[-1] - tensors[0] < 2**16
        # What stays grows with every 400 loads; the allocator's own habits add megabytes to some of them.
        assert objects[-1] - objects[0] < 500 and min(b - a for a, b in pairwise(held)) < 2**20
        assert engine.residents.statistics.evictions > 1550


def test_stop_strings_and_tokens(engine):
    whole = engine.generate([PROMPTS[0]], "a", Sampling(max_tokens=20, ignore_eos=True))[0]
    cut = whole.text[6:8]
    at = whole.text.index(cut)
    stopped = engine.generate([PROMPTS[0]], "a", Sampling(max_tokens=20, ignore_eos=True, stop=("never that", cut)))[0]
    assert (stopped.text, stopped.finish) == (whole.text[:at], "stop") and whole.finish == "length"
    token = whole.tokens[5]
    ended = engine.generate([PROMPTS[0]], "a", Sampling(max_tokens=20, ignore_eos=True, stop_token_ids=(token,)))[0]
    first = whole.tokens.index(token)
    assert (ended.tokens, ended.text, ended.finish) == (whole.tokens[: first + 1], whole.text[:first], "stop")


def test_a_seed_gives_the_same_tokens_whoever_shares_the_batch(engine):
    hot = Sampling(max_tokens=15, temperature=1.5, top_p=0.95, top_k=40, seed=5, ignore_eos=True)
    alone = engine.generate([PROMPTS[1]], "b", hot)[0]
    crowd = engine.generate([PROMPTS[1], PROMPTS[0], PROMPTS[1]], ["b", None, "b"], hot)
    assert crowd[0] == crowd[2] == alone
    others = {engine.generate([PROMPTS[1]], "b", replace(hot, seed=s))[0].tokens for s in range(6)}
    assert len(others) == 6
    assert len({engine.generate([PROMPTS[1]], "b", replace(hot, seed=None))[0].tokens for _ in range(3)}) == 3


def test_a_stream_is_cancelled_by_leaving_it(engine):
    async def leave():
        seen = 0
        async for piece in engine.stream(PROMPTS[2], Sampling(max_tokens=40, ignore_eos=True), "a"):
            seen += len(piece.tokens)
            if seen >= 3:
                break

    asyncio.run(leave())
    deadline = time.monotonic() + 10
    while engine.load and time.monotonic() < deadline:
        time.sleep(0.01)
    before = engine.generated
    time.sleep(0.1)
    assert engine.load == 0 and engine.generated == before
    assert all(e.pins == 0 for e in engine.residents.entries.values())


def test_an_adapter_unloaded_while_it_answers_can_be_asked_for_again(engine, adapters):
    residents = engine.residents
    name = residents.pin("a")
    try:
        assert residents.forget(name)
        assert residents.pin("a") == name  # not "there is an adapter already"
        residents.release(name)
    finally:
        residents.release(name)
    engine.loop.between_steps(lambda: None).result()
    assert name in residents.names


def test_a_slow_disk_stops_nobody_else(engine, store, monkeypatch):
    """An adapter whose reading waits until another's tokens have all come."""
    engine.residents.forget(engine_name(store, "d"))
    engine.loop.between_steps(lambda: None).result()  # it is gone now; asked for before that, it would have stayed
    real, reading, come = store.get, threading.Event(), threading.Event()

    def slow(*args):
        reading.set()
        assert come.wait(60)
        return real(*args)

    monkeypatch.setattr(store, "get", slow)
    thread = threading.Thread(target=engine.generate, args=([PROMPTS[0]], "d", GREEDY))
    thread.start()
    assert reading.wait(60)
    assert len(engine.generate([PROMPTS[0]], "a", GREEDY)[0].tokens) == 12
    assert thread.is_alive() and not come.is_set()
    come.set()
    thread.join(60)
    assert not thread.is_alive() and engine_name(store, "d") in engine.residents.names


def test_what_cannot_be_served_is_refused_in_words(engine, store):
    vera = attach(tiny_llama())
    vera.add(VeraConfig(rank=2, targets=["q_proj"], train_modules=["lm_head"]), "whole")
    store.put("whole", vera.adapter("whole"))
    for name, error, words in [
        ("whole", BadAdapter, "trained in full"),
        ("nobody", UnknownName, "no model"),
        ("a/../b", UnknownName, "no model"),
        ("a@1-000000000000", UnknownName, "no model"),
    ]:
        with pytest.raises(error, match=words):
            engine.generate([PROMPTS[0]], name, GREEDY)
    for prompt, sampling, words in [([], GREEDY, "empty"), ([64], GREEDY, "64"), ([3] * 60, GREEDY, "context length")]:
        with pytest.raises(BadRequest, match=words):
            engine.generate([prompt], None, sampling)
    for wrong in [{"top_p": 0.0}, {"temperature": float("nan")}, {"stop": ("",)}, {"max_tokens": 0}, {"logprobs": 99}]:
        with pytest.raises(BadRequest, match=next(iter(wrong))):
            Sampling(**wrong)
    assert engine.load == 0


def test_too_many_bases_at_once_ask_to_come_back(tmp_path):
    store = open_store(tmp_path)
    fill(tiny_llama(), store, {f"s{k}": VeraConfig(rank=2, seed=k) for k in range(3)})
    with EmbeddedEngine(tiny_llama(), store, tokenizer=Letters(), max_bases=2) as engine:
        held = [engine.residents.pin("s0"), engine.residents.pin("s1")]
        with pytest.raises(EngineBusy, match="pairs A, B"):
            engine.generate([[3]], "s2", GREEDY)
        engine.residents.release(held[0])
        assert len(engine.generate([[3]], "s2", GREEDY)) == 1
        assert engine.residents.statistics.bases == 2


def test_a_step_that_fails_ends_the_engine_and_says_so(tmp_path, monkeypatch):
    engine, died = EmbeddedEngine(tiny_llama(), None, tokenizer=Letters()), threading.Event()
    engine.on_death = died.set
    monkeypatch.setattr(engine.vera.runtime, "override", lambda selection: 1 / 0)
    with pytest.raises(EngineError, match=r"broke off|stopped"):
        engine.generate([[3]], None, GREEDY)
    assert died.wait(10) and not engine.alive
    with pytest.raises(EngineError, match="stopped"):
        engine.generate([[3]], None, GREEDY)
    engine.close()


@pytest.mark.parametrize("build", [tiny_llama, tiny_gpt2, tiny_mistral])
def test_the_model_itself_is_right_while_an_engine_is_open(build):
    model = build()
    ids, padded = torch.tensor([[5, 9, 11, 3, 7, 4]]), torch.tensor([[0, 0, 5, 9, 11, 3], [8, 7, 5, 9, 11, 3]])
    mask = torch.tensor([[0, 0, 1, 1, 1, 1], [1, 1, 1, 1, 1, 1]])

    def all_said():
        settings = dict(max_new_tokens=10, do_sample=False, pad_token_id=0, eos_token_id=None)
        with torch.no_grad():
            return (
                model.generate(ids, **settings),
                model.generate(padded, attention_mask=mask, **settings),
                model(input_ids=padded, attention_mask=mask).logits[mask.bool()],
                model(input_ids=ids).logits,
            )

    before = all_said()
    with EmbeddedEngine(model, None, tokenizer=Letters()) as engine:
        assert model.config._attn_implementation == attention.NAME
        for one, other in zip(before, all_said(), strict=True):
            torch.testing.assert_close(one, other, atol=1e-5, rtol=1e-5)
        made = engine.generate([ids[0].tolist()], None, Sampling(max_tokens=10, ignore_eos=True))[0].tokens
        assert list(made) == before[0][0, 6:].tolist()


def test_closing_gives_the_plain_model_back():
    model = tiny_llama()
    kind, threads = type(model), threading.active_count()
    with EmbeddedEngine(model, None, tokenizer=Letters()) as engine:
        engine.generate([[3]], None, GREEDY)
    assert type(model) is kind and model.config._attn_implementation == "sdpa"
    assert threading.active_count() == threads
