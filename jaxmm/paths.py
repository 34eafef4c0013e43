"""Paths of parameters: patterns over them, and stacks of layers.

Stacks: one array with a leading axis in memory, one leaf per layer in files.

In a path, the stack is the part called `layers`: `transformer.layers.mlp.up.kernel` in memory is
`transformer.layers.0.mlp.up.kernel`, `transformer.layers.1...` in files.
"""

import re
from collections.abc import Mapping, Sequence

import numpy as np

_STACK = re.compile(r"(?:^|(?<=\.))layers\.(?!\d)")
_LAYER = re.compile(r"(?:^|(?<=\.))layers\.(\d+)\.")


def matches(patterns: Sequence[str], path: str) -> bool:
    """Whether one of the regular expressions matches the whole path."""
    return any(re.fullmatch(pattern, path) for pattern in patterns)


def unstack_layers(tree: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
    """{path: stacked array} -> {path with layer numbers: array}. Arrays may be of numpy or of JAX."""
    flat = {}
    for path, value in tree.items():
        match = _STACK.search(path)
        if match is None:
            flat[path] = value
        else:
            for i in range(value.shape[0]):
                flat[layer_path(path, i)] = value[i]
    return flat


def layer_path(path: str, layer: int) -> str:
    """The path of one layer of a stacked parameter."""
    return _STACK.sub(f"layers.{layer}.", path, count=1)


def is_stacked(path: str) -> bool:
    """Whether a path in memory is that of a stack."""
    return _STACK.search(path) is not None


def stack_layers(flat: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
    """The inverse of `unstack_layers`.

    Raises:
      ValueError: if the layers of a stack are not numbered 0, 1, 2, ... without a gap.
    """
    tree, stacks = {}, {}
    for path, value in flat.items():
        match = _LAYER.search(path)
        if match is None:
            tree[path] = value
        else:
            stacks.setdefault(_LAYER.sub("layers.", path, count=1), {})[int(match[1])] = value
    for path, members in stacks.items():
        if sorted(members) != list(range(len(members))):
            raise ValueError(f"{path}: layers {sorted(members)} have gaps")
        tree[path] = np.stack([members[i] for i in range(len(members))])
    return tree
