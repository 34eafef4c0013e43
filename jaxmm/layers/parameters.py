"""Parameters: one description each, and networks that are built from a plain dict of them.

A network is an `nnx.Module`, used as a plain pytree. Its parameters live outside it, in a flat dict
{path: array} with paths like `transformer.layers.streams.tokens.query.kernel`; a stack of layers is one array with a
leading axis. The dict is what is differentiated, sharded, saved and converted.
"""

import dataclasses
from collections.abc import Callable, Mapping

import jax
import jax.numpy as jnp
from flax import nnx

from jaxmm.errors import InputError, nearest
from jaxmm.sharding import Parameter, gather

Params = dict[str, jax.Array]
Initializer = Callable[[jax.Array, tuple[int, ...], jnp.dtype], jax.Array]

zeros = jax.nn.initializers.zeros
ones = jax.nn.initializers.ones


def normal(stddev: float = 0.02) -> Initializer:
    """Normal distribution, cut at two standard deviations."""
    return jax.nn.initializers.truncated_normal(stddev)


def param(
    rngs: nnx.Rngs, shape: tuple[int, ...], axes: tuple[str, ...], init: Initializer, *, inputs: int = 0
) -> nnx.Param:
    """Make a float32 parameter with one logical name per axis (the names of `jaxmm.sharding.RULES`).

    `inputs` is the number of leading axes over which `jaxmm.layers.linear.contract` sums; see `Parameter`.
    """
    return nnx.Param(init(rngs.params(), shape, jnp.float32), axes=axes, inputs=inputs)


def read(parameter: nnx.Param, dtype: jnp.dtype, value: jax.Array | None = None) -> jax.Array:
    """The values in the format in which a layer computes. What is stored in fewer bytes is gathered before the cast.

    `value` stands in for that of the parameter: the matrix under an adapter.
    """
    value = parameter.get_value() if value is None else value
    if value.dtype.itemsize < jnp.dtype(dtype).itemsize:
        value = gather(value, *parameter.get_metadata()["axes"])
    return value.astype(dtype)


def read_whole(parameter: nnx.Param, dtype: jnp.dtype, value: jax.Array | None = None) -> jax.Array:
    """As `read`, gathered along "fsdp" once for all its uses, the backward pass included."""
    value = parameter.get_value() if value is None else value
    return gather(value.astype(dtype), *parameter.get_metadata()["axes"])


def stack(count: int, build: Callable[[nnx.Rngs], nnx.Module], rngs: nnx.Rngs) -> nnx.Module:
    """Build `count` layers of one shape as a single module whose parameters have a leading axis, for `jax.lax.scan`.

    The attribute that holds it is called `layers`, everywhere: checkpoints and weights tables know stacks by that name.
    """
    return nnx.vmap(build)(rngs.split(count))


class Blueprint:
    """A network without its numbers.

    Attributes:
      parameters: {path: Parameter}, the single description that initialisation, sharding, checkpoints and the
        conversion of weights go by.
    """

    def __init__(self, build: Callable[[nnx.Rngs], nnx.Module]):
        self._build = build
        self._graph, state = nnx.split(nnx.eval_shape(lambda: build(nnx.Rngs(0))))
        self._flat = [(path, variable) for path, variable in nnx.to_flat_state(state)]
        self.parameters = {_name(path): _describe(path, variable) for path, variable in self._flat}

    def init(self, key: jax.Array) -> Params:
        """Draw fresh parameters. Run it under `jax.jit` with `out_shardings` to have each drawn where it belongs."""
        state = nnx.split(self._build(nnx.Rngs(key)))[1]
        return {_name(path): variable.get_value() for path, variable in nnx.to_flat_state(state)}

    def bind(self, params: Mapping[str, jax.Array]) -> nnx.Module:
        """Return the network with these parameters; in place of a matrix there may be a `LowRank`.

        Raises:
          ValueError: if a path is missing or unknown.
        """
        check_paths(params, self.parameters)
        flat = [(path, variable.replace(params[_name(path)])) for path, variable in self._flat]
        return nnx.merge(self._graph, nnx.from_flat_state(flat))

    @property
    def size(self) -> int:
        """The number of parameters."""
        return sum(spec.size for spec in self.parameters.values())


def check_paths(params: Mapping[str, object], known: Mapping[str, Parameter]) -> None:
    """Raise ValueError if a path is missing or unknown."""
    if params.keys() != known.keys():
        missing, unknown = known.keys() - params.keys(), params.keys() - known.keys()
        raise ValueError(f"parameters missing: {sorted(missing)}; unknown: {sorted(unknown)}")


def subset(params: Mapping[str, jax.Array], prefix: str) -> Params:
    """Return the parameters below a prefix ("codec."), with the prefix cut off."""
    return {path[len(prefix) :]: value for path, value in params.items() if path.startswith(prefix)}


@dataclasses.dataclass(frozen=True)
class Policy:
    """In which number formats a network computes.

    Activations enter a network in `compute`, and every layer follows the format of its input, casting its weights as it
    uses them. Softmax, norms, modulation, losses, timesteps and sampler states are float32 whatever the policy.
    """

    params: jnp.dtype = jnp.float32
    compute: jnp.dtype = jnp.float32

    @classmethod
    def named(cls, name: str) -> "Policy":
        """ "float32", "mixed" (float32 parameters, bfloat16 compute), "bfloat16" (both), or "auto": by platform."""
        if name == "auto":
            name = "float32" if jax.default_backend() == "cpu" else "mixed"
        policies = {
            "float32": cls(jnp.float32, jnp.float32),
            "mixed": cls(jnp.float32, jnp.bfloat16),
            "bfloat16": cls(jnp.bfloat16, jnp.bfloat16),
        }
        if name not in policies:
            raise InputError(f"unknown policy {name!r}{nearest(name, [*policies, 'auto'])}")
        return policies[name]


def _name(path: tuple) -> str:
    return ".".join(str(part) for part in path)


def _describe(path: tuple, variable: nnx.Param) -> Parameter:
    value = variable.get_value()
    metadata = variable.get_metadata()
    axes = metadata["axes"]
    if "layers" in path:
        axes = ("layers", *axes)
    return Parameter(tuple(value.shape), value.dtype, axes, metadata["inputs"])
