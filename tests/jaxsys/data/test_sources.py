"""Text from the standard library, files, folders and globs."""

import json

import pytest

from jaxsys.data import Document, documents
from parallelism.errors import UserError


def write(root, **files):
    for name, content in files.items():
        path = root / name.replace("__", "/").replace("_", ".")
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(content if isinstance(content, bytes) else content.encode())
    return root


def test_a_file_is_one_document(tmp_path):
    write(tmp_path, a_txt="héllo\n")
    assert list(documents(str(tmp_path / "a.txt"))) == [Document("a.txt", "héllo\n")]


def test_a_folder_gives_its_text_files_in_order_of_names(tmp_path):
    write(tmp_path, z_txt="z", a__b_md="b", a__c_rst="c", m_py="m", i_png=b"\x89PNG\0", _hidden_txt="h")
    assert [d.name for d in documents(str(tmp_path))] == ["a/b.md", "a/c.rst", "m.py", "z.txt"]


def test_a_glob_takes_any_file_and_any_depth(tmp_path):
    write(tmp_path, a__b_dat="b", a__x__c_dat="c", d_txt="d")
    assert [d.name for d in documents(f"{tmp_path}/**/*.dat")] == ["a/b.dat", "a/x/c.dat"]


def test_jsonl_gives_one_document_a_line(tmp_path):
    lines = [{"text": "one\n", "more": 1}, {"text": "twö"}]
    write(tmp_path, a_jsonl="\n\n".join(map(json.dumps, lines)))
    assert list(documents(str(tmp_path))) == [Document("a.jsonl:1", "one\n"), Document("a.jsonl:3", "twö")]


def test_the_standard_library_is_docs_then_code():
    docs, code = list(documents("stdlib-docs")), list(documents("stdlib-code", limit=400))
    assert [d.name for d in documents("stdlib")][: len(docs)] == [d.name for d in docs]
    assert any("is used for conditional execution" in d.text for d in docs)
    names = {d.name for d in code}
    assert {"argparse.py", "asyncio/base_events.py"} <= names
    assert not any(name.startswith(("test/", "site-packages/", "idlelib/", "encodings/")) for name in names)


def test_iteration_repeats_and_limit_takes_the_first():
    source = documents("stdlib-code", limit=3)
    first = list(source)
    assert len(first) == 3
    assert list(source) == first
    assert next(iter(documents("stdlib-code"))) == first[0]


def test_fingerprint_follows_content_names_and_limit(tmp_path):
    write(tmp_path, a_txt="a")
    one = documents(str(tmp_path)).fingerprint
    assert documents(str(tmp_path)).fingerprint == one
    assert documents(str(tmp_path), limit=1).fingerprint != one
    write(tmp_path, a_txt="aa")
    two = documents(str(tmp_path)).fingerprint
    write(tmp_path, b_txt="b")
    assert len({one, two, documents(str(tmp_path)).fingerprint}) == 3


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "no text in it"),
        (b" \n ", "no text in it"),
        (b"abc\0def", "NUL at byte 3"),
        (b"abc\xff\xfe", "not UTF-8 text: invalid start byte at byte 3"),
    ],
)
def test_a_corrupt_or_empty_file_is_named(tmp_path, content, message):
    write(tmp_path, good_txt="good", zbad_txt=content)
    with pytest.raises(UserError, match=rf"zbad\.txt: .*{message}"):
        list(documents(str(tmp_path)))


@pytest.mark.parametrize("line", ["{", "[]", "{}", '{"text": 3}', '{"text": " "}', '{"text": "a\xff"}'])
def test_a_bad_jsonl_line_is_named(tmp_path, line):
    write(tmp_path, a_jsonl=b'{"text": "good"}\n' + line.encode("latin-1"))
    with pytest.raises(UserError, match=r"a\.jsonl:2"):
        list(documents(str(tmp_path)))


def test_an_empty_jsonl_file_is_named(tmp_path):
    write(tmp_path, a_jsonl="\n")
    with pytest.raises(UserError, match=r"a\.jsonl: no text"):
        list(documents(str(tmp_path)))


@pytest.mark.parametrize(
    ("spec", "message"), [("no/such", "no such file"), ("no/such*", "no file matches"), (".", "folder holds no")]
)
def test_a_source_without_files_is_named(tmp_path, monkeypatch, spec, message):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(UserError, match=rf"'{spec.replace('*', '.')}.*{message}"):
        documents(spec)


def test_a_limit_of_nothing_is_an_error():
    with pytest.raises(UserError, match="at least 1"):
        documents("stdlib", limit=0)
