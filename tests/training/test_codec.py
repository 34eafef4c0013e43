"""A run with a frozen VAE, on a folder of pictures with captions: from files to drawings."""

import json
import shutil
from pathlib import Path

import jax
import numpy as np
import pytest
from PIL import Image

from jaxmm.autoencoders import KLConfig, load_diffusers
from jaxmm.errors import InputError
from jaxmm.inference import load
from jaxmm.models.transfusion import TransfusionConfig
from jaxmm.training.config import base_config
from jaxmm.training.loop import Trainer

GOLDEN = Path(__file__).parents[1] / "goldens" / "transfusion" / "vae_kl"
COLOURS = ("red", "green", "blue")


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """(the VAE in diffusers' layout, a folder of captioned pictures)."""
    vae, pictures = tmp_path_factory.mktemp("vae"), tmp_path_factory.mktemp("pictures")
    shutil.copy(GOLDEN / "config.json", vae)
    shutil.copy(GOLDEN / "weights.safetensors", vae / "diffusion_pytorch_model.safetensors")
    with (pictures / "captions.jsonl").open("w") as file:
        for i, colour in enumerate(COLOURS):
            Image.new("RGB", (40 + 8 * i, 48), colour).save(pictures / f"{colour}.png")
            file.write(json.dumps({"image": f"{colour}.png", "caption": colour}) + "\n")
    return vae, pictures


def make_config(vae, pictures):
    codec = KLConfig.from_diffusers(json.loads((vae / "config.json").read_text()))
    model = TransfusionConfig(
        width=32, layers=2, heads=2, mlp_width=64, vocab_size=8, boi_id=6, eoi_id=7, context=32,
        image_size=(32, 32), codec=codec, latent_channels=8, time_features=16,
    )  # fmt: skip
    config = base_config("transfusion", model)
    config.data.source, config.data.words, config.codec = "folder", COLOURS, str(vae)
    config.data.options.update(dict(path=str(pictures), size=32, channels=3))
    config.data.rows, config.data.tokens, config.data.images = 8, 24, 3
    config.steps, config.checkpoint_every, config.log_every = 3, 3, 1
    config.samples.solver.update(dict(steps=3, guidance=2.0))
    return config


@pytest.mark.slow
def test_training_through_a_frozen_vae(folders, tmp_path):
    vae, pictures = folders
    trainer = Trainer(make_config(vae, pictures), tmp_path)
    trainer.run()
    lines = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    assert len(lines) == 3 and all(np.isfinite(line["loss"]) for line in lines)
    assert all(line["fill/images/32x32"] > 0.5 for line in lines)
    _, weights = load_diffusers(vae)
    pipeline = load(tmp_path)
    for path, value in weights.items():
        assert np.array_equal(pipeline.params[f"codec.{path}"], value), f"{path} moved"
    drawn = pipeline.generate("red", count=2)
    assert drawn.shape == (2, 32, 32, 3) and drawn.dtype == np.uint8 and drawn.std() > 0
    assert isinstance(pipeline.describe(pictures / "red.png", limit=4)[0], str)


def test_a_vae_of_other_sizes_is_refused(folders, tmp_path):
    config = make_config(*folders)
    config.model.codec.scaling_factor = 0.5
    with pytest.raises(InputError, match="it has scaling_factor 0.41, not 0.5"):
        Trainer(config, tmp_path).run()


def test_latents_do_not_depend_on_the_row_of_an_image(folders, tmp_path):
    """The posterior sample of an image is drawn from its own number."""
    trainer = Trainer(make_config(*folders), tmp_path)
    params = jax.jit(trainer.blueprint.init)(jax.random.key(0))
    batch = next(iter(trainer.batches))
    images = batch.images["32x32"]
    swapped = jax.tree.map(lambda x: x[::-1], images)
    encode = jax.jit(lambda x: trainer.blueprint.bind(params).encode(x, jax.random.key(1)))
    np.testing.assert_allclose(encode(swapped)[::-1], encode(images), atol=1e-5)
    mean = jax.jit(lambda x: trainer.blueprint.bind(params).encode(x))(images)
    assert np.abs(np.asarray(mean) - encode(images)).max() > 1e-3
