"""Low-rank adaptation (LoRA, arXiv 2106.09685): a matrix W is used as W + scale A B, and only A and B are trained.

A and B are parameters of their own, `<path of W>.lora_a` [*inputs, rank] and `<path of W>.lora_b` [rank, *outputs],
stacked where W is.
"""

import dataclasses
import functools
import math
import zlib
from collections.abc import Mapping

import jax
import jax.numpy as jnp
from flax import nnx

from jaxmm.errors import InputError
from jaxmm.layers.parameters import Blueprint, Params, check_paths
from jaxmm.paths import is_stacked, matches, select
from jaxmm.sharding import Parameter

A, B = ".lora_a", ".lora_b"


@dataclasses.dataclass(frozen=True)
class LoRA:
    """What is adapted, and by how much.

    Attributes:
      rank: r, the size of the axis between A and B.
      alpha: A B is scaled by alpha / rank.
      targets: regular expressions over the paths of matrices.

    Raises:
      InputError: if the rank is not positive.
    """

    rank: int
    alpha: float
    targets: tuple[str, ...]

    def __post_init__(self):
        if self.rank < 1:
            raise InputError(f"the rank of LoRA must be at least 1, not {self.rank}")

    @property
    def scale(self) -> float:
        """What A B is multiplied by."""
        return self.alpha / self.rank


@functools.partial(jax.tree_util.register_dataclass, data_fields=["base", "a", "b"], meta_fields=["scale"])
@dataclasses.dataclass(frozen=True, eq=False)
class LowRank:
    """The matrix base + scale a b, not multiplied out; `jaxmm.layers.linear.contract` applies it.

    Attributes:
      base: [*inputs, *outputs]; with an axis of layers before it, so have a and b.
      a: [*inputs, rank].
      b: [rank, *outputs].
    """

    base: jax.Array
    a: jax.Array
    b: jax.Array
    scale: float

    def merged(self) -> jax.Array:
        """The matrix itself: summed in float32, in the format of the base."""
        product = jnp.tensordot(self.a.astype(jnp.float32), self.b.astype(jnp.float32), 1, precision="highest")
        return (self.base.astype(jnp.float32) + self.scale * product).astype(self.base.dtype)


class AdaptedBlueprint:
    """A blueprint whose targets have adapters; with fresh ones it computes what the blueprint computes.

    Args:
      blueprint: of the network.
      lora: its targets must each match a matrix of an affine layer.
      fixed: regular expressions over paths that stay as they are, whatever the targets.

    Attributes:
      base: the blueprint.
      targets: paths of the adapted matrices.
      parameters: {path: Parameter} of the blueprint and of the adapters.

    Raises:
      InputError: for a target that matches nothing that can be adapted.
    """

    def __init__(self, blueprint: Blueprint, lora: LoRA, fixed: tuple[str, ...] = ()):
        self.base, self.lora = blueprint, lora
        known = {path: spec for path, spec in blueprint.parameters.items() if not matches(fixed, path)}
        self.targets = _targets(lora, known)
        self._adapters = {}
        for path in self.targets:
            self._adapters |= _describe(path, blueprint.parameters[path], lora.rank)
        self.parameters = {**blueprint.parameters, **self._adapters}

    @property
    def adapters(self) -> tuple[str, ...]:
        """The paths of all A and B."""
        return tuple(self._adapters)

    def init(self, key: jax.Array) -> Params:
        """Draw fresh parameters: A normal with variance 1 / inputs (the paper leaves the variance open), B zero."""
        params, key = self.base.init(key), jax.random.fold_in(key, zlib.crc32(b"lora"))
        for path, spec in self._adapters.items():
            if path.endswith(A):
                inputs = math.prod(spec.shape[is_stacked(path) : -1])
                noise = jax.random.normal(jax.random.fold_in(key, zlib.crc32(path.encode())), spec.shape, spec.dtype)
                params[path] = noise / math.sqrt(inputs)
            else:
                params[path] = jnp.zeros(spec.shape, spec.dtype)
        return params

    def bind(self, params: Mapping[str, jax.Array]) -> nnx.Module:
        """Return the network with these parameters, the adapters beside their matrices.

        Raises:
          ValueError: if a path is missing or unknown.
        """
        check_paths(params, self.parameters)
        return self.base.bind(_pair(params, self.lora.scale))

    @property
    def size(self) -> int:
        """The number of parameters."""
        return sum(spec.size for spec in self.parameters.values())


def merge(params: Mapping[str, jax.Array], lora: LoRA) -> Params:
    """Multiply the adapters into their matrices: W + scale A B in float32, in the format of W; no adapter is left.

    Each matrix stays where it is cut.
    """
    merged = {}
    for path, value in _pair(params, lora.scale).items():
        if isinstance(value, LowRank):
            sharding = getattr(value.base, "sharding", None)
            value = jax.jit(_merged, static_argnums=1, out_shardings=sharding)(value, is_stacked(path))
        merged[path] = value
    return merged


def _merged(value: LowRank, stacked: bool) -> jax.Array:
    return jax.vmap(LowRank.merged)(value) if stacked else value.merged()


def _pair(params: Mapping[str, jax.Array], scale: float) -> dict[str, jax.Array | LowRank]:
    """The parameters with a LowRank for each matrix that has adapters."""
    paired = {path: value for path, value in params.items() if not path.endswith((A, B))}
    for path in paired:
        if path + A in params:
            paired[path] = LowRank(params[path], params[path + A], params[path + B], scale)
    return paired


def _describe(path: str, spec: Parameter, rank: int) -> dict[str, Parameter]:
    stack = spec.shape[: is_stacked(path)], spec.axes[: is_stacked(path)]
    split = len(stack[0]) + spec.inputs
    a = Parameter((*spec.shape[:split], rank), spec.dtype, (*spec.axes[:split], "rank"))
    b = Parameter((*stack[0], rank, *spec.shape[split:]), spec.dtype, (*stack[1], "rank", *spec.axes[split:]))
    return {path + A: a, path + B: b}


def _targets(lora: LoRA, known: Mapping[str, Parameter]) -> tuple[str, ...]:
    """The matrices that the targets match."""
    for pattern in lora.targets:
        found = select((pattern,), known, "LoRA target")
        if not any(known[path].inputs for path in found):
            raise InputError(
                f"LoRA target {pattern!r} matches {found[0]}, which cannot be adapted: only matrices of affine layers"
                " can, no embeddings, convolutions, norms or biases"
            )
    return tuple(path for path, spec in known.items() if spec.inputs and matches(lora.targets, path))
