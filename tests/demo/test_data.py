"""The demo's data rule: nothing gives the label away, objects stay together, the same Python gives the same data."""

import os
import subprocess
import sys

import pytest

from veralib.demo.data import MASK, SENTENCES, SPLITS, WORDS, load_data, masker, sentences_of
from veralib.errors import DataError


@pytest.fixture(scope="module")
def data():
    return load_data()


def test_no_sentence_holds_a_labels_name_in_any_case(data):
    for sentence in data.sentences:
        for label in data.labels:
            assert label not in sentence.text.lower(), sentence


@pytest.mark.parametrize(
    ("text", "masked"),
    [
        ("The logger calls Logging.handlers.", f"The {MASK} calls {MASK}.handlers."),
        ("It parses URLs.", f"It parses {MASK}."),
        ("An IP address, an e-mail, an XMLReader.", f"An {MASK}, an {MASK}, an {MASK}."),
        ("AsyncioRunner and sub-processes", f"{MASK} and sub-processes"),
        ("http", MASK),
        ("Nothing to hide here.", "Nothing to hide here."),
    ],
)
def test_words_derived_from_a_name_are_masked(text, masked):
    names = ("logging", "urllib", "ipaddress", "email", "xml", "asyncio", "http")
    assert masker(names)(text) == masked


def test_all_sentences_of_one_object_are_in_one_split(data):
    splits = {}
    for sentence in data.sentences:
        splits.setdefault(sentence.object, set()).add(sentence.split)
    assert max(len(s) for s in splits.values()) == 1
    assert len(splits) > 500


def test_no_text_is_in_two_splits(data):
    texts = {split: {s.text for s in data.split(split)} for split in SPLITS}
    assert len(texts["train"] & texts["test"]) + len(texts["train"] & texts["validation"]) == 0


def test_every_split_has_every_label_and_no_label_dominates(data):
    for split in SPLITS:
        assert {s.package for s in data.split(split)} == set(data.labels)
    counts = [sum(s.package == label for s in data.sentences) for label in data.labels]
    assert max(counts) <= SENTENCES
    assert sum(data.rows.values()) == len(data.sentences) == sum(counts)


def test_another_process_gets_the_same_hash(data):
    # Another hash seed changes the order of sets and dicts' insertions from them.
    code = "from veralib.demo.data import load_data; print(load_data().hash)"
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, env={**os.environ, "PYTHONHASHSEED": "7"}, check=True
    )
    assert done.stdout.strip() == data.hash


def test_examples_code_and_short_lines_are_no_sentences():
    doc = """Return the answer to the question that was asked.  Short one.

    >>> print("an example of how this is used in practice")
    an example of how this is used in practice

    x = {1: 'a', 2: 'b'}; y = [i**2 for i in range(10)]; z = (1, 2, 3)
    """
    assert sentences_of(doc) == ["Return the answer to the question that was asked."]
    assert sentences_of("word " * WORDS[1]) and not sentences_of("word " * (WORDS[1] + 1))


def write_library(folder, packages):
    for name, docs in packages.items():
        functions = "\n".join(f'def f{i}():\n    """{doc}"""\n' for i, doc in enumerate(docs))
        (folder / f"{name}.py").write_text(functions)


def lines(word, count=25):
    return [f"This sentence number {'i' * i} talks about the {word} alone." for i in range(1, count + 1)]


def test_a_sentence_that_two_packages_share_is_left_out_of_both(tmp_path):
    shared = "This sentence stands in two packages at once."
    write_library(tmp_path, {"apple": [*lines("fruit"), shared], "stone": [*lines("rock"), shared.upper()]})
    texts = [s.text for s in load_data(tmp_path, packages=2).sentences]
    assert len(texts) == 50
    assert not [t for t in texts if "two packages" in t.lower()]


def test_the_packages_with_most_sentences_are_taken(tmp_path):
    write_library(
        tmp_path, {"small": lines("a", 22), "large": lines("b", 30), "middle": lines("c", 25), "_private": lines("d", 40)}
    )
    assert load_data(tmp_path, packages=2).labels == ("large", "middle")


def test_a_library_without_sources_is_an_error_that_names_the_folder(tmp_path):
    with pytest.raises(DataError, match="documents 0 packages, expected 12") as e:
        load_data(tmp_path)
    assert str(tmp_path) in str(e.value)


def test_a_file_that_does_not_parse_is_left_out(tmp_path):
    write_library(tmp_path, {"apple": lines("fruit"), "stone": lines("rock")})
    (tmp_path / "broken.py").write_text("def f(:\n")
    assert load_data(tmp_path, packages=2).labels == ("apple", "stone")


def test_written_files_hold_the_splits(data, tmp_path):
    import csv

    paths = data.write(tmp_path)
    for split in SPLITS:
        with paths[split].open(newline="", encoding="utf-8") as file:
            rows = list(csv.DictReader(file))
        assert [(r["text"], r["label"]) for r in rows] == [(s.text, s.package) for s in data.split(split)]
