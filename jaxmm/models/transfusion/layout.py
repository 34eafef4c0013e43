"""Documents and prompts as tokens (specification sections 2.4, 4, 5.1, 5.4, 5.5)."""

import dataclasses
from collections.abc import Collection, Sequence

import numpy as np

from jaxmm.errors import InputError
from jaxmm.models.system import Tokenizer
from jaxmm.models.transfusion.config import TransfusionConfig
from jaxmm.sequence import (
    OPEN,
    Budget,
    Document,
    Image,
    ImageSlot,
    Latents,
    Layout,
    StreamLayout,
    Text,
    causal,
)


@dataclasses.dataclass(frozen=True)
class Recipe:
    """What training leaves to chance.

    Attributes:
      image_first: share of the captioned images whose image comes first; the others have the caption first.
      noise_limit: for images that come first, the share of the noise schedule that is used; 1 is no limit.
      caption_dropout: share of the captions before an image that are dropped, for guidance.
    """

    image_first: float = 0.2
    noise_limit: float = 0.5
    caption_dropout: float = 0.1


@dataclasses.dataclass(frozen=True)
class Picture:
    """An image among the parts of a document, see `ImageSlot`; `scale` is the pixels per value along a side."""

    values: np.ndarray
    noise_limit: float = 1.0
    weight: float = 1.0
    bucket: str | None = None
    scale: int = 1

    def patches(self, c: TransfusionConfig) -> int:
        height, width = self.values.shape[:2]
        return c.patches(height * self.scale, width * self.scale)


class TransfusionLayouts:
    """Writes `BOS text BOI patches EOI text EOS`.

    Args:
      config: of the model.
      tokenizer: of the text, without special tokens.
      recipe: keyword arguments of `Recipe`.
    """

    def __init__(self, config: TransfusionConfig, tokenizer: Tokenizer, **recipe):
        self.config, self.tokenizer, self.recipe = config, tokenizer, Recipe(**recipe)

    def train(self, document: Document, rng: np.random.Generator) -> Layout:
        """A document to learn from: a caption and its image in either order, or any other sequence as it stands."""
        c, segments = self.config, list(document.segments)
        chances = rng.random(2)
        limit, dropped = 1.0, False
        if sorted(isinstance(s, Text) for s in segments) == [False, True]:
            segments.sort(key=lambda s: isinstance(s, Text) == (chances[0] < self.recipe.image_first))
            dropped = isinstance(segments[0], Text) and chances[1] < self.recipe.caption_dropout
            if not isinstance(segments[0], Text):
                limit = self.recipe.noise_limit
        parts = [c.bos_id]
        for segment in segments:
            if isinstance(segment, Text):
                ids = self.tokenizer.encode(segment.text)
                parts += _null(c, len(ids)) if dropped else ids
            else:
                parts += self._picture(segment, limit)
        return arrange(c, [*parts, c.eos_id], example=document.example, name=document.name)

    def budget(self, tokens: int, images: int, kinds: Collection[str] = ("pixels",)) -> Budget:
        """A row of so many tokens, and so many images of the model's size of each kind: "pixels", "latents"."""
        c = self.config
        height, width = c.image_size
        buckets = {}
        if "pixels" in kinds:
            shape = (height, width, c.pixel_channels)
            buckets[bucket_name(shape)] = (images, shape)
        if "latents" in kinds:
            shape = (height // c.downscale, width // c.downscale, self._moment_channels())
            buckets[moments_name(shape)] = (images, shape)
        return Budget({"tokens": tokens}, buckets)

    def draw(self, prompt: str | None) -> Layout:
        """`BOS caption BOI`; the unconditional prompt has no caption."""
        c = self.config
        parts = [c.bos_id, *(self.tokenizer.encode(prompt) if prompt else []), c.boi_id]
        layout = arrange(c, parts, end=OPEN, name=f"prompt {prompt!r}")
        return self._fitting(layout, c.patches(*c.image_size) + 1)

    def describe(self, pixels: np.ndarray) -> Layout:
        """`BOS BOI image EOI`, the image clean."""
        c = self.config
        parts = [c.bos_id, *self._picture(Image(pixels, role="context"), 0.0)]
        return self._fitting(arrange(c, parts, end=OPEN, name="image"), 1)

    def prompt(self, prompt: str) -> Layout:
        """`BOS prompt`: what follows may be text, images, and text again."""
        c = self.config
        return self._fitting(arrange(c, [c.bos_id, *self.tokenizer.encode(prompt)], end=OPEN, name=f"{prompt!r}"), 1)

    def _picture(self, image: Image | Latents, limit: float) -> list:
        given = image.role == "context"
        chances = (0.0, 0.0) if given else (limit, 1.0)
        if isinstance(image, Latents):
            if image.moments.shape[-1] != self._moment_channels():
                raise InputError(f"cached latents of shape {image.moments.shape} are none of this model's codec")
            picture = Picture(image.moments, *chances, moments_name(image.moments.shape), self.config.downscale)
        else:
            picture = Picture(to_values(image.pixels), *chances)
        return [self.config.boi_id, picture, self.config.eoi_id]

    def _moment_channels(self) -> int:
        if self.config.moment_channels is None:
            raise InputError("this model cannot read cached latents: its pixels cannot be told from them")
        return self.config.moment_channels

    def _fitting(self, layout: Layout, more: int) -> Layout:
        needed = layout.length + more
        if needed > self.config.context:
            raise InputError(
                f"{layout.name}: {needed} tokens with what follows, the context holds {self.config.context}"
            )
        return layout


def to_values(pixels: np.ndarray) -> np.ndarray:
    """uint8 [H, W, C] -> float32 in [-1, 1]."""
    return pixels.astype(np.float32) / 127.5 - 1.0


def bucket_name(shape: Sequence[int]) -> str:
    """Images of one height and width share a bucket: "256x256"."""
    return f"{shape[0]}x{shape[1]}"


def moments_name(shape: Sequence[int]) -> str:
    """The bucket of cached moments: "32x32x16"; their channels tell them from pixels."""
    return "x".join(map(str, shape))


def arrange(
    c: TransfusionConfig, parts: Sequence[int | Picture], *, end: int | None = None, example: int = 0, name: str = ""
) -> Layout:
    """Lay out ids and pictures one behind the other; places count all elements.

    Args:
      c: of the model.
      parts: token ids and pictures.
      end: the place at which the document ends; `OPEN` for a prompt. By default, behind its last token.
      example, name: of the document.

    Returns:
      The layout with its labels: the next token where both are text, except after BOI.
    """
    ids, images = [], []
    for part in parts:
        if isinstance(part, Picture):
            bucket, limit = part.bucket or bucket_name(part.values.shape), part.noise_limit
            slot = ImageSlot(part.values, bucket, len(ids), noise_limit=limit, weight=part.weight, order=len(images))
            images.append(slot)
            ids += [c.pad_id] * part.patches(c)
        else:
            ids.append(part)
    length = len(ids)
    if end is None:
        end = length if c.document_mask else OPEN
    places, in_image = np.arange(length, dtype=np.int32), np.zeros(length, bool)
    intervals = causal(0, length, end)
    for slot, picture in zip(images, (part for part in parts if isinstance(part, Picture))):
        patches = slice(slot.slot, slot.slot + picture.patches(c))
        in_image[patches] = True
        if c.bidirectional:
            intervals.start[patches] = slot.slot  # they see each other
    ids = np.array(ids, np.int32)
    labels, weights = _labels(c, ids, in_image)
    stream = StreamLayout(ids, places, intervals, _positions(c, places, images, in_image), labels, weights)
    return Layout({"tokens": stream}, tuple(images), length, example, name, continues=not c.document_mask)


def _positions(c: TransfusionConfig, places: np.ndarray, images: list[ImageSlot], in_image: np.ndarray) -> np.ndarray:
    """Rotary positions: the places, or with `image_positions` "shared" one position for all patches of an image."""
    if c.image_positions != "shared":
        return places
    new = ~in_image
    new[[image.slot for image in images]] = True
    return np.cumsum(new, dtype=np.int32) - 1


def unconditional_prompt(c: TransfusionConfig, prompt: Layout) -> Layout:
    """What guidance goes on from instead of a prompt: `BOS BOI`, or with `null_id` the prompt, each word replaced."""
    if c.null_id is None:
        return arrange(c, [c.bos_id, c.boi_id], end=OPEN)
    ids, kept = prompt.streams["tokens"].ids, (c.bos_id, c.eos_id, c.boi_id, c.eoi_id)
    parts, start = [], 0
    pictures = {image.slot: Picture(image.values, image.noise_limit, image.weight) for image in prompt.images}
    while start < len(ids):
        picture, token = pictures.get(start), int(ids[start])
        parts.append(picture or (token if token in kept else c.null_id))
        start += c.patches(*picture.values.shape[:2]) if picture else 1
    if parts[-1] != c.boi_id:
        parts.append(c.boi_id)
    return arrange(c, parts, end=OPEN, name=prompt.name)


def _null(c: TransfusionConfig, count: int) -> list[int]:
    """A dropped caption of so many words."""
    return [] if c.null_id is None else [c.null_id] * count


def _labels(c: TransfusionConfig, ids: np.ndarray, in_image: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Next-token labels and their weights: none at patches, at BOI, before a patch or a dropped word, or at the end."""
    labels, before_image = np.zeros_like(ids), np.ones_like(in_image)
    labels[:-1], before_image[:-1] = ids[1:], in_image[1:]
    counted = ~(in_image | before_image | (ids == c.boi_id))
    if c.null_id is not None:
        counted &= labels != c.null_id
    return labels * counted, counted.astype(np.float32)
