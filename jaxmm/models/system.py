"""What the shared machinery asks of a system."""

import dataclasses
from collections.abc import Callable, Mapping
from typing import Any, Protocol

import jax
import numpy as np

from jaxmm.layers.losses import Mean
from jaxmm.layers.parameters import Blueprint, Params
from jaxmm.sequence import Batch, Document, Layout
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

    def draw(self, prompt: str | None) -> Layout:
        """A prompt that ends where an image begins; None is the unconditional prompt of guidance."""
        ...

    def describe(self, pixels: np.ndarray) -> Layout:
        """A prompt that shows an image and ends where its description begins."""
        ...


class Decoder(Protocol):
    """How a system continues prompts."""

    def draw(self, params: Params, prompts: list[Layout], unconditional: list[Layout], seeds: np.ndarray, options: Any):
        """One image per prompt: pixels float32 [B, H, W, C] in [-1, 1]."""
        ...

    def describe(self, params: Params, prompts: list[Layout], seeds: np.ndarray, options: Any) -> list[list[int]]:
        """The ids that follow each prompt, up to its end."""
        ...


@dataclasses.dataclass(frozen=True)
class System:
    """One system.

    Attributes:
      name: of its folder.
      config: the frozen dataclass of sizes.
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


LossFunction = Callable[[Params, Batch, jax.Array], tuple[dict[str, Mean], dict[str, jax.Array]]]
