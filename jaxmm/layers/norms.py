"""Normalisation, computed in float32 and returned in the format of the input."""

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float

from jaxmm.layers.parameters import ones, param, zeros


class RMSNorm(nnx.Module):
    """x / sqrt(mean(x^2) + eps) * scale over the last axis (arXiv 1910.07467)."""

    def __init__(self, width: int, *, eps: float, rngs: nnx.Rngs):
        self.scale = param(rngs, (width,), ("norm",), ones)
        self.eps = eps

    def __call__(self, x: Float[Array, "*b D"]) -> Float[Array, "*b D"]:
        y = x.astype(jnp.float32)
        y = y * jax.lax.rsqrt(jnp.mean(jnp.square(y), axis=-1, keepdims=True) + self.eps)
        return (y * self.scale[...]).astype(x.dtype)


class LayerNorm(nnx.Module):
    """(x - mean) / sqrt(variance + eps) * scale + bias over the last axis (arXiv 1607.06450)."""

    def __init__(self, width: int, *, eps: float, rngs: nnx.Rngs):
        self.scale = param(rngs, (width,), ("norm",), ones)
        self.bias = param(rngs, (width,), ("norm",), zeros)
        self.eps = eps

    def __call__(self, x: Float[Array, "*b D"]) -> Float[Array, "*b D"]:
        y = x.astype(jnp.float32)
        y = y - jnp.mean(y, axis=-1, keepdims=True)
        y = y * jax.lax.rsqrt(jnp.mean(jnp.square(y), axis=-1, keepdims=True) + self.eps)
        return (y * self.scale[...] + self.bias[...]).astype(x.dtype)


class GroupNorm(nnx.Module):
    """Normalise groups of neighbouring channels over all pixels, then scale and shift (arXiv 1803.08494)."""

    def __init__(self, channels: int, *, groups: int, eps: float, rngs: nnx.Rngs):
        if channels % groups:
            raise ValueError(f"{channels} channels cannot be cut into {groups} groups")
        self.scale = param(rngs, (channels,), ("norm",), ones)
        self.bias = param(rngs, (channels,), ("norm",), zeros)
        self.groups, self.eps = groups, eps

    def __call__(self, x: Float[Array, "N H W C"]) -> Float[Array, "N H W C"]:
        n, *spatial, c = x.shape
        y = x.astype(jnp.float32).reshape(n, -1, self.groups, c // self.groups)
        mean = jnp.mean(y, axis=(1, 3), keepdims=True)
        variance = jnp.mean(jnp.square(y - mean), axis=(1, 3), keepdims=True)
        y = ((y - mean) * jax.lax.rsqrt(variance + self.eps)).reshape(n, *spatial, c)
        return (y * self.scale[...] + self.bias[...]).astype(x.dtype)
