"""The next token from its logits."""

import dataclasses

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from jaxmm.errors import InputError


@dataclasses.dataclass(frozen=True)
class TokenSampler:
    """Greedy, temperature and nucleus sampling.

    Attributes:
      temperature: 0 takes the most probable token.
      top_p: sample among the fewest tokens whose probability reaches it (arXiv 1904.09751).
      suppress: ids that are never taken.
    """

    temperature: float = 0.0
    top_p: float = 1.0
    suppress: tuple[int, ...] = ()

    def __post_init__(self):
        if not self.temperature >= 0 or not 0 < self.top_p <= 1:
            raise InputError(f"temperature {self.temperature} must be >= 0 and top_p {self.top_p} within (0, 1]")

    def __call__(self, keys: jax.Array, logits: Float[Array, "B V"]) -> Int[Array, "B"]:
        """One token per row, with one key per row."""
        logits = jnp.asarray(logits, jnp.float32)
        if self.suppress:
            logits = logits.at[:, jnp.asarray(self.suppress)].set(-jnp.inf)
        if self.temperature == 0:
            return jnp.argmax(logits, axis=-1).astype(jnp.int32)
        logits = logits / self.temperature
        if self.top_p < 1:
            logits = jnp.where(_nucleus(logits, self.top_p), logits, -jnp.inf)
        return jax.vmap(jax.random.categorical)(keys, logits).astype(jnp.int32)


def _nucleus(logits: Float[Array, "B V"], top_p: float) -> Array:
    """Which tokens belong to the nucleus; the most probable one always does."""
    order = jnp.argsort(-logits, axis=-1)
    probabilities = jnp.take_along_axis(jax.nn.softmax(logits, axis=-1), order, axis=-1)
    inside = jnp.cumsum(probabilities, axis=-1) - probabilities < top_p
    return jnp.zeros_like(inside).at[jnp.arange(len(logits))[:, None], order].set(inside)
