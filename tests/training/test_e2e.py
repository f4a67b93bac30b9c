"""The E2E release becomes prompts and completions in Hu et al.'s form; what is wrong with it is said with its line."""

import json
import zipfile

import pytest

from veralib.errors import DataError
from veralib.training import Settings
from veralib.training.data import load_data
from veralib.training.e2e import FILES, grouped, is_release, prepare, prompt_of, read_e2e

MR = "name[The Vaults], eatType[pub], priceRange[more than £30], customer rating[5 out of 5], near[Café Adriatic]"
OTHER = "name[The Rice, Boat], food[Indian], area[riverside], familyFriendly[no]"
CONTENT = f'mr,ref\n"{MR}",A pub.  It is dear.\n"{OTHER}","Indian food, by the river."\n"{MR}",The Vaults is a pub.\n'


@pytest.fixture
def release(tmp_path):
    folder = tmp_path / "e2e-dataset"
    folder.mkdir()
    for name in FILES.values():
        (folder / name).write_text(CONTENT, encoding="utf-8")
    return folder


def test_a_meaning_representation_in_hu_et_als_form():
    assert prompt_of(MR) == (
        "name : The Vaults | Type : pub | price : more than £30 | customer rating : 5 out of 5 | near : Café Adriatic||"
    )
    assert prompt_of(OTHER) == "name : The Rice, Boat | food : Indian | area : riverside | family friendly : no||"


@pytest.mark.parametrize("mr", ["", "The Vaults", "name[x", "name[x] area[y]", "name[x], ", "name[x]]"])
def test_what_is_no_meaning_representation_is_refused(mr):
    with pytest.raises(DataError, match="is no meaning representation"):
        prompt_of(mr)


def test_an_unknown_attribute_is_refused_with_the_nearest():
    with pytest.raises(DataError, match='Did you mean "eatType"'):
        prompt_of("name[x], eattype[pub]")


def test_the_folder_and_the_zip_read_alike(release, tmp_path):
    with zipfile.ZipFile(tmp_path / "e2e.zip", "w") as archive:
        for name in FILES.values():
            archive.write(release / name, f"e2e-dataset/{name}")
            archive.writestr(f"__MACOSX/e2e-dataset/{name}", b"\x00\xff")
    for split in FILES:
        assert read_e2e(release, split) == read_e2e(tmp_path / "e2e.zip", split)
    assert is_release(release) and is_release(tmp_path / "e2e.zip") and not is_release(tmp_path)


def test_training_has_a_row_for_each_reference_and_test_one_for_each_prompt(release):
    first, second = prompt_of(MR), prompt_of(OTHER)
    assert read_e2e(release, "train") == [
        {"prompt": first, "completion": " A pub. It is dear."},
        {"prompt": second, "completion": " Indian food, by the river."},
        {"prompt": first, "completion": " The Vaults is a pub."},
    ]
    test = read_e2e(release, "test")
    assert test == grouped(read_e2e(release, "train"))
    assert test[0] == {
        "prompt": first,
        "completion": " A pub. It is dear.",
        "references": ["A pub. It is dear.", "The Vaults is a pub."],
    }


def test_prepare_writes_what_a_run_reads(release, tmp_path):
    assert prepare(release, tmp_path / "rows") == {"train": 3, "validation": 3, "test": 2}
    found = load_data(Settings(model="m", data=tmp_path / "rows", task="prompt-completion", test="test"))
    assert (len(found.train), len(found.validation), len(found.test)) == (3, 3, 2)
    assert "Café" in (tmp_path / "rows" / "train.jsonl").read_text(encoding="utf-8")
    assert len(json.loads((tmp_path / "rows" / "test.jsonl").read_text().splitlines()[0])["references"]) == 2


@pytest.mark.parametrize(
    ("content", "said"),
    [
        (None, "has no testset_w_refs.csv"),
        ("", "has no column mr and ref"),
        ("MR\nname[x]\n", "has no column ref"),
        ("mr,ref\n", "holds no rows"),
        ('mr,ref\n"name[x]",y\n"name[x]"\n', "line 3 has 1 fields"),
        ('mr,ref\n"name[x]"," "\n', "line 2 has no reference text"),
        ("mr,ref\nthe pub,y\n", 'line 2: "the pub" is no meaning representation'),
    ],
)
def test_bad_files_are_data_errors_with_the_place(release, content, said):
    file = release / FILES["test"]
    file.unlink() if content is None else file.write_text(content)
    with pytest.raises(DataError, match=said) as e:
        read_e2e(release, "test")
    assert str(release) in str(e.value)


def test_the_test_set_without_references_is_pointed_out(release):
    (release / FILES["test"]).rename(release / "testset.csv")
    with pytest.raises(DataError, match="has no references"):
        read_e2e(release, "test")


def test_what_is_no_release_is_refused(tmp_path):
    (tmp_path / "x.zip").write_bytes(b"no zip")
    for given in (tmp_path / "x.zip", tmp_path / "absent.zip"):
        with pytest.raises(DataError, match=r"can't read .* as the E2E release"):
            read_e2e(given, "train")


def test_the_official_counts(data):
    """Novikova et al. (2017), Table 1, and the release's README: 42,061 references of 4,862; 4,672 of 547; 4,693 of 630."""
    source = data / "e2e" / "e2e-dataset.zip"
    train, validation, test = (read_e2e(source, split) for split in FILES)
    assert (len(train), len(grouped(train))) == (42061, 4862) and (len(validation), len(grouped(validation))) == (4672, 547)
    assert (sum(len(row["references"]) for row in test), len(test)) == (4693, 630)


def test_a_run_trains_on_the_release_as_it_is(release, tmp_path):
    settings = Settings(model="m", data=release, task="prompt-completion", test="test")
    data = load_data(settings)
    assert list(data.train) == read_e2e(release, "train") and list(data.test) == read_e2e(release, "test")
    assert list(data.validation) == read_e2e(release, "validation") and len(data.hashes) == 3
    with pytest.raises(DataError, match='no split "tset"'):
        load_data(settings.replace(test="tset"))


def test_the_release_takes_files_beside_it_and_may_lack_validation(release, tmp_path):
    own = tmp_path / "own.jsonl"
    own.write_text(json.dumps({"prompt": "name : X||", "completion": " X."}) + "\n")
    settings = Settings(model="m", data=release, task="prompt-completion", validation=own)
    assert list(load_data(settings).validation) == [{"prompt": "name : X||", "completion": " X."}]
    (release / FILES["validation"]).unlink()
    assert load_data(settings.replace(validation=None)).validation is None
