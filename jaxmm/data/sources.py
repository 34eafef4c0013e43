"""Documents by index: an image with its caption, or text alone.

A source has a length and gives document i; it needs no state, so that any process can ask for any document. Its `kind`
says what its images are: "pixels", "latents" (as a frozen codec has read them), or "text" if it has none.
"""

import inspect
from collections.abc import Mapping
from typing import Any, Protocol

import numpy as np
import PIL.Image
import PIL.ImageDraw
from jaxtyping import Int, UInt8

from jaxmm.data.folder import ImageFolder
from jaxmm.data.latents import LatentFolder
from jaxmm.data.text import TextFiles
from jaxmm.data.tfds import TFDS
from jaxmm.errors import InputError, nearest
from jaxmm.sequence.document import Document, Image, Text

DIGIT_NAMES = ("zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine")

SHAPES = ("square", "circle", "triangle")
COLOURS = {
    "red": (214, 39, 40),
    "green": (44, 160, 44),
    "blue": (31, 80, 200),
    "yellow": (240, 200, 20),
    "purple": (140, 60, 180),
    "black": (20, 20, 20),
}

_SMOOTH = 4  # shapes are drawn so many times larger and averaged


class Source(Protocol):
    """Documents by index."""

    kind: str

    def __len__(self) -> int: ...

    def __getitem__(self, i: int) -> Document:
        """Document i; raises InputError if it is broken."""
        ...


class Digits:
    """Handwritten digits of scikit-learn: "a zero" ... "a nine", 8 x 8 pixels, bright on black.

    Alpaydin and Kaynak, Optical Recognition of Handwritten Digits, UCI 1998. 1437 are for training and 360 held out;
    the split is fixed and keeps the share of each digit.

    Args:
      split: "train" or "test".

    Attributes:
      images: uint8 [N, 8, 8, 1].
      labels: int [N], 0 to 9.
    """

    kind = "pixels"
    images: UInt8[np.ndarray, "N 8 8 1"]
    labels: Int[np.ndarray, "N"]

    def __init__(self, split: str = "train"):
        if split not in ("train", "test"):
            raise InputError(f"split of the digits: 'train' or 'test', not {split!r}")
        try:
            from sklearn.datasets import load_digits
            from sklearn.model_selection import train_test_split
        except ImportError as error:
            raise InputError("the digits need the package scikit-learn, which is not installed") from error
        digits = load_digits()
        halves = train_test_split(np.arange(len(digits.target)), test_size=0.2, random_state=0, stratify=digits.target)
        chosen = np.sort(halves[("train", "test").index(split)])
        self.split = split
        self.images = np.rint(digits.images[chosen] * 255 / 16).astype(np.uint8)[..., None]
        self.labels = digits.target[chosen]

    def __len__(self) -> int:
        return len(self.labels)

    def __getitem__(self, i: int) -> Document:
        i = range(len(self))[i]
        segments = (Text(f"a {DIGIT_NAMES[self.labels[i]]}"), Image(self.images[i]))
        return Document(segments, example=i, name=f"digits {self.split} {i}")


class GeneratedShapes:
    """Drawn squares, circles and triangles on a pale background: "a red circle". They need no files.

    Args:
      count: how many there are.
      size: pixels are uint8 [size, size, 3].
      seed: document i depends on the seed and on i only.
    """

    kind = "pixels"

    def __init__(self, count: int = 1000, size: int = 64, seed: int = 0):
        for name, value, least in (("count", count, 1), ("size", size, 8), ("seed", seed, 0)):
            if not isinstance(value, int) or isinstance(value, bool) or value < least:
                raise InputError(f"{name} of the shapes: a whole number of at least {least}, not {value!r}")
        self.count, self.size, self.seed = count, size, seed

    def __len__(self) -> int:
        return self.count

    def __getitem__(self, i: int) -> Document:
        i = range(self.count)[i]
        rng = np.random.default_rng([self.seed, i])
        colour, shape = rng.choice(list(COLOURS)), rng.choice(SHAPES)
        segments = (Text(f"a {colour} {shape}"), Image(_draw(shape, COLOURS[colour], self.size, rng)))
        return Document(segments, example=i, name=f"shapes {i}")


SOURCES = {
    "digits": Digits,
    "folder": ImageFolder,
    "latents": LatentFolder,
    "shapes": GeneratedShapes,
    "text": TextFiles,
    "tfds": TFDS,
}


def make_source(name: str, options: Mapping[str, Any]) -> Source:
    """Make a source by its name in `SOURCES`.

    Args:
      name: its name; "tfds:NAME" is "tfds" with the option `name`.
      options: its arguments.

    Raises:
      InputError: for an unknown name, an unknown, missing or ill-typed option, or data that are broken.
    """
    options = dict(options)
    if name.startswith("tfds:"):
        name, _, options["name"] = name.partition(":")
    if name not in SOURCES:
        raise InputError(f"unknown source {name!r}{nearest(name, SOURCES)}")
    known = source_options(name)
    for key in options:
        if key not in known:
            raise InputError(f"source {name!r} has no option {key!r}{nearest(key, known)}")
    for key, parameter in known.items():
        if parameter.default is parameter.empty and key not in options:
            raise InputError(f"source {name!r} needs the option {key!r}")
    return SOURCES[name](**options)


def source_options(name: str) -> Mapping[str, inspect.Parameter]:
    """The options of a source; none of an unknown one."""
    source = SOURCES.get(name.partition(":")[0])
    return {} if source is None else inspect.signature(source).parameters


def _draw(
    shape: str, colour: tuple[int, int, int], size: int, rng: np.random.Generator
) -> UInt8[np.ndarray, "size size 3"]:
    """One shape at a random place, its edges smoothed."""
    large = size * _SMOOTH
    picture = PIL.Image.new("RGB", (large, large), tuple(int(v) for v in rng.integers(215, 256, 3)))
    radius = rng.uniform(0.2, 0.35) * large
    x, y = rng.uniform(radius, large - radius, 2)
    box = [(x - radius, y - radius), (x + radius, y + radius)]
    draw = PIL.ImageDraw.Draw(picture)
    if shape == "circle":
        draw.ellipse(box, fill=colour)
    elif shape == "square":
        draw.rectangle(box, fill=colour)
    else:
        draw.polygon([(x, y - radius), (x + radius, y + radius), (x - radius, y + radius)], fill=colour)
    return np.array(picture.reduce(_SMOOTH))
