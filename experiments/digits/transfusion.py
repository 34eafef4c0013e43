"""Transfusion from scratch on scikit-learn's handwritten digits: it learns to draw and to name them.

    jaxmm train --config experiments/digits/transfusion.py --workdir runs/digits

A laptop CPU does it in a few minutes. It learns by flow matching, which the paper names as future work; `:ddpm` is the
paper's own objective, with its weight of 5 for the image loss. `:short` is a run of seconds, for tests.

The paper's ablations at this size, each one change: `:unet` (the U-Net patch codec), `:causal` (patches of an image do
not see those behind them), `:patch1`, `:patch4` (patches of 1 x 1 and 4 x 4, here 2 x 2), `:no_noise_limit`.
"""

import dataclasses

from ml_collections import ConfigDict

from jaxmm.data.sources import DIGIT_NAMES
from jaxmm.errors import InputError, nearest
from jaxmm.models.transfusion import TransfusionConfig, UNetConfig
from jaxmm.training.config import base_config

WORDS = ("a", *DIGIT_NAMES)
SPECIAL = 3  # <pad>, <s>, </s>
IMAGES = 4  # in a row
# argument -> changes of the model
ABLATIONS = {
    "unet": dict(patch_codec="unet", unet=UNetConfig((32, 64), heads=4)),
    "causal": dict(bidirectional=False),
    "patch1": dict(patch_size=1, context=96),
    "patch4": dict(patch_size=4),
    "no_noise_limit": {},
}
ARGUMENTS = ("", "ddpm", "short", *ABLATIONS)


def get_config(arg: str = "") -> ConfigDict:
    """`arg`: one of `ARGUMENTS`."""
    if arg not in ARGUMENTS:
        raise InputError(f"unknown argument {arg!r}{nearest(arg, ARGUMENTS[1:])}")
    text_ids = SPECIAL + len(WORDS)
    model = TransfusionConfig(
        width=128,
        layers=4,
        heads=4,
        mlp_width=384,
        vocab_size=text_ids + 2,
        boi_id=text_ids,
        eoi_id=text_ids + 1,
        context=64,
        image_size=(8, 8),
        latent_channels=1,
        patch_size=2,
        time_features=64,
        objective="flow",
        image_loss_weight=2.0,
        init_std=0.06,
    )
    model = dataclasses.replace(model, **ABLATIONS.get(arg, {}))
    config = base_config("transfusion", model)
    config.data.options.split = "train"
    config.data.words = WORDS
    # a document: BOS, two words, BOI, patches, EOI, EOS
    config.data.rows, config.data.images, config.data.tokens = 16, IMAGES, IMAGES * (6 + model.patches(8, 8))
    config.recipe.image_first, config.recipe.caption_dropout = 0.5, 0.2
    config.optimizer.learning_rate = 2e-3
    config.steps, config.ema = 2000, 0.998
    config.log_every, config.checkpoint_every, config.sample_every = 50, 500, 500
    config.samples.prompts, config.samples.columns = tuple(f"a {name}" for name in DIGIT_NAMES) * 5, 10
    config.samples.solver.steps, config.samples.solver.guidance = 50, 1.75
    config.evaluation.name = "digits"
    if arg == "ddpm":
        config.model.objective, config.model.image_loss_weight = "ddpm", 5.0
        config.recipe.image_first = 0.4
        config.samples.solver.update(dict(steps=100, guidance=3.0, clip=1.0))
    if arg == "no_noise_limit":
        config.recipe.noise_limit = 1.0
    if arg == "short":
        config.steps, config.checkpoint_every, config.sample_every = 20, 10, 20
        config.evaluation.options = ConfigDict(dict(drawings=20))
        config.samples.solver.steps = 5
    return config
