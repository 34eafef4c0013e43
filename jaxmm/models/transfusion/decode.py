"""The mixed-modal loop (specification section 7): text until BOI, then an image, then text again.

Rows are continued together. A row that has nothing to do in a step writes filler, which nobody sees, so that each row
gets what it would get alone.
"""

import collections
import dataclasses
import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int

from jaxmm.attention import KVCache
from jaxmm.diffusion import guidance
from jaxmm.layers.parameters import Blueprint, Params
from jaxmm.models.transfusion.config import TransfusionConfig
from jaxmm.models.transfusion.layout import unconditional_prompt
from jaxmm.models.transfusion.model import STREAM, Noised, Patches, Transfusion
from jaxmm.models.transfusion.objective import SolverOptions, check_solver, make_objective
from jaxmm.sequence import OPEN, Batch, Budget, ImageSet, Intervals, Layout, Tokens, build_batch
from jaxmm.transformer import TokenSampler

PROMPT_STEP = 16  # prompts are padded to a multiple of it, so that few lengths are compiled


class Rows(NamedTuple):
    """Prompts that have been read.

    Attributes:
      cache: keys and values of all that was read.
      place, position: int32 [B], of the next token of each row.
      logits: float32 [B, V], for the next token.
    """

    cache: KVCache
    place: Int[Array, "B"]
    position: Int[Array, "B"]
    logits: Float[Array, "B V"]


def read(model: Transfusion, batch: Batch, slots: int, dtype=jnp.float32) -> Rows:
    """Read prompts; their images are clean. `slots` is the capacity of the cache."""
    tokens = batch.streams[STREAM]
    clean = make_objective(model.config).clean
    images = {
        bucket: Noised(model.encode(x), jnp.full(x.slot.shape, clean, jnp.float32))
        for bucket, x in batch.images.items()
    }
    cache = model.transformer.empty_cache(batch.rows, slots, dtype)
    output, _ = model(batch, images, cache, dtype)
    last = jnp.argmax(tokens.places, axis=1)
    logits = jnp.take_along_axis(output.logits, last[:, None, None], axis=1)[:, 0]
    position = jnp.take_along_axis(tokens.positions, last[:, None], axis=1)[:, 0] + 1
    return Rows(output.cache.keep(tokens.length), jnp.max(tokens.places, axis=1) + 1, position, logits)


def append(model: Transfusion, rows: Rows, ids: Int[Array, "B"], active: Bool[Array, "B"], dtype=jnp.float32) -> Rows:
    """Write one token behind each active row."""
    batch = Batch({STREAM: _new_tokens(rows, ids[:, None], active)}, {})
    output, _ = model(batch, {}, rows.cache, dtype)
    logits = jnp.where(active[:, None], output.logits[:, 0], rows.logits)
    return Rows(output.cache.keep(1), rows.place + active, rows.position + active, logits)


def predict_image(
    model: Transfusion, rows: Rows, latents: Float[Array, "B 1 H W C"], time: Array, active: Array, dtype=jnp.float32
) -> tuple[Float[Array, "B 1 H W C"], KVCache]:
    """One evaluation of the network for an image behind each active row; the cache holds its keys, not kept."""
    return predict_patches(model, rows, model.encode_patches(Noised(latents, time), dtype)[0], active, dtype)


def predict_patches(
    model: Transfusion, rows: Rows, patches: Patches, active: Bool[Array, "B"], dtype=jnp.float32
) -> tuple[Float[Array, "B 1 H W C"], KVCache]:
    """As `predict_image`, of an image that is behind the patch encoder."""
    c = model.config
    b, _, count, _ = patches.values.shape
    tokens = _new_tokens(rows, jnp.full((b, count), c.pad_id, jnp.int32), active, image=c)
    slot = jnp.where(active, 0, -1)[:, None]
    nothing = jnp.zeros((b, 1))
    images = {"image": ImageSet(None, slot, slot, nothing, nothing)}
    output, _ = model.read(Batch({STREAM: tokens}, images), {"image": patches}, rows.cache, dtype)
    return output.predictions["image"], output.cache


def draw_latents(
    model: Transfusion,
    rows: Rows,
    guide: Rows | None,
    noise: Float[Array, "B 1 H W C"],
    fresh_noise,
    active: Bool[Array, "B"],
    options: SolverOptions,
    indices=None,
    dtype=jnp.float32,
) -> tuple[Float[Array, "B 1 H W C"], Array, Noised]:
    """Denoise an image behind each active row; each step overwrites the last one's patches.

    In each step the image is encoded once, for both branches of guidance: they differ in their text alone.

    Args:
      model, rows: the network and what it has read.
      guide: the unconditional prompts, read into a cache of the same capacity; None is no guidance.
      noise: the initial noise.
      fresh_noise: step number -> noise of the same shape.
      active: rows that draw.
      options, indices: see `objective.DDPM.solve`.

    Returns:
      latents, the state after each step [steps, B, 1, H, W, C], and what the last evaluation saw.
    """
    both = rows if guide is None else join(rows, guide)
    copies = 1 if guide is None else 2
    active = jnp.tile(active, copies)

    def predict(x, t):
        patches, _ = model.encode_patches(Noised(x, t), dtype)
        patches = jax.tree.map(lambda y: jnp.tile(y, (copies, *[1] * (y.ndim - 1))), patches)
        prediction, _ = predict_patches(model, both, patches, active, dtype)
        return prediction if guide is None else guidance.classifier_free(*jnp.split(prediction, 2), options.guidance)

    latents, states, times = make_objective(model.config).solve(predict, noise, fresh_noise, options, indices)
    last = states[-2] if len(states) > 1 else noise
    return latents, states, Noised(last, jnp.full(noise.shape[:2], times[-1]))


def keep_image(
    model: Transfusion, rows: Rows, latents: Array, active: Array, dtype=jnp.float32, time: Array | None = None
) -> Rows:
    """Write an image and EOI behind each active row; it is clean unless `time` [B, 1] says otherwise."""
    c = model.config
    if time is None:
        time = jnp.full(latents.shape[:2], make_objective(c).clean, jnp.float32)
    patches, _ = model.encode_patches(Noised(latents, time), dtype)
    _, cache = predict_patches(model, rows, patches, active, dtype)
    count = patches.values.shape[2]
    taken = count if c.image_positions == "counter" else 1
    rows = Rows(cache.keep(count), rows.place + count * active, rows.position + taken * active, rows.logits)
    return append(model, rows, jnp.full(active.shape, c.eoi_id, jnp.int32), active, dtype)


def write_text(
    model: Transfusion,
    rows: Rows,
    keys: jax.Array,
    active: Bool[Array, "B"],
    count: int,
    sampler: TokenSampler,
    stop: tuple[int, ...],
    dtype=jnp.float32,
) -> tuple[Rows, Int[Array, "B count"]]:
    """Write up to `count` tokens behind each active row, through the first of the `stop` ids.

    Returns:
      the rows, and the ids written; -1 where a row had nothing to write.
    """

    def more(state):
        _, active, _, step = state
        return (step < count) & jnp.any(active)

    def body(state):
        rows, active, ids, step = state
        token = sampler(jax.vmap(jax.random.fold_in)(keys, rows.place), rows.logits)
        ids = ids.at[:, step].set(jnp.where(active, token, -1))
        rows = append(model, rows, token, active, dtype)
        return rows, active & ~jnp.isin(token, jnp.asarray(stop, jnp.int32)), ids, step + 1

    ids = jnp.full((len(active), count), -1, jnp.int32)
    rows, _, ids, _ = jax.lax.while_loop(more, body, (rows, active, ids, jnp.int32(0)))
    return rows, ids


def join(rows: Rows, guide: Rows) -> Rows:
    """Rows and their unconditional partners as one batch, writing at the same memory slots."""
    a, b = rows.cache, guide.cache
    cache = KVCache(
        jnp.concatenate([a.keys, b.keys], axis=1),
        jnp.concatenate([a.values, b.values], axis=1),
        Intervals(*(jnp.concatenate(pair) for pair in zip(a.intervals, b.intervals))),
        jnp.maximum(a.used, b.used),
    )
    return Rows(cache, *(jnp.concatenate(pair) for pair in zip(rows[1:], guide[1:])))


def _new_tokens(
    rows: Rows, ids: Int[Array, "B L"], active: Bool[Array, "B"], *, image: TransfusionConfig | None = None
) -> Tokens:
    """Tokens that follow each row: text, or one image of a model of the config `image`."""
    count = jnp.arange(ids.shape[1])
    places, positions = rows.place[:, None] + count, rows.position[:, None] + count
    if image is not None and image.image_positions == "shared":
        positions = jnp.broadcast_to(rows.position[:, None], positions.shape)
    together = image is not None and image.bidirectional
    start = jnp.broadcast_to(rows.place[:, None], places.shape) if together else places
    here = active[:, None]
    intervals = Intervals(jnp.where(here, start, 0), jnp.where(here, jnp.full_like(places, OPEN), 0))
    none = jnp.zeros_like(ids)
    return Tokens(ids, jnp.where(here, places, -1), intervals, positions, none, none)


class TransfusionDecoder:
    """The tasks, compiled: draw, describe, and free continuation.

    Args:
      config: of the model.
      blueprint: of the model.
      dtype: the format of activations and caches.
    """

    def __init__(self, config: TransfusionConfig, blueprint: Blueprint, dtype=jnp.float32):
        self.config, self.dtype = config, dtype
        bind = blueprint.bind

        @functools.partial(jax.jit, static_argnums=2)
        def read_(params, batch, slots):
            return read(bind(params), batch, slots, dtype)

        @functools.partial(jax.jit, static_argnums=(4, 5, 6))
        def write_(params, rows, keys, active, count, sampler, stop):
            return write_text(bind(params), rows, keys, active, count, sampler, stop, dtype)

        @functools.partial(jax.jit, static_argnums=5)
        def draw_(params, rows, guide, keys, active, options):
            return self._draw(bind(params), rows, guide, keys, active, options)

        @jax.jit
        def keep_(params, rows, latents, active, time):
            return keep_image(bind(params), rows, latents, active, dtype, time)

        self._read, self._write, self._image, self._keep = read_, write_, draw_, keep_

    def draw(
        self,
        params: Params,
        prompts: list[Layout],
        unconditional: list[Layout],
        keys: jax.Array,
        options: SolverOptions,
        place=lambda batch: batch,
    ) -> Float[np.ndarray, "B H W C"]:
        """One image per prompt that ends with BOI.

        Args:
          params: of the whole model, codec included.
          prompts, unconditional: from `TransfusionLayouts.draw` and their partners for guidance.
          keys: one per row; they decide the noise.
          options: of the solver.
          place: puts a batch on the devices.

        Returns:
          pixels, nominally in [-1, 1].
        """
        check_solver(make_objective(self.config), options)
        slots = _padded(max(p.length for p in [*prompts, *unconditional])) + self._patches
        rows = self._read(params, place(prompt_batch(self.config, prompts)), slots)
        guide = None
        if self.config.null_id is not None:
            unconditional = [unconditional_prompt(self.config, prompt) for prompt in prompts]
        if options.guidance != 1:
            guide = self._read(params, place(prompt_batch(self.config, unconditional)), slots)
        return np.asarray(self._image(params, rows, guide, keys, jnp.ones(len(prompts), bool), options)[1])

    def describe(
        self,
        params: Params,
        prompts: list[Layout],
        keys: jax.Array,
        sampler: TokenSampler,
        limit: int,
        place=lambda batch: batch,
    ) -> list[list[int]]:
        """The text that follows each prompt, up to EOS or `limit` tokens; no image is begun."""
        c = self.config
        slots = _padded(max(p.length for p in prompts)) + limit
        rows = self._read(params, place(prompt_batch(c, prompts)), slots)
        sampler = dataclasses.replace(sampler, suppress=(*sampler.suppress, c.boi_id, *c.unwritten))
        _, ids = self._write(params, rows, keys, jnp.ones(len(prompts), bool), limit, sampler, (c.eos_id,))
        return [[int(i) for i in row if i not in (-1, c.eos_id)] for row in np.asarray(ids)]

    def complete(
        self,
        params: Params,
        prompts: list[Layout],
        keys: jax.Array,
        sampler: TokenSampler,
        options: SolverOptions,
        limit: int,
        images: int = 1,
        place=lambda batch: batch,
    ) -> list[list]:
        """The mixed-modal loop: what each prompt goes on with, until EOS.

        Args:
          params, prompts, keys, sampler, options, place: as above.
          limit: tokens of text between two images.
          images: the most that a row may draw.

        Returns:
          for each row a list of ids (BOI, EOI and EOS among them) and of images, float32 [H, W, C].
        """
        c = self.config
        check_solver(make_objective(c), options)
        slots = _padded(max(p.length for p in prompts)) + (images + 1) * limit + images * (self._patches + 1)
        rows = self._read(params, place(prompt_batch(c, prompts)), slots)
        empty = [unconditional_prompt(c, prompt) for prompt in prompts]
        guide = self._read(params, place(prompt_batch(c, empty)), slots) if options.guidance != 1 else None
        sampler = dataclasses.replace(sampler, suppress=(*sampler.suppress, *c.unwritten))
        parts, active = [[] for _ in prompts], np.ones(len(prompts), bool)
        for turn in range(images + 1):
            closed = (c.boi_id,) if turn == images else ()
            chosen = dataclasses.replace(sampler, suppress=(*sampler.suppress, *closed))
            rows, ids = self._write(params, rows, keys, jnp.asarray(active), limit, chosen, (c.eos_id, c.boi_id))
            for row, written in zip(parts, np.asarray(ids)):
                row += [int(i) for i in written if i >= 0]
            active = np.array([bool(on and row and row[-1] == c.boi_id) for on, row in zip(active, parts)])
            if not active.any():
                break
            turn_keys = jax.vmap(jax.random.fold_in, (0, None))(keys, turn)
            latents, pixels, last = self._image(params, rows, guide, turn_keys, jnp.asarray(active), options)
            seen, time = last if options.remember == "last" else (latents, None)
            rows = self._keep(params, rows, seen, jnp.asarray(active), time)
            for row, image, on in zip(parts, np.asarray(pixels), active):
                row += [image, c.eoi_id] if on else []
        return parts

    @property
    def _patches(self) -> int:
        return self.config.patches(*self.config.image_size)

    def _draw(self, model, rows, guide, keys, active, options):
        c = self.config
        shape = (1, *(side // c.downscale for side in c.image_size), c.latent_channels)

        def normal(number):
            return jax.vmap(lambda key: jax.random.normal(jax.random.fold_in(key, number), shape))(keys)

        latents, _, last = draw_latents(
            model, rows, guide, normal(0), lambda step: normal(step + 1), active, options, dtype=self.dtype
        )
        return latents, model.codec.decode(latents[:, 0])[0], last


def prompt_batch(c: TransfusionConfig, prompts: list[Layout]) -> Batch:
    """One prompt per row."""
    counts = [collections.Counter(image.bucket for image in prompt.images) for prompt in prompts]
    shapes = {image.bucket: image.values.shape for prompt in prompts for image in prompt.images}
    images = {bucket: (max(count[bucket] for count in counts), shape) for bucket, shape in shapes.items()}
    length = _padded(max(prompt.length for prompt in prompts))
    return build_batch([[prompt] for prompt in prompts], Budget({STREAM: length}, images))


def _padded(length: int) -> int:
    return -(-length // PROMPT_STEP) * PROMPT_STEP
