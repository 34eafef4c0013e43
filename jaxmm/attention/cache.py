"""Keys and values kept for decoding.

Places carry the order, so a cache has no padding on the left and no offset per row: all rows write at the same memory
slots, and a row that has nothing to say writes filler. What is written beyond `used` is overwritten by the next write:
a denoising loop overwrites its patches until it keeps them.
"""

import dataclasses

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from jaxmm.sequence import Intervals


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class KVCache:
    """An argument and a result of the transformer, never state of a module.

    Attributes:
      keys, values: [layers, B, C, G, K].
      intervals: of the cached keys, int32 [B, C]; (0, 0) where nothing is. Keys of a document that is still being
        written end at `OPEN`.
      used: how many of the C slots are kept.
    """

    keys: Float[Array, "layers B C G K"]
    values: Float[Array, "layers B C G K"]
    intervals: Intervals
    used: Int[Array, ""]

    @classmethod
    def empty(cls, layers: int, rows: int, slots: int, heads: int, size: int, dtype=jnp.float32) -> "KVCache":
        """A cache of `slots` tokens per row that holds nothing."""
        kv = lambda: jnp.zeros((layers, rows, slots, heads, size), dtype)  # noqa: E731
        none = lambda: jnp.zeros((rows, slots), jnp.int32)  # noqa: E731
        return cls(kv(), kv(), Intervals(none(), none()), jnp.zeros((), jnp.int32))

    @property
    def slots(self) -> int:
        return self.keys.shape[2]

    def write_intervals(self, intervals: Intervals) -> "KVCache":
        """Put the intervals of new tokens [B, L] behind the used ones; what an earlier write left there is hidden.

        Raises:
          ValueError: if the tokens do not fit. Under jit, where the number of used slots is not known, only if there
            are more of them than slots: there the caller sees to it that the cache is large enough.
        """
        if intervals.start.shape != intervals.end.shape:
            raise ValueError(f"intervals of {intervals.start.shape} starts and {intervals.end.shape} ends")
        used = 0 if isinstance(self.used, jax.core.Tracer) else int(self.used)
        if used + intervals.start.shape[1] > self.slots:
            raise ValueError(f"{intervals.start.shape[1]} tokens behind {used} do not fit into {self.slots} slots")
        unused = jnp.arange(self.slots) >= self.used
        bounds = []
        for old, new in zip(self.intervals, intervals):
            old = jnp.where(unused, 0, old)
            bounds.append(jax.lax.dynamic_update_slice(old, new.astype(jnp.int32), (0, self.used)))
        return dataclasses.replace(self, intervals=Intervals(*bounds))

    def keep(self, tokens: int) -> "KVCache":
        """Keep the last write of that many tokens: the next one goes behind it."""
        return dataclasses.replace(self, used=self.used + tokens)


def write(cached: Float[Array, "B C G K"], new: Float[Array, "B L G K"], used: Int[Array, ""]) -> jax.Array:
    """Put the keys (or values) of new tokens behind the used ones of one layer."""
    return jax.lax.dynamic_update_slice(cached, new.astype(cached.dtype), (0, used, 0, 0))
