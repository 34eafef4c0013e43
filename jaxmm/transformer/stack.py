"""The stack of blocks, scanned: a model of any depth compiles in about the time of one layer."""

import dataclasses

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array

from jaxmm.attention import KVCache
from jaxmm.layers.norms import RMSNorm
from jaxmm.layers.parameters import stack
from jaxmm.layers.rotary import rotary_tables
from jaxmm.sequence import Intervals, Tokens
from jaxmm.transformer.block import Block, Streams
from jaxmm.transformer.config import REMAT_POLICIES, TransformerConfig
from jaxmm.weights import HEADS_IN, HEADS_OUT, LINEAR, SAME, Row


class Transformer(nnx.Module):
    """Blocks and the last norm of each stream; embeddings and heads belong to the model."""

    def __init__(self, config: TransformerConfig, *, rngs: nnx.Rngs):
        self.config = config
        self.layers = stack(config.layers, lambda r: Block(config, rngs=r), rngs)
        self.norms = nnx.Dict({name: RMSNorm(config.width, eps=config.norm_eps, rngs=rngs) for name in config.streams})

    def __call__(
        self, hidden: Streams, tokens: dict[str, Tokens], cache: KVCache | None = None
    ) -> tuple[Streams, KVCache | None, dict[str, Array]]:
        """Run all layers.

        Args:
          hidden: {stream: [B, L_s, D]}; a stream without tokens may be left out.
          tokens: places, intervals and positions of the same streams.
          cache: keys of what came before. The new keys are written behind its used slots and are seen in this call;
            they stay only if the caller keeps them (`KVCache.keep`).

        Returns:
          hidden after the last norm, the cache with the new keys, and intermediates: `hidden` [layers, B, L, D] of the
          first stream (in the order of the config) after each layer.

        Raises:
          ValueError: if `hidden` and `tokens` are of different streams, or of one that the transformer does not have.
        """
        c = self.config
        tokens = _in_order(c.streams, hidden, tokens)
        rope = {name: rotary_tables(t.positions, c.head_size, c.rope_theta) for name, t in tokens.items()}
        places = _join([t.places for t in tokens.values()])
        intervals = Intervals(*(_join(list(bounds)) for bounds in zip(*(t.intervals for t in tokens.values()))))
        if cache is not None:
            cache = cache.write_intervals(intervals)
            intervals = cache.intervals

        def body(hidden, xs):
            layer, kv = xs
            cached = None if kv is None else (*kv, cache.used)
            hidden, kv = layer(hidden, rope, places, intervals, cached)
            return hidden, (kv, next(iter(hidden.values())))

        if c.remat != "none":
            body = jax.checkpoint(body, policy=REMAT_POLICIES[c.remat], prevent_cse=False)
        kv = None if cache is None else (cache.keys, cache.values)
        hidden, (kv, each) = jax.lax.scan(body, hidden, (self.layers, kv))
        if cache is not None:
            cache = dataclasses.replace(cache, keys=kv[0], values=kv[1])
        hidden = {name: self.norms[name](x) for name, x in hidden.items()}
        rope = next(iter(rope.values()))
        return hidden, cache, {"hidden": each, "rope_cos": rope[0], "rope_sin": rope[1]}

    def empty_cache(self, rows: int, slots: int, dtype=jnp.float32) -> KVCache:
        """A cache for `slots` tokens per row."""
        c = self.config
        return KVCache.empty(c.layers, rows, slots, c.kv_heads, c.head_size, dtype)


def llama_rows(stream: str = "tokens") -> list[Row]:
    """Rows of the weights table for one stream under the keys of Hugging Face's Llama, without embeddings and head."""
    layer, block = "model.layers.{l}.", f"layers.{{l}}.streams.{stream}."
    rows = [
        ("input_layernorm.weight", "attention_norm.scale", SAME),
        ("self_attn.q_proj.weight", "query.kernel", HEADS_OUT),
        ("self_attn.k_proj.weight", "key.kernel", HEADS_OUT),
        ("self_attn.v_proj.weight", "value.kernel", HEADS_OUT),
        ("self_attn.o_proj.weight", "out.kernel", HEADS_IN),
        ("post_attention_layernorm.weight", "mlp_norm.scale", SAME),
        ("mlp.gate_proj.weight", "mlp.gate.kernel", LINEAR),
        ("mlp.up_proj.weight", "mlp.up.kernel", LINEAR),
        ("mlp.down_proj.weight", "mlp.down.kernel", LINEAR),
    ]
    return [Row(layer + official, block + ours, t) for official, ours, t in rows] + [
        Row("model.norm.weight", f"norms.{stream}.scale")
    ]


def _in_order(streams: tuple[str, ...], hidden: Streams, tokens: dict[str, Tokens]) -> dict[str, Tokens]:
    """The tokens in the order of the config, in which the blocks join the streams."""
    if hidden.keys() != tokens.keys() or not hidden.keys() <= set(streams):
        raise ValueError(f"streams {sorted(hidden)} with tokens of {sorted(tokens)}; the transformer has {streams}")
    return {name: tokens[name] for name in streams if name in tokens}


def _join(parts: list[Array]) -> Array:
    return parts[0] if len(parts) == 1 else jnp.concatenate(parts, axis=1)
