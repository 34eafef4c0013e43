"""The experiments as their docstrings give them; trainings are of the slow tier."""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import jax
import numpy as np
import pytest

from jaxmm.data.tokenizers import word_tokenizer
from jaxmm.errors import InputError
from jaxmm.layers.parameters import Policy
from jaxmm.models import get_system
from jaxmm.sequence import build_batch
from jaxmm.sharding import make_mesh
from jaxmm.training.config import load_config, model_config
from jaxmm.training.loop import Trainer
from jaxmm.training.optimizer import make_optimizer
from jaxmm.training.state import StateMaker
from jaxmm.training.step import make_step

ROOT = Path(__file__).parents[1]
DIGITS = str(ROOT / "experiments" / "digits" / "transfusion.py")
ABLATIONS = str(ROOT / "experiments" / "transfusion" / "ablations.py")
# argument -> what it changes of the digits' config
CHANGES = {
    "": set(),
    "unet": {"model.patch_codec", "model.unet.channels", "model.unet.heads"},
    "causal": {"model.bidirectional"},
    "patch1": {"model.patch_size", "model.context", "data.tokens"},
    "patch4": {"model.patch_size", "data.tokens"},
    "no_noise_limit": {"recipe.noise_limit"},
}
# argument -> (patch codec, patch size, patches see each other, noise limit, objective, images in a row)
PAPER = {
    "linear": ("linear", 2, True, 1.0, "ddpm", 16),
    "linear-causal": ("linear", 2, False, 1.0, "ddpm", 16),
    "linear-patch1": ("linear", 1, True, 1.0, "ddpm", 4),
    "linear-patch4": ("linear", 4, True, 1.0, "ddpm", 52),
    "linear-patch8": ("linear", 8, True, 1.0, "ddpm", 128),
    "linear-flow": ("linear", 2, True, 1.0, "flow", 16),
    "unet": ("unet", 2, True, 1.0, "ddpm", 16),
    "unet-causal": ("unet", 2, False, 1.0, "ddpm", 16),
    "unet-patch4": ("unet", 4, True, 1.0, "ddpm", 52),
    "unet-patch8": ("unet", 8, True, 1.0, "ddpm", 128),
    "unet-noise-limit": ("unet", 2, True, 0.5, "ddpm", 16),
    "unet-flow": ("unet", 2, True, 1.0, "flow", 16),
}


def flat(config, prefix="") -> dict:
    """{dotted key: value} of all leaves."""
    found = {}
    for key, value in config.items():
        inner = flat(value, f"{prefix}{key}.") if hasattr(value, "items") else {prefix + key: value}
        found |= inner
    return found


@pytest.mark.parametrize("argument", CHANGES)
def test_an_ablation_on_digits_is_one_change(argument):
    plain, changed = flat(load_config(DIGITS)), flat(load_config(f"{DIGITS}:{argument}"))
    assert {key for key in plain if plain[key] != changed[key]} == CHANGES[argument]
    model = model_config(load_config(f"{DIGITS}:{argument}"))
    assert changed["data.tokens"] == 4 * (6 + model.patches(8, 8)) and model.context >= 6 + model.patches(8, 8)


@pytest.mark.slow
@pytest.mark.parametrize("argument", [*CHANGES, "ddpm"])
def test_an_ablation_on_digits_takes_a_step(argument, tmp_path):
    overrides = ["steps=2", "log_every=1", "data.rows=8", "sample_every=0", "checkpoint_every=2", "evaluation.name="]
    Trainer(load_config(f"{DIGITS}:{argument}", overrides), tmp_path).run()
    lines = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    assert [line["step"] for line in lines] == [1, 2]
    # what a network that knows nothing says: one of 16 ids at random; a prediction of zero for noise (and data)
    for line in lines:
        assert line["loss/text"] == pytest.approx(np.log(16), rel=0.25)
        assert 0.5 < line["loss/image"] < 3.0 and line["skipped_steps"] == 0


@pytest.mark.parametrize("argument", PAPER)
def test_an_ablation_of_the_paper_is_what_its_name_says(argument):
    config = load_config(f"{ABLATIONS}:{argument}")
    model = model_config(config)
    found = (model.patch_codec, model.patch_size, model.bidirectional)
    assert (*found, config.recipe.noise_limit, model.objective, config.data.images) == PAPER[argument]
    assert (model.width, model.layers, config.steps, config.samples.solver.guidance) == (1536, 24, 250_000, 3.0)


def test_an_unknown_ablation_names_the_nearest():
    with pytest.raises(InputError, match="did you mean 'unet-causal'"):
        load_config(f"{ABLATIONS}:unet_causal")
    with pytest.raises(InputError, match="did you mean 'patch4'"):
        load_config(f"{DIGITS}:patch_4")


@pytest.mark.slow
@pytest.mark.parametrize("argument", PAPER)
def test_an_ablation_of_the_paper_takes_a_step_in_shapes(argument):
    """The step of the whole model at its own size, on two rows: traced, not run."""
    config = load_config(f"{ABLATIONS}:{argument}")
    model, system = model_config(config), get_system("transfusion")
    blueprint = system.blueprint(model)
    trainable = [path for path in blueprint.parameters if not path.startswith("codec.")]
    optimizer = make_optimizer(config.optimizer, config.steps, trainable)
    maker = StateMaker(blueprint, optimizer, config.optimizer.frozen, make_mesh(), Policy())
    budget = system.layouts(model, word_tokenizer(["a"]), **config.recipe).budget(
        config.data.tokens, config.data.images
    )
    step = make_step(blueprint, optimizer, system.term_weights(model), Policy())
    state = maker.abstract()
    after, metrics = jax.eval_shape(step, state, build_batch([[], []], budget), jax.random.key(0))
    assert jax.tree.map(lambda x: x.shape, after) == jax.tree.map(lambda x: x.shape, state)
    assert {"loss/text", "loss/image"} <= metrics.keys() and set(after["trainable"]) == set(trainable)


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
