"""Guidance: how predictions made with and without the condition are combined."""

import jax.numpy as jnp
from jaxtyping import Array, Float

from jaxmm.diffusion.timesteps import expand


def classifier_free(
    conditional: Float[Array, "*x"], unconditional: Float[Array, "*x"], scale: float | Float[Array, "*b"]
) -> Float[Array, "*x"]:
    """u + scale (c - u) (arXiv 2207.12598): scale 1 is the conditional prediction, 0 the unconditional one.

    Predictions may be of noise, of data or of velocity. The scale is one number, or one per example [*b] for
    predictions [*b, ...]. The result is float32.
    """
    conditional, unconditional = jnp.asarray(conditional, jnp.float32), jnp.asarray(unconditional, jnp.float32)
    return unconditional + expand(scale, conditional) * (conditional - unconditional)
