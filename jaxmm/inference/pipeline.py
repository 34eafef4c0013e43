"""The Python API: `load(path)` gives a Pipeline with `generate(prompts)` and `describe(images)`."""

import contextlib
import dataclasses
import os
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh

from jaxmm.convert import Saved
from jaxmm.convert.saved import place
from jaxmm.data.images import fit, from_values, read_image
from jaxmm.data.tokenizers import load_tokenizer
from jaxmm.errors import InputError, nearest
from jaxmm.layers.lora import AdaptedBlueprint
from jaxmm.layers.parameters import Blueprint, Params, Policy
from jaxmm.models import System
from jaxmm.sharding import rows_sharding
from jaxmm.transformer import TokenSampler


class Pipeline:
    """A model with its tokenizer and its parameters.

    Args:
      system: which of the systems.
      config: its sizes.
      params: its parameters, codec included.
      tokenizer: of its text.
      draw_options: defaults of the options of drawing.
      dtype: the format of activations.
      mesh: devices over which rows are shared; None is one device.
      blueprint: of `params`; by default that of the system.
    """

    def __init__(
        self,
        system: System,
        config: Any,
        params: Params,
        tokenizer: Any,
        *,
        draw_options: dict[str, Any] | None = None,
        dtype=jnp.float32,
        mesh: Mesh | None = None,
        blueprint: Blueprint | AdaptedBlueprint | None = None,
    ):
        self.system, self.config, self.params, self.tokenizer, self.mesh = system, config, params, tokenizer, mesh
        self.layouts = system.layouts(config, tokenizer)
        self._decoder = system.decoder(config, blueprint or system.blueprint(config), dtype)
        self._draw_options = draw_options or {}

    def generate(
        self, prompts: str | Sequence[str], *, count: int = 1, seed: int = 0, batch_size: int = 64, **options
    ) -> np.ndarray:
        """Draw images.

        Args:
          prompts: captions.
          count: images per prompt, one after the other.
          seed: image i of the answer is decided by (seed, i), whatever the batch size and the number of devices.
          batch_size: rows that are drawn together.
          options: of the system's solver (steps, guidance, ...); the checkpoint's defaults otherwise.

        Returns:
          uint8 [len(prompts) * count, H, W, C].

        Raises:
          InputError: for an unknown option, or a prompt that does not fit the context.
        """
        prompts = [prompts] if isinstance(prompts, str) else list(prompts)
        _check_counts(count=count, batch_size=batch_size)
        options = self._options(options)
        layouts = [layout for prompt in prompts for layout in [self.layouts.draw(prompt)] * count]
        empty = self.layouts.draw(None)

        def draw(chunk, keys):
            return self._decoder.draw(self.params, chunk, [empty] * len(chunk), keys, options, self._place)

        return from_values(np.concatenate(self._chunks(layouts, seed, batch_size, draw)))

    def describe(
        self,
        images: Any,
        *,
        limit: int = 64,
        temperature: float = 0.0,
        top_p: float = 1.0,
        seed: int = 0,
        batch_size: int = 64,
    ) -> list[str]:
        """Describe images.

        Args:
          images: a list of (or one of) paths, PIL images, or uint8 arrays [H, W], [H, W, 1] or [H, W, 3].
          limit: the most tokens of a description.
          temperature, top_p: of sampling; temperature 0 is greedy.
          seed, batch_size: as in `generate`.

        Raises:
          InputError: for an image that cannot be read, by its name.
        """
        single = isinstance(images, (str, os.PathLike)) or hasattr(images, "convert")
        images = [images] if single or (isinstance(images, np.ndarray) and images.ndim < 4) else list(images)
        _check_counts(limit=limit, batch_size=batch_size)
        sampler = TokenSampler(temperature, top_p)
        layouts = [self.layouts.describe(self._pixels(image)) for image in images]

        def write(chunk, keys):
            return self._decoder.describe(self.params, chunk, keys, sampler, limit, self._place)

        ids = [row for part in self._chunks(layouts, seed, batch_size, write) for row in part]
        return [self.tokenizer.decode(row) for row in ids]

    def complete(
        self,
        prompts: str | Sequence[str],
        *,
        images: int = 1,
        limit: int = 64,
        temperature: float = 0.0,
        top_p: float = 1.0,
        seed: int = 0,
        batch_size: int = 64,
        **options,
    ) -> list[list[str | np.ndarray]]:
        """Go on from text with whatever the model writes or draws.

        Args:
          prompts: beginnings.
          images: the most images per prompt.
          limit: the most tokens between two images.
          temperature, top_p, seed, batch_size: as in `describe`.
          options: of the system's solver, as in `generate`.

        Returns:
          for each prompt the parts that follow it in order: strings, and images uint8 [H, W, C].
        """
        prompts = [prompts] if isinstance(prompts, str) else list(prompts)
        _check_counts(limit=limit, batch_size=batch_size)
        if images < 0:
            raise InputError(f"images must be at least 0, not {images}")
        options, sampler = self._options(options), TokenSampler(temperature, top_p)
        layouts = [self.layouts.prompt(prompt) for prompt in prompts]

        def write(chunk, keys):
            return self._decoder.complete(self.params, chunk, keys, sampler, options, limit, images, self._place)

        return [self._parts(row) for part in self._chunks(layouts, seed, batch_size, write) for row in part]

    def _parts(self, row: list) -> list[str | np.ndarray]:
        """Runs of ids become strings; special ids vanish, and with them runs of nothing else."""
        parts, ids = [], []
        for part in [*row, None]:
            if isinstance(part, int):
                ids.append(part)
                continue
            text = self.tokenizer.decode(ids)
            parts += [text] if text else []
            parts += [] if part is None else [from_values(part)]
            ids = []
        return parts

    def _chunks(self, layouts: list, seed: int, size: int, run: Callable) -> list:
        """Run chunks of one size; the last is filled up with copies that are dropped again."""
        size = min(size, len(layouts))
        if self.mesh is not None:
            size = -(-size // self.mesh.size) * self.mesh.size
        keys = jax.vmap(jax.random.fold_in, (None, 0))(jax.random.key(seed), jnp.arange(len(layouts)))
        results = []
        with jax.set_mesh(self.mesh) if self.mesh is not None else contextlib.nullcontext():
            for begin in range(0, len(layouts), size):
                index = [min(begin + i, len(layouts) - 1) for i in range(size)]
                result = run([layouts[i] for i in index], self._place(keys[np.array(index)]))
                results.append(result[: len(layouts) - begin])
        return results

    def _place(self, tree: Any) -> Any:
        """Put the rows of a batch on the devices."""
        if self.mesh is None:
            return tree
        return jax.tree.map(lambda x: jax.device_put(x, rows_sharding(self.mesh, x.shape[0])), tree)

    def _options(self, given: dict[str, Any]) -> Any:
        known = {field.name for field in dataclasses.fields(self.system.draw_options)}
        for name in given:
            if name not in known:
                raise InputError(f"unknown option {name!r}{nearest(name, known)}")
        chosen = {name: value for name, value in given.items() if value is not None}
        return self.system.draw_options(**{**self._draw_options, **chosen})

    def _pixels(self, image: Any) -> np.ndarray:
        """Any image as uint8 of the size and channels that the model reads."""
        channels, size = self.config.pixel_channels, self.config.image_size
        if isinstance(image, (str, os.PathLike)):
            return fit(read_image(image, channels), *size)
        if hasattr(image, "convert"):
            image = image.convert("L" if channels == 1 else "RGB")
        pixels = np.asarray(image)
        pixels = pixels[:, :, None] if pixels.ndim == 2 else pixels
        if pixels.ndim != 3 or pixels.dtype != np.uint8 or pixels.shape[2] not in (1, 3):
            raise InputError(f"an image is uint8 [H, W, 1 or 3], not {pixels.dtype} {list(pixels.shape)}")
        if pixels.shape[2] != channels:
            pixels = pixels[:, :, :1].repeat(3, 2) if channels == 3 else _grey(pixels)
        return fit(pixels, *size)


def load(path: str | os.PathLike, *, policy: str = "auto", mesh: Mesh | None = None) -> Pipeline:
    """Load a checkpoint folder: a workdir of `jaxmm train`, or what `jaxmm export --format jaxmm` writes.

    The adapters of a LoRA run are merged into the parameters of its base.

    Args:
      path: the folder.
      policy: number formats; "auto" is bfloat16 on accelerators and float32 on CPUs.
      mesh: see `Pipeline`.

    Raises:
      InputError: if it is no checkpoint, or does not fit its own description.
    """
    saved = Saved.open(path)
    if policy == "auto":
        policy = "float32" if jax.default_backend() == "cpu" else "bfloat16"
    formats = Policy.named(policy)
    where = jax.sharding.SingleDeviceSharding(jax.devices()[0]) if mesh is None else mesh
    params = saved.load(place(saved.blueprint.parameters, where))
    params = {p: x.astype(formats.params) for p, x in params.items()}
    tokenizer = load_tokenizer(saved.folder / "tokenizer")
    options = saved.description.get("draw_options", {})
    return Pipeline(
        saved.system, saved.config, params, tokenizer, draw_options=options, dtype=formats.compute, mesh=mesh
    )


def _grey(pixels: np.ndarray) -> np.ndarray:
    """ITU-R 601 luma, as PIL's conversion to "L"."""
    return np.round(pixels @ np.array([0.299, 0.587, 0.114])).astype(np.uint8)[:, :, None]


def _check_counts(**counts: int) -> None:
    for name, count in counts.items():
        if count < 1:
            raise InputError(f"{name} must be at least 1, not {count}")
