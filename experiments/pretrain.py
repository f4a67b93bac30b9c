"""The project's own base language model: a small Llama and its tokenizer, from plain text alone.

    python -m experiments.pretrain TRAIN.txt[.xz] --validation VAL.txt[.xz] [--steps 3400] [--out models/books-4m]

One pass over the text at most, on transformers' Trainer, so a killed run goes on where it stopped. What is needed while it runs
(tokens, checkpoints) lies in OUT-work; OUT gets the weights in bf16, the tokenizer and the card when it ends.
"""

import argparse
import json
import lzma
import math
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch.utils.data import Dataset

MODEL = {
    "vocab_size": 4096,
    "hidden_size": 256,
    "intermediate_size": 704,
    "num_hidden_layers": 4,
    "num_attention_heads": 8,
    "num_key_value_heads": 4,
    "max_position_embeddings": 512,
    "tie_word_embeddings": True,
}
SPECIAL = ["<|begin|>", "<|end|>", "<|pad|>", "<|user|>", "<|assistant|>"]
CHAT = (
    "{{ bos_token }}{% for m in messages %}{{ '<|user|>' if m.role != 'assistant' else '<|assistant|>' }}{{ m.content }}"
    "{% if m.role == 'assistant' %}{{ eos_token }}{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|assistant|>' }}{% endif %}"
)


CARD = """---
license: apache-2.0
language: en
library_name: transformers
pipeline_tag: text-generation
---

# {name}

A very small language model, trained from nothing for veralib's demo, tests and examples, where no hub is at hand. It has read
public-domain English books and nothing else: it writes sentences that look like such a book's and mean little. Don't use it for
anything but trying software out.

Llama's architecture: {layers} layers, hidden {hidden}, MLP {mlp}, {heads}, a byte-level BPE of {vocabulary} tokens, {positions}
positions, tied embeddings, weights in bf16. The chat template knows turns of user and assistant; no such text was trained on.

| | |
|---|---|
{table}

    python -m experiments.pretrain TRAIN.txt --validation VAL.txt --steps {steps}

Data: 259 public-domain books to train on and 9 held out, mlschmitt/classic-books-markdown at commit 944882722e9a. torch {torch}.
"""


class Blocks(Dataset):
    """A long row of tokens cut into blocks, each an example."""

    def __init__(self, tokens: np.ndarray, length: int) -> None:
        self.tokens, self.length = tokens, length

    def __len__(self) -> int:
        return len(self.tokens) // self.length

    def __getitem__(self, i: int) -> dict[str, torch.Tensor]:
        ids = torch.from_numpy(self.tokens[i * self.length : (i + 1) * self.length].astype(np.int64))
        return {"input_ids": ids, "labels": ids}


def read(path: Path, separator: str) -> list[str]:
    """The documents of a text file, compressed with xz or not."""
    with lzma.open(path, "rt", encoding="utf-8") if path.suffix == ".xz" else open(path, encoding="utf-8") as f:
        return [text.strip() for text in f.read().split(separator) if text.strip()]


def make_tokenizer(documents: list[str], folder: Path) -> Any:
    """Byte-level BPE: every text has tokens, and they turn back into it exactly."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
    from transformers import PreTrainedTokenizerFast

    bpe = Tokenizer(models.BPE())
    bpe.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    bpe.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=MODEL["vocab_size"], special_tokens=SPECIAL, initial_alphabet=pre_tokenizers.ByteLevel.alphabet()
    )
    bpe.train_from_iterator(documents, trainer)
    bpe.post_processor = processors.TemplateProcessing(single=f"{SPECIAL[0]} $A", special_tokens=[(SPECIAL[0], 0)])
    names = dict(zip(("bos_token", "eos_token", "pad_token"), SPECIAL, strict=False))
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=bpe, **names, model_max_length=MODEL["max_position_embeddings"], clean_up_tokenization_spaces=False
    )
    tokenizer.chat_template = CHAT
    tokenizer.save_pretrained(folder)
    return tokenizer


def encode(tokenizer: Any, documents: list[str], path: Path) -> np.ndarray:
    """All documents' tokens in one row, each begun and ended; kept in a file."""
    if not path.exists():
        rows = tokenizer.backend_tokenizer.encode_batch_fast(documents)
        flat = np.concatenate([np.array([*row.ids, tokenizer.eos_token_id], np.uint16) for row in rows])
        np.save(path, flat)
    return np.load(path, mmap_mode="r")


def main(arguments: list[str] | None = None) -> None:
    """Tokenizer, training, card."""
    from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast, Trainer, TrainingArguments
    from transformers.trainer_utils import get_last_checkpoint

    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("train", type=Path)
    parser.add_argument("--validation", type=Path, required=True)
    parser.add_argument("--separator", default="<|book|>", help="what stands between two documents")
    parser.add_argument("--out", type=Path, default=Path("models/books-4m"))
    parser.add_argument("--steps", type=int, default=3400)
    parser.add_argument("--rows", type=int, default=8, help="blocks of 512 tokens in a step")
    parser.add_argument("--lr", type=float, default=3e-3)
    parser.add_argument("--set", action="append", default=[], metavar="NAME=VALUE", help="a setting of the model")
    a = parser.parse_args(arguments)
    for setting in a.set:
        name, _, value = setting.partition("=")
        MODEL[name] = json.loads(value)
    work = a.out.with_name(a.out.name + "-work")
    work.mkdir(parents=True, exist_ok=True)

    if not (work / "tokenizer.json").exists():
        make_tokenizer(read(a.train, a.separator), work)
    tokenizer = PreTrainedTokenizerFast.from_pretrained(work)
    rows = {}
    for name, path in {"train": a.train, "validation": a.validation}.items():
        kept = work / f"{name}.npy"
        rows[name] = encode(tokenizer, [] if kept.exists() else read(path, a.separator), kept)
    length = MODEL["max_position_embeddings"]
    held_out = Blocks(rows["validation"], length)
    some = Blocks(rows["validation"][: 100 * length], length)

    torch.manual_seed(0)
    model = LlamaForCausalLM(
        LlamaConfig(**MODEL, bos_token_id=0, eos_token_id=1, pad_token_id=2, initializer_range=0.02)  # type: ignore[arg-type]
    )
    settings = TrainingArguments(
        str(work),
        max_steps=a.steps,
        per_device_train_batch_size=a.rows,
        per_device_eval_batch_size=a.rows,
        learning_rate=a.lr,
        lr_scheduler_type="cosine",
        warmup_steps=200,
        weight_decay=0.1,
        adam_beta2=0.95,
        max_grad_norm=1.0,
        optim="adamw_torch_fused",
        logging_steps=50,
        eval_strategy="steps",
        eval_steps=500,
        save_steps=250,
        save_total_limit=1,
        report_to="none",
        disable_tqdm=True,
        dataloader_pin_memory=False,
    )
    trainer = Trainer(model, settings, train_dataset=Blocks(rows["train"], length), eval_dataset=some)
    trainer.train(resume_from_checkpoint=get_last_checkpoint(str(work)))
    loss = trainer.evaluate(held_out)["eval_loss"]

    model.to(torch.bfloat16).save_pretrained(a.out)
    tokenizer.save_pretrained(a.out)
    bytes_a_token = sum(len(text.encode()) for text in read(a.validation, a.separator)) / len(rows["validation"])
    facts = {
        "parameters": sum(p.numel() for p in model.parameters()),
        "steps": a.steps,
        "tokens seen": a.steps * a.rows * length,
        "tokens of text": len(rows["train"]),
        "held-out loss a token": round(loss, 4),
        "held-out bits a byte": round(loss / math.log(2) / bytes_a_token, 4),
        "torch": torch.__version__,
    }
    (a.out / "training.json").write_text(json.dumps(facts | {"model": MODEL}, indent=1) + "\n")
    write_card(a.out)
    print(json.dumps(facts, indent=1))


def write_card(folder: Path) -> None:
    """README.md of the model, from its training.json."""
    facts = json.loads((folder / "training.json").read_text())
    m, rows = facts["model"], [f"| {name} | {value:,} |" for name, value in facts.items() if isinstance(value, int | float)]
    text = CARD.format(
        name=folder.name,
        layers=m["num_hidden_layers"],
        hidden=m["hidden_size"],
        mlp=m["intermediate_size"],
        heads=f"{m['num_attention_heads']} heads ({m['num_key_value_heads']} for keys and values)",
        vocabulary=f"{m['vocab_size']:,}",
        positions=m["max_position_embeddings"],
        steps=facts["steps"],
        torch=facts["torch"],
        table="\n".join(rows),
    )
    (folder / "README.md").write_text(text)


if __name__ == "__main__":
    main()
