"""The fleet's data: documentation strings of 64 packages, each an owner with a style of its own.

The standard library, torch and transformers are there wherever the demo runs. The rule was fixed before anything was trained
(docs/demo.md says it in words); nothing in it is random, so the same versions give the same rows, and Texts.hash names them.
"""

import ast
import hashlib
import importlib.util
import sysconfig
from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from ..errors import DataError
from .data import EXCLUDED, documented, fraction, letters

OWNERS = 64
STRINGS = (12, 80)
"""Documentation strings of an owner, at least and at most."""
LETTERS = 60
"""Shorter strings are left out."""
HELD_OUT = 0.25
LIBRARIES = ("torch", "transformers")
"""Their direct submodules are owners; of the standard library, the top-level modules."""
SKIPPED = EXCLUDED | {"transformers.models"}  # hundreds of models, much copied from one to the next, and half a minute to read
TEST_FOLDERS = {"test", "tests", "testing"}


@dataclass(frozen=True)
class Texts:
    """Rows by owner, sorted by name: those to train on and those that only measure."""

    train: Mapping[str, Sequence[str]]
    held_out: Mapping[str, Sequence[str]]

    @property
    def hash(self) -> str:
        """SHA-256 of all of it; 64 hexadecimal digits."""
        lines = (
            f"{part}\t{name}\t{t}\n" for part in ("train", "held_out") for name, ts in getattr(self, part).items() for t in ts
        )
        return hashlib.sha256("".join(lines).encode("utf-8", "surrogatepass")).hexdigest()


def load_texts(sources: Mapping[str, Path] | None = None, owners: int = OWNERS, skip: int = 0) -> Texts:
    """The fleet's rows. sources: {"" or a library's name: its folder}, else those of this Python. Imports nothing.

    skip: leaves out so many owners that would come first; rates and epochs are chosen on those that the demo doesn't use.
    DataError where fewer owners have enough documentation.
    """
    found = _unshared(_strings(sources or _sources()))
    enough = {name: strings for name, strings in found.items() if len(strings) >= STRINGS[0]}
    if len(enough) < skip + owners:
        raise DataError(
            f"{len(enough)} packages have {STRINGS[0]} documentation strings or more, expected {skip + owners}: this Python "
            "comes without its libraries' source files. Run the demo with a Python from python.org, conda or your system."
        )
    chosen = sorted(sorted(enough, key=lambda name: fraction("owner", name))[skip : skip + owners])
    train, held_out = {}, {}
    for name in chosen:
        objects = sorted(enough[name], key=lambda o: (fraction("string", o), o))[: STRINGS[1]]
        held = round(HELD_OUT * len(objects))
        held_out[name] = [enough[name][o] for o in objects[:held]]
        train[name] = [enough[name][o] for o in objects[held:]]
    return Texts(train, held_out)


def _sources() -> dict[str, Path]:
    out = {"": Path(sysconfig.get_path("stdlib"))}
    for library in LIBRARIES:
        spec = importlib.util.find_spec(library)
        if spec is not None and spec.origin is not None:
            out[library] = Path(spec.origin).parent
    return out


def _strings(sources: Mapping[str, Path]) -> Iterator[tuple[str, str, str]]:
    """(owner, object, documentation string) of every public module."""
    for library, folder in sources.items():
        for entry in sorted(folder.iterdir()):
            module = entry.name.removesuffix(".py")
            owner = f"{library}.{module}" if library else module
            if not module.isidentifier() or module.startswith("_") or owner in SKIPPED or module in TEST_FOLDERS:
                continue
            for path in sorted(entry.rglob("*.py")) if entry.is_dir() else [entry] * entry.name.endswith(".py"):
                parts = path.relative_to(folder).with_suffix("").parts
                if TEST_FOLDERS & {*parts} or any(p.startswith("_") and p != "__init__" for p in parts):
                    continue
                try:
                    tree = ast.parse(path.read_bytes())
                except (SyntaxError, ValueError, OSError):
                    continue
                for name, text in documented(tree, ".".join((library, *parts) if library else parts).removesuffix(".__init__")):
                    yield owner, name, text


def _unshared(strings: Iterator[tuple[str, str, str]]) -> Mapping[str, dict[str, str]]:
    """{owner: {object: string}}, each string once; one that two owners share (letters compared) is left out of both."""
    first: dict[str, tuple[str, str, str]] = {}
    shared = set()
    for owner, name, text in strings:
        key = letters(text)
        if len(key) < LETTERS:
            continue
        if first.setdefault(key, (owner, name, text))[0] != owner:
            shared.add(key)
    found: dict[str, dict[str, str]] = defaultdict(dict)
    for key, (owner, name, text) in first.items():
        if key not in shared:
            found[owner].setdefault(name, text)
    return found
