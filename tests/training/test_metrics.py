"""What is written on the way."""

import json
import sys
import types

import numpy as np
import pytest

from jaxmm.training import metrics
from jaxmm.training.metrics import MetricWriter, Progress
from jaxmm.training.step import fill
from tests import tiny


def test_lines_after_the_restored_step_are_dropped(tmp_path):
    writer = MetricWriter(tmp_path)
    for step in (10, 20, 30):
        writer.write(step, {"loss": step / 10})
    writer.close()
    MetricWriter(tmp_path, 20).close()
    assert [json.loads(line)["step"] for line in (tmp_path / "metrics.jsonl").read_text().splitlines()] == [10, 20]


def test_tensorboard_is_written_where_it_is_installed(tmp_path, monkeypatch):
    calls = []

    class Writer:
        def __init__(self, folder):
            calls.append(folder)

        def __getattr__(self, name):
            return lambda *arguments: calls.append((name, *arguments))

    board = types.SimpleNamespace(SummaryWriter=Writer)
    monkeypatch.setattr(metrics.importlib.util, "find_spec", lambda name: object())
    monkeypatch.setitem(sys.modules, "clu", types.SimpleNamespace(metric_writers=board))
    monkeypatch.setitem(sys.modules, "clu.metric_writers", board)
    writer = MetricWriter(tmp_path)
    writer.write(5, {"loss": 1.5})
    writer.write_image(5, "samples", np.zeros((4, 4, 1), np.uint8))
    writer.close()
    assert calls[0] == str(tmp_path) and calls[1] == ("write_scalars", 5, {"loss": 1.5})
    assert calls[2][0] == "write_images" and calls[2][2]["samples"].shape == (1, 4, 4, 1) and calls[3] == ("close",)


@pytest.mark.parametrize("missing", ["tensorflow", "tensorboard"])
def test_half_an_extra_is_none(tmp_path, monkeypatch, missing):
    """TensorFlow alone is no TensorBoard: clu's writer needs both."""
    monkeypatch.setattr(metrics.importlib.util, "find_spec", lambda name: None if name == missing else object())
    writer = MetricWriter(tmp_path)
    writer.write(1, {"loss": 1.0})
    writer.close()
    assert sorted(path.name for path in tmp_path.iterdir()) == ["metrics.jsonl"]


def test_the_progress_line_says_step_terms_rate_and_time(capsys):
    progress = Progress(10, 3)
    progress.advance()
    progress.show(
        {"loss": 2.5, "loss/text": 1.0, "loss/image": 0.3, "tokens_per_second": 12345.6, "gradient_norm": 9.0}
    )
    progress.close()
    line = capsys.readouterr().err.split("\r")[-1]
    for part in ("step 4/10", "loss 2.5000", "text 1.0000", "image 0.3000", "12,346 tokens/s", "left"):
        assert part in line
    assert "9.0" not in line


def test_fill_is_the_share_of_the_budget():
    batch = tiny.batch(rows=8)
    numbers = {name: float(value) for name, value in fill(batch).items()}
    tokens = np.sum(batch.streams["tokens"].places >= 0)
    assert numbers == {
        "fill/tokens/tokens": tokens / (8 * 64),
        "fill/images/8x8": 12 / 24,
        "tokens": tokens,
    }
