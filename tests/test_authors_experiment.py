"""The authors' data: who is in by the rule, how many passages, and that none that measures stands among those that train."""

from experiments import authors


def book(author: str, count: int, first: int = 0) -> str:
    paragraphs = [f"{author} writes paragraph {first + i}. " + "word " * 60 for i in range(count)]
    return "\n\n".join(["# Title: T", f"## Author: {author}", *paragraphs, "too short"])


def test_the_rule_for_authors_and_passages():
    names = [f"Author {c}" for c in "ABCDEFGHIJKL"]
    books = [book(name, 200) for name in names] + [
        book("Scanty", 60),
        book("Various", 200),
        "# Title: no author\n\n" + "w " * 300,
    ]
    train, held_out = authors.passages([*books, book("Author A", 100, first=200)])
    assert set(train) == set(names) == set(held_out)
    assert {len(t) for t in train.values()} == set(authors.SIZES) and {len(h) for h in held_out.values()} == {authors.HELD_OUT}
    for name in names:
        number = lambda text: int(text.split("paragraph ")[1].split(".")[0])  # noqa: E731
        total = 300 if name == "Author A" else 200
        assert not set(train[name]) & set(held_out[name]) and all(text.startswith(name) for text in train[name] + held_out[name])
        assert max(map(number, train[name])) < 4 * total // 5 <= min(map(number, held_out[name]))
    assert authors.passages(books) == authors.passages(books)
    assert authors.fingerprint(train) != authors.fingerprint(held_out)
