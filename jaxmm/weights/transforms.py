"""Invertible changes of layout between an official tensor and ours. None of them changes a value."""

import dataclasses
import math
from collections.abc import Callable

import numpy as np

Shape = tuple[int, ...]


@dataclasses.dataclass(frozen=True)
class Transform:
    """A change of layout and its inverse.

    Attributes:
      official_shape: our shape -> the official one.
      read: (official tensor, our shape) -> our tensor.
      write: our tensor -> official tensor.
    """

    name: str
    official_shape: Callable[[Shape], Shape]
    read: Callable[[np.ndarray, Shape], np.ndarray]
    write: Callable[[np.ndarray], np.ndarray]


SAME = Transform("same", lambda shape: shape, lambda x, shape: x, lambda x: x)

# PyTorch Linear [out, in] <-> [in, out]
LINEAR = Transform("linear", lambda shape: shape[::-1], lambda x, shape: x.T, lambda x: x.T)

# PyTorch Conv2d [out, in, height, width] <-> [height, width, in, out]
CONV = Transform(
    "conv",
    lambda s: (s[3], s[2], s[0], s[1]),
    lambda x, shape: x.transpose(2, 3, 1, 0),
    lambda x: x.transpose(3, 2, 0, 1),
)

# a projection to heads: PyTorch [heads * head, in] <-> [in, heads, head]
HEADS_OUT = Transform(
    "heads_out",
    lambda s: (s[1] * s[2], s[0]),
    lambda x, shape: x.T.reshape(shape),
    lambda x: x.reshape(x.shape[0], -1).T,
)

# a projection from heads: PyTorch [out, heads * head] <-> [heads, head, out]
HEADS_IN = Transform(
    "heads_in",
    lambda s: (s[2], math.prod(s[:2])),
    lambda x, shape: x.T.reshape(shape),
    lambda x: x.reshape(-1, x.shape[-1]).T,
)
