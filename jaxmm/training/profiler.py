"""A window of steps under JAX's profiler."""

import re
from pathlib import Path

import jax

from jaxmm.errors import InputError


class ProfileWindow:
    """Traces the steps FIRST to LAST, both included, into a folder that TensorBoard and XProf read.

    Args:
      window: "FIRST:LAST", or "" for none.
      folder: of the trace.

    Raises:
      InputError: if the window is none.
    """

    def __init__(self, window: str, folder: Path):
        match = re.fullmatch(r"(\d+):(\d+)", window) if window else None
        if window and (match is None or not 1 <= int(match[1]) <= int(match[2])):
            raise InputError(f"config key 'profile' is a window of steps like '100:110', not {window!r}")
        self._first, self._last = (int(match[1]), int(match[2])) if match else (0, -1)
        self._folder, self._running = folder, False

    def before(self, step: int) -> None:
        """A step is about to begin."""
        if not self._running and self._first <= step <= self._last:
            jax.profiler.start_trace(str(self._folder))
            self._running = True

    def after(self, step: int, results) -> None:
        """A step was given to the device; its results are waited for at the end of the window."""
        if self._running and step >= self._last:
            jax.block_until_ready(results)
            self.close()

    def close(self) -> None:
        """End the trace, also one whose window did not come to its end."""
        if self._running:
            jax.profiler.stop_trace()
            self._running = False
