"""The base models that are measured, and the contestants that train on them: shapes, not knowledge, so weights are random."""

import copy
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor, nn

Method = Literal["frozen", "full", "lora", "peft-vera", "veralib"]
SEED = 0


@dataclass(frozen=True)
class Shape:
    """A kind of base model and what is adapted in it."""

    name: str
    build: Callable[[], nn.Module]
    targets: str | tuple[str, ...]
    vocabulary: int
    labels: Literal["tokens", "classes"]


def _llama(hidden: int, layers: int, heads: int, mlp: int, vocabulary: int) -> Callable[[], nn.Module]:
    def build() -> nn.Module:
        from transformers import LlamaConfig, LlamaForCausalLM

        config = LlamaConfig(
            hidden_size=hidden,
            num_hidden_layers=layers,
            num_attention_heads=heads,
            num_key_value_heads=heads,
            intermediate_size=mlp,
            vocab_size=vocabulary,
            max_position_embeddings=1024,
            use_cache=False,
        )
        return LlamaForCausalLM(config)

    return build


def _roberta(**fields: Any) -> Callable[[], nn.Module]:
    def build() -> nn.Module:
        from transformers import RobertaConfig, RobertaForSequenceClassification

        return RobertaForSequenceClassification(RobertaConfig(max_position_embeddings=514, **fields))  # 2 labels

    return build


def _gpt2(**fields: Any) -> Callable[[], nn.Module]:
    def build() -> nn.Module:
        from transformers import GPT2Config, GPT2LMHeadModel

        return GPT2LMHeadModel(GPT2Config(use_cache=False, **fields))

    return build


# roberta: RobertaConfig's own defaults are the base size: 12 layers, hidden 768, MLP 3072, vocabulary 50265, dropout 0.1.
SHAPES = {
    "llama": Shape("llama", _llama(512, 8, 8, 1408, 2000), "all-linear", 2000, "tokens"),
    "roberta": Shape("roberta", _roberta(vocab_size=50265), ("query", "value"), 50265, "classes"),
    "roberta-large": Shape(
        "roberta-large",
        _roberta(vocab_size=50265, hidden_size=1024, num_hidden_layers=24, num_attention_heads=16, intermediate_size=4096),
        ("query", "value"),
        50265,
        "classes",
    ),
    # The query, key and value are one linear here; PEFT adapts it whole.
    "gpt2-large": Shape("gpt2-large", _gpt2(n_embd=1280, n_layer=36, n_head=20), ("c_attn",), 50257, "tokens"),
    "tiny-llama": Shape("tiny-llama", _llama(32, 2, 4, 48, 64), "all-linear", 64, "tokens"),
    "tiny-roberta": Shape(
        "tiny-roberta",
        _roberta(vocab_size=64, hidden_size=32, num_hidden_layers=2, num_attention_heads=4, intermediate_size=64),
        ("query", "value"),
        64,
        "classes",
    ),
    "tiny-gpt2": Shape("tiny-gpt2", _gpt2(n_embd=32, n_layer=2, n_head=4, vocab_size=64), ("c_attn",), 64, "tokens"),
}


@dataclass(frozen=True)
class Contestant:
    """One way to train the model; rank 0 where the method has none."""

    method: Method
    rank: int = 0

    @property
    def name(self) -> str:
        """The key in result files: "lora-8", "veralib-1024", "full"."""
        return f"{self.method}-{self.rank}" if self.rank else self.method


def base_model(shape: Shape, dtype: torch.dtype = torch.float32) -> nn.Module:
    """The base, in training mode, its weights drawn from one seed."""
    torch.manual_seed(SEED)
    return shape.build().to(dtype).train()


def batch(shape: Shape, rows: int, length: int) -> dict[str, Tensor]:
    """One batch of random tokens, the same for every contestant: input_ids, attention_mask, labels."""
    generator = torch.Generator().manual_seed(SEED)
    # 0 to 2 are special tokens in RoBERTa; 1 is its padding, which would shorten the rows.
    ids = torch.randint(3, shape.vocabulary, (rows, length), generator=generator)
    labels = ids if shape.labels == "tokens" else torch.randint(0, 2, (rows,), generator=generator)
    return {"input_ids": ids, "attention_mask": torch.ones_like(ids), "labels": labels}


def contest(base: nn.Module, shape: Shape, contestant: Contestant) -> nn.Module:
    """A copy of the base with this contestant's adapter on it and its parameters trainable; the base stays as it is.

    Heads stay frozen except in full fine-tuning, so every adapter method trains its own vectors or matrices alone.
    """
    model = copy.deepcopy(base)
    if contestant.method == "full":
        return model
    if contestant.method == "frozen":
        # The floor: nothing trains, the gradient only passes through, as it must below any adapter.
        model.requires_grad_(False)
        model.enable_input_require_grads()  # type: ignore[operator]
        return model
    if contestant.method == "veralib":
        import veralib

        veralib.attach(model, veralib.VeraConfig(rank=contestant.rank, targets=shape.targets))
        return model
    import peft

    targets = shape.targets if isinstance(shape.targets, str) else list(shape.targets)
    config: peft.PeftConfig
    if contestant.method == "lora":
        config = peft.LoraConfig(r=contestant.rank, lora_alpha=2 * contestant.rank, target_modules=targets)
    else:
        config = peft.VeraConfig(r=contestant.rank, target_modules=targets)
    return peft.get_peft_model(model, config)


def frozen_tensors(model: nn.Module, contestant: Contestant) -> list[Tensor]:
    """Parameters, buffers and A and B: what exists once, however many tokens a step has."""
    tensors = [*model.parameters(), *model.buffers()]
    if contestant.method == "veralib":
        from veralib import basis

        tensors += basis._cache.values()
    return tensors
