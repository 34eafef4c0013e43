"""What the disk refuses ends a run in one line; the last checkpoint is intact and the same run goes on from it."""

import contextlib
import datetime
import errno
import itertools
import os
import stat
import subprocess
import time
from pathlib import Path
from types import SimpleNamespace
from unittest import mock

import numpy as np
import orbax.checkpoint.checkpoint_manager as manager
import pytest

from jaxmm.checkpoints import Checkpoints, saved_steps
from jaxmm.data.images import write_image
from jaxmm.errors import InputError, RunError
from jaxmm.training.disk import disk_errors, only_run
from tests.training.disks import Quota, Tmpfs, mount, small_disk, without_override
from tests.training.killed_run import make_trainer
from tests.training.test_kill import assert_equal_runs
from tests.training.test_loop import lines
from tests.training.test_signals import ROOT, command, wait_for_steps


@pytest.fixture(scope="module")
def trainer(tmp_path_factory):
    """One trainer for all runs of this file, so that its step is compiled once."""
    options = ("steps=12", "checkpoint_every=4", "log_every=1", "keep_last=2", "keep_every=4")
    return make_trainer(tmp_path_factory.mktemp("trainer"), *options)


@pytest.fixture(scope="module")
def whole(trainer, tmp_path_factory):
    """A run that nothing disturbed."""
    return run(trainer, tmp_path_factory.mktemp("whole") / "run")


def run(trainer, workdir, act=None, at=6):
    """Run it in a workdir; call `act` before a step, when the steps saved before are on disk."""
    step = trainer.step

    def watched(state, batch, key):
        if act is not None and int(state["step"]) + 1 == at:
            while len(saved_steps(workdir)) < (at - 1) // 4:
                time.sleep(0.01)
            act()
        return step(state, batch, key)

    with mock.patch.object(trainer, "workdir", workdir), mock.patch.object(trainer, "step", watched):
        trainer.run()
    return workdir


# a quota is of one file: an array of a checkpoint may be below it, the metrics are not for long
@pytest.mark.parametrize("kind, left", [(Quota, 0), (Quota, 12_000), (Tmpfs, 0), (Tmpfs, 100_000)])
def test_a_full_disk(trainer, whole, tmp_path, kind, left):
    """Full before the next line of the metrics, or inside the next checkpoint."""
    with small_disk(kind, tmp_path) as disk:
        workdir = disk.folder / "run"
        begin = time.monotonic()
        with pytest.raises(RunError) as error:
            run(trainer, workdir, lambda: disk.fill(left))
        disk.free()
        last = saved_steps(workdir)[-1]
        assert str(error.value) == (
            f"cannot write to {workdir}: {disk.cause}; step {last} is intact and the same command goes on from there"
        )
        assert last == 4 or (disk.cause, left) == (Quota.cause, 12_000)
        assert time.monotonic() - begin < 60
        run(trainer, workdir)
        assert_equal_runs(workdir, whole)


def test_a_disk_that_is_full_before_the_first_checkpoint(trainer, whole, tmp_path):
    with small_disk(Quota, tmp_path) as disk:
        with pytest.raises(RunError, match="cannot write to .*run: File too large; no step is saved"):
            run(trainer, disk.folder / "run", lambda: disk.fill(20_000), at=2)
    run(trainer, tmp_path / "run")
    assert_equal_runs(tmp_path / "run", whole)


def test_a_full_disk_at_the_last_checkpoint(trainer, whole, tmp_path):
    """Nothing is saved after it, so that its error is heard from the wait at the end."""
    with small_disk(Quota, tmp_path) as disk:
        with pytest.raises(RunError, match="step 8 is intact"):
            run(trainer, tmp_path / "run", lambda: disk.fill(60_000), at=12)
    run(trainer, tmp_path / "run")
    assert_equal_runs(tmp_path / "run", whole)


def test_a_read_only_disk_at_the_start(trainer, tmp_path):
    workdir, cause = tmp_path / "disk" / "run", "Read-only file system"
    workdir.parent.mkdir()
    try:
        mount("-t", "tmpfs", "-o", "ro,size=1m", "none", workdir.parent)
    except OSError:
        workdir, cause = Path("/proc/self/run"), ""
    try:
        with pytest.raises(InputError, match=f"cannot write to {workdir}: {cause}"):
            run(trainer, workdir)
    finally:
        if cause:
            subprocess.run(["umount", workdir.parent], check=True)


def test_a_picture_that_cannot_be_written(tmp_path):
    with small_disk(Quota, tmp_path) as disk, pytest.raises(RunError, match="File too large; no step is saved"):
        with disk_errors(tmp_path):
            disk.fill(10)
            write_image(tmp_path / "a.png", np.zeros((8, 8, 1), np.uint8))
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    "error",
    [
        OSError(errno.EACCES, "Permission denied", "/elsewhere/shard-0"),
        FileNotFoundError(errno.ENOENT, "No such file or directory"),
        InputError("record 7 has no image"),
        ValueError("RESOURCE_EXHAUSTED: Out of memory"),
    ],
    ids=repr,
)
def test_other_errors_stay_as_they_are(tmp_path, error):
    with pytest.raises(type(error)) as raised, disk_errors(tmp_path):
        raise error
    assert raised.value is error


def test_a_consequence_is_told_by_its_cause(tmp_path):
    """TensorStore misses a file that it could not write; the disk itself says why."""
    error = ValueError(f"NOT_FOUND: Error reading local file {tmp_path}/checkpoints/4/d/0")
    with small_disk(Quota, tmp_path) as disk, pytest.raises(RunError, match=f"to {tmp_path}: File too large; no step"):
        with disk_errors(tmp_path):
            disk.fill(1000)
            raise error
    with (
        pytest.raises(RunError, match=f"to {tmp_path}: NOT_FOUND: Error reading .*/d/0; no step"),
        disk_errors(tmp_path),
    ):
        raise error
    assert list(tmp_path.iterdir()) == []


def test_two_runs_do_not_share_a_workdir(trainer, tmp_path):
    with only_run(tmp_path), pytest.raises(InputError, match=f"another process trains in {tmp_path}: "):
        run(trainer, tmp_path)
    assert not (tmp_path / "model.json").exists()


@contextlib.contextmanager
def jumping_clock(jumps):
    """The wall clock is off by the next number of seconds whenever it is asked."""
    now, now_ns, jumps = time.time, time.time_ns, itertools.cycle(jumps)

    class Jumping(datetime.datetime):
        @classmethod
        def now(cls, tz=None):
            return datetime.datetime.now(tz) + datetime.timedelta(seconds=next(jumps))

    module = SimpleNamespace(datetime=Jumping, timedelta=datetime.timedelta, timezone=datetime.timezone)
    with (
        mock.patch.object(time, "time", lambda: now() + next(jumps)),
        mock.patch.object(time, "time_ns", lambda: now_ns() + next(jumps) * 10**9),
        mock.patch.object(manager, "datetime", module),
    ):
        yield


def test_a_clock_that_jumps(trainer, whole, tmp_path):
    """It jumps by a day, to and fro, during a run and between two runs."""
    day, workdir = 86400, tmp_path / "run"
    with jumping_clock([0, 2 * day, -day, day, -3 * day]), pytest.raises(KeyError):
        run(trainer, workdir, lambda: {}["the run ends here"], at=10)
    assert saved_steps(workdir) == [4, 8]
    os.utime(workdir / "checkpoints" / "4", (time.time() + day,) * 2)  # so that the older one looks newer
    with jumping_clock([-10 * day]):
        assert Checkpoints(workdir).latest() == 8
        run(trainer, workdir)
    assert_equal_runs(workdir, whole)
    for line in lines(workdir):
        assert 0 < line["seconds_per_step"] < 60 and 0 < line["tokens_per_second"] < np.inf


def cli(workdir, *overrides, expect):
    """Run the command line as a user whom permissions bind; its one line of error."""
    options = command(workdir, "data.rows=8", "mesh.fsdp=-1", "checkpoint_every=4", *overrides)
    environment = os.environ | {"JAX_PLATFORMS": "cpu"}
    done = subprocess.run(
        options, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=300, preexec_fn=without_override
    )
    assert done.returncode == expect, done.stderr
    return said(done.stderr)


def said(stderr):
    """The lines of an error output but for the progress."""
    assert "Traceback" not in stderr
    return [line for line in stderr.replace("\r", "\n").splitlines() if line and not line.startswith("step ")]


@pytest.mark.slow
def test_permissions_at_the_start_and_in_the_middle(tmp_path):
    workdir = tmp_path / "run"
    workdir.mkdir(mode=0o555)
    assert cli(workdir, "steps=4", expect=2) == [f"jaxmm train: cannot write to {workdir}: Permission denied"]
    workdir.chmod(0o755)
    options = command(workdir, "data.rows=8", "checkpoint_every=4", "steps=100000")
    environment = os.environ | {"JAX_PLATFORMS": "cpu"}
    process = subprocess.Popen(
        options, cwd=ROOT, env=environment, stderr=subprocess.PIPE, text=True, preexec_fn=without_override
    )
    try:
        wait_for_steps(workdir, 6)
        while not saved_steps(workdir) and process.poll() is None:
            time.sleep(0.01)
        (workdir / "checkpoints").chmod(stat.S_IREAD | stat.S_IEXEC)
        error = process.communicate(timeout=300)[1]
    finally:
        process.kill()
    last = saved_steps(workdir)[-1]
    assert process.returncode == 3
    assert said(error) == [
        f"jaxmm train: cannot write to {workdir}: Permission denied; "
        f"step {last} is intact and the same command goes on from there"
    ]
    (workdir / "checkpoints").chmod(0o755)
    cli(workdir, f"steps={last + 8}", expect=0)
    assert saved_steps(workdir)[-1] == last + 8
    assert [line["step"] for line in lines(workdir)] == list(range(1, last + 9))


@pytest.mark.slow
def test_the_command_line_on_a_full_disk(tmp_path):
    workdir = tmp_path / "run"
    with small_disk(Quota, tmp_path) as disk:
        disk.fill(50_000)  # its child has the same quota
        error = cli(workdir, "steps=8", expect=3)
    assert error == [f"jaxmm train: cannot write to {workdir}: File too large; no step is saved"]
    assert cli(workdir, "steps=8", expect=0) == []
    assert saved_steps(workdir) == [4, 8]
