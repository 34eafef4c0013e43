"""One document as tokens: what a system's `layout.py` makes and the packer packs."""

import dataclasses

import numpy as np

from jaxmm.sequence.intervals import Intervals, causal


@dataclasses.dataclass(frozen=True)
class StreamLayout:
    """The tokens of one document in one stream, in memory order; every field int32 [L] unless said otherwise.

    Attributes:
      ids: token ids; tokens of an image slot hold any valid id, which nothing reads.
      places: order of the queries within the document, from 0; -1 sees nothing.
      intervals: from where each token may be seen as a key, in places of the document.
      positions: rotary positions.
      labels: the id that the token should predict; no model shifts it.
      weights: float32 [L], the weight of that label in the loss; 0 for none.
    """

    ids: np.ndarray
    places: np.ndarray
    intervals: Intervals
    positions: np.ndarray
    labels: np.ndarray
    weights: np.ndarray

    def __len__(self) -> int:
        return len(self.ids)


@dataclasses.dataclass(frozen=True)
class ImageSlot:
    """One image of a document and the run of tokens that stands for it.

    Attributes:
      values: float32 [H, W, C]: pixels in [-1, 1] or latents.
      bucket: name of the set of images of this shape that it belongs to.
      slot: index of its first token in its stream.
      stream: the stream that its tokens are in.
      noise_limit: the largest share of the noise schedule that training may add; 0 keeps the image clean.
      weight: its weight in the image loss; 0 for none.
      order: which image of its document it is, for its own noise.
    """

    values: np.ndarray
    bucket: str
    slot: int
    stream: str = "tokens"
    noise_limit: float = 1.0
    weight: float = 1.0
    order: int = 0


@dataclasses.dataclass(frozen=True)
class Layout:
    """One document: streams of tokens, image slots, and how many places it takes.

    Attributes:
      streams: {name: StreamLayout}.
      images: the slots, in the order of reading.
      length: the number of places; several documents of a row follow each other by it.
      example, name: of the document.
      piece: which run of the document it is, if the document was `cut`.
      continues: whether the documents of a row are one text: keys may stay open to those behind it, and its rotary
        positions go on from its place in the row.
    """

    streams: dict[str, StreamLayout]
    images: tuple[ImageSlot, ...] = ()
    length: int = 0
    example: int = 0
    name: str = ""
    piece: int = 0
    continues: bool = False


def cut(layout: Layout, limit: int) -> list[Layout]:
    """Cut a document of causal text alone into runs of at most `limit` tokens; any other comes back whole.

    A run sees nothing of the one before it and its positions begin at 0; labels and weights stay as they are, so that
    the last token of a run still learns the first of the next, and nothing is lost.
    """
    if layout.images or len(layout.streams) != 1 or layout.length <= limit:
        return [layout]
    ((name, whole),) = layout.streams.items()
    places = np.arange(layout.length, dtype=np.int32)
    in_order = np.array_equal(whole.places, places) and np.array_equal(whole.intervals.start, places)
    if not in_order or not np.all(whole.intervals.end == layout.length):
        return [layout]
    pieces = []
    for first in range(0, layout.length, limit):
        run = slice(first, first + limit)
        size = len(whole.ids[run])
        positions = whole.positions[run] - whole.positions[first]
        stream = StreamLayout(
            whole.ids[run], places[:size], causal(0, size, size), positions, whole.labels[run], whole.weights[run]
        )
        pieces.append(Layout({name: stream}, (), size, layout.example, layout.name, len(pieces)))
    return pieces
