"""Meshes, and the one table that maps logical axis names to mesh axes.

Networks name the axes of their parameters and activations ("embed", "heads", "rows", ...). Only this module knows the
mesh: four axes, "data" (replicas), "fsdp" (parameters and optimizer state cut, batch cut), "tensor" (heads, MLP,
vocabulary) and "context" (the tokens of a row). Axes are of type Auto throughout the library: `constrain` pins what
the compiler must not guess.
"""

import dataclasses
import functools
import math
from collections.abc import Mapping

import jax
import numpy as np
from jax.sharding import AbstractMesh, AxisType, Mesh, NamedSharding, PartitionSpec

from jaxmm.errors import InputError, nearest

AnyMesh = Mesh | AbstractMesh
MESH_AXES = ("data", "fsdp", "tensor", "context")

# Logical axis -> mesh axes. A name that is missing here is an error.
RULES: dict[str, tuple[str, ...]] = {
    # parameters
    "layers": (),
    "embed": ("fsdp",),
    "heads": ("tensor",),
    "kv_heads": ("tensor",),
    "head": (),
    "mlp": ("tensor",),
    "vocab": ("tensor",),
    "norm": (),
    "patch": (),
    "frequencies": (),
    "time": ("fsdp",),
    "rank": (),
    "kernel": (),
    "channels_in": (),
    "channels_out": ("fsdp",),
    # activations
    "rows": ("data", "fsdp"),
    "length": ("context",),
    "keys": (),  # the key side of attention: gathered over "context"
    "width": (),
}


@dataclasses.dataclass(frozen=True)
class Parameter:
    """What is known of one parameter before it has numbers.

    Attributes:
      shape, dtype: of the array.
      axes: one logical name per axis.
      inputs: how many axes, after that of a stack, an affine layer sums over; 0 for what is no matrix of such a layer
        (norms, biases, embeddings, convolutions). What has inputs can be adapted (`jaxmm.layers.lora`).
    """

    shape: tuple[int, ...]
    dtype: np.dtype
    axes: tuple[str, ...]
    inputs: int = 0

    def __post_init__(self):
        if len(self.shape) != len(self.axes):
            raise ValueError(f"{len(self.axes)} axis names {self.axes} for shape {self.shape}")

    @property
    def size(self) -> int:
        return math.prod(self.shape)


def make_mesh(*, data: int = 1, fsdp: int = -1, tensor: int = 1, context: int = 1, devices: list | None = None) -> Mesh:
    """Make the mesh of the four axes; one of the sizes may be -1, for what the others leave of the devices.

    Raises:
      InputError: if the sizes do not multiply to the number of devices.
    """
    devices = jax.devices() if devices is None else devices
    sizes = [data, fsdp, tensor, context]
    if any(size == 0 or size < -1 for size in sizes) or sizes.count(-1) > 1:
        raise InputError(f"mesh {dict(zip(MESH_AXES, sizes))}: sizes are positive, and at most one of them is -1")
    known = math.prod(size for size in sizes if size != -1)
    if len(devices) % known == 0:
        sizes = [len(devices) // known if size == -1 else size for size in sizes]
    if math.prod(sizes) != len(devices):
        raise InputError(f"mesh {dict(zip(MESH_AXES, sizes))} does not fit {len(devices)} devices")
    return jax.make_mesh(tuple(sizes), MESH_AXES, axis_types=(AxisType.Auto,) * 4, devices=devices)


def abstract_mesh(*, data: int = 1, fsdp: int = 1, tensor: int = 1, context: int = 1) -> AbstractMesh:
    """The mesh of these sizes without devices: enough for shapes and shardings."""
    return AbstractMesh((data, fsdp, tensor, context), MESH_AXES, axis_types=(AxisType.Auto,) * 4)


def mesh_axes(logical: str) -> tuple[str, ...]:
    """Return the mesh axes that cut a logical axis.

    Raises:
      ValueError: if no rule names that axis.
    """
    if logical not in RULES:
        raise ValueError(f"no sharding rule for the axis {logical!r}{nearest(logical, RULES)}")
    return RULES[logical]


def partition(
    shape: tuple[int, ...], axes: tuple[str | None, ...], mesh: AnyMesh, *, move: bool = False
) -> PartitionSpec:
    """Return the partition of an array with these logical axes.

    A dimension is cut only if the mesh axes divide it, and a mesh axis cuts the first dimension that wants it. With
    `move` (parameters), a mesh axis that finds its dimension indivisible goes to the largest other dimension that it
    divides, never to the stack of layers.
    """
    cuts: list[tuple[str, ...] | None] = [None] * len(shape)
    homeless, taken = [], set()
    for i, name in enumerate(axes):
        rule = mesh_axes(name) if name else ()
        wanted = tuple(axis for axis in rule if mesh.shape[axis] > 1 and axis not in taken)
        if not wanted:
            continue
        if shape[i] % math.prod(mesh.shape[axis] for axis in wanted) == 0:
            cuts[i] = wanted
            taken.update(wanted)
        elif move:
            homeless.append(wanted)
    for wanted in homeless:
        if taken.intersection(wanted):
            continue
        for i in sorted(range(len(shape)), key=lambda i: -shape[i]):
            if cuts[i] is None and axes[i] != "layers" and shape[i] % math.prod(mesh.shape[a] for a in wanted) == 0:
                cuts[i] = wanted
                taken.update(wanted)
                break
    return PartitionSpec(*(cut[0] if cut and len(cut) == 1 else cut for cut in cuts))


def parameter_shardings(parameters: Mapping[str, Parameter], mesh: AnyMesh) -> dict[str, NamedSharding]:
    """Return the sharding of each parameter on a mesh."""
    return {
        path: NamedSharding(mesh, partition(spec.shape, spec.axes, mesh, move=True))
        for path, spec in parameters.items()
    }


def unsharded(parameters: Mapping[str, Parameter], mesh: AnyMesh) -> dict[str, int]:
    """{path: size} of the parameters that every device holds whole, largest first; none if the mesh cuts none."""
    if mesh.shape["fsdp"] * mesh.shape["tensor"] == 1:
        return {}
    whole = [path for path, sharding in parameter_shardings(parameters, mesh).items() if not any(sharding.spec)]
    return {path: parameters[path].size for path in sorted(whole, key=lambda path: -parameters[path].size)}


def describe_unsharded(parameters: Mapping[str, Parameter], mesh: AnyMesh, names: int = 3) -> str:
    """One line: the share of all parameters that every device holds whole, and the largest of them by name."""
    whole, total = unsharded(parameters, mesh), sum(spec.size for spec in parameters.values())
    line = f"{sum(whole.values()) / total:.2%} of {total:,} parameters are on every device"
    more = f" and {len(whole) - names} more" if len(whole) > names else ""
    return line + (": " + ", ".join(list(whole)[:names]) + more if whole else "")


def check_unsharded(
    parameters: Mapping[str, Parameter], mesh: AnyMesh, limit: float = 0.02, least: int = 2**20
) -> None:
    """Raise InputError if every device would hold more than that share of the parameters whole.

    So few as `least` parameters may be whole in any case: 4 MiB, the adapters of a small model.
    """
    whole, total = unsharded(parameters, mesh), sum(spec.size for spec in parameters.values())
    if sum(whole.values()) > max(limit * total, least):
        sizes = {axis: size for axis, size in mesh.shape.items() if size > 1}
        raise InputError(
            f"mesh {sizes} divides too few sizes of this model: {describe_unsharded(parameters, mesh)}; "
            f"at most {limit:.0%} may be (take a smaller fsdp or tensor, and more of data)"
        )


def rows_sharding(mesh: Mesh, rows: int) -> NamedSharding:
    """Return the sharding of any array of a batch whose first axis counts `rows` rows."""
    return NamedSharding(mesh, partition((rows,), ("rows",), mesh))


def replicated(mesh: Mesh) -> NamedSharding:
    """Return the sharding of an array that every device holds whole."""
    return NamedSharding(mesh, PartitionSpec())


def constrain(x: jax.Array, *axes: str | None) -> jax.Array:
    """Pin the sharding of an activation by its logical axes; without a mesh (`jax.set_mesh`) it returns x as it is."""
    mesh = jax.sharding.get_abstract_mesh()
    if mesh.empty or mesh.size == 1:
        return x
    return jax.lax.with_sharding_constraint(x, partition(x.shape, axes, mesh))


def constrain_rows(x: jax.Array) -> jax.Array:
    """Pin an activation whose first axis counts rows, and whose other axes no mesh axis cuts."""
    return constrain(x, "rows", *[None] * (x.ndim - 1))


def gather(weight: jax.Array, *axes: str) -> jax.Array:
    """Pin a weight as a layer uses it: whole along "fsdp", cut as it is stored along the other mesh axes.

    Its gradient is pinned as the weight is stored, so that the devices need not each have the whole sum.
    """
    mesh = jax.sharding.get_abstract_mesh()
    if mesh.empty or mesh.shape["fsdp"] == 1:
        return weight
    stored = partition(weight.shape, axes, mesh, move=True)
    return _gather(weight, stored)


@functools.partial(jax.custom_vjp, nondiff_argnums=(1,))
def _gather(weight: jax.Array, stored: PartitionSpec) -> jax.Array:
    # first as it is stored: or else the compiler gathers what the weight was cast from
    weight = jax.lax.with_sharding_constraint(weight, stored)
    return jax.lax.with_sharding_constraint(weight, PartitionSpec(*(None if cut == "fsdp" else cut for cut in stored)))


def _gather_backward(stored: PartitionSpec, _: None, gradient: jax.Array) -> tuple[jax.Array]:
    return (jax.lax.with_sharding_constraint(gradient, stored),)


_gather.defvjp(lambda weight, stored: (_gather(weight, stored), None), _gather_backward)
