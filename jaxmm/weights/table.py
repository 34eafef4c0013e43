"""The table itself: rows, expansion over layers, and coverage in both directions."""

import dataclasses
import re
from collections.abc import Mapping

import numpy as np

from jaxmm.errors import InputError
from jaxmm.paths import stack_layers, unstack_layers
from jaxmm.weights.transforms import SAME, Transform

_FIELD = re.compile(r"\\\{(\w+)\\\}")


class Mismatch(InputError):
    """Official tensors and a table do not cover each other; every difference is in the message."""

    def __init__(self, problems: list[str]):
        super().__init__(f"{len(problems)} mismatched weights: " + "; ".join(problems))
        self.problems = problems


@dataclasses.dataclass(frozen=True)
class Row:
    """One official key, or one per value of its fields: `model.layers.{l}.mlp.up_proj.weight`.

    Attributes:
      official: the official key, with fields in braces for numbers.
      ours: our path with the same fields, or None for a tensor that is carried through though no network uses it.
      transform: between the two layouts.
    """

    official: str
    ours: str | None
    transform: Transform = SAME

    def prefixed(self, official: str, ours: str) -> "Row":
        """The same row below two prefixes: how a system composes its table from those of its parts."""
        return Row(official + self.official, None if self.ours is None else ours + self.ours, self.transform)


class Table:
    """The rows of one network, applied in both directions.

    Args:
      rows: every official key matches exactly one of them.
      shapes: {our path, stacks in memory form: shape}, that is, `Blueprint.parameters` or any mapping to objects with
        a `shape`.
    """

    def __init__(self, rows: list[Row], shapes: Mapping[str, object]):
        self.rows = rows
        self._stacked = {path: tuple(spec.shape) for path, spec in shapes.items()}
        flat = unstack_layers({path: _Shape(shape) for path, shape in self._stacked.items()})
        self._shapes = {path: value.shape for path, value in flat.items()}

    def official_keys(self) -> dict[str, str]:
        """{our path, one per layer: official key}.

        Raises:
          ValueError: if a path has no row or several: a defect of the table.
        """
        keys = {}
        for path in self._shapes:
            found = [key for row in self.rows if (key := _translate(row.ours, row.official, path)) is not None]
            if len(found) != 1:
                raise ValueError(f"{path} has {len(found)} rows in its weights table")
            keys[path] = found[0]
        return keys

    def read(self, tensors: Mapping[str, np.ndarray]) -> tuple[dict[str, np.ndarray], dict[str, np.ndarray]]:
        """Official tensors -> (our parameters with stacked layers, the tensors that are only carried).

        Raises:
          Mismatch: if a key is unknown, missing or of a wrong shape; all of them are listed.
        """
        ours, carried, problems = {}, {}, []
        for key, tensor in tensors.items():
            found = [(row, path) for row in self.rows if (path := self._target(row, key)) is not None]
            if len(found) != 1:
                problems.append(f"{key}: unknown key" if not found else f"{key}: matches {len(found)} rows")
                continue
            row, path = found[0]
            if row.ours is None:
                carried[key] = tensor
                continue
            shape = self._shapes[path]
            if tuple(tensor.shape) != row.transform.official_shape(shape):
                expected = list(row.transform.official_shape(shape))
                problems.append(f"{key}: shape {list(tensor.shape)}, expected {expected}")
                continue
            ours[path] = row.transform.read(np.asarray(tensor), shape)
        wrong = {problem.split(":")[0] for problem in problems}
        problems += [
            f"{key}: missing" for path, key in self.official_keys().items() if path not in ours and key not in wrong
        ]
        if problems:
            raise Mismatch(sorted(problems))
        return stack_layers(ours), carried

    def write(self, params: Mapping[str, np.ndarray], carried: Mapping[str, np.ndarray] | None = None) -> dict:
        """Our parameters -> official tensors, the carried ones added."""
        flat = unstack_layers(params)
        official = dict(self.write_one(path, flat[path]) for path in self.official_keys())
        return official | dict(carried or {})

    def write_one(self, path: str, value: np.ndarray) -> tuple[str, np.ndarray]:
        """One of our parameters, a single layer of a stack -> (official key, tensor)."""
        row = next(row for row in self.rows if _translate(row.ours, row.official, path) is not None)
        return _translate(row.ours, row.official, path), np.ascontiguousarray(row.transform.write(np.asarray(value)))

    def _target(self, row: Row, key: str) -> str | None:
        """Our path for an official key by this row; "" for a carried one; None where the row does not apply."""
        if row.ours is None:
            return "" if _pattern(row.official).fullmatch(key) else None
        path = _translate(row.official, row.ours, key)
        return path if path in self._shapes else None


class _Shape:
    """A shape that can be indexed like a stacked array, so that `unstack_layers` works on shapes too."""

    def __init__(self, shape: tuple[int, ...]):
        self.shape = shape

    def __getitem__(self, i: int) -> "_Shape":
        return _Shape(self.shape[1:])


def _pattern(template: str) -> re.Pattern:
    return re.compile(_FIELD.sub(r"(?P<\1>\\d+)", re.escape(template)))


def _translate(source: str | None, target: str, text: str) -> str | None:
    """Rewrite text from the form of one template to that of another; None if it has not the form of the first."""
    match = None if source is None else _pattern(source).fullmatch(text)
    return None if match is None else _fill(target, match.groupdict())


def _fill(template: str, fields: Mapping[str, str]) -> str:
    return re.sub(r"\{(\w+)\}", lambda m: fields[m[1]], template)
