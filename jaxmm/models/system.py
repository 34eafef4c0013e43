"""What the shared machinery asks of a system."""

import dataclasses
from collections.abc import Callable, Collection, Mapping
from typing import Any, Protocol

import jax
import numpy as np

from jaxmm.layers.parameters import Blueprint, Params
from jaxmm.sequence import Budget, Document, Layout
from jaxmm.transformer import TokenSampler
from jaxmm.weights import Table


class Tokenizer(Protocol):
    """What a layout needs of a tokenizer (`jaxmm.data.tokenizers` makes one)."""

    def encode(self, text: str) -> list[int]: ...

    def decode(self, ids: list[int]) -> str: ...


class Layouts(Protocol):
    """How a system writes documents and prompts as tokens."""

    def train(self, document: Document, rng: np.random.Generator) -> Layout:
        """A document to learn from; `rng` decides what a recipe leaves to chance."""
        ...

    def budget(self, tokens: int, images: int, kinds: Collection[str] = ("pixels",)) -> Budget:
        """What a packed row holds: tokens of the text stream, and images of the model's size as "pixels", "latents"."""
        ...

    def draw(self, prompt: str | None) -> Layout:
        """A prompt that ends where an image begins; None is the unconditional prompt of guidance."""
        ...

    def prompt(self, prompt: str) -> Layout:
        """Text that goes on with whatever the model writes or draws."""
        ...

    def describe(self, pixels: np.ndarray) -> Layout:
        """A prompt that shows an image and ends where its description begins."""
        ...


class Decoder(Protocol):
    """How a system continues prompts, a batch of rows at a time.

    `keys` are one per row; `options` are the system's `draw_options`; `place` puts a batch on the devices.
    """

    def draw(
        self, params: Params, prompts: list[Layout], unconditional: list[Layout], keys: jax.Array, options: Any, place
    ) -> np.ndarray:
        """One image per prompt: pixels float32 [B, H, W, C], nominally in [-1, 1]."""
        ...

    def describe(
        self, params: Params, prompts: list[Layout], keys: jax.Array, sampler: TokenSampler, limit: int, place
    ) -> list[list[int]]:
        """The ids that follow each prompt, up to its end or `limit` tokens."""
        ...

    def complete(
        self,
        params: Params,
        prompts: list[Layout],
        keys: jax.Array,
        sampler: TokenSampler,
        options: Any,
        limit: int,
        images: int,
        place,
    ) -> list[list]:
        """Ids and images (float32 [H, W, C]) that follow each prompt."""
        ...


@dataclasses.dataclass(frozen=True)
class System:
    """One system.

    Attributes:
      name: of its folder.
      config: the frozen dataclass of sizes. Besides them it tells `image_size`, `pixel_channels`, `text_vocab_size`
        (text may use the ids below it) and `codec`, and has the classmethod `from_dict`.
      presets: the published sizes.
      blueprint: config -> network; the network has `loss(batch, key) -> ({term: Mean}, intermediates)`.
      layouts: (config, tokenizer, recipe options) -> Layouts.
      decoder: (config, blueprint) -> Decoder.
      recipe: dataclass of what training leaves to chance: the keyword arguments of `layouts`.
      draw_options: dataclass of the options of drawing.
      table: (config, blueprint) -> weights table under the official keys.
      term_weights: config -> {loss term: weight in the total}.
    """

    name: str
    config: type
    presets: Mapping[str, Any]
    blueprint: Callable[[Any], Blueprint]
    layouts: Callable[..., Layouts]
    decoder: Callable[[Any, Blueprint], Decoder]
    recipe: type
    draw_options: type
    table: Callable[[Any, Blueprint], Table]
    term_weights: Callable[[Any], dict[str, float]]
