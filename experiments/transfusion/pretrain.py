"""Transfusion pre-training, the paper's recipe (arXiv 2408.11039, sections 3 and 4).

    jaxmm train --config experiments/transfusion/pretrain.py:7b --workdir /runs/transfusion-7b \
        --config.data.mixture.images.options.path=/data/captioned --config.data.mixture.text.options.path=/data/text \
        --config.codec=/data/vae --config.tokenizer=/data/llama-tokenizer

Sizes: 0.16b, 0.37b, 0.76b, 1.4b, 7b, with the linear patch codec, and 0.16b-unet to 7b-unet. `:7.3b` is the paper's
large run (section 4.4): 7b-unet with the noise limit, 500,000 steps of 4 million tokens. The ablations of section 4.3
are in `ablations.py`. Controlled runs of the paper: 250,000 steps of 2 million tokens (0.5T tokens),
AdamW (0.9, 0.95, 1e-8), weight decay 0.1, clip 1.0, learning rate 3e-4 after 4000 steps, cosine to 1.5e-5, caption
first in 80 % of the pairs, captioned images and text alone in equal shares of tokens. The paper names no hardware. Its
VAE was never released: give the folder of one with 8 latent channels in diffusers' layout. The images are a folder with
captions.jsonl; any other source does as well (--config.data.mixture.images.source=tfds:coco_captions), or the latents
that `jaxmm encode --source images` has written of it (--config.data.mixture.images.source=latents). `:runlocal` is a
run of a minute on a laptop, on the digits that ship with scikit-learn and on counting.txt.

What to expect at 7b and 0.5T tokens (paper, table 3): COCO FID 16.8, CIDEr 27.2, C4 perplexity 7.72. At 7b-unet (table
7): FID 16.0, CIDEr 33.7, C4 perplexity 7.8. At 7.3b (section 4.4): FID 6.78, GenEval 0.63.
"""

import dataclasses
from pathlib import Path

from ml_collections import ConfigDict

from jaxmm.data.sources import DIGIT_NAMES
from jaxmm.errors import InputError, nearest
from jaxmm.models.transfusion import PRESETS, TransfusionConfig
from jaxmm.training.config import base_config


def get_config(arg: str = "7b") -> ConfigDict:
    """`arg`: one of the presets, "7.3b" or "runlocal"."""
    arg = arg or "7b"
    if arg == "runlocal":
        return _run_local()
    preset = "7b-unet" if arg == "7.3b" else arg
    if preset not in PRESETS:
        raise InputError(f"unknown size {arg!r}{nearest(arg, [*PRESETS, '7.3b', 'runlocal'])}")
    model = PRESETS[preset]
    config = base_config("transfusion", model)
    _recipe(config)
    config.tokenizer = "meta-llama/Llama-2-7b-hf"
    config.data.mixture = _mixture("folder", dict(path="", size=256, channels=3), text="")
    config.data.rows, config.data.tokens = 512, 4096
    # as many images as a row has room for, with captions of some ten words
    config.data.images = -(-config.data.tokens // (model.patches(*model.image_size) + 16))
    config.steps, config.optimizer.warmup_steps = 250_000, 4000
    if arg == "7.3b":
        config.data.rows, config.steps, config.recipe.noise_limit = 1024, 500_000, 0.5
    config.log_every, config.checkpoint_every = 100, 5000
    return config


def _mixture(source: str, options: dict, text: str) -> ConfigDict:
    """Captioned images and text alone, 1 : 1 in tokens."""
    images = dict(source=source, options=options, weight=1.0)
    return ConfigDict(dict(images=images, text=dict(source="text", options=dict(path=text), weight=1.0)))


def _recipe(config: ConfigDict) -> None:
    config.recipe.image_first, config.recipe.noise_limit, config.recipe.caption_dropout = 0.2, 1.0, 0.1
    config.optimizer.learning_rate, config.optimizer.final_learning_rate = 3e-4, 1.5e-5
    config.samples.solver.steps, config.samples.solver.guidance = 250, 5.0


def _run_local() -> ConfigDict:
    text_ids = 3 + 1 + len(DIGIT_NAMES)
    model = TransfusionConfig(
        width=64,
        layers=2,
        heads=2,
        mlp_width=192,
        vocab_size=text_ids + 2,
        boi_id=text_ids,
        eoi_id=text_ids + 1,
        context=64,
        image_size=(8, 8),
        latent_channels=1,
    )
    config = base_config("transfusion", dataclasses.replace(model, remat="full"))
    _recipe(config)
    config.data.mixture = _mixture("digits", dict(split="train"), text=str(Path(__file__).with_name("counting.txt")))
    config.data.words = ("a", *DIGIT_NAMES)
    config.data.rows, config.data.tokens, config.data.images = 8, 88, 4
    config.steps, config.checkpoint_every, config.optimizer.warmup_steps = 300, 100, 20
    config.samples.solver.steps = 25
    config.sample_every, config.samples.prompts = 100, tuple(f"a {name}" for name in DIGIT_NAMES)
    return config
