"""A run that is killed again and again ends bit for bit like one that was never killed."""

import itertools
import json
import os
import random
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest

from jaxmm.checkpoints import saved_steps
from tests.training.killed_run import make_trainer, record_steps
from tests.training.test_loop import arrays

ROOT = Path(__file__).parents[2]
STEPS, EVERY = 240, 6
OPTIONS = (f"steps={STEPS}", f"checkpoint_every={EVERY}", "log_every=1", "keep_last=2")


def start(workdir, record, cache):
    """The run, in a process of its own."""
    environment = os.environ | {
        "JAX_PLATFORMS": "cpu",
        "JAX_NUM_CPU_DEVICES": "1",
        "JAX_COMPILATION_CACHE_DIR": str(cache),
        "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0",
        "PYTHONPATH": str(ROOT),
    }
    command = [sys.executable, "-m", "tests.training.killed_run", str(workdir), str(record), *OPTIONS]
    return subprocess.Popen(command, cwd=ROOT, env=environment, stderr=subprocess.DEVNULL)


def records(path):
    """The lines of a record; a kill may have cut the last one of a life short."""
    found = []
    for line in path.read_text().splitlines() if path.exists() else ():
        try:
            found.append(json.loads(line))
        except ValueError:
            continue
    return found


def size(path):
    return path.stat().st_size if path.exists() else 0


def unfinished(workdir):
    return list((workdir / "checkpoints").glob("*.orbax-checkpoint-tmp*"))


def wait_until(condition, process, every=0.01):
    """Poll until a condition holds or the process ends."""
    end = time.monotonic() + 300
    while not condition() and process.poll() is None:
        assert time.monotonic() < end, "nothing happened for five minutes"
        time.sleep(every)


def kill_at(point, process, workdir, record, draw):
    """Kill a run at a kind of point: while it starts, some steps after a save, or inside a checkpoint write.

    Every third write is the first one of that life; the others follow a complete one, so that the chain goes on.
    """
    began, saved = size(record), saved_steps(workdir)
    if point == "start":
        time.sleep(draw.uniform(0.5, 4))
    else:
        wait_until(lambda: size(record) > began, process)  # what the life before left is removed by now
        if point == "step" or draw.randrange(3):
            wait_until(lambda: saved_steps(workdir)[-1:] > saved[-1:], process)
    if point == "step":
        lines = len(records(record)) + draw.randrange(1, EVERY)
        wait_until(lambda: len(records(record)) >= lines, process)
    if point == "write":
        wait_until(lambda: unfinished(workdir), process, every=0.001)
        time.sleep(draw.uniform(0, 0.03))
    process.kill()
    return process.wait()


@pytest.mark.slow
def test_a_run_killed_many_times_ends_like_one_never_killed(tmp_path):
    killed, whole = tmp_path / "killed", tmp_path / "whole"
    cache, record = tmp_path / "cache", tmp_path / "killed.jsonl"
    process = start(whole, tmp_path / "whole.jsonl", cache)
    assert process.wait(timeout=300) == 0
    draw, inside = random.Random(0), 0
    for point in ("start", *("step", "write") * 9, "start", "write"):
        process = start(killed, record, cache)
        assert kill_at(point, process, killed, record, draw) == -signal.SIGKILL, "the run ended before it was killed"
        left = unfinished(killed)
        inside += bool(left)
        assert len(left) <= 1  # those of earlier lives are removed
    assert inside >= 8
    assert 5 * EVERY <= saved_steps(killed)[-1] < STEPS
    process = start(killed, record, cache)
    assert process.wait(timeout=300) == 0
    assert_equal_runs(killed, whole)
    ours, theirs = records(record), records(tmp_path / "whole.jsonl")
    assert [line["step"] for line in theirs] == list(range(1, STEPS + 1))
    assert {line["step"] for line in ours} == set(range(1, STEPS + 1))
    expected = {line["step"]: line for line in theirs}
    for line in ours:  # also each step that was done twice
        assert line == expected[line["step"]]


def assert_equal_runs(ours, theirs):
    """The same arrays bit for bit, data states and losses; nothing half written is left."""
    assert saved_steps(ours) == saved_steps(theirs)
    last = saved_steps(theirs)[-1]
    for item in ("trainable", "ema", "optimizer"):
        first, second = arrays(ours, last, item), arrays(theirs, last, item)
        assert first.keys() == second.keys()
        for path in first:
            assert np.asarray(first[path]).tobytes() == np.asarray(second[path]).tobytes(), path
    data = Path("checkpoints", str(last), "data", "process_0-of-1.json")
    assert (ours / data).read_text() == (theirs / data).read_text()
    lines = [[json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()] for run in (ours, theirs)]
    for first, second in itertools.zip_longest(*lines):
        assert without_times(first) == without_times(second)
    names = {path.name for path in ours.rglob("*")}
    assert not [name for name in names if "tmp" in name]
    assert {path.name for path in ours.iterdir()} == {path.name for path in theirs.iterdir()}


def without_times(line):
    """A line of metrics but for what differs from run to run: times, rates and memory."""
    timed = ("_second", "_seconds", "seconds_per_step", "utilisation")
    return {name: x for name, x in line.items() if not name.endswith(timed) and not name.startswith("memory/")}


def test_what_a_killed_run_left_is_removed_at_the_next_start(tmp_path):
    run = tmp_path / "run"
    facts = []
    record_steps(make_trainer(run, "steps=2", "checkpoint_every=2"), facts.append).run()
    assert [f["step"] for f in facts] == [1, 2]
    left = ["checkpoints/4.orbax-checkpoint-tmp", "frozen.orbax-checkpoint-tmp", ".tokenizer.4711"]
    for name in left:
        shutil.copytree(run / "checkpoints" / "2", run / name)
    for name in (".model.json.4711", ".metrics.jsonl.12", "samples/.00000002.png.4711"):
        (run / name).parent.mkdir(exist_ok=True)
        (run / name).write_text("{")
    kept = ["notes.txt", ".hidden", "v1.2", "samples/00000002.png"]
    for name in kept:
        (run / name).write_text("mine")
    make_trainer(run, "steps=4", "checkpoint_every=2").run()
    assert saved_steps(run) == [2, 4]
    assert sorted(str(path.relative_to(run)) for path in [*run.iterdir(), *(run / "samples").iterdir()]) == sorted(
        [".lock", "checkpoints", "config.json", "metrics.jsonl", "model.json", "samples", "starts.jsonl", "tokenizer"]
        + kept
    )
