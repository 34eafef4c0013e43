"""The curves of runs as a picture: one panel per metric, one line per run."""

import math
import re
from collections.abc import Sequence

import numpy as np
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.ticker import EngFormatter, FuncFormatter, MaxNLocator

from jaxmm.data.images import Pixels
from jaxmm.training.report import Run, running_mean

# Okabe and Ito's palette, which the colour-blind can tell apart, without its yellow, which is faint on white;
# then the same colours with another dash
_COLOURS = ("#0072B2", "#E69F00", "#009E73", "#D55E00", "#CC79A7", "#56B4E9", "#000000")
_DASHES = ("-", "--", ":", "-.")
_PANEL = (4.0, 2.8)  # inches
_DPI = 120
_TITLE, _NAME = 44, 60  # characters of a line of a title, and of a run's name in the legend

_engineering = EngFormatter(sep="")


def draw_curves(runs: Sequence[Run], metrics: Sequence[str], smooth: int = 1) -> Figure:
    """Draw metrics over steps.

    Args:
      runs: a line in each panel whose metric it has; a gap where a value was not finite.
      metrics: a panel each, row by row.
      smooth: the lines are means over this many log points.
    """
    columns = min(4, math.ceil(math.sqrt(len(metrics))))
    rows = math.ceil(len(metrics) / columns)
    names = [_wrapped(run.name, _NAME) for run in runs]
    # an entry of the legend takes about 0.08 inches per character and 0.6 for its line
    width = max(_PANEL[0] * columns, 6.0)
    longest = max(len(line) for name in names for line in name.split("\n"))
    entries = max(1, min(len(runs), int(width / (0.6 + 0.08 * longest))))
    lines = math.ceil(len(runs) / entries) * max(name.count("\n") + 1 for name in names)
    height = _PANEL[1] * rows + 0.4 + 0.2 * lines
    figure = Figure(figsize=(width, height), dpi=_DPI, layout="constrained")
    panels = figure.subplots(rows, columns, squeeze=False).flat
    for axes, metric in zip(panels, metrics):
        _draw_panel(axes, metric, runs, smooth)
    for axes in panels[len(metrics) :]:
        axes.remove()
    _draw_legend(figure, names, entries, f"running mean over {smooth} log points" if smooth > 1 else None)
    return figure


def render(figure: Figure) -> Pixels:
    """The figure as pixels, uint8 [H, W, 3]."""
    canvas = FigureCanvasAgg(figure)
    canvas.draw()
    return np.asarray(canvas.buffer_rgba())[:, :, :3]


def _draw_legend(figure: Figure, names: Sequence[str], columns: int, title: str | None) -> None:
    handles = [Line2D([], [], label=str(i), **_style(i)) for i in range(len(names))]
    options = {"loc": "outside lower center", "frameon": False, "fontsize": 9}
    legend = figure.legend(handles=handles, ncols=columns, title=title, **options)
    for text, name in zip(legend.get_texts(), names):  # as labels, names that start with "_" would be left out
        text.set(text=name, parse_math=False)


def _draw_panel(axes: Axes, metric: str, runs: Sequence[Run], smooth: int) -> None:
    axes.set_title(_wrapped(metric, _TITLE), fontsize=10, parse_math=False)
    axes.set_xlabel("step", fontsize=9)
    axes.tick_params(labelsize=8)
    axes.grid(color="0.9", linewidth=0.6)
    axes.set_axisbelow(True)
    axes.spines[["top", "right"]].set_visible(False)
    for i, run in enumerate(runs):
        if metric in run.curves:
            steps, values = run.curves[metric]
            values = running_mean(values, smooth)
            alone = {"marker": "o", "markersize": 3, "markevery": _alone(values)}
            axes.plot(steps, values, label=run.name, **_style(i), **alone)
    axes.xaxis.set_major_locator(MaxNLocator(nbins=5, integer=True))
    axes.xaxis.set_major_formatter(_engineering)
    axes.yaxis.set_major_formatter(FuncFormatter(_number))


def _style(i: int) -> dict:
    dash = _DASHES[i // len(_COLOURS) % len(_DASHES)]
    return {"color": _COLOURS[i % len(_COLOURS)], "linestyle": dash, "linewidth": 1.4}


def _alone(values: np.ndarray) -> list[int]:
    """Points between two gaps: no line goes through them, so they get a dot."""
    there = np.pad(np.isfinite(values), 1)
    return np.flatnonzero(there[1:-1] & ~there[:-2] & ~there[2:]).tolist()


def _wrapped(text: str, width: int) -> str:
    """Lines of at most `width` characters, broken where a part of the name ends, if there is such a place."""
    return "\n".join(re.findall(rf".{{1,{width}}}(?:$|(?<=[/._ -]))|.{{1,{width}}}", text))


def _number(value: float, _: int | None = None) -> str:
    return _engineering(value) if abs(value) >= 1e4 else f"{value:g}"
