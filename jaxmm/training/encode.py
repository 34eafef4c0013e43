"""`jaxmm encode`: a frozen codec reads the images of a source once, and training reads what it said."""

import contextlib
import dataclasses
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import grain
import jax
import numpy as np
from array_record.python.array_record_module import ArrayRecordWriter
from jax.sharding import AxisType, NamedSharding, PartitionSpec
from ml_collections import ConfigDict
from tqdm import tqdm

from jaxmm.autoencoders import KLAutoencoder
from jaxmm.checkpoints import write_json
from jaxmm.data.bad_examples import BadExample, BadExamples
from jaxmm.data.latents import (
    DTYPES,
    MANIFEST,
    Manifest,
    codec_fingerprint,
    pack,
    pack_error,
    read_manifest,
)
from jaxmm.data.sources import Source
from jaxmm.errors import InputError, nearest
from jaxmm.layers.parameters import Blueprint
from jaxmm.sequence import Document, Image, Latents
from jaxmm.training.config import model_config
from jaxmm.training.inputs import codec_weights, source_of

READERS = 16  # threads that read images ahead


@dataclasses.dataclass(frozen=True)
class EncodeOptions:
    """How a cache is written.

    Attributes:
      source: of a mixture, the one to encode; "" is the only one.
      dtype: of the numbers on disk. float16 is the default: rounding moves a mean by at most 1 part in 2048; bfloat16
        takes the same room and is 8 times coarser, and its range is not needed (log-variances lie in [-30, 20]).
      shard_size: documents of a shard; a run that was killed begins its unfinished shards anew.
      batch_size: images that each device encodes together.
    """

    source: str = ""
    dtype: str = "float16"
    shard_size: int = 4096
    batch_size: int = 16

    def __post_init__(self):
        if self.dtype not in DTYPES:
            raise InputError(f"unknown dtype {self.dtype!r}{nearest(self.dtype, DTYPES)}")
        for name in ("shard_size", "batch_size"):
            if getattr(self, name) < 1:
                raise InputError(f"{name} must be at least 1, not {getattr(self, name)}")


def encode_source(config: ConfigDict, folder: Path, options: EncodeOptions = EncodeOptions()) -> Manifest:
    """Write mean and log-variance of all images of an experiment's source, with their texts.

    Shards that are there are kept, so that a run that was killed goes on. With several processes each writes its own.

    Args:
      config: of the experiment: its model, codec, source and share of bad records.
      folder: of the cache; what cannot be encoded is named in its bad_examples.jsonl.
      options: see `EncodeOptions`.

    Raises:
      InputError: if there is no codec, too many records are bad, or the folder holds something else.
    """
    model = model_config(config)
    weights = {path.removeprefix("codec."): x for path, x in codec_weights(config.codec, model).items()}
    made_by = codec_fingerprint(model.codec, {f"codec.{path}": x for path, x in weights.items()})
    entry = _entry(config, options.source)
    source = source_of(entry, model)
    if source.kind != "pixels":
        raise InputError(f"source {entry.source!r} has no pixels to encode")
    manifest = _manifest(config, entry, made_by, len(source), options)
    _claim(folder, manifest)
    encoder = Encoder(model.codec, weights, model.image_size, options.batch_size)
    bad = BadExamples(folder / "bad_examples.jsonl", config.data.bad_share, len(source))
    mine = range(jax.process_index(), manifest.shards, jax.process_count())
    with tqdm(total=len(source), desc="encoded", unit="document", disable=None) as progress:
        for shard in mine:
            if not (folder / manifest.shard(shard)).exists():
                _write_shard(folder, manifest, shard, source, encoder, bad)
            progress.update(len(manifest.documents(shard)))
    return manifest


class Encoder:
    """The frozen codec on all devices of this process.

    Args:
      config: of the codec.
      weights: of the codec, by its own paths.
      image_size: (H, W) of the pixels.
      batch_size: images per device.
    """

    def __init__(self, config: Any, weights: dict[str, np.ndarray], image_size: Sequence[int], batch_size: int):
        devices = jax.local_devices()
        self.count, self.shape = batch_size * len(devices), (*image_size, config.in_channels)
        mesh = jax.sharding.Mesh(np.array(devices), ("rows",), axis_types=(AxisType.Auto,))
        self._rows = NamedSharding(mesh, PartitionSpec("rows"))
        self._weights = jax.device_put(
            {path: np.asarray(x, np.float32) for path, x in weights.items()}, NamedSharding(mesh, PartitionSpec())
        )
        blueprint = Blueprint(lambda rngs: KLAutoencoder(config, rngs=rngs))

        def moments(weights, pixels):
            (mean, logvar), _ = blueprint.bind(weights).moments(pixels)
            return jax.numpy.concatenate([mean, logvar], axis=-1)

        self._moments = jax.jit(moments, out_shardings=self._rows)

    def __call__(self, pixels: Sequence[np.ndarray]) -> np.ndarray:
        """uint8 [n, H, W, C], at most `count` of them, to float32 [n, h, w, 2 c]."""
        values = np.zeros((self.count, *self.shape), np.float32)
        values[: len(pixels)] = np.stack(pixels).astype(np.float32) / 127.5 - 1.0
        return np.asarray(self._moments(self._weights, jax.device_put(values, self._rows)))[: len(pixels)]


def _entry(config: ConfigDict, name: str) -> Any:
    """The part of the config that says what is encoded."""
    mixture = config.data.mixture
    if not mixture:
        if name:
            raise InputError(f"the config has no mixture, so there is no source {name!r} in it")
        return config.data
    if name not in mixture:
        raise InputError(f"which source of the mixture? --source {name!r} is none of it{nearest(name, mixture)}")
    return mixture[name]


def _manifest(config: ConfigDict, entry: Any, made_by: str, records: int, options: EncodeOptions) -> Manifest:
    model = model_config(config)
    height, width = model.image_size
    shape = (height // model.downscale, width // model.downscale, 2 * model.latent_channels)
    given = entry.get("options", ConfigDict()).to_dict()
    size, dtype = options.shard_size, options.dtype
    return Manifest(made_by, entry.source, given, records, size, (height, width), shape, dtype)


def _claim(folder: Path, manifest: Manifest) -> None:
    """Write the manifest, or see that the folder holds the same cache, begun before."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
        old = read_manifest(folder)
        if old is None:
            write_json(folder / MANIFEST, manifest.to_json())
            return
    except OSError as error:
        raise InputError(f"cannot write to {folder}: {error.strerror or error}") from error
    was, now = old.to_json(), manifest.to_json()
    differing = [f"{name} {was[name]!r}, not {now[name]!r}" for name in now if was[name] != now[name]]
    if differing:
        raise InputError(f"{folder} holds other latents, take another --output; it has " + "; ".join(differing))


def _write_shard(
    folder: Path, manifest: Manifest, shard: int, source: Source, encoder: Encoder, bad: BadExamples
) -> None:
    """Write one shard beside its place and rename it into it."""
    place = folder / manifest.shard(shard)
    beside = folder / f".{place.name}.{jax.process_index()}"
    try:
        writer = ArrayRecordWriter(str(beside), "group_size:1")
        for i, document in _encoded(source, manifest.documents(shard), encoder):
            if isinstance(document, str):
                bad.add(BadExample(i, document, i), i + 1)
                writer.write(pack_error(document))
            else:
                writer.write(pack(document, manifest))
        writer.close()
        beside.replace(place)
    except OSError as error:
        raise InputError(f"cannot write {place}: {error.strerror or error}") from error
    finally:
        with contextlib.suppress(OSError):
            beside.unlink(missing_ok=True)


def _encoded(source: Source, documents: range, encoder: Encoder) -> Iterator[tuple[int, Document | str]]:
    """(number, document of latents, or what is wrong with it), in order."""
    reading = grain.MapDataset.range(documents.start, documents.stop).map(
        lambda i: (i, _read(source, i, encoder.shape))
    )
    options = grain.ReadOptions(num_threads=READERS, prefetch_buffer_size=2 * encoder.count)
    waiting: list[tuple[int, Document | str]] = []
    pixels: list[np.ndarray] = []
    for i, document in reading.to_iter_dataset(options):
        images = [] if isinstance(document, str) else [s.pixels for s in document.segments if isinstance(s, Image)]
        if len(images) > encoder.count:
            document, images = f"{document.name}: {len(images)} images, a batch has {encoder.count}", []
        if len(pixels) + len(images) > encoder.count:
            yield from _run(waiting, encoder(pixels))
            waiting, pixels = [], []
        waiting.append((i, document))
        pixels += images
    yield from _run(waiting, encoder(pixels) if pixels else np.zeros((0, 1, 1, 1)))


def _read(source: Source, i: int, shape: tuple[int, int, int]) -> Document | str:
    try:
        document = source[i]
    except InputError as error:
        return str(error)
    for segment in document.segments:
        if isinstance(segment, Image) and segment.pixels.shape != shape:
            return f"{document.name}: an image of {segment.pixels.shape}, the model's have {shape}"
    return document


def _run(waiting: list[tuple[int, Document | str]], moments: np.ndarray) -> Iterator[tuple[int, Document | str]]:
    """The documents with their images encoded."""
    unread = iter(moments)
    for i, document in waiting:
        if not isinstance(document, str):
            segments = [Latents(next(unread), s.role) if isinstance(s, Image) else s for s in document.segments]
            document = dataclasses.replace(document, segments=tuple(segments))
            if not all(np.isfinite(s.moments).all() for s in segments if isinstance(s, Latents)):
                document = f"{document.name}: the codec's numbers are not finite"
        yield i, document
