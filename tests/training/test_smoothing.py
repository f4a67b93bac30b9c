"""Label smoothing: the training loss is the smoothed one of the shifted tokens, and evaluation stays unsmoothed."""

import pytest
import torch

from veralib.errors import ConfigError
from veralib.training import Settings, train
from veralib.training.tokens import collator, encode

from .tiny import write_jsonl

ROWS = [{"prompt": p, "completion": c} for p, c in (("the cat sees", " a dog"), ("who", " did not see the big house"))] * 2


def by_hand(llama, settings, epsilon):
    """(1 - ε) · mean negative log-likelihood + ε · the mean over the vocabulary, of the completions' tokens."""
    from transformers import AutoModelForCausalLM, AutoTokenizer

    model, tokenizer = AutoModelForCausalLM.from_pretrained(llama).eval(), AutoTokenizer.from_pretrained(llama)
    batch = collator(0)(encode(ROWS, tokenizer, settings, (), 64, "the rows"))
    labels = batch.pop("labels")
    with torch.no_grad():
        logs = -model(**batch).logits[:, :-1].double().log_softmax(-1)
    counted = labels[:, 1:] != -100
    right = logs.gather(2, labels[:, 1:].clamp(min=0)[..., None])[..., 0]
    return float((1 - epsilon) * right[counted].mean() + epsilon * logs.mean(-1)[counted].mean())


@pytest.mark.parametrize("accumulation", [1, 2])
@pytest.mark.parametrize("method", ["vera", "lora"])
def test_the_first_loss_is_the_smoothed_one_by_hand(llama, tmp_path, method, accumulation):
    """A fresh adapter changes nothing, so the base model's loss is the first step's."""
    file = write_jsonl(tmp_path / "rows.jsonl", ROWS)
    fields = {"task": "prompt-completion", "rank": 4, "epochs": 1, "plot": False, "method": method, "save_every": "never"}
    fields |= {"batch_size": 4 // accumulation, "accumulation": accumulation, "lr": 1e-9, "validation": file}
    losses = []
    for epsilon in (0.0, 0.1):
        extra = {"logging_steps": 1, "label_smoothing_factor": epsilon}
        settings = Settings(model=llama, data=file, output=tmp_path / f"{epsilon}", training=extra, **fields)
        found = train(settings)
        losses.append(next(h["loss"] for h in found.history if "loss" in h))
        assert losses[-1] == pytest.approx(by_hand(llama, settings, epsilon), abs=2e-4)
        assert found.metrics["eval_loss"] == pytest.approx(by_hand(llama, settings, 0.0), abs=2e-4)
    assert abs(losses[0] - losses[1]) > 2e-3


@pytest.mark.parametrize("accumulation", [1, 2])
def test_adaloras_penalty_is_in_the_smoothed_loss_too(llama, tmp_path, accumulation):
    """PEFT adds it to the model's own loss alone; smoothed, Trainer counts the loss. The first step's: base loss + penalty."""
    from transformers import AutoModelForCausalLM

    from veralib.baselines import find_method

    pytest.importorskip("peft")
    file = write_jsonl(tmp_path / "rows.jsonl", ROWS)
    fields = {"task": "prompt-completion", "rank": 4, "epochs": 3, "plot": False, "method": "adalora", "save_every": "never"}
    fields |= {"batch_size": 4 // accumulation, "accumulation": accumulation, "lr": 1e-9, "options": {"orth_reg_weight": 0.5}}
    extra = {"logging_steps": 1, "label_smoothing_factor": 0.1}
    settings = Settings(model=llama, data=file, output=tmp_path / "run", training=extra, **fields)
    torch.manual_seed(0)
    made = find_method("adalora")(AutoModelForCausalLM.from_pretrained(llama), settings, ())
    batch = {"input_ids": torch.arange(8)[None], "labels": torch.arange(8)[None]}
    own = made.model(**batch).loss - made.model.base_model.model(**batch).loss  # PEFT's own term
    torch.testing.assert_close(made.penalty(), own, rtol=1e-4, atol=1e-4)
    loss = next(h["loss"] for h in train(settings).history if "loss" in h)
    drawn = loss - by_hand(llama, settings, 0.1)
    # A and B are drawn anew from the run's seed, N(0, 0.02²): |P Pᵀ - I| is about √rank.
    assert drawn == pytest.approx(float(own.detach()), rel=0.02)
    with pytest.raises(ConfigError, match="the run has 1"):
        train(settings.replace(epochs=1, output=tmp_path / "short"))
