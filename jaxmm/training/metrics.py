"""Numbers on the way: JSON lines always, TensorBoard where it is installed, one live line on the screen."""

import contextlib
import importlib.util
import json
import math
import resource
import sys
import time
from collections.abc import Iterator, Mapping
from pathlib import Path

import jax
import numpy as np
from tqdm import tqdm

from jaxmm.checkpoints import write_text


class MetricWriter:
    """Writes WORKDIR/metrics.jsonl, one line per log step, and TensorBoard events beside it if that extra is installed.

    Args:
      workdir: of the run.
      step: the step that the run starts from; lines of later steps, left by a run that was killed, are dropped.
    """

    def __init__(self, workdir: Path, step: int = 0):
        self._path = workdir / "metrics.jsonl"
        _drop_after(self._path, step)
        self._file = self._path.open("a")
        self._board = _tensorboard(workdir)

    def write(self, step: int, values: Mapping[str, float]) -> None:
        """Write the numbers of one step; what is not finite is null, for JSON has no such numbers."""
        line = {name: value if math.isfinite(value) else None for name, value in values.items()}
        self._file.write(json.dumps({"step": step, **line}) + "\n")
        self._file.flush()
        if self._board is not None:
            self._board.write_scalars(step, dict(values))

    def write_image(self, step: int, name: str, pixels: np.ndarray) -> None:
        """Show a picture, uint8 [H, W, C], on TensorBoard."""
        if self._board is not None:
            self._board.write_images(step, {name: pixels[None]})

    def close(self) -> None:
        """Finish both."""
        self._file.close()
        if self._board is not None:
            self._board.close()


class Meter:
    """Where the time between two log steps goes, by a clock that no one sets.

    Args:
      names: of the totals that are kept apart.
    """

    def __init__(self, *names: str):
        self._totals = dict.fromkeys(names, 0.0)
        self._begin, self._steps = time.perf_counter(), 0

    @contextlib.contextmanager
    def timed(self, name: str) -> Iterator[None]:
        """Add the time spent inside to a total."""
        begin = time.perf_counter()
        try:
            yield
        finally:
            self._totals[name] += time.perf_counter() - begin

    def step(self) -> None:
        """One step is done."""
        self._steps += 1

    def read(self) -> dict[str, float]:
        """Seconds per step, and those of each total per step: {"seconds_per_step", "<name>_seconds": ...}."""
        steps = max(self._steps, 1)
        seconds = {"seconds_per_step": (time.perf_counter() - self._begin) / steps}
        return seconds | {f"{name}_seconds": total / steps for name, total in self._totals.items()}

    def restart(self) -> None:
        """Begin the next interval."""
        self._totals = dict.fromkeys(self._totals, 0.0)
        self._begin, self._steps = time.perf_counter(), 0


def memory_use() -> dict[str, float]:
    """Bytes: the most that any local device holds and has held, where devices tell, and the process's peak."""
    stats = [device.memory_stats() or {} for device in jax.local_devices()]
    use = {}
    for name, key in (("memory/device_bytes", "bytes_in_use"), ("memory/device_peak_bytes", "peak_bytes_in_use")):
        values = [each[key] for each in stats if key in each]
        use |= {name: float(max(values))} if values else {}
    unit = 1 if sys.platform == "darwin" else 1024
    return use | {"memory/host_peak_bytes": float(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit)}


class Progress:
    """The live line: step, of how many, each loss term, tokens per second, time left."""

    def __init__(self, steps: int, start: int):
        live = sys.stderr.isatty()
        self._bar = tqdm(
            total=steps,
            initial=start,
            dynamic_ncols=live,
            mininterval=0.2 if live else 10.0,
            bar_format="step {n_fmt}/{total_fmt} |{bar:12}| {postfix} [{elapsed}, {remaining} left]",
        )

    def advance(self) -> None:
        """One step is done."""
        self._bar.update()

    def show(self, values: Mapping[str, float]) -> None:
        """Show the latest numbers."""
        terms = [
            f"{name.removeprefix('loss/')} {value:.4f}" for name, value in values.items() if name.startswith("loss")
        ]
        self._bar.set_postfix_str(" ".join([*terms, f"{values['tokens_per_second']:,.0f} tokens/s"]), refresh=False)

    def say(self, text: str) -> None:
        """Print a line above it."""
        self._bar.write(text, file=sys.stderr)

    def close(self) -> None:
        """Leave the line as it is."""
        self._bar.close()


def _drop_after(path: Path, step: int) -> None:
    if not path.exists():
        return
    kept = [line for line in path.read_text(errors="replace").splitlines() if _step(line) <= step]
    write_text(path, "".join(line + "\n" for line in kept))


def _step(line: str) -> float:
    """The step of a line; a line that was cut by a kill is later than all."""
    try:
        return json.loads(line)["step"]
    except (ValueError, KeyError, TypeError):
        return math.inf


def _tensorboard(workdir: Path):
    """clu's writer imports TensorFlow, so only where the extra is installed, and only now."""
    if any(importlib.util.find_spec(package) is None for package in ("tensorflow", "tensorboard")):
        return None
    from clu import metric_writers

    return metric_writers.SummaryWriter(str(workdir))
