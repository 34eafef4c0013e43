"""A golden folder: what the official code answers, and a record of what a comparison has read of it."""

import json
from pathlib import Path

import numpy as np
from safetensors.numpy import load_file

TOLERANCE = 1e-4


class Cases:
    """The tensors of `cases.safetensors`; reading one marks it as read."""

    def __init__(self, path: Path):
        self._tensors = load_file(path)
        self.read: set[str] = set()

    def __getitem__(self, name: str) -> np.ndarray:
        tensor = self._tensors[name]
        self.read.add(name)
        return tensor

    def __contains__(self, name: str) -> bool:
        return name in self._tensors

    def names(self, prefix: str = "") -> list[str]:
        """All names with a prefix."""
        return sorted(name for name in self._tensors if name.startswith(prefix))

    def series(self, prefix: str) -> list[np.ndarray]:
        """The tensors prefix/0, prefix/1, ... in order."""
        names = self.names(prefix + "/")
        return [self[f"{prefix}/{i}"] for i in range(len(names))]


class Golden:
    """Config, weights and cases of one folder."""

    def __init__(self, folder: Path):
        self.folder = folder
        self.config = json.loads((folder / "config.json").read_text())
        self.weights = load_file(folder / "weights.safetensors")
        self.cases = Cases(folder / "cases.safetensors")

    def prefixes(self) -> list[str]:
        """The names of the cases."""
        return sorted({name.split("/")[0] for name in self.cases.names()})

    def check(
        self, name: str, ours, *, tolerance: float = TOLERANCE, suggested: float | None = None, where=None
    ) -> None:
        """Compare with a stored tensor: integers exactly, floats by max|a-b| / max(max|b|, 1e-6).

        Args:
          name: of the tensor.
          ours: our value.
          tolerance: bound of that error.
          suggested: besides, a bound of max|a-b| / max(max|b|, 1), where a golden's README gives one.
          where: boolean over the leading axes: compare only there.
        """
        expected, ours = self.cases[name], np.asarray(ours)
        assert ours.shape == expected.shape, f"{name}: shape {ours.shape}, expected {expected.shape}"
        if where is not None:
            expected, ours = expected[where], ours[where]
        if np.issubdtype(expected.dtype, np.integer):
            assert np.array_equal(ours, expected), f"{name}: {np.sum(ours != expected)} numbers differ"
            return
        error = relative_error(ours, expected)
        assert error <= tolerance, f"{name}: error {error:.2e}, at most {tolerance:.0e}"
        if suggested is not None:
            error = relative_error(ours, expected, floor=1.0)
            assert error <= suggested, f"{name}: error {error:.2e} by its README, at most {suggested:.0e}"


def relative_error(ours: np.ndarray, expected: np.ndarray, floor: float = 1e-6) -> float:
    """max|a-b| / max(max|b|, floor); infinite where ours is not finite."""
    if not expected.size:
        return 0.0
    ours = np.asarray(ours, expected.dtype)
    error = np.max(np.abs(ours - expected)) / max(np.max(np.abs(expected)), floor)
    return float(error) if np.isfinite(error) else np.inf
