"""attend(): the one door to attention, and the plain XLA path behind it."""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from jaxmm.attention.mask import visible
from jaxmm.sequence import Intervals


def attend(
    q: Float[Array, "B Lq H K"],
    k: Float[Array, "B Lk G K"],
    v: Float[Array, "B Lk G K"],
    places: Int[Array, "B Lq"],
    intervals: Intervals,
    *,
    scale: float | None = None,
    bias: Float[Array, "#B H Lq Lk"] | None = None,
) -> Float[Array, "B Lq H K"]:
    """Attention of queries to the keys that they may see; softmax in float32.

    Args:
      q, k, v: H query heads, G key heads; H is a multiple of G, and query head h reads key head h // (H / G).
      places: of the queries, any order; -1 sees nothing.
      intervals: of the keys, int32 [B, Lk].
      scale: of the scores; K ** -0.5 by default.
      bias: added to the scaled scores.

    Returns:
      In the format of q. A query that sees no key gets zeros, and its gradients are zero.

    Raises:
      ValueError: if the shapes do not fit each other.
    """
    _check(q, k, v, places, intervals, bias)
    scale = q.shape[-1] ** -0.5 if scale is None else scale
    b, lq, h, size = q.shape
    groups = k.shape[2]
    grouped = q.reshape(b, lq, groups, h // groups, size)
    scores = jnp.einsum("BQGHK,BSGK->BGHQS", grouped, k, preferred_element_type=jnp.float32) * scale
    if bias is not None:
        scores += bias.astype(jnp.float32).reshape(bias.shape[0], groups, h // groups, *bias.shape[2:])
    weights = _softmax(scores, visible(places, intervals)[:, None, None])
    out = jnp.einsum("BGHQS,BSGK->BQGHK", weights.astype(v.dtype), v, preferred_element_type=jnp.float32)
    return out.reshape(b, lq, h, size).astype(q.dtype)


def _softmax(scores: jax.Array, seen: jax.Array) -> jax.Array:
    """Softmax over the last axis among what is seen; rows that see nothing are zero, with zero gradients."""
    scores = jnp.where(seen, scores, -jnp.inf)
    top = jax.lax.stop_gradient(jnp.max(scores, axis=-1, keepdims=True))
    weights = jnp.exp(scores - jnp.where(jnp.isfinite(top), top, 0.0))
    total = jnp.sum(weights, axis=-1, keepdims=True)
    return weights / jnp.where(total == 0, 1.0, total)


def _check(q, k, v, places, intervals, bias) -> None:
    fits = q.ndim == k.ndim == 4 and k.shape == v.shape and (q.shape[0], q.shape[3]) == (k.shape[0], k.shape[3])
    if not fits or q.shape[2] % k.shape[2]:
        raise ValueError(f"attend: q {q.shape} does not fit k {k.shape}, v {v.shape}")
    b, lq, h, _ = q.shape
    lk = k.shape[1]
    if places.shape != (b, lq) or intervals.start.shape != (b, lk) or intervals.end.shape != (b, lk):
        raise ValueError(
            f"attend: places {places.shape} and intervals {intervals.start.shape}, {intervals.end.shape} "
            f"do not fit q {q.shape}, k {k.shape}"
        )
    if bias is not None and (bias.shape[0] not in (1, b) or bias.shape[1:] != (h, lq, lk)):
        raise ValueError(f"attend: bias {bias.shape} does not fit q {q.shape}, k {k.shape}")
