"""The command line: the whole path on a run of seconds, and one clear line for each mistake."""

import json
import subprocess
import sys

import numpy as np
import pytest
from PIL import Image

from jaxmm.cli import main

CONFIG = "experiments/digits/transfusion.py:short"


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """A finished run of twenty steps."""
    workdir = tmp_path_factory.mktemp("run")
    smaller = ["--config.model.width=32", "--config.model.mlp_width=64", "--config.model.layers=2"]
    options = ["--config.evaluation.options.drawings=10", "--config.seed=3"]
    assert main(["train", "--config", CONFIG, "--workdir", str(workdir), *smaller, *options]) == 0
    return workdir


@pytest.fixture
def picture(tmp_path):
    path = tmp_path / "digit.png"
    Image.fromarray(np.arange(64, dtype=np.uint8).reshape(8, 8) * 4).resize((64, 64), Image.NEAREST).save(path)
    return path


def refused(capsys, *arguments) -> str:
    """Run, expect exit code 2 and one line on stderr, and return it."""
    assert main([str(a) for a in arguments]) == 2
    captured = capsys.readouterr()
    assert captured.out == ""
    lines = captured.err.strip().splitlines()
    assert len(lines) == 1 and "Traceback" not in lines[0]
    return lines[0]


def test_training_leaves_everything(run):
    report = json.loads((run / "report.json").read_text())
    names = {"naming_accuracy", "drawing_accuracy", "judge_accuracy", "drawing_variance_ratio", "drawing_copies"}
    names |= {"naming_count", "drawing_count", "seed", "steps", "wall_seconds", "matmul_seconds"}
    assert set(report) == names
    assert (report["naming_count"], report["drawing_count"], report["seed"], report["steps"]) == (360, 10, 3, 20)
    assert report["judge_accuracy"] == pytest.approx(0.989, abs=1e-3)
    assert (run / "checkpoints" / "20").is_dir() and (run / "tokenizer").is_dir()
    with Image.open(run / "samples" / "00000020.png") as samples:
        assert min(samples.size) > 200


def test_generate_writes_a_grid_and_a_folder(run, tmp_path):
    base = ["generate", "--checkpoint", str(run), "--prompt", "a seven", "--seed", "1", "--steps", "3"]
    assert main([*base, "--count", "4", "--output", str(tmp_path / "grid.png")]) == 0
    assert main([*base, "--count", "4", "--output", str(tmp_path / "each")]) == 0
    assert main([*base, "--output", str(tmp_path / "one.png")]) == 0
    each = [np.array(Image.open(path)) for path in sorted((tmp_path / "each").iterdir())]
    assert len(each) == 4 and each[0].shape == (8, 8)
    assert np.array_equal(np.array(Image.open(tmp_path / "one.png")), each[0])
    assert min(Image.open(tmp_path / "grid.png").size) >= 128
    assert any(not np.array_equal(each[0], other) for other in each[1:])


def test_describe_prints_a_line_per_image(run, picture, capsys):
    assert main(["describe", "--checkpoint", str(run), "--image", str(picture), "--image", str(picture)]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) == 2 and lines[0] == lines[1]


def test_mistakes_in_training(run, tmp_path, capsys):
    train = ["train", "--workdir", tmp_path / "w", "--config"]
    assert "no config file nothing.py" in refused(capsys, *train, "nothing.py")
    assert "did you mean 'optimizer.learning_rate'" in refused(
        capsys, *train, CONFIG, "--config.optimizer.learning_rat=1"
    )
    assert "'steps' takes int, not 'many'" in refused(capsys, *train, CONFIG, "--config.steps=many")
    assert "unknown argument 'shrt'; did you mean 'short'" in refused(capsys, *train, CONFIG.replace("short", "shrt"))
    line = refused(capsys, *train, CONFIG, "--config.data.words=('a','b','c','d','e','f','g','h','i','j','k','l')")
    assert "the tokenizer has 15 ids; the model leaves 14 to text" in line
    assert "layers must be at least 1" in refused(capsys, *train, CONFIG, "--config.model.layers=0")
    assert "even head size" in refused(capsys, *train, CONFIG, "--config.model.heads=5")
    assert "12 rows cannot be shared by 8 devices" in refused(capsys, *train, CONFIG, "--config.data.rows=12")
    assert "'data.tokens' must be at least 1" in refused(capsys, *train, CONFIG, "--config.data.tokens=0")
    assert "a row has 10" in refused(capsys, *train, CONFIG, "--config.data.tokens=10")
    assert "does not fit" in refused(capsys, *train, CONFIG, "--config.mesh.fsdp=3")
    captions = tmp_path / "captions.jsonl"
    captions.write_text('{"image": "a.png", "caption": "a"}\n{"image": \n')
    Image.new("L", (8, 8)).save(tmp_path / "a.png")
    pretrain = ["experiments/transfusion/pretrain.py:7b", f"--config.data.mixture.images.options.path={tmp_path}"]
    line = refused(capsys, *train, *pretrain, "--config.tokenizer=words", "--config.data.words=('a',)")
    assert "captions.jsonl:2" in line
    (tmp_path / "file").write_text("")
    line = refused(capsys, "train", "--config", CONFIG, "--workdir", tmp_path / "file" / "run")
    assert f"cannot write to {tmp_path / 'file' / 'run'}" in line
    assert "another model" in refused(capsys, "train", "--config", CONFIG, "--workdir", run)


def test_mistakes_in_generating(run, tmp_path, capsys):
    generate = ["generate", "--output", tmp_path / "x.png", "--checkpoint"]
    assert "is no checkpoint" in refused(capsys, *generate, tmp_path, "--prompt", "a one")
    assert "context" in refused(capsys, *generate, run, "--prompt", "a one " * 40)
    assert "elephant" in refused(capsys, *generate, run, "--prompt", "an elephant")
    assert "solver" in refused(capsys, *generate, run, "--prompt", "a one", "--solver", "heun")
    assert "steps" in refused(capsys, *generate, run, "--prompt", "a one", "--steps", "0")
    assert "count must be at least 1" in refused(capsys, *generate, run, "--prompt", "a one", "--count", "0")


def test_mistakes_in_describing(run, tmp_path, capsys):
    describe = ["describe", "--checkpoint", run, "--image"]
    empty, corrupt = tmp_path / "empty.png", tmp_path / "corrupt.png"
    empty.write_bytes(b"")
    corrupt.write_bytes(b"\x89PNG\r\n\x1a\nnot a picture")
    for path in (tmp_path / "missing.png", empty, corrupt, tmp_path):
        assert str(path) in refused(capsys, *describe, path)


def test_an_unfinished_checkpoint_is_named(tmp_path, run, capsys):
    for name in ("model.json",):
        (tmp_path / name).write_text((run / name).read_text())
    line = refused(capsys, "generate", "--checkpoint", tmp_path, "--prompt", "a one", "--output", tmp_path / "x.png")
    assert "no saved step" in line
    (tmp_path / "model.json").write_text("{")
    line = refused(capsys, "generate", "--checkpoint", tmp_path, "--prompt", "a one", "--output", tmp_path / "x.png")
    assert "model.json cannot be read" in line


def test_usage_errors_and_help(capsys):
    for arguments in ([], ["paint"], ["generate"], ["generate", "--config.seed=1", "--checkpoint", "x"]):
        with pytest.raises(SystemExit) as stop:
            main(arguments)
        assert stop.value.code == 2
    capsys.readouterr()
    for verb in ([], ["train"], ["generate"], ["describe"]):
        with pytest.raises(SystemExit) as stop:
            main([*verb, "--help"])
        assert stop.value.code == 0
    text = capsys.readouterr().out
    for option in ("--config", "--workdir", "--prompt", "--count", "--seed", "--output", "--image", "--config.seed=3"):
        assert option in text


def test_importing_jaxmm_is_light():
    code = (
        "import sys, jaxmm, jaxmm.cli; jaxmm.cli.make_parser(); heavy = {'jax', 'tensorflow', 'torch', 'transformers'}"
        "; print(sorted(heavy & set(sys.modules)))"
    )
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True).stdout.strip() == "[]"


def test_training_and_inference_import_neither_tensorflow_nor_torch():
    code = (
        "import sys, jaxmm.training.loop, jaxmm.inference; heavy = {'tensorflow', 'torch'}"
        "; print(sorted(heavy & set(sys.modules)))"
    )
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True).stdout.strip() == "[]"
