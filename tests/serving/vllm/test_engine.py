"""vLLM with the plugin in this process: exact tokens, versions, eviction, refusals."""

import pytest
import torch

pytest.importorskip("vllm", reason="needs vLLM: make test-vllm builds an environment with it and runs this there")

from vllm.lora.request import LoRARequest

from veralib.errors import AdapterMismatch, StateError, UnknownName
from veralib.serving.vllm import lora_request, sums
from veralib.serving.vllm.manager import Manager

from .world import PROMPTS, TOKENS, World, adapter, close, greedy, llama, manager, qwen

ADAPTERS = {
    "ann": dict(draw=1),
    "bob": dict(draw=2, rank=8, targets=("q_proj", "v_proj")),
    "cal": dict(draw=3, rank=32),
    "dot": dict(draw=4, targets=("k_proj", "down_proj"), rank=4),
}


def world_of(folder, build=llama, **more):
    world = World(folder, build)
    for name, config in (ADAPTERS | more).items():
        world.put(name, **config)
    return world


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    return world_of(tmp_path_factory.mktemp("vllm"))


@pytest.fixture(scope="module")
def llm(world):
    """For the tests that come first: closing any engine ends what vLLM shares between those of one process."""
    return world.engine(enable_prefix_caching=True)


def test_greedy_tokens_equal_the_merged_models_in_mixed_batches(world, llm):
    assert world.check(llm, [None, *ADAPTERS]) == 20
    assert world.check(llm, ["bob"]) == 4
    assert world.check(llm, [None]) == 4


def test_a_batch_without_adapters_does_no_adapter_work(world, llm, monkeypatch):
    calls = []
    monkeypatch.setattr(sums.Site, "_add_eager", lambda *a: calls.append(a))
    assert world.ask(llm, [(None, p) for p in PROMPTS]) == world.merged(None)
    assert not calls
    world.ask(llm, [("bob", PROMPTS[0])], tokens=1)
    assert len(calls) == 2  # q and v are one linear of vLLM's, in two layers; the others aren't adapted


def test_a_new_version_answers_the_next_request_and_shares_no_cache(world, llm):
    world.put("eve", 20)
    first = world.ask(llm, [("eve", PROMPTS[0] * 8)])  # long enough to fill blocks of the prefix cache
    assert first == world.merged("eve", [PROMPTS[0] * 8])
    old = lora_request(world.store, "eve")
    world.put("eve", 21)
    second = world.ask(llm, [("eve", PROMPTS[0] * 8)])
    assert second == world.merged("eve", [PROMPTS[0] * 8]) != first
    assert lora_request(world.store, "eve").lora_path != old.lora_path
    world.store.delete("eve")
    with pytest.raises(UnknownName):
        lora_request(world.store, "eve")


def test_what_cannot_be_served_is_refused_in_words_and_nobody_else_notices(world, llm):
    from transformers import LlamaConfig, LlamaForCausalLM

    def wide():
        return LlamaForCausalLM(
            LlamaConfig(hidden_size=256, intermediate_size=96, num_hidden_layers=3, num_attention_heads=4, vocab_size=128)
        )

    world.put("large", 5, rank=64)
    world.put("unique", 6, sharing="unique", targets=("q_proj",))
    world.put("headed", 7, train_modules=("lm_head",))
    world.store.put("wide", adapter(wide, 9, targets=("q_proj",)))
    world.store.put("deep", adapter(wide, 9, targets=("q_proj",), layers=(2,)))
    cases = {
        "large": "has rank 64, and this server takes up to 32",
        "unique": 'sharing="unique"',
        "headed": "fully trained modules",
        "wide": "has 256 outputs and 256 inputs at .*; this server's model has 128 and 128",
        "deep": 'adapts "model.layers.2.self_attn.q_proj", where this server\'s model has no linear',
    }
    before = set(manager(llm).loaded)
    for name, words in cases.items():
        with pytest.raises(AdapterMismatch, match=words):
            world.ask(llm, [(name, PROMPTS[0])])
    with pytest.raises(AdapterMismatch, match=r"no longer the current one|no adapter"):
        stale = LoRARequest("ann@1-000000000000", 77, "vera-store:ann@1-000000000000")
        llm.generate([{"prompt_token_ids": [1]}], greedy(), lora_request=[stale], use_tqdm=False)
    with pytest.raises(AdapterMismatch, match="takes VeRA adapters from its store"):
        llm.generate([{"prompt_token_ids": [1]}], greedy(), lora_request=[LoRARequest("x", 78, "/etc")], use_tqdm=False)
    assert set(manager(llm).loaded) == before
    assert world.check(llm, [None, "ann"]) == 8


def test_what_is_removed_while_a_request_uses_it_leaves_memory_with_that_request(world, llm):
    engine, held = llm.llm_engine, manager(llm).loaded
    world.put("fox", 22)
    for end in ("by itself", "aborted"):
        before = set(held)
        lora = lora_request(world.store, "fox")
        engine.add_request("r", {"prompt_token_ids": PROMPTS[0]}, greedy(), lora_request=lora)
        engine.step()
        (mine,) = set(held) - before
        slot = manager(llm).active[mine]
        assert engine.remove_lora(lora.lora_int_id) and not engine.remove_lora(lora.lora_int_id)
        assert mine in held
        if end == "aborted":
            engine.abort_request(["r"])
            world.ask(llm, [(None, PROMPTS[0])], tokens=1)
        else:
            while not (out := engine.step()) or not out[0].finished:
                assert mine in held
            assert list(out[0].outputs[0].token_ids) == world.merged("fox")[0]
        tables = manager(llm).tables
        assert mine not in held and not tables.d[slot].any() and not tables.b[slot].any(), end


def test_a_version_that_leaves_and_the_same_one_anew_answer_in_one_batch(world, llm):
    """Unloaded while it answers, asked for again: two numbers of one name, which vLLM's set of requests takes for one."""
    engine, held = llm.llm_engine, manager(llm).loaded
    before = set(held)
    lora = lora_request(world.store, "bob")
    engine.remove_lora(lora.lora_int_id)
    got = {}
    for name, prompt in zip("rst", PROMPTS, strict=False):
        engine.add_request(name, {"prompt_token_ids": prompt}, greedy(), lora_request=lora)
        for out in engine.step():
            got |= {out.request_id: list(out.outputs[0].token_ids)} if out.finished else {}
        if name != "t":
            assert engine.remove_lora(lora.lora_int_id)
    assert len(set(held) - before) == 3 and not got
    while engine.has_unfinished_requests():
        for out in engine.step():
            got |= {out.request_id.partition("-")[0]: list(out.outputs[0].token_ids)} if out.finished else {}
    assert [got[name] for name in "rst"] == world.merged("bob")[:3]
    assert len(set(held) - before) == 1


def test_another_basis_takes_the_place_of_one_that_no_request_uses(world, llm):
    world.put("seeded", 8, seed=9)
    assert world.check(llm, ["ann"]) == world.check(llm, ["seeded"]) == 4
    assert manager(llm).bases.users == [1] and manager(llm).bases.held[0].seed == 9
    engine = llm.llm_engine
    seeded = lora_request(world.store, "seeded")
    engine.add_request("r", {"prompt_token_ids": PROMPTS[0]}, greedy(), lora_request=seeded)
    engine.step()
    with pytest.raises(StateError, match=r'^running requests use .*ask again later.*"max_bases"'):
        engine.add_request("s", {"prompt_token_ids": [1]}, greedy(), lora_request=lora_request(world.store, "ann"))
    while engine.has_unfinished_requests():
        engine.step()
    assert world.check(llm, [None, "ann"]) == 8


def test_base_rows_equal_an_engine_without_the_plugin_bit_for_bit(world):
    plain = world.engine(plain=True, enable_prefix_caching=False)
    assert type(manager(plain)).__module__ == "vllm.lora.worker_manager"
    want = world.base_numbers(plain, [None, None])
    close(plain)
    fresh = world.engine(enable_prefix_caching=False)
    assert isinstance(manager(fresh), Manager)
    assert world.base_numbers(fresh, [None, None]) == want
    assert world.base_numbers(fresh, ["ann", "bob"]) == want
    close(fresh)


def test_more_adapters_than_slots_and_memory(world):
    llm = world.engine(slots=2, memory=2)
    names = [None, *ADAPTERS]
    assert world.check(llm, names) == 20
    for name in names:
        assert world.ask(llm, [(name, PROMPTS[1])]) == [world.merged(name)[1]]
    assert len(manager(llm).loaded) <= 2 and manager(llm).bases.users == [len(manager(llm).loaded)]
    close(llm)


def test_no_step_reads_the_store_and_what_a_request_waits_for_stays(world, monkeypatch):
    llm = world.engine(slots=1, memory=1)
    world.put("gone", 30)
    want = {n: world.merged(n)[0] for n in ("gone", *ADAPTERS)}
    engine = llm.llm_engine
    for i, name in enumerate(want):
        engine.add_request(f"{i}", {"prompt_token_ids": PROMPTS[0]}, greedy(), lora_request=lora_request(world.store, name))
    world.store.delete("gone")
    monkeypatch.setattr(Manager, "_read", lambda *a: pytest.fail("a step read an adapter"))
    monkeypatch.setattr(Manager, "list_adapters", lambda *a: pytest.fail("a step copied the names of all adapters"))
    got = {}
    while engine.has_unfinished_requests():
        for out in engine.step():
            if out.finished:
                got[out.request_id.partition("-")[0]] = list(out.outputs[0].token_ids)
    assert [got[str(i)] for i in range(len(want))] == list(want.values())
    close(llm)


@torch.no_grad()
@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_half_precision_is_as_close_to_the_merged_model_as_that_model_in_half_precision(world, dtype):
    """By packed products where the processor has the arithmetic, plain ones elsewhere."""
    llm = world.engine(dtype=dtype, enable_prefix_caching=False)
    names = [None, *ADAPTERS]
    rows = [(name, list(prompt)) for prompt in PROMPTS for name in names]
    requests = [None if name is None else lora_request(world.store, name) for name, _ in rows]
    prompts = [{"prompt_token_ids": prompt} for _, prompt in rows]
    outputs = llm.generate(prompts, greedy(logprobs=0), lora_request=requests, use_tqdm=False)
    bases = manager(llm).bases
    assert bool(bases._packed) == (bases._packs is not None)
    close(llm)
    answers = {name: [] for name in names}
    for (name, prompt), output in zip(rows, outputs, strict=True):
        tokens = list(output.outputs[0].token_ids)
        numbers = [step[token].logprob for step, token in zip(output.outputs[0].logprobs, tokens, strict=True)]
        answers[name].append((prompt, tokens, torch.tensor(numbers)))

    def numbers_by(model, prompt, tokens):
        logits = model(torch.tensor([prompt + tokens])).logits[0, len(prompt) - 1 : -1]
        return logits.float().log_softmax(-1).gather(1, torch.tensor(tokens)[:, None])[:, 0]

    merged_errors, engine_errors = [], []
    for name in names:
        engine, merged, base = [], [], []
        for prompt, tokens, numbers in answers[name]:
            want = numbers_by(world.model(name), prompt, tokens)
            engine.append(numbers - want)
            merged.append(numbers_by(world.model(name).to(getattr(torch, dtype)), prompt, tokens) - want)
            base.append(numbers_by(world.model(None), prompt, tokens) - want)
        assert name is None or rms(engine) < rms(base) / 20, name  # without the adapter: far off
        engine_errors += engine
        merged_errors += merged
    # Of all adapters together: one's error is a few sums' luck.
    assert rms(engine_errors) < 1.5 * rms(merged_errors)


def rms(differences):
    return torch.cat(differences).square().mean().sqrt().item()


def test_biases_and_several_bases_of_both_kinds_in_one_batch(tmp_path):
    more = {"fay": dict(draw=5, seed=3), "gus": dict(draw=6, basis="peft", rank=16), "hal": dict(draw=7, levels="rademacher")}
    world = world_of(tmp_path, qwen, **more)
    llm = world.engine(slots=8, settings={"max_bases": 4})
    assert world.check(llm, [None, "ann", "fay", "gus", "hal"]) == 20
    assert world.check(llm, ["gus"]) == 4
    held = manager(llm).bases
    assert held.users == [1, 1, 1, 1] and [b.kind for b in held.held] == ["philox-u8", "philox-u8", "peft", "philox-u8"]
    assert len(world.ask(llm, [("cal", PROMPTS[0])])[0]) == TOKENS
    close(llm)
    assert torch.isfinite(held.A(0, 128)).all()
