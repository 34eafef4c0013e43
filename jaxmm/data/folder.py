"""A folder of images with a file of captions."""

import codecs
import json
import os
from pathlib import Path
from typing import Any, NamedTuple

from jaxmm.data.images import fit, read_image, two_sizes
from jaxmm.errors import InputError
from jaxmm.sequence.document import Document, Image, Text


class Line(NamedTuple):
    """One line of a file of captions: the image's path in the folder, its caption, and the number of the line."""

    image: str
    caption: str
    number: int


class ImageFolder:
    """A folder of images with a JSONL file of captions: {"image": "cats/1.png", "caption": "a cat"} per line.

    Every line is checked when the source is made; images are read when they are asked for, cropped in the centre and
    resized. Other keys of a line are ignored, and so are blank lines. Symbolic links are followed.

    Args:
      path: the folder.
      captions: the file of captions, in the folder or anywhere else.
      size: of the images, one number for squares or (height, width).
      channels: 1 (grey) or 3 (RGB).

    Raises:
      InputError: for a wrong argument, a missing folder or file, and a broken line, by file and line.
    """

    kind = "pixels"

    def __init__(
        self,
        path: str | os.PathLike,
        captions: str | os.PathLike = "captions.jsonl",
        size: int | tuple[int, int] = 256,
        channels: int = 3,
    ):
        for name, value in (("path", path), ("captions", captions)):
            if not isinstance(value, (str, os.PathLike)):
                raise InputError(f"{name} of an image folder: a path, not {value!r}")
        if isinstance(channels, bool) or channels not in (1, 3):
            raise InputError(f"channels of an image folder: 1 or 3, not {channels!r}")
        self.folder, self.channels = Path(path), channels
        self.height, self.width = two_sizes(size, "size of an image folder")
        if not self.folder.is_dir():
            raise InputError(f"there is no image folder {self.folder}")
        self.captions = self.folder / captions
        self.lines = read_captions(self.captions, self.folder)

    def __len__(self) -> int:
        return len(self.lines)

    def __getitem__(self, i: int) -> Document:
        i = range(len(self))[i]
        line = self.lines[i]
        name = f"{self.captions}:{line.number}"
        try:
            pixels = read_image(self.folder / line.image, self.channels)
        except InputError as error:
            raise InputError(f"{name}: {error}") from error
        segments = (Text(line.caption), Image(fit(pixels, self.height, self.width)))
        return Document(segments, example=i, name=name)


def read_captions(file: Path, folder: Path) -> list[Line]:
    """Read and check a JSONL file of captions of the images in `folder`.

    Raises:
      InputError: for the first broken line, by file and line, or for a file without any line.
    """
    try:
        content = file.read_bytes()
    except OSError as error:
        raise InputError(f"captions {file} cannot be read: {error.strerror or error}") from error
    lines = content.removeprefix(codecs.BOM_UTF8).split(b"\n")
    found = [_parse(line, folder, f"{file}:{i}", i) for i, line in enumerate(lines, start=1) if line.strip()]
    if not found:
        raise InputError(f"captions {file} are empty")
    return found


def _parse(line: bytes, folder: Path, where: str, number: int) -> Line:
    try:
        record = json.loads(line.decode("utf-8"))
    except UnicodeDecodeError as error:
        raise InputError(f"{where}: byte {error.start + 1} of the line is not UTF-8") from error
    except (ValueError, RecursionError) as error:
        raise InputError(f"{where}: not JSON: {error}") from error
    if not isinstance(record, dict):
        raise InputError(f'{where}: a line is {{"image": ..., "caption": ...}}, not {_short(record)}')
    image, caption = _text(record, "image", where), _text(record, "caption", where)
    path = os.path.normpath(image)
    if os.path.isabs(path) or path.split(os.sep)[0] == os.pardir:
        raise InputError(f"{where}: image {image!r} is not inside the folder {folder}")
    if not os.path.isfile(folder / path):
        raise InputError(f"{where}: there is no image {path!r} in {folder}")
    return Line(path, caption, number)


def _text(record: dict[str, Any], key: str, where: str) -> str:
    """The text under a key, which must be there, not blank, and Unicode."""
    if key not in record:
        raise InputError(f"{where}: key {key!r} is missing; there are {_short(sorted(record))}")
    value = record[key]
    if not isinstance(value, str):
        raise InputError(f"{where}: {key!r} is {_short(value)}, not a text")
    if not value.strip():
        raise InputError(f"{where}: {key!r} is empty")
    if not value.isascii() and any("\ud800" <= character <= "\udfff" for character in value):
        raise InputError(f"{where}: {key!r} holds half of a surrogate pair, which is not Unicode")
    return value


def _short(value: Any) -> str:
    text = json.dumps(value)
    return text if len(text) <= 60 else f"{text[:57]}..."
