"""Affine maps and embeddings. Kernels are [in, out]; each layer computes in the format of its input."""

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float, Int

from jaxmm.layers.lora import LowRank
from jaxmm.layers.parameters import Initializer, normal, param, read, read_whole, zeros
from jaxmm.sharding import constrain


def contract(
    x: Float[Array, "*b inputs"], kernel: nnx.Param, dtype: jnp.dtype | None = None, *, whole: bool = False
) -> Array:
    """x kernel: the sum over the last axes of x and the leading axes of a kernel that are its inputs.

    Every affine layer multiplies with it, so that any kernel can be a `LowRank`: x W + scale (x A) B, without the
    product A B.

    Args:
      x: whose format the kernel is cast to.
      kernel: made by `param` with `inputs` of at least 1.
      dtype: the format of sums and result, by default that of x.
      whole: gather the kernel along "fsdp" once for all its uses (`read_whole`).
    """
    value, inputs = kernel.get_value(), kernel.get_metadata()["inputs"]
    adapted = isinstance(value, LowRank)
    matrix = (read_whole if whole else read)(kernel, x.dtype, value.base if adapted else value)
    base = jnp.tensordot(x, matrix, inputs, preferred_element_type=dtype)
    if not adapted:
        return base
    low = jnp.tensordot(x, value.a.astype(x.dtype), inputs)
    return base + value.scale * jnp.tensordot(low, value.b.astype(x.dtype), 1, preferred_element_type=dtype)


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
        self.kernel = param(rngs, (inputs, outputs), axes, init, inputs=1)
        self.bias = param(rngs, (outputs,), axes[1:], zeros) if bias else None

    def __call__(self, x: Float[Array, "*b inputs"]) -> Float[Array, "*b outputs"]:
        y = contract(x, self.kernel)
        return y if self.bias is None else y + read(self.bias, x.dtype)


class ToHeads(nnx.Module):
    """Projection to H heads of size K, without bias; `name` is the logical name of the axis of heads."""

    def __init__(self, width: int, heads: int, size: int, name: str, *, init: Initializer = normal(), rngs: nnx.Rngs):
        self.kernel = param(rngs, (width, heads, size), ("embed", name, "head"), init, inputs=1)

    def __call__(self, x: Float[Array, "B L D"]) -> Float[Array, "B L H K"]:
        return contract(x, self.kernel)


class FromHeads(nnx.Module):
    """Projection of H heads of size K back to the width, without bias."""

    def __init__(self, heads: int, size: int, width: int, *, init: Initializer = normal(), rngs: nnx.Rngs):
        self.kernel = param(rngs, (heads, size, width), ("heads", "head", "embed"), init, inputs=2)

    def __call__(self, x: Float[Array, "B L H K"]) -> Float[Array, "B L D"]:
        return contract(x, self.kernel)


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
        self.kernel = param(rngs, (width, vocabulary), ("embed", "vocab"), init, inputs=1)

    def __call__(self, x: Float[Array, "*b D"]) -> Float[Array, "*b V"]:
        return _logits(contract(x, self.kernel, jnp.float32, whole=True))


def _logits(x: Float[Array, "*b V"]) -> Float[Array, "*b V"]:
    return constrain(x, "rows", *["length"] * (x.ndim - 2), "vocab")


def gather_rows(x: jax.Array, index: jax.Array) -> jax.Array:
    """x [B, L, D], index [B, N] -> [B, N, D]; an index out of range gives an unspecified row."""
    return jax.vmap(lambda row, i: jnp.take(row, i, axis=0, mode="clip"))(x, index)


def scatter_rows(x: jax.Array, index: jax.Array, values: jax.Array) -> jax.Array:
    """Write values [B, N, D] over x [B, L, D] at index [B, N]; negative indices are dropped."""
    index = jnp.where(index < 0, x.shape[1], index)
    return jax.vmap(lambda row, i, v: row.at[i].set(v, mode="drop"))(x, index, values.astype(x.dtype))
