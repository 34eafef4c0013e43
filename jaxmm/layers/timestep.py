"""Embedding of the time of a diffusion process; always float32."""

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jaxtyping import Array, Float

from jaxmm.layers.linear import Linear
from jaxmm.sharding import constrain_rows


def sinusoid(t: Float[Array, "*b"], features: int, max_period: float = 10000.0) -> Float[Array, "*b F"]:
    """[cos(t w), sin(t w)] with w_i = max_period ** (-i / (F/2)), i = 0 .. F/2 - 1 (DiT, arXiv 2212.09748).

    An angle of a thousand radians has an error of 3e-5 in float32. So whole turns are taken off before they can round:
    the frequency in turns is split into a part of 12 bits, whose product with an index below 4096 is exact, and a rest.
    """
    half = features // 2
    turns = np.exp(-np.log(max_period) * np.arange(half) / half) / (2 * np.pi)
    mantissa, exponent = np.frexp(turns)
    coarse = np.ldexp(np.round(mantissa * 2**12), exponent - 12)
    t = t.astype(jnp.float32)[..., None]
    angle = t * coarse.astype(np.float32)
    angle = (angle - jnp.round(angle) + t * (turns - coarse).astype(np.float32)) * np.float32(2 * np.pi)
    return jnp.concatenate([jnp.cos(angle), jnp.sin(angle)], axis=-1)


class TimestepEmbedding(nnx.Module):
    """Linear, SiLU, Linear over the sinusoid of t (DiT, arXiv 2212.09748)."""

    def __init__(self, features: int, width: int, *, max_period: float = 10000.0, rngs: nnx.Rngs):
        self.input = Linear(features, width, ("frequencies", "time"), rngs=rngs)
        self.output = Linear(width, width, ("time", "width"), rngs=rngs)
        self.features, self.max_period = features, max_period

    def __call__(self, t: Float[Array, "*b"]) -> tuple[Float[Array, "*b E"], dict[str, Array]]:
        features = sinusoid(t, self.features, self.max_period)
        hidden = constrain_rows(jax.nn.silu(self.input(constrain_rows(features))))
        embedding = constrain_rows(self.output(hidden))
        return embedding, {"time_sinusoid": features, "time_embed": embedding}
