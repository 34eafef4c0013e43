"""A run that is asked to stop saves its step and ends; run again, it goes on from there."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
SMALL = ["model.width=32", "model.mlp_width=64", "model.layers=2", "log_every=1", "checkpoint_every=1000"]


def command(workdir, *overrides):
    base = [sys.executable, "-m", "jaxmm.cli", "train", "--config", "experiments/digits/transfusion.py:short"]
    options = [f"--config.{x}" for x in [*SMALL, "sample_every=0", "evaluation.name=", *overrides]]
    return [*base, "--workdir", str(workdir), *options]


def wait_for_steps(workdir, count):
    """Until the run has logged so many steps."""
    path = workdir / "metrics.jsonl"
    for _ in range(6000):
        if path.exists() and len(path.read_text().splitlines()) >= count:
            return
        time.sleep(0.05)
    raise TimeoutError(f"{path} has not {count} lines after five minutes")


@pytest.mark.slow
@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_saves_and_the_run_resumes(tmp_path, number):
    environment = os.environ | {"JAX_PLATFORMS": "cpu"}
    process = subprocess.Popen(command(tmp_path, "steps=100000"), cwd=ROOT, env=environment, stderr=subprocess.PIPE)
    wait_for_steps(tmp_path, 5)
    process.send_signal(number)
    error = process.communicate(timeout=60)[1].decode()
    assert process.returncode == 75
    assert f"{number.name}: step" in error and "Traceback" not in error
    saved = [int(path.name) for path in (tmp_path / "checkpoints").iterdir() if path.name.isdigit()]
    lines = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    assert saved == [lines[-1]["step"]]
    last = saved[0] + 3
    subprocess.run(command(tmp_path, f"steps={last}"), cwd=ROOT, env=environment, check=True)
    lines = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    assert [line["step"] for line in lines] == list(range(1, last + 1))


@pytest.mark.slow
def test_a_second_signal_ends_at_once(tmp_path):
    """The handler itself, in a process that never ends its step."""
    code = (
        "import os, signal, time\n"
        "from jaxmm.training.signals import StopRequests\n"
        "with StopRequests() as stop:\n"
        "    os.kill(os.getpid(), signal.SIGTERM)\n"
        "    assert stop.requested == 'SIGTERM'\n"
        "    os.kill(os.getpid(), signal.SIGINT)\n"
        "    time.sleep(60)\n"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, timeout=50)
    assert done.returncode == 128 + signal.SIGINT
