"""What the demo's task takes without fine-tuning: logistic regression on two kinds of features. python -m veralib.demo.simple

Word counts (tf-idf of words and pairs of words), and MiniLM's sentence embeddings as sentence-transformers makes them (the mean
of the token vectors, length 1). The regularisation C is chosen on the validation split. Writes results/demo/simple.json.
"""

import json
import platform
from pathlib import Path
from typing import Any

from .data import SPLITS, Data, load_data
from .methods import COMMON
from .model import find_model

FILE = Path(__file__).parents[2] / "results" / "demo" / "simple.json"
C = (0.3, 1, 3, 10, 30, 100, 300)


def word_counts(data: Data) -> dict[str, Any]:
    """{split: tf-idf matrix}, the vocabulary from the training split."""
    from sklearn.feature_extraction.text import TfidfVectorizer

    counts = TfidfVectorizer(ngram_range=(1, 2), sublinear_tf=True).fit([s.text for s in data.split("train")])
    return {split: counts.transform([s.text for s in data.split(split)]) for split in SPLITS}


def embeddings(data: Data) -> dict[str, Any]:
    """{split: (sentences, 384) array}."""
    import torch
    from transformers import AutoModel, AutoTokenizer

    tokenizer, model = AutoTokenizer.from_pretrained(find_model()), AutoModel.from_pretrained(find_model()).eval()

    @torch.inference_mode()
    def embed(texts: list[str]) -> torch.Tensor:
        batch = tokenizer(texts, truncation=True, max_length=COMMON["max_length"], padding=True, return_tensors="pt")
        mask = batch["attention_mask"][..., None]
        mean = (model(**batch).last_hidden_state * mask).sum(1) / mask.sum(1)
        return torch.nn.functional.normalize(mean)

    found: dict[str, Any] = {}
    for split in SPLITS:
        texts = [s.text for s in data.split(split)]
        found[split] = torch.cat([embed(texts[i : i + 32]) for i in range(0, len(texts), 32)]).numpy()
    return found


def score(data: Data, features: dict[str, Any]) -> dict[str, float]:
    """Accuracy on the validation and test splits with the best C."""
    from sklearn.linear_model import LogisticRegression

    truth = {split: [s.package for s in data.split(split)] for split in SPLITS}
    fits = [LogisticRegression(C=c, max_iter=2000).fit(features["train"], truth["train"]) for c in C]
    best = max(fits, key=lambda fit: fit.score(features["validation"], truth["validation"]))
    scores = {split: best.score(features[split], truth[split]) for split in SPLITS if split != "train"}
    return {"C": best.C, **{split: round(value, 4) for split, value in scores.items()}}


if __name__ == "__main__":
    data = load_data()
    result = {
        "python": platform.python_version(),
        "data": data.hash,
        "word counts": score(data, word_counts(data)),
        "embeddings": score(data, embeddings(data)),
    }
    FILE.parent.mkdir(parents=True, exist_ok=True)
    FILE.write_text(json.dumps(result, indent=1) + "\n")
    print(FILE.read_text())
