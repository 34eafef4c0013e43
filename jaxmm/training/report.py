"""What runs have come to: the numbers in their workdirs, read, and one table of them all."""

import dataclasses
import json
import math
import re
import statistics
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from jaxmm.errors import InputError, nearest
from jaxmm.paths import matches

DEFAULT_METRICS = (r"loss(/.*)?", "learning_rate", "gradient_norm", "tokens_per_second", "utilisation")

_LAST = 10  # log points that the last value of a loss is the mean of
_MOST_KEYS = 6  # config keys with a column of their own
_WIDEST = 40  # characters of a cell with a config value

# metric -> (column, format of its median)
_MEDIANS = {
    "tokens_per_second": ("tokens/s", "{:,.0f}"),
    "utilisation": ("utilisation", "{:.1%}"),
    "data_wait_seconds": ("data wait (s)", "{:.2g}"),
}
# config keys whose values are in another column, or change no number of a run
_OBVIOUS = (r"steps|log_every|.*(checkpoint|sample)_every|keep_.*|samples\..*|data\.prefetch",)
_REPEATED = ("seed", "steps")  # of report.json: in the config too


@dataclasses.dataclass(frozen=True)
class Run:
    """The numbers of one workdir.

    Attributes:
      name: the end of its path, as short as tells it from the other runs.
      step: of the last log point; None before the first.
      curves: {metric: (steps, values)}, float64; a value that was not finite is NaN.
      config: {dotted key: value} of config.json; {} without one.
      report: {name: number} of report.json; {} without one.
    """

    name: str
    step: int | None
    curves: Mapping[str, tuple[np.ndarray, np.ndarray]]
    config: Mapping[str, Any]
    report: Mapping[str, float]


def read_runs(workdirs: Sequence[str | Path]) -> list[Run]:
    """Read several workdirs; one that is given twice counts once.

    Raises:
      InputError: for a workdir without metrics.jsonl, or a broken file in it.
    """
    folders = list(dict.fromkeys(Path(workdir).resolve() for workdir in workdirs))
    return [_read_run(folder, name) for folder, name in zip(folders, _names(folders))]


def choose_metrics(runs: Sequence[Run], patterns: Sequence[str] = ()) -> list[str]:
    """The metrics that a pattern matches wholly, by pattern; those of `DEFAULT_METRICS` without patterns.

    Raises:
      InputError: for a pattern that is no regular expression or matches nothing, and for runs without any log point.
    """
    known = list(dict.fromkeys(name for run in runs for name in run.curves))
    if not known:
        raise InputError(f"nothing is logged yet in {', '.join(run.name for run in runs)}")
    chosen = []
    for pattern in patterns or DEFAULT_METRICS:
        try:
            found = [name for name in known if matches([pattern], name)]
        except re.error as error:
            raise InputError(f"--metric {pattern!r} is no regular expression: {error}") from error
        if patterns and not found:
            raise InputError(f"no run has a metric {pattern!r}{nearest(pattern, known)}")
        chosen += found
    if not chosen:
        raise InputError(f"none of the default metrics is there; choose with --metric{nearest('', known)}")
    return list(dict.fromkeys(chosen))


def running_mean(values: np.ndarray, points: int) -> np.ndarray:
    """The mean of each value and the `points` - 1 before it, as far as they are there; a gap (NaN) stays a gap."""
    there = np.isfinite(values)
    window = np.ones(min(points, max(1, len(values))))
    counts = np.convolve(there, window)[: len(values)]
    sums = np.convolve(np.where(there, values, 0.0), window)[: len(values)]
    return np.where(there, sums / np.maximum(counts, 1), np.nan)


def table(runs: Sequence[Run]) -> str:
    """One row per run, in Markdown.

    Columns: the run; the config keys in which the runs differ, the first six of them; the step and of how many; the
    last value of each loss, of more than ten log points the mean of the last ten; medians of tokens per second,
    utilisation and the wait for data; the numbers of report.json. What a run does not have is "-", and a number that
    was not finite "nan".
    """
    differing = differing_keys(runs)
    columns = {"run": [run.name for run in runs]}
    columns |= {key: [_config_cell(run.config, key) for run in runs] for key in differing[:_MOST_KEYS]}
    columns["step"] = [_cell(run.step, "{}") for run in runs]
    columns["of"] = [_cell(run.config.get("steps"), "{}") for run in runs]
    for metric in _union(run.curves for run in runs):
        if matches([r"loss(/.*)?"], metric):
            columns[metric] = [_cell(_last(run, metric), "{:.4g}") for run in runs]
    for metric, (title, form) in _MEDIANS.items():
        if any(metric in run.curves for run in runs):
            columns[title] = [_cell(_median(run, metric), form) for run in runs]
    for name in _union(run.report for run in runs):
        columns[name] = [_cell(run.report.get(name), "{:.4g}") for run in runs]
    lines = _aligned(columns, left={"run", *differing})
    if differing[_MOST_KEYS:]:
        lines += ["", f"{len(differing) - _MOST_KEYS} more keys differ: {', '.join(differing[_MOST_KEYS:])}"]
    return "\n".join(lines)


def differing_keys(runs: Sequence[Run]) -> list[str]:
    """The config keys that have not the same value in all runs that have a config, in the order of the files.

    Left out are keys that change no number of a run (what is logged, saved and drawn on the way), and `steps`, which
    has its own column.
    """
    configs = [run.config for run in runs if run.config]
    values = {key: {json.dumps(config.get(key, ...), default=repr) for config in configs} for key in _union(configs)}
    return [key for key, found in values.items() if len(found) > 1 and not matches(_OBVIOUS, key)]


def _read_run(folder: Path, name: str) -> Run:
    points = _read_points(folder)
    curves = {}
    for metric in _union(points):
        if metric != "step":
            pairs = [(point["step"], point[metric]) for point in points if metric in point]
            steps, values = np.array(pairs, np.float64).T  # None becomes NaN
            curves[metric] = steps, np.where(np.isfinite(values), values, np.nan)
    config, report = (_read_json(folder / name) for name in ("config.json", "report.json"))
    numbers = {key: x for key, x in _flat(report).items() if _is_number(x) and key not in _REPEATED}
    return Run(name, points[-1]["step"] if points else None, curves, _flat(config), numbers)


def _read_points(folder: Path) -> list[dict[str, Any]]:
    """The log points; a last line without its end, cut by a kill, is none."""
    path = folder / "metrics.jsonl"
    if not folder.is_dir():
        raise InputError(f"there is no workdir {folder}")
    if not path.is_file():
        raise InputError(f"{folder} is no workdir of a run: it has no metrics.jsonl")
    try:
        lines = path.read_bytes().split(b"\n")
    except OSError as error:
        raise InputError(f"{path} cannot be read: {error.strerror or error}") from error
    points = []
    for number, line in enumerate(lines, start=1):
        try:
            points.append(_point(line))
        except ValueError as error:
            if number < len(lines):
                raise InputError(f"{path}:{number} is broken: {error}; delete the line") from error
    return points


def _point(line: bytes) -> dict[str, Any]:
    point = json.loads(line.decode())
    if not isinstance(point, dict) or type(point.get("step")) is not int:
        raise ValueError("it has no step")
    for name, value in point.items():
        if value is not None and not _is_number(value):
            raise ValueError(f"{name!r} is no number")
    return point


def _read_json(path: Path) -> dict[str, Any]:
    """An object; {} if there is no such file."""
    if not path.exists():
        return {}
    try:
        content = json.loads(path.read_text())
    except (OSError, ValueError) as error:
        raise InputError(f"{path} cannot be read: {error}") from error
    if not isinstance(content, dict):
        raise InputError(f"{path} holds no JSON object")
    return content


def _flat(tree: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """{dotted key: value} of all leaves."""
    flat = {}
    for key, value in tree.items():
        flat |= _flat(value, f"{prefix}{key}.") if isinstance(value, dict) else {prefix + key: value}
    return flat


def _names(folders: Sequence[Path]) -> list[str]:
    """The last part of each path, and as many before it as make it differ from all others."""

    def end(folder: Path, parts: int) -> tuple[str, ...]:
        return folder.parts[-parts:]

    names = []
    for folder in folders:
        parts = 1
        while sum(end(other, parts) == end(folder, parts) for other in folders) > 1:
            parts += 1
        names.append(str(Path(*end(folder, parts))))
    return names


def _last(run: Run, metric: str) -> float | None:
    if metric not in run.curves:
        return None
    values = run.curves[metric][1]
    values = values[-_LAST:] if len(values) > _LAST else values[-1:]
    return _mean(values[np.isfinite(values)])


def _mean(values: np.ndarray) -> float:
    return float(values.mean()) if len(values) else math.nan


def _median(run: Run, metric: str) -> float | None:
    if metric not in run.curves:
        return None
    values = run.curves[metric][1]
    return statistics.median(values[np.isfinite(values)].tolist() or [math.nan])


def _cell(value: Any, form: str) -> str:
    if value is None:
        return "-"
    return "nan" if isinstance(value, float) and math.isnan(value) else form.format(value)


def _config_cell(config: Mapping[str, Any], key: str) -> str:
    if key not in config:
        return "-"
    text = config[key] if isinstance(config[key], str) else json.dumps(config[key])
    return text if len(text) <= _WIDEST else text[: _WIDEST - 3] + "..."


def _aligned(columns: Mapping[str, Sequence[str]], left: set[str]) -> list[str]:
    """Lines of a Markdown table; numbers are aligned to the right."""
    columns = {_escaped(title): [_escaped(cell) for cell in cells] for title, cells in columns.items()}
    widths = {title: max(3, len(title), *map(len, cells)) for title, cells in columns.items()}

    def line(cells: Sequence[str]) -> str:
        pairs = zip(columns, cells)
        padded = (cell.ljust(widths[title]) if title in left else cell.rjust(widths[title]) for title, cell in pairs)
        return f"| {' | '.join(padded)} |"

    rule = "|".join("-" * (w + 2) if title in left else "-" * (w + 1) + ":" for title, w in widths.items())
    return [line(list(columns)), f"|{rule}|", *(line(row) for row in zip(*columns.values()))]


def _escaped(text: str) -> str:
    return " ".join(text.replace("|", r"\|").split())


def _union(mappings: Any) -> list[str]:
    """All keys, in the order in which they come first."""
    return list(dict.fromkeys(key for mapping in mappings for key in mapping))


def _is_number(x: Any) -> bool:
    return isinstance(x, (int, float)) and not isinstance(x, bool)
