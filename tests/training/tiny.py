"""Tiny models, tokenizers and data sets, made here: nothing is downloaded."""

import json
import random
from pathlib import Path

GOOD, BAD = ("likes", "red"), ("eats", "blue")
WORDS = [
    *GOOD,
    *BAD,
    "the",
    "a",
    "cat",
    "dog",
    "bird",
    "fish",
    "sees",
    "big",
    "small",
    "house",
    "tree",
    "and",
    "not",
    "who",
    "did",
]
CHAT_TEMPLATE = (
    "{% for m in messages %}<{{ m['role'] }}> {{ m['content'] }} <end> {% endfor %}"
    "{% if add_generation_prompt %}<assistant> {% endif %}"
)


def make_tokenizer(folder: Path, causal: bool):
    """A word tokenizer, saved to the folder; BERT's specials, or <s> and </s> for a causal model."""
    from tokenizers import Tokenizer, models, pre_tokenizers, processors
    from transformers import PreTrainedTokenizerFast

    specials = ["<pad>", "<unk>", "<s>", "</s>"] if causal else ["[PAD]", "[UNK]", "[CLS]", "[SEP]"]
    extra = ["<user>", "<assistant>", "<end>"]
    vocabulary = {w: i for i, w in enumerate([*specials, *extra, *WORDS])}
    raw = Tokenizer(models.WordLevel(vocabulary, unk_token=specials[1]))
    raw.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    first, last = specials[2], specials[3]
    raw.post_processor = processors.TemplateProcessing(
        single=f"{first} $A" if causal else f"{first} $A {last}",
        pair=None if causal else f"{first} $A {last} $B:1 {last}:1",
        special_tokens=[(first, vocabulary[first]), (last, vocabulary[last])],
    )
    names = {"bos_token": first, "eos_token": last} if causal else {"cls_token": first, "sep_token": last}
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=raw, pad_token=specials[0], unk_token=specials[1], model_max_length=64, **names
    )
    tokenizer.model_input_names = ["input_ids", "attention_mask"] + ([] if causal else ["token_type_ids"])
    tokenizer.save_pretrained(folder)
    return tokenizer


def make_bert(folder: Path) -> Path:
    """A saved two-layer BertModel without a head, as sentence encoders are."""
    import torch
    from transformers import BertConfig, BertModel

    tokenizer = make_tokenizer(folder, causal=False)
    torch.manual_seed(1)
    shape = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 48}
    config = BertConfig(vocab_size=len(tokenizer), max_position_embeddings=64, pad_token_id=0, **shape)
    BertModel(config).save_pretrained(folder)
    return folder


def make_llama(folder: Path, template: bool = True) -> Path:
    """A saved two-layer LlamaForCausalLM, with a chat template."""
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    tokenizer = make_tokenizer(folder, causal=True)
    if template:
        tokenizer.chat_template = CHAT_TEMPLATE
        tokenizer.save_pretrained(folder)
    torch.manual_seed(1)
    shape = {
        "hidden_size": 32,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "intermediate_size": 48,
    }
    config = LlamaConfig(
        vocab_size=len(tokenizer), max_position_embeddings=64, bos_token_id=2, eos_token_id=3, pad_token_id=0, **shape
    )
    LlamaForCausalLM(config).save_pretrained(folder)
    return folder


COLOURS = {"blue": (40, 40, 200), "green": (40, 200, 40), "red": (200, 40, 40)}


def make_vit(folder: Path, **changes) -> Path:
    """A saved two-layer ViTModel without a head, 16 x 16 pixels in patches of 8, with its image processor."""
    import torch
    from transformers import ViTConfig, ViTImageProcessorPil, ViTModel

    torch.manual_seed(1)
    shape = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 48}
    config = ViTConfig(**{"image_size": 16, "patch_size": 8, **shape, **changes})
    ViTModel(config, add_pooling_layer=False).save_pretrained(folder)
    ViTImageProcessorPil(size={"height": 16, "width": 16}).save_pretrained(folder)
    return folder


def jpegs(count: int, seed: int = 0, colours: tuple[str, ...] = tuple(COLOURS)) -> dict[str, list[bytes]]:
    """`count` JPEG files a class, each of the class's colour under noise, 20 x 24 pixels."""
    import io

    import numpy as np
    from PIL import Image

    rng = np.random.default_rng(seed)
    made: dict[str, list[bytes]] = {}
    for name in colours:
        noisy = rng.normal(COLOURS[name], 30, (count, 20, 24, 3)).clip(0, 255).astype(np.uint8)
        made[name] = []
        for pixels in noisy:
            Image.fromarray(pixels).save(file := io.BytesIO(), "JPEG")
            made[name].append(file.getvalue())
    return made


def write_images(folder: Path, images: dict[str, list[bytes]]) -> Path:
    """A folder of class folders."""
    for name, files in images.items():
        (folder / name).mkdir(parents=True)
        for i, content in enumerate(files):
            (folder / name / f"{i:03d}.jpg").write_bytes(content)
    return folder


def write_npz(path: Path, splits: list[dict[str, list[bytes]]]) -> Path:
    """The layout of veralib/training/images.py; splits: train, then val."""
    import numpy as np

    names = sorted({name for images in splits for name in images})
    rows = [(f, names.index(n), s) for s, images in enumerate(splits) for n, files in images.items() for f in files]
    np.savez(
        path,
        data=np.frombuffer(b"".join(f for f, _, _ in rows), np.uint8),
        offsets=np.cumsum([0, *(len(f) for f, _, _ in rows)]),
        labels=np.array([label for _, label, _ in rows], np.int16),
        split=np.array([s for _, _, s in rows], np.int8),
        names=np.array(names),
    )
    return path


def sentences(count: int, seed: int = 0) -> list[dict[str, str]]:
    """Rows whose label, "good" or "bad", one word decides."""
    rng = random.Random(seed)
    rows = []
    for _ in range(count):
        label, telling = rng.choice([("good", GOOD), ("bad", BAD)])
        words = rng.choices(WORDS[4:], k=rng.randrange(3, 9))
        words.insert(rng.randrange(len(words)), rng.choice(telling))
        rows.append({"text": " ".join(words), "label": label})
    return rows


def write_jsonl(path: Path, rows: list[dict]) -> Path:
    """The rows as jsonl."""
    path.write_text("".join(json.dumps(r) + "\n" for r in rows), encoding="utf-8")
    return path
