"""One block: every stream has its own weights, and they meet inside `attend`."""

import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float

from jaxmm.attention import attend
from jaxmm.attention.cache import write
from jaxmm.layers.linear import FromHeads, ToHeads
from jaxmm.layers.mlp import SwiGLU
from jaxmm.layers.norms import RMSNorm
from jaxmm.layers.parameters import normal
from jaxmm.layers.rotary import rotate
from jaxmm.sequence import Intervals
from jaxmm.sharding import constrain
from jaxmm.transformer.config import TransformerConfig

Streams = dict[str, Float[Array, "B L D"]]


class StreamBlock(nnx.Module):
    """The weights of one stream in one block (Llama: arXiv 2302.13971)."""

    def __init__(self, c: TransformerConfig, *, rngs: nnx.Rngs):
        init, out_init = normal(c.init_std), normal(c.init_std / (2 * c.layers) ** 0.5)
        self.attention_norm = RMSNorm(c.width, eps=c.norm_eps, rngs=rngs)
        self.query = ToHeads(c.width, c.heads, c.head_size, "heads", init=init, rngs=rngs)
        self.key = ToHeads(c.width, c.kv_heads, c.head_size, "kv_heads", init=init, rngs=rngs)
        self.value = ToHeads(c.width, c.kv_heads, c.head_size, "kv_heads", init=init, rngs=rngs)
        self.out = FromHeads(c.heads, c.head_size, c.width, init=out_init, rngs=rngs)
        self.mlp_norm = RMSNorm(c.width, eps=c.norm_eps, rngs=rngs)
        self.mlp = SwiGLU(c.width, c.mlp_width, init=init, out_init=out_init, rngs=rngs)

    def project(self, x: Float[Array, "B L D"], rope: tuple) -> tuple:
        """Queries, keys and values of this stream, rotated."""
        y = self.attention_norm(x)
        return rotate(self.query(y), rope), rotate(self.key(y), rope), self.value(y)

    def finish(self, x: Float[Array, "B L D"], mixed: Float[Array, "B L H K"]) -> Float[Array, "B L D"]:
        """Both residual additions."""
        x = x + self.out(mixed)
        return x + self.mlp(self.mlp_norm(x))


class Block(nnx.Module):
    """One layer of all streams."""

    def __init__(self, config: TransformerConfig, *, rngs: nnx.Rngs):
        self.names = config.streams
        self.streams = nnx.Dict({name: StreamBlock(config, rngs=rngs) for name in config.streams})

    def __call__(
        self, hidden: Streams, rope: dict[str, tuple], places: Array, intervals: Intervals, cached: tuple | None
    ) -> tuple[Streams, tuple | None]:
        """One step of the residual streams.

        Args:
          hidden: {stream: [B, L_s, D]}.
          rope: {stream: rotary tables}.
          places: of the queries of all streams, joined in the order of the config; [B, sum of L_s].
          intervals: of the keys: those of the cache, or of all streams joined.
          cached: (keys, values, used) of this layer, or None.

        Returns:
          hidden, and the keys and values of the cache with the new ones written.
        """
        # by the config, for JAX sorts the keys of a dict that passes through scan or jit
        hidden = {name: constrain(hidden[name], "rows", "length", "width") for name in self.names if name in hidden}
        projected = [self.streams[name].project(x, rope[name]) for name, x in hidden.items()]
        q, k, v = (parts[0] if len(parts) == 1 else jnp.concatenate(parts, axis=1) for parts in zip(*projected))
        if cached is not None:
            keys, values, used = cached
            cached = k, v = write(keys, k, used), write(values, v, used)
            k, v = k.astype(q.dtype), v.astype(q.dtype)
        q = constrain(q, "rows", "length", "heads", "head")
        k, v = (constrain(x, "rows", "keys", "kv_heads", "head") for x in (k, v))
        mixed = attend(q, k, v, places, intervals)
        result, begin = {}, 0
        for name, x in hidden.items():
            result[name] = self.streams[name].finish(x, mixed[:, begin : begin + x.shape[1]])
            begin += x.shape[1]
        return result, cached
