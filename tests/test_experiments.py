"""The experiments as their docstrings give them; trainings are of the slow tier."""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]


def train(config: str, workdir: Path, *overrides: str) -> None:
    """Run the command in a process of its own, on one device."""
    command = [sys.executable, "-m", "jaxmm.cli", "train", "--config", config, "--workdir", str(workdir), *overrides]
    subprocess.run(command, check=True, cwd=ROOT)


@pytest.mark.slow
def test_digits_are_named_and_drawn(tmp_path):
    train("experiments/digits/transfusion.py", tmp_path, "--config.seed=7")
    report = json.loads((tmp_path / "report.json").read_text())
    assert report["naming_accuracy"] >= 0.95 and report["naming_count"] == 360
    assert report["drawing_accuracy"] >= 0.95 and report["drawing_count"] == 500
    assert report["drawing_variance_ratio"] >= 0.5 and report["drawing_copies"] <= 0.05


@pytest.mark.slow
def test_pretrain_runs_locally(tmp_path):
    train("experiments/transfusion/pretrain.py:runlocal", tmp_path)
    lines = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    assert lines[-1]["step"] == 300 and lines[-1]["loss"] < 0.6 * lines[0]["loss"]
    assert len(list((tmp_path / "samples").glob("*.png"))) == 3


@pytest.mark.slow
@pytest.mark.parametrize("broken", [False, True])
def test_parity_reads_other_goldens(tmp_path, broken):
    """JAXMM_GOLDENS names a folder: it passes as it is, and fails with one number off."""
    import numpy as np
    from safetensors.numpy import load_file, save_file

    folder = tmp_path / "transfusion" / "vae_kl"
    shutil.copytree(ROOT / "tests" / "goldens" / "transfusion" / "vae_kl", folder)
    if broken:
        tensors = load_file(folder / "cases.safetensors")
        tensors["ae/recon_from_mean"].flat[7] += 1e-3 * np.abs(tensors["ae/recon_from_mean"]).max()
        save_file(tensors, folder / "cases.safetensors")
    environment = os.environ | {"JAXMM_GOLDENS": str(tmp_path)}
    command = [sys.executable, "-m", "pytest", "tests/parity/test_parity.py", "-n", "0"]
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)
    assert done.returncode == int(broken), done.stdout
    assert ("ae/recon_from_mean: error" in done.stdout) == broken
