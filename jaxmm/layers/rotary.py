"""Rotary position embedding (arXiv 2104.09864), half-split layout: the one of Hugging Face checkpoints."""

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int


def rotary_tables(
    positions: Int[Array, "B L"], size: int, theta: float
) -> tuple[Float[Array, "B L K"], Float[Array, "B L K"]]:
    """Cosines and sines of each position, float32; K = size, the two halves repeat the same angles."""
    if size % 2:
        raise ValueError(f"rotary embedding needs an even head size, not {size}")
    inverse = (theta ** -(np.arange(0, size, 2, dtype=np.float64) / size)).astype(np.float32)
    angles = positions.astype(jnp.float32)[..., None] * inverse
    angles = jnp.concatenate([angles, angles], axis=-1)
    return jnp.cos(angles), jnp.sin(angles)


def rotate(
    x: Float[Array, "B L H K"], tables: tuple[Float[Array, "B L K"], Float[Array, "B L K"]]
) -> Float[Array, "B L H K"]:
    """Rotate each pair (i, i + K/2) of a head by its angle, in float32."""
    cos, sin = (table[:, :, None] for table in tables)
    y = x.astype(jnp.float32)
    first, second = jnp.split(y, 2, axis=-1)
    return (y * cos + jnp.concatenate([-second, first], axis=-1) * sin).astype(x.dtype)
