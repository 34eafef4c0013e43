"""Feed-forward blocks."""

import jax
from flax import nnx
from jaxtyping import Array, Float

from jaxmm.layers.linear import Linear
from jaxmm.layers.parameters import Initializer, normal


class SwiGLU(nnx.Module):
    """down(silu(gate(x)) * up(x)), without biases (arXiv 2002.05202)."""

    def __init__(
        self, width: int, hidden: int, *, init: Initializer = normal(), out_init: Initializer = normal(), rngs: nnx.Rngs
    ):
        self.gate = Linear(width, hidden, ("embed", "mlp"), bias=False, init=init, rngs=rngs)
        self.up = Linear(width, hidden, ("embed", "mlp"), bias=False, init=init, rngs=rngs)
        self.down = Linear(hidden, width, ("mlp", "embed"), bias=False, init=out_init, rngs=rngs)

    def __call__(self, x: Float[Array, "*b D"]) -> Float[Array, "*b D"]:
        return self.down(jax.nn.silu(self.gate(x)) * self.up(x))
