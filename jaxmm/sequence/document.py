"""What a person would recognise: text and images, in the order of reading."""

import dataclasses

import numpy as np


@dataclasses.dataclass(frozen=True)
class Text:
    """A run of text.

    Attributes:
      text: the words themselves.
      role: what the text is to its document ("caption", "question", "answer", ...); systems say which roles they know.
      alternatives: other texts that would do as well (captions by other people); the data pipeline draws one of all of
        them for each reading, and systems see no alternatives.
    """

    text: str
    role: str = "caption"
    alternatives: tuple[str, ...] = ()


@dataclasses.dataclass(frozen=True)
class Image:
    """One image.

    Attributes:
      pixels: uint8 [H, W, C], C = 1 or 3.
      role: "target" (to be drawn: noised and trained on) or "context" (given: clean).
    """

    pixels: np.ndarray
    role: str = "target"


@dataclasses.dataclass(frozen=True)
class Latents:
    """One image as a frozen codec has read it.

    Attributes:
      moments: float32 [h, w, 2 C], mean and log-variance of the unscaled latents.
      role: as of an `Image`.
    """

    moments: np.ndarray
    role: str = "target"


@dataclasses.dataclass(frozen=True)
class Document:
    """Segments in the order of reading.

    Attributes:
      segments: text and images.
      example: a number that stays the same whatever row, batch or host the document lands in; the noise of its images
        is drawn from it.
      name: where it comes from (file and line, index), for messages.
    """

    segments: tuple[Text | Image | Latents, ...]
    example: int = 0
    name: str = ""
