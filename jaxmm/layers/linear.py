"""Affine maps and embeddings. Kernels are [in, out]; each layer computes in the format of its input."""

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float, Int

from jaxmm.layers.parameters import Initializer, normal, param, read, read_whole, zeros
from jaxmm.sharding import constrain


class Linear(nnx.Module):
    """y = x kernel + bias, over the last axis.

    Args:
      inputs, outputs: sizes of the last axis before and after.
      axes: logical names of the two kernel axes.
    """

    def __init__(
        self,
        inputs: int,
        outputs: int,
        axes: tuple[str, str],
        *,
        bias: bool = True,
        init: Initializer = normal(),
        rngs: nnx.Rngs,
    ):
        self.kernel = param(rngs, (inputs, outputs), axes, init)
        self.bias = param(rngs, (outputs,), axes[1:], zeros) if bias else None

    def __call__(self, x: Float[Array, "*b inputs"]) -> Float[Array, "*b outputs"]:
        y = x @ read(self.kernel, x.dtype)
        return y if self.bias is None else y + read(self.bias, x.dtype)


class ToHeads(nnx.Module):
    """Projection to H heads of size K, without bias; `name` is the logical name of the axis of heads."""

    def __init__(self, width: int, heads: int, size: int, name: str, *, init: Initializer = normal(), rngs: nnx.Rngs):
        self.kernel = param(rngs, (width, heads, size), ("embed", name, "head"), init)

    def __call__(self, x: Float[Array, "B L D"]) -> Float[Array, "B L H K"]:
        return jnp.einsum("BLD,DHK->BLHK", x, read(self.kernel, x.dtype))


class FromHeads(nnx.Module):
    """Projection of H heads of size K back to the width, without bias."""

    def __init__(self, heads: int, size: int, width: int, *, init: Initializer = normal(), rngs: nnx.Rngs):
        self.kernel = param(rngs, (heads, size, width), ("heads", "head", "embed"), init)

    def __call__(self, x: Float[Array, "B L H K"]) -> Float[Array, "B L D"]:
        return jnp.einsum("BLHK,HKD->BLD", x, read(self.kernel, x.dtype))


class Embedding(nnx.Module):
    """A table of V vectors of width D; `attend` uses it as an output matrix (tied embeddings)."""

    def __init__(self, vocabulary: int, width: int, *, init: Initializer = normal(), rngs: nnx.Rngs):
        self.table = param(rngs, (vocabulary, width), ("vocab", "embed"), init)

    def __call__(self, ids: Int[Array, "*b"], dtype: jnp.dtype = jnp.float32) -> Float[Array, "*b D"]:
        # the whole table, and its whole gradient: along a cut width each device would look up the ids of all of them
        table = constrain(read_whole(self.table, dtype), "vocab", "width")
        found = jnp.take(table, ids, axis=0)
        return constrain(found, "rows", *["length"] * (ids.ndim - 1), "width")

    def attend(self, x: Float[Array, "*b D"]) -> Float[Array, "*b V"]:
        table = read_whole(self.table, x.dtype)
        return _logits(jnp.einsum("...d,vd->...v", x, table, preferred_element_type=jnp.float32))


class Head(nnx.Module):
    """Output matrix to the vocabulary, without bias; logits are float32."""

    def __init__(self, width: int, vocabulary: int, *, init: Initializer = normal(), rngs: nnx.Rngs):
        self.kernel = param(rngs, (width, vocabulary), ("embed", "vocab"), init)

    def __call__(self, x: Float[Array, "*b D"]) -> Float[Array, "*b V"]:
        return _logits(jnp.matmul(x, read_whole(self.kernel, x.dtype), preferred_element_type=jnp.float32))


def _logits(x: Float[Array, "*b V"]) -> Float[Array, "*b V"]:
    return constrain(x, "rows", *["length"] * (x.ndim - 2), "vocab")


def gather_rows(x: jax.Array, index: jax.Array) -> jax.Array:
    """x [B, L, D], index [B, N] -> [B, N, D]; an index out of range gives an unspecified row."""
    return jax.vmap(lambda row, i: jnp.take(row, i, axis=0, mode="clip"))(x, index)


def scatter_rows(x: jax.Array, index: jax.Array, values: jax.Array) -> jax.Array:
    """Write values [B, N, D] over x [B, L, D] at index [B, N]; negative indices are dropped."""
    index = jnp.where(index < 0, x.shape[1], index)
    return jax.vmap(lambda row, i, v: row.at[i].set(v, mode="drop"))(x, index, values.astype(x.dtype))
