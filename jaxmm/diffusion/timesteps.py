"""Noise levels for training, and noise that belongs to an example.

The samplers take one key; `jax.vmap` over `per_example_keys` draws one value per example:

    keys = per_example_keys(key, ids)
    t = jax.vmap(lambda key, limit: uniform_index(key, (), 1000, limit))(keys, limits)
"""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int, Key


def expand(values: float | Float[Array, "*b"], like: Float[Array, "*x"]) -> Float[Array, "*x"]:
    """Return values [*b] as float32 with axes of size 1 behind, so that they broadcast over `like` [*b, ...].

    Raises:
      ValueError: if the axes of `values` are not the leading axes of `like` (or of size 1, or absent).
    """
    values = jnp.asarray(values, jnp.float32)
    shape = jnp.shape(like)
    if values.ndim > len(shape) or any(n not in (1, size) for n, size in zip(values.shape, shape)):
        raise ValueError(f"values of shape {values.shape} do not belong to the leading axes of {shape}")
    return values.reshape(values.shape + (1,) * (len(shape) - values.ndim))


def uniform(key: Key[Array, ""], shape: tuple[int, ...], limit: float | Float[Array, "*s"] = 1.0) -> Float[Array, "*s"]:
    """Draw sigma uniformly from [0, limit); a limit of 0 gives 0. The limit broadcasts to the shape."""
    return jax.random.uniform(key, shape, jnp.float32) * jnp.asarray(limit, jnp.float32)


def uniform_index(
    key: Key[Array, ""], shape: tuple[int, ...], steps: int, limit: float | Float[Array, "*s"] = 1.0
) -> Int[Array, "*s"]:
    """Draw int32 timesteps uniformly from 0 .. ceil(limit * steps) - 1.

    The limit broadcasts to the shape. A limit of 0 gives 0, one above 1 is no limit: the index is always one of the
    schedule's.
    """
    return jax.random.randint(key, shape, 0, count_below(steps, limit), jnp.int32)


def count_below(steps: int, limit: float | Float[Array, "*s"]) -> Int[Array, "*s"]:
    """How many of the schedule's timesteps a limit leaves: ceil(limit * steps), from 1 to `steps`."""
    # ceil of a product that should be whole but is rounded upwards (0.07 * 100 > 7) must not count one more
    count = jnp.ceil(jnp.asarray(limit, jnp.float32) * (steps * (1 - 1e-6)))
    return jnp.clip(count, 1, steps).astype(jnp.int32)


def logit_normal(
    key: Key[Array, ""], shape: tuple[int, ...], mean: float = 0.0, std: float = 1.0
) -> Float[Array, "*s"]:
    """Draw sigma = sigmoid(mean + std z), z normal (arXiv 2403.03206, 3.1); a positive mean leans towards noise."""
    return jax.nn.sigmoid(mean + std * jax.random.normal(key, shape, jnp.float32))


def per_example_keys(key: Key[Array, ""], ids: Int[Array, "*b"]) -> Key[Array, "*b"]:
    """Fold the id of each example into the key: one key per example.

    What is drawn from such a key is the example's own: it does not change with its place in the batch, the size of the
    batch or the number of devices. Keys must be of JAX's default kind (threefry).
    """
    ids = jnp.asarray(ids)
    keys = jax.vmap(lambda i: jax.random.fold_in(key, i))(ids.reshape(-1))
    return keys.reshape(ids.shape + key.shape)


def normal_per_example(key: Key[Array, ""], ids: Int[Array, "*b"], shape: tuple[int, ...]) -> Float[Array, "*x"]:
    """Draw standard normal noise [*b, *shape] that depends only on the key and on each example's id."""
    ids = jnp.asarray(ids)
    keys = per_example_keys(key, ids.reshape(-1))
    return jax.vmap(lambda k: jax.random.normal(k, shape, jnp.float32))(keys).reshape(ids.shape + tuple(shape))


def uniform_per_example(key: Key[Array, ""], ids: Int[Array, "*b"]) -> Float[Array, "*b"]:
    """Draw one number of [0, 1) per example that depends only on the key and on the example's id."""
    ids = jnp.asarray(ids)
    keys = per_example_keys(key, ids.reshape(-1))
    return jax.vmap(lambda k: jax.random.uniform(k, dtype=jnp.float32))(keys).reshape(ids.shape)
