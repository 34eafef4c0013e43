"""Text without images, from files."""

import array
import json
import os
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from jaxmm.errors import InputError
from jaxmm.sequence.document import Document, Text

SUFFIXES = (".txt", ".jsonl")


class _Lines(NamedTuple):
    """Where the lines of a file are that are not blank: bytes from its beginning, sizes, numbers from 1."""

    starts: np.ndarray
    sizes: np.ndarray
    numbers: np.ndarray


class TextFiles:
    """Files of text, a document per line: plain text, or {"text": ...} in files that end in .jsonl.

    Blank lines are left out. Files are gone through once, for the places of their lines, and stay on disk; a line is
    read when it is asked for. A document may be of any length: the packer cuts it to rows and loses nothing.

    Args:
      path: a file, or a folder with all .txt and .jsonl files below it.

    Raises:
      InputError: if there is no file or no line; for a line that is broken, when it is read, by file and line.
    """

    kind = "text"

    def __init__(self, path: str | os.PathLike):
        if not isinstance(path, (str, os.PathLike)) or not os.fspath(path):
            raise InputError(f"path of the text: a file or a folder, not {path!r}")
        self.path = Path(path)
        self.files = _files(self.path)
        self._lines = [_find_lines(file) for file in self.files]
        self._ends = np.cumsum([len(lines.starts) for lines in self._lines])
        if not self._ends[-1]:
            raise InputError(f"text {self.path} is empty")
        self._open = [file.open("rb") for file in self.files]

    def __len__(self) -> int:
        return int(self._ends[-1])

    def __getitem__(self, i: int) -> Document:
        i = range(len(self))[i]
        which = int(np.searchsorted(self._ends, i, side="right"))
        lines, file = self._lines[which], self.files[which]
        line = i - int(self._ends[which]) + len(lines.starts)
        name = f"{file}:{lines.numbers[line]}"
        content = os.pread(self._open[which].fileno(), int(lines.sizes[line]), int(lines.starts[line]))
        try:
            text = content.decode("utf-8").strip("\r\n")
        except UnicodeDecodeError as error:
            raise InputError(f"{name}: byte {error.start + 1} of the line is not UTF-8") from error
        return Document((Text(_from_json(text, name) if file.suffix == ".jsonl" else text, "text"),), i, name)


def _files(path: Path) -> list[Path]:
    if path.is_dir():
        files = sorted(file for file in path.rglob("*") if file.suffix in SUFFIXES and file.is_file())
        if not files:
            raise InputError(f"folder {path} holds no .txt and no .jsonl file")
        return files
    if not path.is_file():
        raise InputError(f"there is no text {path}")
    return [path]


def _find_lines(file: Path) -> _Lines:
    starts, sizes, numbers = array.array("q"), array.array("q"), array.array("q")
    start = 0
    try:
        with file.open("rb") as lines:
            for number, line in enumerate(lines, start=1):
                if line.strip():
                    starts.append(start)
                    sizes.append(len(line))
                    numbers.append(number)
                start += len(line)
    except OSError as error:
        raise InputError(f"text {file} cannot be read: {error.strerror or error}") from error
    return _Lines(*(np.array(x, np.int64) for x in (starts, sizes, numbers)))


def _from_json(line: str, name: str) -> str:
    try:
        record: Any = json.loads(line)
    except (ValueError, RecursionError) as error:
        raise InputError(f"{name}: not JSON: {error}") from error
    text = record.get("text") if isinstance(record, dict) else None
    if not isinstance(text, str) or not text.strip():
        raise InputError(f'{name}: a line is {{"text": "..."}} with a text that is not empty')
    return text
