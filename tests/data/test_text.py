"""Documents of text files, by line."""

import json

import pytest

from jaxmm.data.sources import make_source
from jaxmm.data.text import TextFiles
from jaxmm.errors import InputError
from jaxmm.sequence import Text


def texts(source):
    return [source[i].segments[0].text for i in range(len(source))]


def test_a_line_of_plain_text_is_a_document(tmp_path):
    (tmp_path / "a.txt").write_bytes("one\r\n\n  two three \n \t\nvier f\u00fcnf\u2028sechs".encode())
    source = make_source("text", {"path": str(tmp_path / "a.txt")})
    assert texts(source) == ["one", "  two three ", "vier f\u00fcnf\u2028sechs"] and source.kind == "text"
    document = source[-1]
    assert document.segments == (Text("vier f\u00fcnf\u2028sechs", "text"),)
    assert document.example == 2 and document.name == f"{tmp_path / 'a.txt'}:5"
    with pytest.raises(IndexError):
        source[3]


def test_a_folder_is_its_files_in_order(tmp_path):
    (tmp_path / "below").mkdir()
    (tmp_path / "b.txt").write_text("b1\nb2\n")
    (tmp_path / "empty.txt").write_text("\n")
    (tmp_path / "notes.md").write_text("not this\n")
    lines = [{"text": "c1\nsecond line", "id": 3}, {"text": " c2"}]
    (tmp_path / "below" / "c.jsonl").write_text("\n".join(map(json.dumps, lines)) + "\n\n")
    assert texts(TextFiles(tmp_path)) == ["b1", "b2", "c1\nsecond line", " c2"]


@pytest.mark.parametrize(
    "line, problem",
    [
        (b"{broken", "c.jsonl:2: not JSON"),
        (b'{"txt": "x"}', 'c.jsonl:2: a line is {"text": "..."}'),
        (b'{"text": " "}', "that is not empty"),
        (b'["x"]', "a line is"),
        (b'{"text": "\xff"}', "c.jsonl:2: byte 11 of the line is not UTF-8"),
    ],
)
def test_a_broken_line_is_that_record_alone(tmp_path, line, problem):
    (tmp_path / "c.jsonl").write_bytes(b'{"text": "good"}\n' + line + b'\n{"text": "too"}\n')
    source = TextFiles(tmp_path / "c.jsonl")
    with pytest.raises(InputError, match=problem):
        source[1]
    assert [source[i].segments[0].text for i in (0, 2)] == ["good", "too"]


def test_there_must_be_text(tmp_path):
    with pytest.raises(InputError, match="there is no text .*nothing.txt"):
        TextFiles(tmp_path / "nothing.txt")
    with pytest.raises(InputError, match="holds no .txt and no .jsonl file"):
        TextFiles(tmp_path)
    (tmp_path / "a.txt").write_text(" \n")
    with pytest.raises(InputError, match="a.txt is empty"):
        TextFiles(tmp_path / "a.txt")
    with pytest.raises(InputError, match="path of the text: a file or a folder, not ''"):
        TextFiles("")
