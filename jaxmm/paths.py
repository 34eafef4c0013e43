"""Paths of parameters: patterns over them, and stacks of layers.

Stacks: one array with a leading axis in memory, one leaf per layer in files.

In a path, the stack is the part called `layers`: `transformer.layers.mlp.up.kernel` in memory is
`transformer.layers.0.mlp.up.kernel`, `transformer.layers.1...` in files.
"""

import difflib
import re
from collections.abc import Collection, Mapping, Sequence

import numpy as np

from jaxmm.errors import InputError

_STACK = re.compile(r"(?:^|(?<=\.))layers\.(?!\d)")
_LAYER = re.compile(r"(?:^|(?<=\.))layers\.(\d+)\.")


def matches(patterns: Sequence[str], path: str) -> bool:
    """Whether one of the regular expressions matches the whole path."""
    return any(re.fullmatch(pattern, path) for pattern in patterns)


def select(patterns: Sequence[str], paths: Collection[str], what: str) -> list[str]:
    """The paths that one of the regular expressions matches.

    Args:
      patterns: regular expressions over whole paths.
      paths: in memory.
      what: how an error calls a pattern.

    Raises:
      InputError: for a pattern that is no regular expression or matches nothing; it names the nearest path.
    """
    for pattern in patterns:
        try:
            found = any(re.fullmatch(pattern, path) for path in paths)
        except re.error as error:
            raise InputError(f"{what} {pattern!r} is no regular expression: {error}") from error
        if not found:
            raise InputError(f"{what} {pattern!r} matches nothing; the nearest path is {_nearest(pattern, paths)!r}")
    return [path for path in paths if matches(patterns, path)]


def _nearest(pattern: str, paths: Collection[str]) -> str:
    """The path that has most of the letters of a pattern, in order."""
    letters = re.sub(r"\.[*+]|[^\w.]", "", pattern)

    def shared(path: str) -> int:
        return sum(block.size for block in difflib.SequenceMatcher(None, letters, path).get_matching_blocks())

    return max(sorted(paths), key=shared, default="")


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
