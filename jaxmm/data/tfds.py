"""Datasets of TensorFlow Datasets by index, without TensorFlow.

They must be on disk in a format with random access: `download_and_prepare(file_format="array_record")`. Nothing is
downloaded here.
"""

import contextlib
import os
import string
from collections.abc import Iterator
from typing import Any

import numpy as np

from jaxmm.data.images import fit, read_image, two_sizes
from jaxmm.errors import InputError, nearest
from jaxmm.sequence.document import Document, Image, Text


class TFDS:
    """A prepared dataset of TensorFlow Datasets: images with captions, images alone, or text alone.

    A text feature that is a list (the captions of an image by several people) gives the first as the text and the
    others as its alternatives, of which each reading draws one.

    Args:
      name: "coco_captions", "coco_captions/2014" or "coco_captions/2014:1.1.0"; by default the only config and the
        latest version that are on disk.
      split: "train", "train[:90%]", ...
      data_dir: the folder of all datasets; "" is TFDS' own ($TFDS_DATA_DIR or ~/tensorflow_datasets).
      image: path of the image's feature, with / into nested features; "" for none.
      text: path of the text's feature: a text, a class label (its name), or a list of either; "" for none.
      template: a text with paths of features in braces, "a photo of a {label}", instead of `text`; here they may also
        be whole numbers.
      size: of the images, one number for squares or (height, width).
      channels: 1 (grey) or 3 (RGB).

    Raises:
      InputError: for a dataset that is not there, an unknown split or feature; for a record that is broken, when it is
        read, by its number.
    """

    def __init__(
        self,
        name: str,
        split: str = "train",
        data_dir: str | os.PathLike = "",
        image: str = "image",
        text: str = "",
        template: str = "",
        size: int | tuple[int, int] = 256,
        channels: int = 3,
    ):
        if channels not in (1, 3):
            raise InputError(f"channels of dataset {name}: 1 or 3, not {channels!r}")
        if text and template:
            raise InputError(f"dataset {name}: the options text and template exclude each other")
        self.height, self.width = two_sizes(size, f"size of the images of dataset {name}")
        self.channels, self.image, self.split = channels, image, split
        self.name = _full_name(name, str(data_dir))
        self._data = _open(self.name, split, str(data_dir))
        features = self._data.dataset_info.features
        self._kinds = {path: feature for path, feature in _leaves(features) if path}
        self._template = template or (f"{{{text}}}" if text else "")
        try:
            self._fields = [field for _, field, _, _ in string.Formatter().parse(self._template) if field is not None]
        except ValueError as error:
            raise InputError(f"template {template!r} of dataset {name}: {error}") from error
        if not image and not self._fields:
            raise InputError(f"dataset {self.name}: name a feature for the option image, text or template")
        self._check(bool(template))

    @property
    def kind(self) -> str:
        return "pixels" if self.image else "text"

    def __len__(self) -> int:
        return len(self._data)

    def __getitem__(self, i: int) -> Document:
        i = range(len(self))[i]
        name = f"{self.name} {self.split} {i}"
        try:
            record = self._data[i]
        except Exception as error:  # the parsers of records raise nearly anything on broken ones
            raise InputError(f"{name}: cannot be read: {' '.join(str(error).split())}") from error
        segments: list[Text | Image] = []
        if self._fields:
            first, *others = self._texts(record, name)
            segments.append(Text(first, "caption" if self.image else "text", tuple(others)))
        if self.image:
            pixels = read_image(f"{name}: {self.image}", self.channels, content=_value(record, self.image))
            segments.append(Image(fit(pixels, self.height, self.width)))
        return Document(tuple(segments), example=i, name=name)

    def _check(self, template: bool) -> None:
        for path in [*([self.image] if self.image else []), *self._fields]:
            if path not in self._kinds:
                raise InputError(f"dataset {self.name} has no feature {path!r}{nearest(path, self._kinds)}")
        if self.image and not self._kinds[self.image].is_image:
            images = sorted(path for path, feature in self._kinds.items() if feature.is_image)
            raise InputError(
                f"feature {self.image!r} of {self.name} is no image; images: {', '.join(images) or 'none'}"
            )
        for path in self._fields:
            if not (self._kinds[path].is_text or (template and self._kinds[path].is_number)):
                raise InputError(f"feature {path!r} of {self.name} is neither a text nor a class label")

    def _texts(self, record: dict, name: str) -> list[str]:
        """The template, filled in with each of the texts of its features in turn."""
        values = {}
        for path in self._fields:
            value = _value(record, path)
            values[path] = [self._kinds[path].write(x, f"{name}: {path}") for x in _as_list(value)]
            if not values[path]:
                raise InputError(f"{name}: {path} is an empty list")
        texts = [self._fill({path: x[n % len(x)] for path, x in values.items()}) for n in range(_longest(values))]
        texts = [text for text in dict.fromkeys(texts) if text.strip()]
        if not texts:
            raise InputError(f"{name}: {', '.join(self._fields)}: the text is empty")
        return texts

    def _fill(self, values: dict[str, str]) -> str:
        parts = string.Formatter().parse(self._template)
        return "".join(literal + ("" if field is None else values[field]) for literal, field, _, _ in parts)


class _Feature:
    """What is known of a feature without its records."""

    def __init__(self, feature: Any, in_list: bool):
        import tensorflow_datasets as tfds

        self.is_image = isinstance(feature, tfds.features.Image) and not in_list
        self._names = feature.names if isinstance(feature, tfds.features.ClassLabel) else None
        scalar = isinstance(feature, tfds.features.Tensor) and not feature.shape
        kind = np.dtype(feature.np_dtype).kind if scalar else ""
        self.is_text = isinstance(feature, (tfds.features.Text, tfds.features.ClassLabel)) or kind == "O"
        self.is_number = kind in tuple("iu")

    def write(self, value: Any, name: str) -> str:
        """The text of one value: bytes, or the number of a class."""
        if not isinstance(value, bytes):
            number = int(value)
            if self._names is None or not 0 <= number < len(self._names):
                return str(number)
            return self._names[number]
        try:
            return value.decode("utf-8")
        except UnicodeDecodeError as error:
            raise InputError(f"{name}: byte {error.start + 1} is not UTF-8") from error


def _leaves(feature: Any, path: str = "", in_list: bool = False) -> Iterator[tuple[str, _Feature]]:
    """(path, feature) of everything that a record holds."""
    import tensorflow_datasets as tfds

    if isinstance(feature, tfds.features.FeaturesDict):
        for name in feature:
            yield from _leaves(feature[name], f"{path}/{name}" if path else name, in_list)
    elif isinstance(feature, tfds.features.Sequence):
        yield from _leaves(feature.feature, path, True)
    else:
        yield path, _Feature(feature, in_list)


def _skip_images(features: Any) -> dict[str, Any]:
    """Decoders that leave images outside lists as the bytes of their files: those that are used are read here."""
    import tensorflow_datasets as tfds

    decoders = {}
    for name in features:
        if isinstance(features[name], tfds.features.FeaturesDict):
            decoders[name] = _skip_images(features[name])
        elif isinstance(features[name], tfds.features.Image):
            decoders[name] = tfds.decode.SkipDecoding()
    return {name: decoder for name, decoder in decoders.items() if decoder}


def _full_name(name: str, data_dir: str) -> str:
    """The name with config and version, of what is on disk."""
    if not isinstance(name, str) or not name:
        raise InputError(f"name of a dataset: a text like 'coco_captions', not {name!r}")
    known = _prepared(data_dir)
    config, _, version = name.partition(":")
    found = [full for full in known if full == name or (not version and full.partition(":")[0] == config)]
    found = found or [full for full in known if full.partition("/")[0] == config and not version]
    configs = {full.partition(":")[0] for full in found}
    if len(configs) > 1:
        raise InputError(f"dataset {name} has several configs in {_root(data_dir)}: {', '.join(sorted(configs))}")
    if not found:
        hint = nearest(name, known) or "; it holds no prepared dataset"
        raise InputError(f"there is no dataset {name} in {_root(data_dir)}{hint}")
    return max(found, key=lambda full: [int(n) for n in full.partition(":")[2].split(".")])


def _prepared(data_dir: str) -> tuple[str, ...]:
    """name[/config]:version of the datasets in a folder."""
    root = _root(data_dir)
    found = []
    for depth in ("*/*", "*/*/*"):
        with contextlib.suppress(OSError):
            for folder in root.glob(depth):
                *name, version = folder.parts[-depth.count("*") :]
                numbers = version.split(".")
                if len(numbers) == 3 and all(n.isdigit() for n in numbers) and (folder / "dataset_info.json").exists():
                    found.append(f"{'/'.join(name)}:{version}")
    return tuple(sorted(found))


def _root(data_dir: str) -> Any:
    import tensorflow_datasets as tfds
    from etils import epath

    return epath.Path(data_dir or os.environ.get("TFDS_DATA_DIR") or tfds.core.constants.DATA_DIR).expanduser()


def _open(name: str, split: str, data_dir: str) -> Any:
    import tensorflow_datasets as tfds

    try:
        where = dict(data_dir=str(_root(data_dir)), download=False)
        splits = tfds.data_source(name, **where)
        if not isinstance(split, str) or split.partition("[")[0] not in [*splits, "all"]:
            raise InputError(f"dataset {name} has no split {split!r}{nearest(str(split), splits)}")
        features = next(iter(splits.values())).dataset_info.features
        return tfds.data_source(name, split=split, decoders=_skip_images(features), **where)
    except NotImplementedError as error:
        raise InputError(
            f"dataset {name} is not in a format with random access: prepare it in another folder with"
            ' download_and_prepare(file_format="array_record")'
        ) from error
    except InputError:
        raise
    except Exception as error:  # what is wrong with its files shows as nearly anything
        raise InputError(f"dataset {name}, split {split!r}: {' '.join(str(error).split())[:300]}") from error


def _value(record: Any, path: str) -> Any:
    for part in path.split("/"):
        record = record[part]
    return record


def _as_list(value: Any) -> list:
    return list(value) if isinstance(value, list) or getattr(value, "ndim", 0) else [value]


def _longest(values: dict[str, list]) -> int:
    return max(len(x) for x in values.values())
