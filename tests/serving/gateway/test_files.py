"""/v1/files: what is a training file is kept byte for byte, what isn't is answered with its lines; nobody sees another's."""

import json
from concurrent.futures import ThreadPoolExecutor

import pytest
from openai import BadRequestError, NotFoundError

from tests.serving.gateway.workplace import TENANTS, Workplace, chats
from veralib.serving.gateway.errors import ApiError

GOOD = b'{"messages": [{"role": "user", "content": "hi"}, {"role": "assistant", "content": "yes"}]}'


@pytest.fixture
def place(tmp_path) -> Workplace:
    return Workplace(tmp_path, max_line=2000, max_rows=50, max_files=6)


def test_the_openai_client_keeps_lists_reads_and_deletes_files(place):
    client = place.openai()
    content = b"\xef\xbb\xbf" + GOOD + b"\r\n\r\n" + GOOD.replace(b"yes", "größer 🦆".encode()) + b"\r\n"
    made = client.files.create(file=("über.jsonl", content), purpose="fine-tune")
    assert (made.object, made.bytes, made.filename, made.purpose) == ("file", len(content), "über.jsonl", "fine-tune")
    assert client.files.retrieve(made.id) == made
    assert client.files.content(made.id).read() == content  # as it came
    others = [place.upload(chats(2, seed)) for seed in range(4)]
    assert [f.id for f in client.files.list(limit=2)] == [*others[::-1], made.id]  # three pages, the newest first
    assert [f.id for f in client.files.list(limit=2, order="asc")] == [made.id, *others]
    assert list(client.files.list(purpose="assistants")) == []
    for file in client.files.list(limit=1):  # what is behind a deleted one is found all the same
        assert client.files.delete(file.id).deleted
    assert list(client.files.list()) == [] and not list(place.folder.glob("state/files/*/*"))
    with pytest.raises(NotFoundError):
        client.files.retrieve(made.id)


def test_rows_are_what_was_sent(place):
    file = place.upload(b"\xef\xbb\xbf" + GOOD + b"\r\n \n" + GOOD.replace(b'"content": "yes"', b'"content": "no", "weight": 1'))
    upload = place.learning.uploads.of_job(file, "acme:")
    assert upload.rows == 2
    assert [row[1] for row in place.learning.uploads.rows(upload)] == [
        {"role": "assistant", "content": "yes"},
        {"role": "assistant", "content": "no"},
    ]


BAD = {
    b"": "the file is empty",
    b"\xef\xbb\xbf\r\n": "the file is empty",
    b"\x00\x01\xff\xfe" * 9: "line 1 isn't UTF-8",
    GOOD + b"\nnonsense": "line 2 is no JSON: Expecting value at character 0",
    b"[" * 1900: "line 1 is no JSON",
    b'{"messages": ' + b"1" * 1900 + b"}": "line 1",
    b"[1, 2]": 'line 1 expected {"messages"',
    b'{"prompt": "a", "completion": "b"}': "found the fields completion, prompt",
    b'{"messages": []}': '"messages" is empty',
    b'{"messages": [{"role": "user", "content": "hi"}]}': "no message is the assistant's",
    b'{"messages": [{"role": "assistant", "content": "  "}]}': "nothing to learn",
    b'{"messages": ["hi"]}': "message 1 is a str",
    b'{"messages": [{"role": "robot", "content": "hi"}]}': "the role 'robot', expected one of system",
    b'{"messages": [{"role": "assistant", "content": null}]}': "a NoneType as content",
    b'{"messages": [{"role": "assistant", "content": "\\ud800"}]}': "half of a surrogate pair",
    GOOD[:-1] + b', "tools": []}': 'has "tools"',
    GOOD.replace(b'"yes"', b'"yes", "weight": 0'): "a weight other than 1",
    GOOD.replace(b'"yes"', b'"yes", "tool_calls": []'): 'has "tool_calls"',
    GOOD + b" " * 2000: "line 1 is longer than 2,000 bytes",
    b"\n".join([GOOD] * 51): "more than 50 rows",
    b"\n".join([GOOD, b"x", GOOD, *[b"y"] * 9]): "line 2 is no JSON: Expecting value at character 0; line 4 is no JSON",
}


@pytest.mark.parametrize("content", BAD, ids=range(len(BAD)))
def test_what_is_no_training_file_is_answered_with_the_line(place, content):
    with pytest.raises(BadRequestError) as e:
        place.upload(content)
    error = e.value.response.json()["error"]
    assert BAD[content] in error["message"] and error["code"] == "invalid_training_file" and error["param"] == "file"
    assert error["type"] == "invalid_request_error" and len(error["message"]) < 600
    assert not [p for p in place.folder.glob("state/*/**/*") if p.is_file()]  # nothing of it was kept


def test_the_number_of_further_faults_is_said(place):
    with pytest.raises(BadRequestError, match=r"line 6 is no JSON.*and 4 more lines"):
        place.upload(b"\n".join([GOOD, *[b"y"] * 9]))


def test_bad_requests(place):
    http = place.http()
    file = {"file": ("a.jsonl", GOOD)}
    answers = [
        http.post("/v1/files", files=file, data={"purpose": "vision"}),
        http.post("/v1/files", files=file),
        http.post("/v1/files", data={"purpose": "fine-tune", "file": "no file"}),
        http.post("/v1/files", content=b"--x\r\ngarbage", headers={"Content-Type": "multipart/form-data; boundary=x"}),
        http.get("/v1/files?limit=0"),
        http.get("/v1/files?limit=x"),
        http.get("/v1/files?order=up"),
    ]
    assert [a.status_code for a in answers] == [400] * 7
    assert all(a.json()["error"]["message"] for a in answers)
    for _ in range(6):
        place.upload(GOOD)
    answer = http.post("/v1/files", files=file, data={"purpose": "fine-tune"})
    assert answer.status_code == 429 and answer.json()["error"]["code"] == "too_many_files"


def test_the_bytes_of_a_tenants_files_are_bounded(tmp_path):
    place = Workplace(tmp_path, max_file_bytes=2 * len(GOOD) + 10)
    first, _ = place.upload(GOOD), place.upload(GOOD)
    answer = place.http().post("/v1/files", files={"file": ("a.jsonl", GOOD)}, data={"purpose": "fine-tune"})
    assert answer.status_code == 429 and answer.json()["error"]["code"] == "too_many_bytes"
    assert f"have {2 * len(GOOD)} bytes and this one {len(GOOD)}, expected at most {2 * len(GOOD) + 10}" in answer.text
    assert len(list(tmp_path.glob("state/files/*/*"))) == 4  # nothing of the refused one
    place.upload(GOOD, "evil")
    place.openai().files.delete(first)
    place.upload(GOOD)


@pytest.mark.parametrize("limit", [{"max_files": 3}, {"max_file_bytes": 3 * len(GOOD)}])
def test_files_that_come_at_once_are_all_counted(tmp_path, limit):
    http = Workplace(tmp_path, **limit).http()
    ask = lambda _: http.post("/v1/files", files={"file": ("a.jsonl", GOOD)}, data={"purpose": "fine-tune"}).status_code  # noqa: E731
    with ThreadPoolExecutor(12) as threads:
        assert sorted(threads.map(ask, range(12))) == [200] * 3 + [429] * 9
    assert len(list(tmp_path.glob("state/files/*/*"))) == 6


def test_another_tenants_file_is_answered_like_one_that_never_was(place):
    file = place.upload(GOOD, "acme")
    never = file[:-4] + ("aaaa" if not file.endswith("aaaa") else "bbbb")
    assert place.openai("acme2").files.retrieve(file).id == file  # another key of the same tenant
    assert place.openai("admin").files.retrieve(file).id == file and len(list(place.openai("admin").files.list())) == 1
    evil = place.http("evil")
    for path in ("", "/content"):
        answers = [evil.get(f"/v1/files/{i}{path}") for i in (file, never)]
        assert [a.status_code for a in answers] == [404, 404]
        assert answers[0].text.replace(file, "X") == answers[1].text.replace(never, "X")
    assert evil.delete(f"/v1/files/{file}").status_code == 404 and evil.get("/v1/files").json()["data"] == []
    assert evil.get(f"/v1/files?after={file}").json()["data"] == []
    for name in ("..%2f..%2fkeys%2fa", "file-%00", "file-" + "a" * 9000, "%ff", "file-" + "A" * 40):
        assert evil.get(f"/v1/files/{name}").status_code == 404, name
    assert place.openai().files.retrieve(file).id == file


def test_a_file_is_sent_piece_by_piece(place):
    """What is read of a big one before the client takes it is bounded, and a deletion meanwhile cuts nothing off."""
    content = b"\n".join([GOOD] * 50)
    file = place.upload(content)
    answer = place.http().get(f"/v1/files/{file}/content")
    assert answer.content == content and answer.headers["content-length"] == str(len(content))
    uploads = place.learning.uploads
    upload = uploads.get(TENANTS["acme"], file)
    pieces = uploads.content(upload)
    uploads.delete(upload)
    assert not isinstance(pieces, bytes) and b"".join(pieces) == content
    with pytest.raises(ApiError, match="There is no file"):
        uploads.content(upload)


def test_two_gateways_on_one_folder_agree(place, tmp_path):
    other = Workplace(tmp_path)
    file = place.upload(GOOD)
    assert other.openai().files.retrieve(file).id == file
    other.openai().files.delete(file)
    assert list(place.openai().files.list()) == []


def test_bytes_without_a_record_are_swept_when_they_are_old(place):
    import os

    file = place.upload(GOOD)
    folder = next(place.folder.glob("state/files/*"))
    for name, age in (("file-old.jsonl", 7200), ("file-new.jsonl", 0)):
        (folder / name).write_bytes(b"x")
        os.utime(folder / name, (folder.stat().st_mtime - age,) * 2)
    place.learning.uploads.sweep()
    assert {p.name for p in folder.iterdir()} == {f"{file}.json", f"{file}.jsonl", "file-new.jsonl"}
    assert json.loads((folder / f"{file}.json").read_text())["tenant"] == "acme:"
