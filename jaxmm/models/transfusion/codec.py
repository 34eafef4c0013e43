"""Latent patches to hidden states and back: the linear codec, and positions by row and column.

Specification sections 2.6 and 10; the U-Net codec is in `unet.py`.
"""

import jax.numpy as jnp
import numpy as np
from flax import nnx
from jaxtyping import Array, Float

from jaxmm.errors import InputError
from jaxmm.layers.linear import Linear
from jaxmm.layers.parameters import normal, param
from jaxmm.layers.patches import patchify, unpatchify
from jaxmm.models.transfusion.config import TransfusionConfig
from jaxmm.sharding import constrain_rows


class LinearPatchEncoder(nnx.Module):
    """Noised latents and their time to one hidden state per patch; there are no skip connections."""

    def __init__(self, c: TransfusionConfig, *, rngs: nnx.Rngs):
        values = c.patch_size**2 * c.latent_channels
        self.patch_size, self.channel_first = c.patch_size, c.patch_order == "channel_row_column"
        self.proj = Linear(values, c.width, ("patch", "embed"), rngs=rngs)
        pre = c.time_injection == "pre_linear"
        self.time_proj = Linear(c.time_size, values, ("time", "patch"), rngs=rngs) if pre else None

    def __call__(
        self, latents: Float[Array, "B N H W C"], time: Float[Array, "B N E"], dtype
    ) -> tuple[Float[Array, "B N P D"], tuple[()]]:
        patches, time = patchify(latents, self.patch_size), time[:, :, None]
        if self.channel_first:
            patches = _swap(patches, self.patch_size**2)
        if self.time_proj is not None:
            return constrain_rows(self.proj((patches + constrain_rows(self.time_proj(time))).astype(dtype))), ()
        return constrain_rows(self.proj(patches.astype(dtype)) + time.astype(dtype)), ()


class LinearPatchDecoder(nnx.Module):
    """Hidden states of an image's patches to a prediction on the latent grid, float32."""

    def __init__(self, c: TransfusionConfig, *, rngs: nnx.Rngs):
        self.patch_size, self.channels = c.patch_size, c.latent_channels
        self.channel_first = c.patch_order == "channel_row_column"
        self.proj = Linear(c.width, c.patch_size**2 * c.latent_channels, ("embed", "patch"), rngs=rngs)

    def __call__(
        self, hidden: Float[Array, "B N P D"], skips: tuple[()], time: Float[Array, "B N E"], height: int, width: int
    ) -> Float[Array, "B N H W C"]:
        patches = constrain_rows(self.proj(hidden)).astype(jnp.float32)
        if self.channel_first:
            patches = _swap(patches, self.channels)
        return unpatchify(patches, self.patch_size, height, width)


class GridPositions(nnx.Module):
    """What is added to each patch by its row and its column, [H, W, D]: fixed (MonoFormer) or learned."""

    def __init__(self, c: TransfusionConfig, *, rngs: nnx.Rngs):
        step = c.downscale * c.patch_size
        self.width, shape = c.width, tuple(side // step for side in c.image_size)
        learned, axes = c.grid_positions == "learned", ("patch", "patch", "embed")
        self.table = param(rngs, (*shape, c.width), axes, normal(c.init_std)) if learned else None

    def __call__(self, rows: int, columns: int) -> Float[Array, "H W D"]:
        if self.table is None:
            return jnp.asarray(grid_sincos(rows, columns, self.width))
        table = self.table[...]
        if rows > table.shape[0] or columns > table.shape[1]:
            raise InputError(f"an image of {rows} x {columns} patches: positions are learned for {table.shape[:2]}")
        return table[:rows, :columns]


def grid_sincos(rows: int, columns: int, width: int) -> Float[np.ndarray, "H W D"]:
    """[sin(row w), cos(row w), sin(column w), cos(column w)], w_i = 10000 ** (-4 i / D), i = 0 .. D/4 - 1; float32."""
    frequencies = 10000.0 ** (-np.arange(width // 4) / (width // 4))
    along = [np.arange(count)[:, None] * frequencies for count in (rows, columns)]
    row, column = (np.concatenate([np.sin(angle), np.cos(angle)], axis=-1) for angle in along)
    shape = (rows, columns, width // 2)
    both = [np.broadcast_to(row[:, None], shape), np.broadcast_to(column, shape)]
    return np.concatenate(both, axis=-1).astype(np.float32)


def _swap(patches: Float[Array, "*b P"], first: int) -> Float[Array, "*b P"]:
    """Flattened [first, rest] -> flattened [rest, first]."""
    *b, values = patches.shape
    return patches.reshape(*b, first, values // first).swapaxes(-1, -2).reshape(*b, values)
