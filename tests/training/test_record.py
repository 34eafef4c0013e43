"""What a run was started with."""

import importlib.metadata
import json
import subprocess

import jax
import pytest

import jaxmm
from jaxmm.cli import main
from jaxmm.errors import InputError
from jaxmm.sharding import make_mesh
from jaxmm.training.config import load_config
from jaxmm.training.profiler import ProfileWindow
from jaxmm.training.record import Origin, git_states, package_versions, record_start

CONFIG = "experiments/digits/transfusion.py:short"


def git(folder, *arguments):
    subprocess.run(["git", "-C", str(folder), *arguments], check=True, capture_output=True)


@pytest.fixture
def checkout(tmp_path):
    folder = tmp_path / "code"
    (folder / "sub").mkdir(parents=True)
    (folder / "sub" / "a.py").write_text("x = 1\n")
    git(folder, "init", "-q")
    git(folder, "add", ".")
    git(folder, "-c", "user.name=n", "-c", "user.email=e@x", "commit", "-qm", "one")
    return folder


def test_a_line_per_start_with_everything_that_decides_the_run(tmp_path, checkout):
    overrides = ["seed=5", "optimizer.learning_rate=0.01"]
    config = load_config(CONFIG, overrides)
    origin = Origin(f"{checkout}/sub/a.py:arg", overrides)
    for step in (0, 40):
        record_start(tmp_path, config, origin, make_mesh(fsdp=4, tensor=2), step, {"a.scale": 7})
    lines = [json.loads(line) for line in (tmp_path / "starts.jsonl").read_text().splitlines()]
    assert [line["step"] for line in lines] == [0, 40]
    line = lines[0]
    assert line["overrides"] == overrides and line["config_file"] == origin.config
    assert line["config"]["seed"] == 5 and line["config"]["optimizer"]["learning_rate"] == 0.01
    assert line["packages"]["jax"] == jax.__version__ and {"flax", "optax", "jaxlib", "numpy"} <= set(line["packages"])
    assert line["mesh"] == {"data": 1, "fsdp": 4, "tensor": 2, "context": 1} and line["devices"]["count"] == 8
    assert str(checkout) in line["git"] and line["unsharded"] == {"a.scale": 7}


def test_the_state_of_a_checkout(tmp_path, checkout):
    clean = git_states([checkout / "sub", checkout])
    assert list(clean) == [str(checkout)]
    assert len(clean[str(checkout)]["commit"]) == 40
    assert clean[str(checkout)]["changed"] == [] and clean[str(checkout)]["diff"] == ""
    (checkout / "sub" / "a.py").write_text("x = 2\n")
    (checkout / "new.py").write_text("")
    changed = git_states([checkout])[str(checkout)]
    assert sorted(changed["changed"]) == ["new.py", "sub/a.py"]
    assert "-x = 1\n+x = 2\n" in changed["diff"]
    outside = tmp_path / "outside"
    outside.mkdir()
    assert git_states([outside]) == {} and git_states([tmp_path / "missing"]) == {}


def test_the_versions_are_those_of_the_installed_packages():
    versions = package_versions()
    assert versions.pop("jaxmm") == jaxmm.__version__
    assert versions == {name: importlib.metadata.version(name) for name in versions}


def test_the_command_line_records_its_overrides(tmp_path, capsys):
    smaller = ["model.width=32", "model.mlp_width=64", "model.layers=1", "data.rows=8", "steps=2", "log_every=1"]
    smaller += ["sample_every=0", "evaluation.name=", "profile=2:2"]
    command = ["train", "--config", CONFIG, "--workdir", str(tmp_path)]
    assert main([*command, *[f"--config.{x}" for x in smaller]]) == 0
    line = json.loads((tmp_path / "starts.jsonl").read_text())
    assert line["overrides"] == smaller and line["config_file"] == CONFIG
    assert list((tmp_path / "profile").rglob("*.xplane.pb"))
    metrics = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    for line in metrics:
        assert 0 <= line["data_wait_seconds"] <= line["seconds_per_step"]
        assert line["memory/host_peak_bytes"] > 1e8 and line["bad_examples"] == 0
        assert line["model_flops"] > 1e6 and 0 < line["utilisation"] < 1


@pytest.mark.parametrize("window", ["5", "7:5", "0:3", "a:b", "1:2:3"])
def test_a_wrong_window_is_refused(tmp_path, window):
    with pytest.raises(InputError, match="profile"):
        ProfileWindow(window, tmp_path)


def test_the_window_opens_and_closes_once(tmp_path, monkeypatch):
    calls, step = [], 0
    monkeypatch.setattr(jax.profiler, "start_trace", lambda folder: calls.append(("start", step, folder)))
    monkeypatch.setattr(jax.profiler, "stop_trace", lambda: calls.append(("stop", step)))
    window = ProfileWindow("3:5", tmp_path)
    for step in range(1, 9):
        window.before(step)
        window.after(step, ())
    window.close()
    assert calls == [("start", 3, str(tmp_path)), ("stop", 5)]
    calls.clear()
    window = ProfileWindow("3:5", tmp_path)
    for step in (4,):  # resumed within the window, and stopped within it
        window.before(step)
        window.after(step, ())
    window.close()
    assert calls == [("start", 4, str(tmp_path)), ("stop", 4)]
