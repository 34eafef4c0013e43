"""Model FLOPs of a training step, and the peak of the devices that it runs on.

Model FLOPs (PaLM, arXiv 2204.02311, appendix B) are those that the mathematics of a step needs: the matrix products
and convolutions of its forward and backward passes, whatever is computed a second time to save memory. Only tokens
that are not filler count:

    model FLOPs per step = FLOPs of the step at its static shapes x share of the token slots that are filled
    utilisation = model FLOPs per step / (seconds per step x peak FLOP/s of all devices)

The peak is the dense bfloat16 peak of accelerators, also where the run computes in float32. Devices that are not in
the table below, CPUs among them, are measured with a large float32 product.
"""

import dataclasses
import math
import re
import time
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.extend.core import Jaxpr, Literal, Var
from jax.interpreters.partial_eval import dce_jaxpr
from jax.sharding import Mesh

from jaxmm.sequence import Batch

Flags = list[bool]

# device_kind, as JAX spells it -> dense bfloat16 FLOP/s of one device (data sheets of the makers)
PEAKS = (
    (r"TPU v4", 275e12),
    (r"TPU v5 lite|TPU v5e", 197e12),
    (r"TPU v5|TPU v5p", 459e12),
    (r"TPU v6 lite|TPU v6e", 918e12),
    (r"TPU7x", 1153.5e12),  # JAX shows the two halves of a chip (2307e12) as two devices
    (r"NVIDIA A100\b.*", 312e12),
    (r"NVIDIA H100 PCIe", 756e12),
    (r"NVIDIA H100 80GB HBM3|NVIDIA H200", 989e12),
    (r"NVIDIA B200", 2250e12),
    (r"NVIDIA L4", 121e12),
)

# their derivative is zero everywhere; integers and booleans, which have none either, are told by their format
_NO_GRADIENT = {"stop_gradient", "sign", "floor", "ceil", "round"}


@dataclasses.dataclass(frozen=True)
class Work:
    """What a step of a run asks of its devices, and what they can do.

    Attributes:
      flops: of a step whose rows are full.
      slots: token slots of a batch, filler included.
      peak: FLOP/s of all devices.
    """

    flops: float
    slots: int
    peak: float

    @classmethod
    def of_step(cls, loss: Callable, state: Any, batch: Batch, key: jax.Array, mesh: Mesh) -> "Work":
        """Count it, for the `make_loss` of the run; nothing is computed but a matrix product on unknown devices."""
        flops = model_flops(loss, state["trainable"], state["frozen"], batch, key)
        slots = sum(tokens.ids.size for tokens in batch.streams.values())
        return cls(flops, slots, peak_flops_total(mesh.devices))

    def metrics(self, tokens: float, seconds: float) -> dict[str, float]:
        """Model FLOPs and utilisation of a step with so many tokens that took so many seconds."""
        flops = self.flops * tokens / self.slots
        return {"model_flops": flops, "utilisation": flops / (seconds * self.peak)}


def model_flops(loss: Callable, trainable: Any, frozen: Any, batch: Any, key: Any) -> float:
    """FLOPs of the matrix products and convolutions of one training step, at its static shapes.

    A product of [M, K] and [K, N] costs 2 M N K. Where the total depends on it, the backward pass costs as much once
    more for each of its two operands that depends on a trainable parameter: 3 times the forward product in ordinary
    training, 2 times under a frozen weight, 1 time in a frozen encoder.

    Recomputation is not counted; attention counts as the dense product that it is in the plain path. Of a cond the
    dearest branch counts. A while loop, which has no backward pass, counts one turn: how many it takes is not known
    (a `fori_loop` of static bounds is a scan). A convolution counts its padding, but not the zeros between its inputs
    (`lhs_dilation`). A Pallas kernel counts what its `cost_estimate` says, times 3 if there is a gradient.

    Args:
      loss: (trainable, frozen, batch, key) -> the total, or a tuple that it leads; only the total is differentiated.
      trainable, frozen, batch, key: arrays, or shapes in their place: nothing is computed.

    Raises:
      ValueError: for a Pallas kernel without a cost estimate.
    """
    jaxpr = jax.make_jaxpr(loss)(trainable, frozen, batch, key).jaxpr
    jaxpr, _ = dce_jaxpr(jaxpr, [True] * len(jaxpr.outvars), instantiate=True)
    parameters = len(jax.tree.leaves(trainable))
    trained = [i < parameters for i in range(len(jaxpr.invars))]
    total = [i == 0 for i in range(len(jaxpr.outvars))]
    return float(_cost(jaxpr, trained, total)[0])


def peak_flops(devices: Sequence[Any]) -> float | None:
    """Dense bfloat16 FLOP/s of one of `devices`, by their kind; None if it is unknown, or they are of several kinds."""
    peaks = {_peak(device.device_kind) for device in devices}
    return peaks.pop() if len(peaks) == 1 else None


def peak_flops_total(devices: Any) -> float:
    """FLOP/s of all devices of a mesh (`mesh.devices`) together.

    What is not in the table is measured. The CPU devices of a process share its cores: all of them are as fast as one.
    """
    devices = list(np.asarray(devices).flat)
    peak = peak_flops(devices)
    if peak is not None:
        return peak * len(devices)
    processes = {device.process_index for device in devices}
    return measured_peak() * (len(processes) if devices[0].platform == "cpu" else len(devices))


def measured_peak(size: int = 2048) -> float:
    """FLOP/s of a float32 matrix product of size x size on the default device."""
    return 2 * size**3 / matmul_seconds(size)


def matmul_seconds(size: int = 2048, repeats: int = 5) -> float:
    """The median time of one float32 matrix product of size x size: how fast this machine is just now."""
    x = jnp.ones((size, size), jnp.float32)
    product = jax.jit(jnp.matmul)
    product(x, x).block_until_ready()
    times = []
    for _ in range(repeats):
        begin = time.perf_counter()
        product(x, x).block_until_ready()
        times.append(time.perf_counter() - begin)
    return float(np.median(times))


def _peak(kind: str) -> float | None:
    """A share of a GPU (MIG) has less than the table says."""
    known = (peak for pattern, peak in PEAKS if re.fullmatch(pattern, kind) and "MIG" not in kind)
    return next(known, None)


def _cost(jaxpr: Jaxpr, trained: Flags, active: Flags) -> tuple[int, Flags]:
    """FLOPs of a jaxpr, forward and backward.

    Args:
      jaxpr: without dead code.
      trained: which inputs depend on a trainable parameter.
      active: which outputs are differentiated.

    Returns:
      The FLOPs, and which inputs get a gradient.
    """
    marked = _marked(jaxpr, trained)
    live = {x for x, on in zip(jaxpr.outvars, active) if on and _in(x, marked)}
    total = 0
    for eqn in reversed(jaxpr.eqns):
        differentiated = [_in(x, live) for x in eqn.outvars]
        flops, needs = _equation_cost(eqn, [_in(x, marked) for x in eqn.invars], differentiated)
        total += flops
        if any(differentiated):
            live |= {x for x, on in zip(eqn.invars, needs) if on and _in(x, marked)}
    return total, [x in live for x in jaxpr.invars]


def _marked(jaxpr: Jaxpr, trained: Flags) -> set[Var]:
    """The variables that depend differentiably on the inputs that are `trained`."""
    marked = {x for x, on in zip(jaxpr.invars, trained) if on}
    for eqn in jaxpr.eqns:
        flags = [_in(x, marked) for x in eqn.invars]
        if any(flags):
            results = zip(eqn.outvars, _equation_marks(eqn, flags))
            marked |= {x for x, on in results if on and jnp.issubdtype(x.aval.dtype, jnp.inexact)}
    return marked


def _equation_marks(eqn: Any, trained: Flags) -> Flags:
    """Which results of an equation depend on its operands that are `trained`."""
    name = eqn.primitive.name
    if name in _NO_GRADIENT or name == "while":
        return [False] * len(eqn.outvars)
    bodies, skip, _ = _bodies(eqn)
    if not bodies:
        return [True] * len(eqn.outvars)
    return _fixpoint(eqn, bodies, trained[skip:])[1]


def _equation_cost(eqn: Any, trained: Flags, active: Flags) -> tuple[int, Flags]:
    """As `_cost`, of one equation; which operands get a gradient says nothing where no result is `active`."""
    name, params = eqn.primitive.name, eqn.params
    if name in _PRODUCTS:
        return _PRODUCTS[name](eqn) * (1 + any(active) * sum(trained)), trained
    if name == "pallas_call":
        if params["cost_estimate"] is None:
            raise ValueError(f"the FLOPs of Pallas kernel {params['name']} are unknown: give it a cost_estimate")
        return params["cost_estimate"].flops * (3 if any(active) and any(trained) else 1), trained
    if name == "while":
        parts = [params["cond_jaxpr"].jaxpr, params["body_jaxpr"].jaxpr]
        return sum(_cost(part, [False] * len(part.invars), [])[0] for part in parts), [False] * len(trained)
    bodies, skip, times = _bodies(eqn)
    if not bodies:
        return 0, trained
    trained, _ = _fixpoint(eqn, bodies, trained[skip:])
    carry, consts = params.get("num_carry", 0), params.get("num_consts", 0)
    while True:
        costs = [_cost(body, trained, active) for body in bodies]
        needs = [any(each) for each in zip(*(needs for _, needs in costs))]
        again = [on or needs[consts + i] for i, on in enumerate(active[:carry])] + active[carry:]
        if again == active:
            return times * max(flops for flops, _ in costs), [False] * skip + needs
        active = again


def _fixpoint(eqn: Any, bodies: list[Jaxpr], trained: Flags) -> tuple[Flags, Flags]:
    """Which inputs of the bodies depend on a trainable parameter, in some turn of a scan, and which results."""
    carry, consts = eqn.params.get("num_carry", 0), eqn.params.get("num_consts", 0)
    while True:
        outs = [[_in(x, marked) for x in body.outvars] for body in bodies for marked in [_marked(body, trained)]]
        results = [any(each) for each in zip(*outs)]
        again = list(trained)
        for i in range(carry):
            again[consts + i] |= results[i]
        if again == trained:
            return trained, results
        trained = again


def _bodies(eqn: Any) -> tuple[list[Jaxpr], int, int]:
    """The jaxprs that an equation runs (alternatives of a cond), how many operands go before theirs, how many times."""
    name, params = eqn.primitive.name, eqn.params
    if name == "scan":
        return [params["jaxpr"].jaxpr], 0, params["length"]
    if name == "cond":
        return [branch.jaxpr for branch in params["branches"]], 1, 1
    if name == "shard_map":
        axes = {axis for spec in params["in_specs"] for axis in jax.tree.leaves(tuple(spec))}
        return [params["jaxpr"]], 0, math.prod(params["mesh"].shape[axis] for axis in axes)
    if name == "pallas_call":
        return [], 0, 1
    body = params.get("call_jaxpr", params.get("jaxpr"))
    body = getattr(body, "jaxpr", body)
    calls = body is not None and len(body.invars) == len(eqn.invars) and len(body.outvars) == len(eqn.outvars)
    return [body] if calls else [], 0, 1


def _in(x: Any, variables: set[Var]) -> bool:
    return not isinstance(x, Literal) and x in variables


def _dot(eqn: Any) -> int:
    """2 x results x contracted size."""
    (contracted, _), _ = eqn.params["dimension_numbers"]
    return 2 * eqn.outvars[0].aval.size * math.prod(eqn.invars[0].aval.shape[axis] for axis in contracted)


def _convolution(eqn: Any) -> int:
    """2 x results x input channels of a group x taps; of the taps, those that do not fall between inputs."""
    params = eqn.params
    result, kernel = eqn.outvars[0].aval.shape, eqn.invars[1].aval.shape
    batch, features, *space = params["dimension_numbers"].out_spec
    _, inputs, *window = params["dimension_numbers"].rhs_spec
    taps = 1
    for i, (axis, tap) in enumerate(zip(space, window)):
        begin = np.arange(result[axis]) * params["window_strides"][i] - params["padding"][i][0]
        place = begin[:, None] + np.arange(kernel[tap]) * params["rhs_dilation"][i]
        taps *= int(np.sum(place % params["lhs_dilation"][i] == 0))
    return 2 * result[batch] * result[features] * kernel[inputs] * taps


_PRODUCTS = {"dot_general": _dot, "conv_general_dilated": _convolution}
