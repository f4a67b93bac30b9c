"""The demo's data: which package of Python's standard library does this sentence of documentation come from?

Every machine with Python has this text. The rule below was fixed before anything was trained (docs/demo.md says it in words);
nothing in it is random, so one version of Python gives one data set, and Data.hash names it.
"""

import ast
import csv
import hashlib
import re
import sysconfig
from collections import defaultdict
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from ..errors import DataError

Split = Literal["train", "validation", "test"]
SPLITS: dict[Split, float] = {"train": 0.40, "validation": 0.60, "test": 1.0}
"""Split -> where it ends on the line from 0 to 1 that an object's hash falls on."""

PACKAGES = 12
"""Number of labels: the packages with the most sentences."""
SENTENCES = 200
"""At most this many sentences of one package, so that no label dominates."""
WORDS = (6, 24)
"""Shortest and longest sentence."""
MASK = "[MASK]"

# Absent from some distributions of Python (Debian splits them off), or old and gone in later versions.
EXCLUDED = {"test", "idlelib", "tkinter", "turtle", "turtledemo", "lib2to3", "distutils", "ensurepip", "venv", "pydoc_data"}


@dataclass(frozen=True)
class Sentence:
    """One example. object is the qualified name of what the sentence documents: "email.message.Message.get_payload"."""

    text: str
    package: str
    object: str

    @property
    def split(self) -> Split:
        """By the object's name alone: all sentences of one object are in one split."""
        place = fraction("split", self.object)
        return next(split for split, end in SPLITS.items() if place < end)


@dataclass(frozen=True)
class Data:
    """The three splits."""

    labels: tuple[str, ...]
    """Package names, sorted."""
    sentences: tuple[Sentence, ...]

    def split(self, name: Split) -> list[Sentence]:
        """The sentences of one split, in a fixed order."""
        return [s for s in self.sentences if s.split == name]

    @property
    def rows(self) -> dict[str, int]:
        """How many sentences each split has."""
        return {split: len(self.split(split)) for split in SPLITS}

    @property
    def hash(self) -> str:
        """SHA-256 of every split, label, object and text; 64 hexadecimal digits."""
        lines = (f"{s.split}\t{s.package}\t{s.object}\t{s.text}\n" for s in self.sentences)
        return hashlib.sha256("".join(lines).encode()).hexdigest()

    def write(self, folder: Path) -> dict[str, Path]:
        """Write train.csv, validation.csv and test.csv with the columns text and label; {split: path} comes back."""
        folder.mkdir(parents=True, exist_ok=True)
        paths: dict[str, Path] = {split: folder / f"{split}.csv" for split in SPLITS}
        for split in SPLITS:
            with paths[split].open("w", newline="", encoding="utf-8") as file:
                rows = csv.writer(file)
                rows.writerow(["text", "label"])
                rows.writerows((s.text, s.package) for s in self.split(split))
        return paths


def load_data(library: Path | None = None, packages: int = PACKAGES) -> Data:
    """The data set of this Python, or of the standard library in the folder `library`. Reads source files, imports none of them.

    Raises DataError where the folder holds too few sources (a Python whose library is compiled only or zipped).
    """
    folder = library or Path(sysconfig.get_path("stdlib"))
    found = _without_repeats(_all_sentences(folder))
    largest = sorted(found, key=lambda name: (-len(found[name]), name))[:packages]
    if len(largest) < packages or len(found[largest[-1]]) < 20:
        raise DataError(
            f"{folder} documents {len(found)} packages, expected {packages} with 20 sentences or more: this Python comes "
            "without its library's source files. Run the demo with a Python from python.org, conda or your system."
        )
    names = tuple(sorted(largest))
    mask = masker(names)
    kept: dict[str, Sentence] = {}
    for s in (s for name in names for s in _sample(found[name])):
        text = mask(s.text)
        kept.setdefault(letters(text), Sentence(text, s.package, s.object))  # two sentences may be one once they are masked
    return Data(names, tuple(kept.values()))


def masker(names: tuple[str, ...]):
    """A function that replaces each word containing one of the names, or a name's stem, by [MASK], in any case.

    Stems, so that "logger" doesn't give away "logging": -ing, -lib and -io are cut off, a doubled last letter is undoubled.
    A name written as two words ("IP address", "e-mail") is found too. Every label's name is masked in every sentence:
    otherwise a name left standing would say "not this one".
    """
    stems = sorted({_stem(n.lower()) for n in names}, key=lambda s: (-len(s), s))
    words = "|".join(r"[-\s_]?".join(map(re.escape, s)) for s in stems)
    pattern = re.compile(rf"\w*(?:{words})\w*", re.IGNORECASE)
    return lambda text: pattern.sub(MASK, text)


def sentences_of(doc: str) -> list[str]:
    """The sentences of one documentation string: prose of 6 to 24 words, no code, no examples, no tables."""
    found = []
    for paragraph in re.split(r"\n\s*\n", doc):
        lines = [line.strip() for line in paragraph.splitlines()]
        if any(line.startswith((">>>", "...", "$ ")) for line in lines):
            continue
        for sentence in re.split(r"(?<=[.!?])\s+(?=[A-Z\"'`(])", " ".join(lines)):
            letters = sum(c.isalpha() or c == " " for c in sentence)
            if WORDS[0] <= len(sentence.split()) <= WORDS[1] and letters >= 0.85 * len(sentence):
                found.append(" ".join(sentence.split()))
    return found


def _all_sentences(folder: Path) -> Iterator[Sentence]:
    for path in sorted(folder.rglob("*.py")):
        parts = path.relative_to(folder).with_suffix("").parts
        package = parts[0]
        if not package.isidentifier() or package.startswith("_") or package in EXCLUDED or {"test", "tests"} & {*parts}:
            continue  # not an identifier: site-packages, lib-dynload and the like
        try:
            tree = ast.parse(path.read_bytes())
        except (SyntaxError, ValueError, OSError):
            continue
        for name, doc in documented(tree, ".".join(parts).removesuffix(".__init__")):
            for text in sentences_of(doc):
                yield Sentence(text, package, name)


def documented(node: ast.AST, name: str) -> Iterator[tuple[str, str]]:
    """(qualified name, documentation string) of a module and of every class and function in it."""
    if isinstance(node, (ast.Module, ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)) and (doc := ast.get_docstring(node)):
        yield name, doc
    for child in ast.iter_child_nodes(node):
        if isinstance(child, (ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)):
            yield from documented(child, f"{name}.{child.name}")
        elif isinstance(child, ast.stmt):
            yield from documented(child, name)


def _without_repeats(sentences: Iterator[Sentence]) -> Mapping[str, list[Sentence]]:
    """{package: sentences}, each sentence once; one that two packages share (letters alone compared) is left out of both."""
    first: dict[str, Sentence] = {}
    shared = set()
    for s in sentences:
        key = letters(s.text)
        if first.setdefault(key, s).package != s.package:
            shared.add(key)
    found = defaultdict(list)
    for key, s in first.items():
        if key not in shared:
            found[s.package].append(s)
    return found


def letters(text: str) -> str:
    """The text without all but its letters, in lower case: what is compared to find repeats."""
    return "".join(c for c in text.lower() if c.isalpha())


def _sample(sentences: list[Sentence]) -> list[Sentence]:
    """The first SENTENCES by a hash of the object's name: another hash than the split's, which would fill one split alone."""
    return sorted(sentences, key=lambda s: (fraction("sample", s.object), s.object, s.text))[:SENTENCES]


def fraction(use: str, name: str) -> float:
    """A number from 0 to 1 that depends on the name alone."""
    return int.from_bytes(hashlib.sha256(f"{use}:{name}".encode()).digest()[:6], "big") / 2**48


def _stem(name: str) -> str:
    for ending in ("ing", "lib", "io"):
        cut = name.removesuffix(ending)
        if cut != name and len(cut) >= 3:
            return cut[:-1] if cut[-1] == cut[-2] else cut
    return name
