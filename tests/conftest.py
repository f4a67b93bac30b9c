"""Small models that tests share; real data and models only where VERALIB_DATA names their folder."""

import os
import random
from pathlib import Path

import numpy as np
import pytest
import torch

torch.set_num_threads(1)  # pytest-xdist runs a worker a core


def _seed() -> None:
    random.seed(0)
    torch.manual_seed(0)
    np.random.seed(0)


@pytest.fixture(autouse=True)
def same_numbers() -> None:
    """What a test draws doesn't hang on the tests before it, which differ with the number of workers."""
    _seed()


@pytest.fixture(scope="module", autouse=True)
def same_numbers_for_a_module() -> None:
    """Nor does what a module's own fixtures draw."""
    _seed()


@pytest.fixture
def data() -> Path:
    folder = os.environ.get("VERALIB_DATA")
    if not folder or not Path(folder).is_dir():
        pytest.skip("set VERALIB_DATA to the folder with the real data and models to run this test")
    return Path(folder)


def tiny_llama(seed: int = 0, **changes):
    """A LlamaForCausalLM of 2 layers, hidden 32, GQA, vocabulary 64."""
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(seed)
    settings = dict(
        hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2,
        vocab_size=64, max_position_embeddings=64, pad_token_id=0, bos_token_id=1, eos_token_id=2,
    )  # fmt: skip
    return LlamaForCausalLM(LlamaConfig(**(settings | changes))).eval()


def tiny_gpt2(seed: int = 0, **changes):
    """A GPT2LMHeadModel of 2 layers, hidden 32: Conv1D, fused c_attn, tied embeddings."""
    from transformers import GPT2Config, GPT2LMHeadModel

    torch.manual_seed(seed)
    settings = dict(n_embd=32, n_layer=2, n_head=4, vocab_size=64, n_positions=64, bos_token_id=1, eos_token_id=2)
    return GPT2LMHeadModel(GPT2Config(**(settings | changes))).eval()


def tiny_bert(seed: int = 0, labels: int = 3, **changes):
    """A BertForSequenceClassification of 2 layers, hidden 32."""
    from transformers import BertConfig, BertForSequenceClassification

    torch.manual_seed(seed)
    settings = dict(
        hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4, vocab_size=64,
        max_position_embeddings=64, num_labels=labels, hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0,
    )  # fmt: skip
    return BertForSequenceClassification(BertConfig(**(settings | changes))).eval()


def tokens(rows: int = 4, length: int = 7, seed: int = 0) -> torch.Tensor:
    return torch.randint(3, 64, (rows, length), generator=torch.Generator().manual_seed(seed))


@torch.no_grad()
def randomise(vera, name: str, seed: int = 0, size: float = 0.3) -> None:
    """Vectors as if trained: every one of them matters."""
    generator = torch.Generator().manual_seed(seed)
    for unit in vera.member(name).layout.units:
        for vector in vera.member(name).vectors(unit.unit):
            vector.copy_(size * torch.randn(vector.shape, generator=generator))
