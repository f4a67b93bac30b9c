"""Data sets: what is read, and what is said where it can't be."""

import gzip
import hashlib
import itertools
import lzma
import sys

import pytest

from veralib.errors import DataError, MissingPackage
from veralib.training.data import load_data, ordered
from veralib.training.rows import read_rows
from veralib.training.settings import Settings

from .tiny import write_jsonl


def settings(**fields):
    return Settings(**{"model": "m", "data": "unused", **fields})


def write(path, text, encoding="utf-8"):
    path.write_bytes(text.encode(encoding))
    return path


def test_csv_has_quotes_and_line_ends_inside_them(tmp_path):
    file = write(tmp_path / "a.csv", 'text,label\r\n"one, two",x\r\n"three\nlines",y\r\n')
    assert read_rows(file) == [{"text": "one, two", "label": "x"}, {"text": "three\nlines", "label": "y"}]


def test_tsv_has_no_quotes_as_in_glue(tmp_path):
    file = write(tmp_path / "a.tsv", 'label\ttext\n1\t" he said\n0\tend "\n')
    assert read_rows(file) == [{"label": "1", "text": '" he said'}, {"label": "0", "text": 'end "'}]


def test_a_byte_order_mark_is_no_part_of_the_first_name(tmp_path):
    assert list(read_rows(write(tmp_path / "a.tsv", "Quality\tx\n1\t2\n", "utf-8-sig"))[0]) == ["Quality", "x"]


def test_a_line_separator_of_unicode_ends_no_line(tmp_path):
    file = write(tmp_path / "a.tsv", "text\tlabel\none\u2028two\x85three\rfour\t1\r\n")
    assert read_rows(file) == [{"text": "one\u2028two\x85three\rfour", "label": "1"}]


def test_columns_name_a_file_without_header(tmp_path):
    file = write(tmp_path / "a.tsv", "x\t1\ny\t0\n")
    assert read_rows(file, ("text", "label")) == [{"text": "x", "label": "1"}, {"text": "y", "label": "0"}]


def test_json_lines_json_and_compressed_files(tmp_path):
    write(tmp_path / "a.json", '[{"text": "x"}]')
    (tmp_path / "b.jsonl.gz").write_bytes(gzip.compress(b'{"text": "x"}\n\n{"text": "y"}\n'))
    (tmp_path / "c.txt.xz").write_bytes(lzma.compress(b"whole\ndocument"))
    assert read_rows(tmp_path / "a.json") == [{"text": "x"}]
    assert read_rows(tmp_path / "b.jsonl.gz") == [{"text": "x"}, {"text": "y"}]
    assert read_rows(tmp_path / "c.txt.xz") == [{"text": "whole\ndocument"}]


@pytest.mark.parametrize(
    ("name", "content", "said"),
    [
        ("a.csv", b"", "is empty"),
        ("a.csv", b"text,label\n", "no rows after the header"),
        ("a.tsv", b"a\tb\n1\t2\n1\t2\t3\n", "line 3 has 3 fields, expected 2: a, b"),
        ("a.csv", b"a,b\n1\n", "line 2 has 1 fields"),
        ("a.jsonl", b'{"a": 1}\n{"a": \n', "line 2 is no JSON"),
        ("a.jsonl", b"[1]\n", "line 1 is a list, expected an object"),
        ("a.json", b'{"a": 1}', "expected a list of objects"),
        ("a.txt", b"  \n", "is empty"),
        ("a.csv", b"a,b\n\xff\xfe,1\n", "isn't UTF-8"),
        ("a.csv.gz", b"not gzip", "can't read"),
        ("a.csv.xz", b"not xz", "compression is damaged"),
        ("a.parquet", b"PAR1", "no known kind"),
    ],
)
def test_an_unreadable_file_says_what_and_where(tmp_path, name, content, said):
    (tmp_path / name).write_bytes(content)
    with pytest.raises(DataError) as e:
        read_rows(tmp_path / name)
    assert said in str(e.value) and name in str(e.value)


def test_labels_are_ordered_and_numbers_count_as_numbers(tmp_path):
    file = write_jsonl(tmp_path / "a.jsonl", [{"text": "x", "label": n} for n in (10, 9, 2, 10)])
    assert load_data(settings(data=file)).labels == ("2", "9", "10")
    file = write_jsonl(tmp_path / "b.jsonl", [{"text": "x", "label": n} for n in ("no", "yes", "no")])
    assert load_data(settings(data=file)).labels == ("no", "yes")


def test_a_missing_column_lists_those_there(tmp_path):
    file = write(tmp_path / "a.csv", "sentence,label\nx,1\ny,0\n")
    with pytest.raises(DataError) as e:
        load_data(settings(data=file, text="sentense"))
    assert 'no column "sentense". Did you mean "sentence"? Columns there: sentence, label' in str(e.value)
    with pytest.raises(DataError, match='no column "score"'):
        load_data(settings(data=file, text="sentence", label="score"))


def test_unseen_labels_in_validation_are_named(tmp_path):
    train = write(tmp_path / "a.csv", "text,label\nx,1\ny,0\n")
    other = write(tmp_path / "b.csv", "text,label\nx,1\ny,2\n")
    for role in ("validation", "test"):
        with pytest.raises(DataError) as e:
            load_data(settings(data=train, **{role: str(other)}))
        assert f'the {role} data has labels that training has never seen: "2". Known: "0", "1"' in str(e.value)


@pytest.mark.parametrize(
    ("rows", "fields", "said"),
    [
        ([{"text": "a", "label": 1}, {"text": "b", "label": 1}], {}, 'one label alone, "1"'),
        ([{"text": "a", "label": 1}, {"text": "b", "label": None}], {}, 'row 2 of the train data has nothing in column "label"'),
        ([{"text": "a", "label": "high"}], {"task": "regression"}, "row 1 of the train data has label 'high'"),
        ([{"text": str(i), "label": i} for i in range(1200)], {}, "hardly labels"),
        ([{"text": "a", "label": 1}, {"text": "b", "label": 0}], {"validation": 0.1}, "leaves 0 to validate"),
    ],
)
def test_unusable_rows_are_named(tmp_path, rows, fields, said):
    with pytest.raises(DataError) as e:
        load_data(settings(data=write_jsonl(tmp_path / "a.jsonl", rows), **fields))
    assert said in str(e.value)


def test_a_folder_gives_train_and_its_validation_split(tmp_path):
    write(tmp_path / "train.tsv", "text\tlabel\nx\t1\ny\t0\n")
    write(tmp_path / "dev.tsv", "text\tlabel\nz\t1\n")
    write(tmp_path / "test.tsv", "text\tlabel\nw\t0\n")
    data = load_data(settings(data=tmp_path, test="test"))
    assert [len(data.train), len(data.validation), len(data.test)] == [2, 1, 1]
    assert data.hashes["train/train.tsv"] == hashlib.sha256((tmp_path / "train.tsv").read_bytes()).hexdigest()
    assert set(data.hashes) == {"train/train.tsv", "validation/dev.tsv", "test/test.tsv"}


@pytest.mark.parametrize("test", ["dev", "validation"])
def test_what_the_test_takes_is_no_validation(tmp_path, test):
    for name in ("train", test):
        write(tmp_path / f"{name}.tsv", "text\tlabel\nx\t1\ny\t0\n")
    data = load_data(settings(data=tmp_path, test=test))
    assert data.validation is None and len(data.test) == 2
    assert len(load_data(settings(data=tmp_path)).validation) == 2


def test_a_file_that_is_the_test_is_no_validation_whatever_it_is_called_by(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for name in ("train", "dev"):
        write_jsonl(tmp_path / f"{name}.jsonl", [{"text": f"{name} {i}", "label": str(i % 2)} for i in range(4)])
    for test in (tmp_path / "dev.jsonl", "dev.jsonl", "./dev.jsonl"):
        found = load_data(Settings(model="m", data=str(tmp_path), test=str(test)))
        assert found.validation is None and len(found.test) == 4


def test_labels_have_one_order_whatever_a_sets_is():
    for labels in itertools.permutations(("01", "1", "2")):
        assert ordered(dict.fromkeys(labels)) == ("01", "1", "2")


def test_a_folder_without_the_split_lists_its_files(tmp_path):
    write(tmp_path / "training.csv", "a,b\n1,2\n")
    with pytest.raises(DataError, match=r"no file train.csv.*There: training.csv"):
        load_data(settings(data=tmp_path))
    with pytest.raises(DataError, match="no such split"):
        load_data(settings(data=tmp_path, split="training", validation="held", text="a", label="b"))


def test_a_missing_file_is_no_hub_id():
    for name in ("absent.csv", "./absent", "/absent/folder", "a/b/c"):
        with pytest.raises(DataError, match="there is no data file"):
            load_data(settings(data=name))


def test_a_validation_share_is_fixed_by_its_seed_and_disjoint(tmp_path):
    rows = [{"text": str(i), "label": i % 2} for i in range(50)]
    file = write_jsonl(tmp_path / "a.jsonl", rows)
    one, again, other = (load_data(settings(data=file, validation="0.2", split_seed=s)) for s in (0, 0, 1))
    assert one.validation == again.validation != other.validation
    assert len(one.validation) == 10
    assert sorted([r["text"] for r in one.train] + [r["text"] for r in one.validation]) == sorted(r["text"] for r in rows)


def test_several_files_are_one_data_set(tmp_path):
    one = write(tmp_path / "a.csv", "text,label\nx,1\n")
    two = write_jsonl(tmp_path / "b.jsonl", [{"text": "y", "label": 0}])
    assert [r["text"] for r in load_data(settings(data=[one, two])).train] == ["x", "y"]


def test_a_hub_data_set_has_class_names_and_its_validation_split(monkeypatch):
    datasets = pytest.importorskip("datasets")
    features = datasets.Features({"text": datasets.Value("string"), "label": datasets.ClassLabel(names=["neg", "pos"])})

    def part(*pairs):
        return datasets.Dataset.from_list([{"text": t, "label": v} for t, v in pairs], features=features)

    whole = datasets.DatasetDict(train=part(("a", 1), ("b", 0)), validation=part(("c", 1)), test=part(("d", -1)))
    asked = []
    monkeypatch.setattr(datasets, "load_dataset", lambda *a: asked.append(a) or whole)
    data = load_data(settings(data="user/set", data_config="sub"))
    assert asked == [("user/set", "sub")]
    assert data.labels == ("neg", "pos") and data.train[0] == {"text": "a", "label": "pos"}
    assert data.validation == [{"text": "c", "label": "pos"}] and set(data.hashes) == {"train/train", "validation/validation"}
    assert load_data(settings(data="user/set", test="validation")).validation is None
    with pytest.raises(DataError, match='no split "trian"'):
        load_data(settings(data="user/set", split="trian"))
    with pytest.raises(DataError, match="row 1 of the test data has nothing"):  # -1: GLUE's hidden test labels
        load_data(settings(data="user/set", test="test"))


def test_files_need_no_datasets_package_and_hub_ids_say_they_do(monkeypatch, tmp_path):
    monkeypatch.setitem(sys.modules, "datasets", None)
    assert len(load_data(settings(data=write(tmp_path / "a.csv", "text,label\nx,1\ny,0\n"))).train) == 2
    with pytest.raises(MissingPackage, match=r"pip install 'veralib\[data\]'"):
        load_data(settings(data="user/set"))


GLUE = {
    "CoLA": ({"columns": "source,label,mark,sentence", "text": "sentence"}, 8551, 1043, ("0", "1")),
    "MRPC": ({"text": "#1 String,#2 String", "label": "Quality"}, 3668, 408, ("0", "1")),
    "STS-B": ({"text": "sentence1,sentence2", "label": "score", "task": "regression"}, 5749, 1500, ()),
    "SST-2": ({"text": "sentence"}, 67349, 872, ("0", "1")),
}


@pytest.mark.parametrize("task", GLUE)
def test_glues_original_files_have_the_official_counts(data, task):
    fields, train, validation, labels = GLUE[task]
    found = load_data(settings(data=data / "glue" / task, **fields))
    assert (len(found.train), len(found.validation), found.labels) == (train, validation, labels)


@pytest.mark.parametrize(("task", "labels", "stand_in"), [("regression", ("0.5", "4.0"), -1.0), ("classification", "xy", "x")])
def test_a_test_set_without_labels_is_refused(tmp_path, task, labels, stand_in):
    """As GLUE's public test sets are: STS-B's labels are all -1."""
    rows = write_jsonl(tmp_path / "train.jsonl", [{"text": f"a {i}", "label": labels[i % 2]} for i in range(8)])
    blank = write_jsonl(tmp_path / "test.jsonl", [{"text": f"b {i}", "label": stand_in} for i in range(4)])
    with pytest.raises(DataError, match=r'"label" of the test data holds .* in all 4 rows: they look unlabelled'):
        load_data(settings(data=rows, test=blank, task=task))
    load_data(settings(data=rows, test=rows, task=task))
