"""Losses as (sum, count) pairs, so that they add up over microbatches, devices and hosts before the one division."""

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int


class Mean(NamedTuple):
    """A mean that is not divided yet; float32 scalars."""

    sum: jax.Array
    count: jax.Array

    def value(self) -> jax.Array:
        """sum / count, and 0 where nothing was counted."""
        return self.sum / jnp.where(self.count == 0, 1.0, self.count)


def weighted(values: Float[Array, "*b"], weights: Float[Array, "*b"]) -> Mean:
    """Mean of values under weights."""
    values, weights = values.astype(jnp.float32), weights.astype(jnp.float32)
    return Mean(jnp.sum(jnp.where(weights > 0, values, 0.0) * weights), jnp.sum(weights))


def cross_entropy(logits: Float[Array, "*b V"], labels: Int[Array, "*b"]) -> Float[Array, "*b"]:
    """Negative log-likelihood of each label, in float32."""
    logits = logits.astype(jnp.float32)
    chosen = jnp.take_along_axis(logits, labels[..., None], axis=-1)[..., 0]
    return jax.nn.logsumexp(logits, axis=-1) - chosen
