"""Tables and curves of runs, from workdirs written by hand."""

import json
import math

import numpy as np
import pytest
from PIL import Image

from jaxmm.cli import main
from jaxmm.errors import InputError
from jaxmm.training.curves import draw_curves, render
from jaxmm.training.report import choose_metrics, differing_keys, read_runs, running_mean, table


def write_run(workdir, points, config=None, report=None, end="\n"):
    """A workdir with these log points."""
    workdir.mkdir(parents=True)
    (workdir / "metrics.jsonl").write_text("\n".join(json.dumps(point) for point in points) + end)
    for name, content in (("config.json", config), ("report.json", report)):
        if content is not None:
            (workdir / name).write_text(json.dumps(content))
    return workdir


def points(losses, every=10, **more):
    return [{"step": every * (i + 1), "loss": loss, **more} for i, loss in enumerate(losses)]


def config(steps=100, rate=1e-3, **more):
    return {"steps": steps, "log_every": 10, "optimizer": {"learning_rate": rate, "betas": [0.9, 0.95]}, **more}


def cells(text):
    """The rows of a Markdown table: a dict each."""
    lines = [[cell.strip() for cell in line.strip("|").split(" | ")] for line in text.splitlines() if line[:1] == "|"]
    return [dict(zip(lines[0], line, strict=True)) for line in lines[2:]]


def curves(figure):
    """{panel: {run: (steps, values)}} as plotted."""
    return {
        axes.get_title(): {line.get_label(): tuple(map(list, line.get_xydata().T)) for line in axes.lines}
        for axes in figure.axes
    }


def test_the_numbers_of_the_table(tmp_path):
    losses = [100.0, *[1.0] * 5, *[2.0] * 5]  # eleven: the mean of the last ten
    fast = [p | {"loss/text": 0.25, "tokens_per_second": t} for p, t in zip(points(losses), [1, *[1500.4] * 10])]
    slow = points([3.0, 4.0], utilisation=0.4321, data_wait_seconds=0.0123)
    report = {"naming_accuracy": 0.97, "drawing": {"copies": 3}, "seed": 1, "steps": 110, "judge": "svc"}
    first = write_run(tmp_path / "fast", fast, config(200), report)
    second = write_run(tmp_path / "slow", slow)
    assert cells(table(read_runs([first, second]))) == [
        {"run": "fast", "step": "110", "of": "200", "loss": "1.5", "loss/text": "0.25", "tokens/s": "1,500",
         "utilisation": "-", "data wait (s)": "-", "naming_accuracy": "0.97", "drawing.copies": "3"},
        {"run": "slow", "step": "20", "of": "-", "loss": "4", "loss/text": "-", "tokens/s": "-",
         "utilisation": "43.2%", "data wait (s)": "0.012", "naming_accuracy": "-", "drawing.copies": "-"},
    ]  # fmt: skip


def test_the_columns_are_aligned(tmp_path):
    runs = read_runs([write_run(tmp_path / name, points([1.0])) for name in ("a", "a longer|name")])
    assert table(runs).splitlines() == [
        "| run            | step |  of | loss |",
        "|----------------|-----:|----:|-----:|",
        "| a              |   10 |   - |    1 |",
        r"| a longer\|name |   10 |   - |    1 |",
    ]


def test_numbers_that_were_not_finite(tmp_path):
    gone = write_run(tmp_path / "gone", points([1.0, 2.0, None]))
    some = write_run(tmp_path / "some", points([5.0] * 10 + [None, 6.0]))
    assert [row["loss"] for row in cells(table(read_runs([gone, some])))] == ["nan", f"{(8 * 5 + 6) / 9:.4g}"]
    plotted = curves(draw_curves(read_runs([gone]), ["loss"]))["loss"]["gone"]
    assert plotted[0] == [10, 20, 30] and plotted[1][:2] == [1, 2] and math.isnan(plotted[1][2])


def test_nan_as_python_writes_it_is_a_gap(tmp_path):
    workdir = write_run(tmp_path / "a", points([1.0, math.nan, math.inf]))
    assert np.array_equal(read_runs([workdir])[0].curves["loss"][1], [1, math.nan, math.nan], equal_nan=True)


def test_the_keys_in_which_runs_differ(tmp_path):
    configs = [
        config(rate=1e-3, seed=0, keep_last=1, model={"width": 64}, samples={"columns": 3}),
        config(rate=2e-3, seed=0, keep_last=2, model={"width": 64, "remat": "full"}, samples={"columns": 4}),
        config(300, rate=2e-3, seed=0, keep_last=3, model={"width": 64, "remat": None}, samples={"columns": 5}),
    ]
    runs = read_runs([write_run(tmp_path / str(i), points([1.0]), c) for i, c in enumerate(configs)])
    runs += read_runs([write_run(tmp_path / "bare", points([1.0]))])
    assert differing_keys(runs) == ["optimizer.learning_rate", "model.remat"]
    rows = cells(table(runs))
    assert [row["optimizer.learning_rate"] for row in rows] == ["0.001", "0.002", "0.002", "-"]
    assert [row["model.remat"] for row in rows] == ["-", "full", "null", "-"]
    assert [row["of"] for row in rows] == ["100", "100", "300", "-"]
    assert list(rows[0])[:3] == ["run", "optimizer.learning_rate", "model.remat"]


def test_no_more_than_six_keys_have_a_column(tmp_path):
    both = [config(model={f"size_{k}": i * k + i for k in range(8)}) for i in range(2)]
    text = table(read_runs([write_run(tmp_path / str(i), points([1.0]), c) for i, c in enumerate(both)]))
    assert list(cells(text)[0])[1:8] == [*(f"model.size_{k}" for k in range(6)), "step"]
    assert text.splitlines()[-1] == "2 more keys differ: model.size_6, model.size_7"


def test_names_are_as_short_as_tells_them_apart(tmp_path):
    folders = [tmp_path / path for path in ("x/a/run", "x/b/run", "y/b/run", "other")]
    for folder in folders:
        write_run(folder, points([1.0]))
    runs = read_runs([*folders, tmp_path / "x" / "." / "a" / "run"])
    assert [run.name for run in runs] == ["a/run", "x/b/run", "y/b/run", "other"]


def test_the_metrics_that_are_drawn(tmp_path):
    more = {"loss/text": 1, "fill/a": 1, "gradient_norm": 1, "gradient_norm/head": 1, "learning_rate": 1, "tokens": 1}
    runs = read_runs([write_run(tmp_path / "a", points([1.0], **more, tokens_per_second=1, utilisation=1))])
    standard = ["loss", "loss/text", "learning_rate", "gradient_norm", "tokens_per_second", "utilisation"]
    assert choose_metrics(runs) == standard
    assert choose_metrics(runs, ["fill/.*", "gradient_norm.*", ".*/head"]) == [
        "fill/a",
        "gradient_norm",
        "gradient_norm/head",
    ]
    with pytest.raises(InputError, match="no run has a metric 'learning_rat'; did you mean 'learning_rate'"):
        choose_metrics(runs, ["loss", "learning_rat"])
    with pytest.raises(InputError, match=r"'\(' is no regular expression"):
        choose_metrics(runs, ["("])


def test_what_is_plotted(tmp_path):
    first = write_run(tmp_path / "a", points([4.0, 2.0, None, 8.0], **{"loss/text": 1.0}))
    second = write_run(tmp_path / "_b", points([1.0, 3.0], every=5))
    figure = draw_curves(read_runs([first, second]), ["loss", "loss/text"], smooth=2)
    plotted = curves(figure)
    assert plotted["loss/text"] == {"a": ([10, 20, 30, 40], [1, 1, 1, 1])}
    assert plotted["loss"]["_b"] == ([5, 10], [1, 2])
    steps, values = plotted["loss"]["a"]
    assert steps == [10, 20, 30, 40] and values[:2] == [4, 3] and math.isnan(values[2]) and values[3] == 8
    by_panel = [[line.get_color() for line in axes.lines] for axes in figure.axes]
    assert by_panel[0][0] == by_panel[1][0] != by_panel[0][1]
    assert figure.axes[0].lines[0].get_markevery() == [3]  # no line goes through the last point
    (legend,) = figure.legends
    assert [text.get_text() for text in legend.get_texts()] == ["a", "_b"]
    assert legend.get_title().get_text() == "running mean over 2 log points"


def test_lines_of_many_runs_are_told_apart(tmp_path):
    runs = read_runs([write_run(tmp_path / str(i), points([1.0, 2.0])) for i in range(16)])
    lines = draw_curves(runs, ["loss"]).axes[0].lines
    assert len({(line.get_color(), line.get_linestyle()) for line in lines}) == 16


def test_everything_fits_into_the_picture(tmp_path):
    long = [f"gradient_norm/transformer.layers.streams.tokens.{k}.attention.query.kernel" for k in range(15)]
    names = [f"run-{i}-with-a-name-" + "of-several-words-" * 5 + "$x_" for i in range(8)]
    workdirs = [write_run(tmp_path / name, points([1.0, 2.0], **dict.fromkeys(long, 1.0))) for name in names]
    figure = draw_curves(read_runs(workdirs), ["loss", *long])
    height, width, channels = render(figure).shape
    assert (width, height, channels) == (*(figure.get_size_inches() * figure.dpi).astype(int), 3)
    boxes = [axes.get_tightbbox() for axes in figure.axes] + [figure.legends[0].get_tightbbox()]
    assert all(box.x0 >= 0 and box.y0 >= 0 and box.x1 <= width and box.y1 <= height for box in boxes)
    assert not any(a.overlaps(b) for i, a in enumerate(boxes) for b in boxes[:i])
    assert all(axes.get_window_extent().height > height / 10 for axes in figure.axes)
    assert [text.get_text().replace("\n", "") for text in figure.legends[0].get_texts()] == names


@pytest.mark.parametrize("window, expected", [(1, [2, 4, 9, 0]), (3, [2, 3, 5, 13 / 3]), (9, [2, 3, 5, 15 / 4])])
def test_running_mean(window, expected):
    np.testing.assert_allclose(running_mean(np.array([2.0, 4.0, 9.0, 0.0]), window), expected)


def test_a_last_line_cut_by_a_kill_is_ignored(tmp_path):
    workdir = write_run(tmp_path / "a", points([1.0, 2.0]), end='\n{"step": 30, "lo')
    assert read_runs([workdir])[0].step == 20


@pytest.mark.parametrize(
    "line, what",
    [
        ('{"step": 5, "lo', "Unterminated string"),
        ("", "Expecting value"),
        ("[1]", "it has no step"),
        ('{"loss": 1.0}', "it has no step"),
        ('{"step": 5, "loss": "low"}', "'loss' is no number"),
    ],
)
def test_a_broken_line_is_named(tmp_path, line, what):
    workdir = write_run(tmp_path / "a", points([1.0]), end=f'\n{line}\n{{"step": 20}}\n')
    with pytest.raises(InputError) as error:
        read_runs([workdir])
    assert f"{workdir / 'metrics.jsonl'}:2 is broken: {what}" in str(error.value) and "\n" not in str(error.value)


def test_broken_workdirs_are_named(tmp_path):
    whole = write_run(tmp_path / "whole", points([1.0]))
    (tmp_path / "empty").mkdir()
    with pytest.raises(InputError, match="empty is no workdir of a run: it has no metrics.jsonl"):
        read_runs([whole, tmp_path / "empty"])
    with pytest.raises(InputError, match="there is no workdir .*nowhere"):
        read_runs([tmp_path / "nowhere"])
    (whole / "report.json").write_text("{")
    with pytest.raises(InputError, match="report.json cannot be read"):
        read_runs([whole])
    (whole / "report.json").write_text("[]")
    with pytest.raises(InputError, match="report.json holds no JSON object"):
        read_runs([whole])


def test_a_run_that_has_logged_nothing_yet(tmp_path):
    begun, empty = write_run(tmp_path / "begun", points([1.0])), write_run(tmp_path / "empty", [], config(), end="")
    runs = read_runs([begun, empty])
    assert cells(table(runs))[1] == {"run": "empty", "step": "-", "of": "100", "loss": "-"}
    assert list(curves(draw_curves(runs, choose_metrics(runs)))["loss"]) == ["begun"]
    with pytest.raises(InputError, match="nothing is logged yet in empty"):
        choose_metrics(read_runs([empty]))


def test_the_verb_draws_and_prints(tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for i in range(2):
        write_run(tmp_path / f"run{i}", points([1.0, 2.0 + i]), config(rate=1e-3 * (i + 1)))
    assert main(["report", "run0", "run1"]) == 0
    rows = cells(capsys.readouterr().out)
    assert [(row["run"], row["optimizer.learning_rate"], row["loss"]) for row in rows] == [
        ("run0", "0.001", "2"),
        ("run1", "0.002", "3"),
    ]
    with Image.open(tmp_path / "report.png") as picture:
        assert picture.format == "PNG" and min(picture.size) > 300
    assert {path.name for path in tmp_path.iterdir()} == {"run0", "run1", "report.png"}


@pytest.mark.parametrize(
    "arguments, message",
    [
        (["run", "--smooth", "0"], "--smooth must be at least 1, not 0"),
        (["run", "--metric", "los"], "did you mean 'loss'"),
        (["run", "--output", "nowhere/x.png"], "there is no folder nowhere"),
        (["run", "--output", "x.txt"], "images cannot be written as '.txt'"),
        (["run", "other"], "there is no workdir"),
    ],
)
def test_mistakes_are_one_line(tmp_path, capsys, monkeypatch, arguments, message):
    monkeypatch.chdir(tmp_path)
    write_run(tmp_path / "run", points([1.0]))
    assert main(["report", *arguments]) == 2
    captured = capsys.readouterr()
    assert captured.out == "" and message in captured.err and len(captured.err.splitlines()) == 1
