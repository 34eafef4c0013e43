"""One document as tokens: what a system's `layout.py` makes and the packer packs."""

import dataclasses

import numpy as np

from jaxmm.sequence.intervals import Intervals


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
      continues: whether the documents of a row are one text: keys may stay open to those behind it, and its rotary
        positions go on from its place in the row.
    """

    streams: dict[str, StreamLayout]
    images: tuple[ImageSlot, ...] = ()
    length: int = 0
    example: int = 0
    name: str = ""
    continues: bool = False
