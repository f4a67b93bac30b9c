"""A fleet over the authors of books: shared and own adapters on held-out passages, the demo's comparison on other text.

    python -m experiments.authors BOOKS.txt[.xz] [--model models/books-4m] [--results results/authors]

BOOKS holds books that begin with "# Title:" and "## Author:" lines, separated by <|book|>. The rule, fixed beforehand: every
named author; passages are paragraphs of 200 to 1,500 letters; an author has 8, 16 or 40 of them to train on, by a hash of the
name, and 16 that only measure, from the last fifth of the author's text, so that none stands beside one that was trained on.
The base model has read most of these books, each at most once: all columns share that. Sixteen authors, by a hash of the name,
choose the learning rates and are measured no more; the demo's rates, chosen on documentation, are too high for prose.
"""

import argparse
import hashlib
import re
import time
from collections import defaultdict
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from veralib.demo import fleet_report
from veralib.demo.comparison import Comparison
from veralib.demo.data import fraction
from veralib.demo.tune_fleet import tune

from .pretrain import read

RESULTS = Path(__file__).parents[1] / "results" / "authors"
SIZES = (8, 16, 40)
HELD_OUT = 16
LETTERS = (200, 1500)
TUNED_ON = 16
VERA, LORA = (1e-2, 3e-2, 1e-1, 3e-1), (1e-2, 3e-2, 1e-1)
ANONYMOUS = {"Various", "Anonymous", "Unknown"}


def passages(books: Sequence[str]) -> tuple[dict[str, list[str]], dict[str, list[str]]]:
    """({author: passages to train on}, {author: held-out passages}); authors with too little text are left out."""
    texts: dict[str, list[str]] = defaultdict(list)
    for book in books:
        author = re.search(r"^## Author:\s*(.+?)\s*$", book, re.MULTILINE)
        if author is not None and author[1] not in ANONYMOUS:
            paragraphs = (" ".join(p.split()) for p in re.split(r"\n\s*\n", book))
            texts[author[1]] += [p for p in paragraphs if LETTERS[0] <= len(p) <= LETTERS[1]]
    train, held_out = {}, {}
    for author in sorted(texts):
        wanted = SIZES[int(3 * fraction("size", author))]
        early, late = texts[author][: (cut := 4 * len(texts[author]) // 5)], texts[author][cut:]
        if len(early) >= wanted and len(late) >= HELD_OUT:
            train[author], held_out[author] = _draw(early, wanted), _draw(late, HELD_OUT)
    return train, held_out


def _draw(paragraphs: Sequence[str], count: int) -> list[str]:
    return sorted(paragraphs, key=lambda p: hashlib.sha256(p.encode()).digest())[:count]


def fingerprint(rows: Mapping[str, Sequence[str]]) -> str:
    """SHA-256 of all rows; 64 hexadecimal digits."""
    lines = (f"{name}\t{text}\n" for name, texts in rows.items() for text in texts)
    return hashlib.sha256("".join(lines).encode()).hexdigest()


def main(arguments: list[str] | None = None) -> dict[str, Any]:
    """Trains, measures, writes the result files."""
    from transformers import AutoModelForCausalLM, AutoTokenizer

    from veralib.training.result import hardware, versions

    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("books", type=Path)
    parser.add_argument("--model", type=Path, default=Path("models/books-4m"))
    parser.add_argument("--results", type=Path, default=RESULTS)
    parser.add_argument("--authors", type=int, help="no more than so many, by name")
    a = parser.parse_args(arguments)
    train, held_out = passages(read(a.books, "<|book|>"))
    chosen = sorted(train, key=lambda name: fraction("rates", name))[: min(TUNED_ON, len(train) // 2)]
    names = [name for name in train if name not in chosen][: a.authors]
    tokenizer = AutoTokenizer.from_pretrained(a.model)
    tokenizer.model_max_length = 10**9  # passages are cut later
    base = AutoModelForCausalLM.from_pretrained(a.model, dtype="float32")
    last = [time.monotonic()]

    def say(phase: str, step: int | None = None, steps: int | None = None) -> None:
        if step is None or step == steps or time.monotonic() - last[0] > 30:
            last[0] = time.monotonic()
            print(phase if step is None else f"{phase}: step {step} of {steps}", flush=True)

    recipe, trials = tune(
        base, tokenizer, {n: train[n] for n in chosen}, {n: held_out[n] for n in chosen}, VERA, LORA, timed=TUNED_ON // 2
    )
    rows = {n: train[n] for n in names}
    found = Comparison(base, tokenizer, rows, {n: held_out[n] for n in names}, recipe, say).run("He looked")
    about = {"data": fingerprint(rows), "model": a.model.name, "versions": versions(), "hardware": hardware()}
    about["rates"] = {"trials": trials, "authors": chosen}
    result = {**found, "about": about}
    fleet_report.write(result, a.results)
    print(fleet_report.markdown(result))
    return result


if __name__ == "__main__":
    main()
