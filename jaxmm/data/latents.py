"""Images as a frozen codec has read them: the cache that `jaxmm encode` writes and training reads.

A folder holds manifest.json and shards of array records; record i is document i of the source, or what is wrong with
it. A record is a line of JSON, {"name", "segments"} or {"error"}, and the numbers of its moments behind it.
"""

import dataclasses
import hashlib
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import ml_dtypes  # noqa: F401 makes NumPy know bfloat16
import numpy as np

from jaxmm.errors import InputError, nearest
from jaxmm.sequence.document import Document, Latents, Text

MANIFEST = "manifest.json"
DTYPES = ("float16", "bfloat16", "float32")


@dataclasses.dataclass(frozen=True)
class Manifest:
    """What a cache is.

    Attributes:
      codec: `codec_fingerprint` of the codec.
      source, options: what was encoded.
      records: the number of documents, bad ones included.
      shard_size: documents of a shard, but for the last.
      image_size: (H, W) of the pixels.
      shape: of the moments, (h, w, 2 C).
      dtype: of the moments on disk.
    """

    codec: str
    source: str
    options: dict[str, Any]
    records: int
    shard_size: int
    image_size: tuple[int, int]
    shape: tuple[int, int, int]
    dtype: str

    @property
    def shards(self) -> int:
        return -(-self.records // self.shard_size)

    def shard(self, i: int) -> str:
        """The name of a shard's file."""
        return f"latents-{i:05d}-of-{self.shards:05d}.array_record"

    def documents(self, i: int) -> range:
        """The documents of a shard."""
        return range(i * self.shard_size, min((i + 1) * self.shard_size, self.records))

    def to_json(self) -> dict[str, Any]:
        return json.loads(json.dumps(dataclasses.asdict(self), default=str))


def read_manifest(folder: Path) -> Manifest | None:
    """The manifest of a folder; None if there is none.

    Raises:
      InputError: if it is damaged.
    """
    file = folder / MANIFEST
    if not file.is_file():
        return None
    try:
        content = json.loads(file.read_text())
        content["image_size"], content["shape"] = tuple(content["image_size"]), tuple(content["shape"])
        manifest = Manifest(**content)
    except (OSError, ValueError, TypeError, KeyError) as error:
        raise InputError(f"{file} is damaged: {error}") from error
    if manifest.dtype not in DTYPES:
        raise InputError(f"{file}: unknown dtype {manifest.dtype!r}{nearest(manifest.dtype, DTYPES)}")
    return manifest


class LatentFolder:
    """The documents of a cache, their images as mean and log-variance.

    Args:
      path: the folder that `jaxmm encode` wrote.

    Raises:
      InputError: if it is no such folder, or is not finished; for a record that could not be encoded, when it is read.
    """

    kind = "latents"

    def __init__(self, path: str):
        from grain.sources import ArrayRecordDataSource

        folder = Path(path)
        manifest = read_manifest(folder)
        if manifest is None:
            raise InputError(f"{folder} is no folder of latents: it has no {MANIFEST}; `jaxmm encode` writes one")
        files = [folder / manifest.shard(i) for i in range(manifest.shards)]
        missing = [file.name for file in files if not file.is_file()]
        if missing:
            raise InputError(
                f"{folder}: {len(missing)} of {len(files)} shards are missing ({missing[0]}, ...): run the same"
                " `jaxmm encode` again, it goes on where it was"
            )
        self.folder, self.manifest = folder, manifest
        try:
            self._records = ArrayRecordDataSource([str(file) for file in files])
            count = len(self._records)
        except Exception as error:  # what is wrong with a file shows as nearly anything
            raise InputError(f"{folder}: a shard is damaged: {' '.join(str(error).split())[:200]}") from error
        if count != manifest.records:
            raise InputError(f"{folder}: its shards hold {count} records, not {manifest.records}")

    def __len__(self) -> int:
        return self.manifest.records

    def __getitem__(self, i: int) -> Document:
        i = range(len(self))[i]
        try:
            document = unpack(self._records[i], self.manifest)
        except InputError:
            raise
        except Exception as error:
            raise InputError(f"{self.folder}: record {i} is damaged: {' '.join(str(error).split())}") from error
        return dataclasses.replace(document, example=i)

    def check(self, codec: str, image_size: Sequence[int]) -> None:
        """Raise InputError if these are not the latents of a codec, or of images of another size."""
        if self.manifest.codec != codec:
            raise InputError(
                f"latents {self.folder} are of another codec ({self.manifest.codec[:12]}...) than config key 'codec'"
                f" names ({codec[:12]}...)"
            )
        if self.manifest.image_size != tuple(image_size):
            raise InputError(
                f"latents {self.folder} are of images of {self.manifest.image_size} pixels, not {tuple(image_size)}"
            )


def pack(document: Document, manifest: Manifest) -> bytes:
    """A document of texts and latents as a record."""
    segments, numbers = [], []
    for segment in document.segments:
        if isinstance(segment, Text):
            segments.append({"text": segment.text, "role": segment.role, "alternatives": segment.alternatives})
        else:
            segments.append({"role": segment.role})
            numbers.append(segment.moments.astype(np.dtype(manifest.dtype)).tobytes())
    header = json.dumps({"name": document.name, "segments": segments})
    return b"".join([header.encode(), b"\n", *numbers])


def pack_error(error: str) -> bytes:
    """The record of a document that could not be encoded."""
    return json.dumps({"error": error}).encode() + b"\n"


def unpack(record: bytes, manifest: Manifest) -> Document:
    """The inverse of `pack`; moments become float32.

    Raises:
      InputError: for a record of `pack_error`.
    """
    header, _, numbers = record.partition(b"\n")
    content = json.loads(header)
    if "error" in content:
        raise InputError(content["error"])
    texts = [segment for segment in content["segments"] if "text" in segment]
    images = len(content["segments"]) - len(texts)
    moments = np.frombuffer(numbers, np.dtype(manifest.dtype)).reshape(images, *manifest.shape).astype(np.float32)
    unread = iter(moments)
    segments = tuple(
        Text(segment["text"], segment["role"], tuple(segment["alternatives"]))
        if "text" in segment
        else Latents(next(unread), segment["role"])
        for segment in content["segments"]
    )
    return Document(segments, name=content["name"])


def codec_fingerprint(config: Any, weights: Mapping[str, np.ndarray]) -> str:
    """SHA-256 of a codec's sizes and weights.

    Raises:
      InputError: if there is no codec, or it has no weights.
    """
    if config is None:
        raise InputError("the model has no codec: its latents are the pixels, and a cache of them is pointless")
    if not weights:
        raise InputError("cached latents belong to a codec: name its folder, --config.codec=FOLDER")
    digest = hashlib.sha256(json.dumps(dataclasses.asdict(config), sort_keys=True).encode())
    for path in sorted(weights):
        value = np.ascontiguousarray(weights[path])
        digest.update(f"{path} {value.dtype} {value.shape}".encode())
        digest.update(value.view(np.uint8).data if value.ndim else value.tobytes())
    return digest.hexdigest()
