"""Generated text: the search finds what an exhaustive one finds, and the rule against repetition is about the text alone."""

import itertools

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, GPT2Config, GPT2LMHeadModel

from veralib.errors import ConfigError, VeraWarning
from veralib.training.decoding import Decoding, _no_repeat, write

PROMPTS = ["the cat sees", "a big red house and the", "who"]


@pytest.fixture(scope="module")
def loaded(llama):
    """A model that is surer of itself than a fresh one, and to which the end is as likely as the first prompt's best word."""
    model, tokenizer = AutoModelForCausalLM.from_pretrained(llama).eval(), AutoTokenizer.from_pretrained(llama)
    with torch.no_grad():
        model.lm_head.weight.mul_(40)
        best = model(torch.tensor([tokenizer(PROMPTS[0])["input_ids"]])).logits[0, -1].argmax()
        model.lm_head.weight[tokenizer.eos_token_id] = model.lm_head.weight[best]
    return model, tokenizer


def ids_of(tokenizer):
    return [tokenizer(p)["input_ids"] for p in PROMPTS]


@torch.no_grad()
def best_of_all(model, prompt, penalty, end):
    """The tokens of the best text of up to two tokens, by log-probability over length to the penalty: all are tried."""
    logs = model(torch.tensor([prompt])).logits[0, -1].log_softmax(-1)
    size = len(logs)
    after = torch.tensor([[*prompt, t] for t in range(size)])
    seconds = model(after).logits[:, -1].log_softmax(-1)
    found = {(end,): logs[end].item()}
    for first, second in itertools.product(range(size), range(size)):
        if first != end:
            found[first, second] = (logs[first] + seconds[first, second]).item() / 2**penalty
    return max(found, key=found.get)


def test_a_wide_beam_finds_the_best_text(loaded):
    model, tokenizer = loaded
    lengths = []
    for penalty in (0.0, 0.8, 4.0):
        decoding = Decoding(max_new_tokens=2, beams=len(tokenizer), length_penalty=penalty)
        expected = [best_of_all(model, ids, penalty, tokenizer.eos_token_id) for ids in ids_of(tokenizer)]
        texts = write(model, tokenizer, ids_of(tokenizer), decoding)
        assert texts == [tokenizer.decode(e, skip_special_tokens=True) for e in expected]
        lengths.append(len(expected[0]))
    assert lengths[0] == 1 and lengths[-1] == 2  # the penalty decides


@torch.no_grad()
def plain_search(model, prompt, beams, penalty, steps, end):
    """Beam search to the last step, over lists: what ended among the best `beams` is kept aside, the others go on."""
    running, ended = [((), 0.0)], []
    for _ in range(steps):
        logs = model(torch.tensor([[*prompt, *text] for text, _ in running])).logits[:, -1].log_softmax(-1)
        made = [((*text, t), s + logs[i, t].item()) for i, (text, s) in enumerate(running) for t in range(logs.shape[1])]
        made.sort(key=lambda m: -m[1])
        ended += [m for m in made[:beams] if m[0][-1] == end]
        running = [m for m in made if m[0][-1] != end][:beams]
    return max(ended + running, key=lambda m: m[1] / len(m[0]) ** penalty)[0]


@pytest.mark.parametrize("penalty", [0.8, 2.0])
@pytest.mark.parametrize("beams", [2, 3])
def test_a_narrow_beam_goes_on_to_the_last_step(loaded, beams, penalty):
    model, tokenizer = loaded
    expected = [plain_search(model, ids, beams, penalty, 6, tokenizer.eos_token_id) for ids in ids_of(tokenizer)]
    texts = write(model, tokenizer, ids_of(tokenizer), Decoding(6, beams, penalty))
    assert texts == [tokenizer.decode(e, skip_special_tokens=True) for e in expected]


def test_no_n_gram_comes_twice_in_a_text(llama):
    model, tokenizer = AutoModelForCausalLM.from_pretrained(llama), AutoTokenizer.from_pretrained(llama)

    def repeats(no_repeat, beams):
        texts = write(model, tokenizer, ids_of(tokenizer), Decoding(30, beams, 0.8, no_repeat))
        words = [text.split() for text in texts]
        pairs = [list(itertools.pairwise(w)) for w in words]
        return sum(len(p) - len(set(p)) for p in pairs)

    assert repeats(0, 1) > 0 and repeats(2, 1) == repeats(2, 3) == 0


def test_the_prompts_n_grams_may_be_written():
    scores = torch.zeros(1, 9)
    prompt, text = [3, 4, 5], [3]
    assert _no_repeat(2, len(prompt))(torch.tensor([prompt + text]), scores).isfinite().all()
    banned = _no_repeat(2, len(prompt))(torch.tensor([[*prompt, 6, 7, 6]]), scores)
    assert torch.nonzero(banned.isinf()).tolist() == [[0, 7]]


def test_faults_are_listed_at_once():
    with pytest.raises(ConfigError) as e:
        Decoding(max_new_tokens=0, beams=-1, length_penalty=float("nan"), no_repeat=-1)
    assert all(name in str(e.value) for name in ("max_new_tokens", "beams", "length_penalty", "no_repeat"))


def test_a_prompt_as_long_as_the_model_reads_keeps_its_end(loaded):
    _, tokenizer = loaded
    torch.manual_seed(0)
    config = GPT2Config(n_embd=32, n_layer=1, n_head=2, vocab_size=len(tokenizer), n_positions=32, bos_token_id=0, eos_token_id=0)
    model, long = GPT2LMHeadModel(config).eval(), list(range(5, 15)) * 6
    with pytest.warns(VeraWarning, match="1 of 2 prompts leave no room in the model's 32 positions"):
        texts = write(model, tokenizer, [long, long[:3]], Decoding(max_new_tokens=8))
    assert texts == write(model, tokenizer, [long[-24:], long[:3]], Decoding(max_new_tokens=8))
