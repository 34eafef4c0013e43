"""The Batch: packed rows of static shape, the only thing that networks and trainers see."""

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import numpy as np

from jaxmm.errors import InputError
from jaxmm.sequence.intervals import OPEN, Intervals
from jaxmm.sequence.layout import Layout, StreamLayout

ORDERS = 1024  # an image's own number is example * ORDERS + its order within the document


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Tokens:
    """The tokens of one stream, int32 [B, L] unless said otherwise; the fields are those of `StreamLayout`.

    Filler has place -1 and the interval (0, 0): it sees nothing and nobody sees it.
    """

    ids: Any
    places: Any
    intervals: Intervals
    positions: Any
    labels: Any
    weights: Any  # float32

    @property
    def length(self) -> int:
        return self.ids.shape[1]


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class ImageSet:
    """The images of one shape: N places for images per row.

    Attributes:
      values: float32 [B, N, H, W, C]: pixels in [-1, 1], or latents.
      slot: int32 [B, N], index of the image's first token in its row; -1 where there is no image.
      example: int32 [B, N], the image's own number, from which its noise is drawn.
      noise_limit: float32 [B, N], the largest share of the noise schedule; 0 keeps the image clean.
      weight: float32 [B, N], its weight in the image loss.
    """

    values: Any
    slot: Any
    example: Any
    noise_limit: Any
    weight: Any


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Batch:
    """Packed rows.

    Attributes:
      streams: {name: Tokens}, each [B, L_s].
      images: {bucket: ImageSet}.
    """

    streams: dict[str, Tokens]
    images: dict[str, ImageSet]

    @property
    def rows(self) -> int:
        return next(iter(self.streams.values())).ids.shape[0]


@dataclasses.dataclass(frozen=True)
class Budget:
    """How much fits into one row.

    Attributes:
      tokens: {stream: L}.
      images: {bucket: (N, (H, W, C))}.
    """

    tokens: Mapping[str, int]
    images: Mapping[str, tuple[int, tuple[int, int, int]]]

    def used(self, layout: Layout) -> dict[str, int]:
        """What one layout takes of each budget: {"tokens/<stream>": n, "images/<bucket>": n}."""
        used = {f"tokens/{name}": len(stream) for name, stream in layout.streams.items()}
        for image in layout.images:
            used[f"images/{image.bucket}"] = used.get(f"images/{image.bucket}", 0) + 1
        return used

    def check(self, layout: Layout) -> dict[str, int]:
        """`used` of a layout; raises InputError if it does not fit into an empty row."""
        used, limits = self.used(layout), self.limits()
        for name, amount in used.items():
            if amount > limits.get(name, 0):
                raise InputError(f"{layout.name}: needs {amount} of {name}, a row has {limits.get(name, 0)}")
        return used

    def limits(self) -> dict[str, int]:
        """The budgets under the names of `used`."""
        limits = {f"tokens/{name}": length for name, length in self.tokens.items()}
        return limits | {f"images/{name}": count for name, (count, _) in self.images.items()}


def build_batch(rows: Sequence[Sequence[Layout]], budget: Budget) -> Batch:
    """Place the layouts of each row one behind the other; the rest of a row is filler.

    Raises:
      ValueError: if a row exceeds its budget, an image has another shape than its bucket, or a document would be seen
        by the next one in its row.
    """
    streams = {name: _empty_tokens(len(rows), length) for name, length in budget.tokens.items()}
    images = {name: _empty_images(len(rows), *shape) for name, shape in budget.images.items()}
    for b, row in enumerate(rows):
        _fill_row(streams, images, b, row)
    return Batch(streams, images)


def _empty_tokens(rows: int, length: int) -> Tokens:
    zeros = lambda: np.zeros((rows, length), np.int32)  # noqa: E731
    places = np.full((rows, length), -1, np.int32)
    weights = np.zeros((rows, length), np.float32)
    return Tokens(zeros(), places, Intervals(zeros(), zeros()), zeros(), zeros(), weights)


def _empty_images(rows: int, count: int, shape: tuple[int, int, int]) -> ImageSet:
    return ImageSet(
        values=np.zeros((rows, count, *shape), np.float32),
        slot=np.full((rows, count), -1, np.int32),
        example=np.zeros((rows, count), np.int32),
        noise_limit=np.zeros((rows, count), np.float32),
        weight=np.zeros((rows, count), np.float32),
    )


def _fill_row(streams: dict[str, Tokens], images: dict[str, ImageSet], b: int, row: Sequence[Layout]) -> None:
    """Write the layouts of one row, a stream at a time: rows of many small documents are made quickly."""
    for layout in row[:-1]:
        if not layout.continues:
            _check_closed(layout)
    starts: list[dict[str, int]] = []  # of each document, where it begins in each stream
    ends = dict.fromkeys(streams, 0)
    for layout in row:
        starts.append(dict(ends))
        for name, source in layout.streams.items():
            if name not in streams:
                raise ValueError(f"{layout.name}: no budget for tokens of stream {name!r}; there is {sorted(streams)}")
            ends[name] += len(source)
            if ends[name] > streams[name].length:
                limit = streams[name].length
                raise ValueError(f"{layout.name}: {ends[name]} tokens in stream {name!r}, the row has {limit}")
    offsets = np.cumsum([0, *(layout.length for layout in row[:-1])], dtype=np.int32)
    for name, target in streams.items():
        held = [(offset, layout) for offset, layout in zip(offsets, row) if name in layout.streams]
        parts = [(offset, offset * layout.continues, layout.streams[name]) for offset, layout in held]
        if parts:
            _write(target, b, *zip(*parts))
    counts = dict.fromkeys(images, 0)
    for layout, start in zip(row, starts):
        for image in layout.images:
            _place_image(images, counts, b, image, layout, start[image.stream])


def _check_closed(layout: Layout) -> None:
    """The tokens of a document that another one follows keep to its own places."""
    for name, source in layout.streams.items():
        furthest = max(source.places.max(initial=-1) + 1, source.intervals.end.max(initial=0))
        if furthest > layout.length:
            raise ValueError(
                f"{layout.name}: stream {name!r} reaches beyond the document's {layout.length} places into the next "
                "document of the row (a prompt with open keys stands last)"
            )


def _write(
    target: Tokens, b: int, offsets: Sequence[int], turns: Sequence[int], sources: Sequence[StreamLayout]
) -> None:
    """Write the documents of one row and stream one behind the other, places `offsets` further, positions `turns`."""
    join = np.concatenate
    shift, turn = (np.repeat(by, [len(s) for s in sources]) for by in (offsets, turns))
    n = len(shift)
    target.ids[b, :n] = join([s.ids for s in sources])
    target.positions[b, :n] = join([s.positions for s in sources]) + turn
    target.labels[b, :n], target.weights[b, :n] = join([s.labels for s in sources]), join([s.weights for s in sources])
    places, end = join([s.places for s in sources]), join([s.intervals.end for s in sources])
    target.places[b, :n] = np.where(places < 0, places, places + shift)  # -1 sees nothing, wherever it is
    target.intervals.start[b, :n] = join([s.intervals.start for s in sources]) + shift
    target.intervals.end[b, :n] = np.where(end == OPEN, OPEN, end + shift)


def _place_image(images: dict, counts: dict, b: int, image, layout: Layout, start: int) -> None:
    if image.bucket not in images:
        raise ValueError(f"{layout.name}: no budget for images of bucket {image.bucket!r}; there is {sorted(images)}")
    target, i = images[image.bucket], counts[image.bucket]
    if i >= target.slot.shape[1]:
        raise ValueError(f"{layout.name}: more than {i} images of bucket {image.bucket!r} in a row")
    if image.values.shape != target.values.shape[2:]:
        raise ValueError(f"{layout.name}: image {image.values.shape} in a bucket of {target.values.shape[2:]}")
    target.values[b, i] = image.values
    target.slot[b, i] = start + image.slot
    target.example[b, i] = (int(layout.example) * ORDERS + image.order) % 2**31
    target.noise_limit[b, i] = image.noise_limit
    target.weight[b, i] = image.weight
    counts[image.bucket] = i + 1
