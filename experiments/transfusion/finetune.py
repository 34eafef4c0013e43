"""Transfusion fine-tuned on a folder of your own pictures with captions, from a checkpoint of `jaxmm train`.

    jaxmm train --config experiments/transfusion/finetune.py:lora --init /runs/transfusion-7b \
        --workdir /runs/mine --config.data.options.path=/data/mine

The folder holds pictures and a `captions.jsonl`, one `{"image": "path.png", "caption": "text"}` per line. Sizes,
tokenizer and options of drawing are those of the checkpoint; its VAE, if it has one, stays as it is.

Without an argument all parameters but the VAE's are trained, which takes the memory of pre-training. `:lora` trains
adapters of rank 16 (arXiv 2106.09685) on the attention and MLP matrices, about 0.6 % of the parameters of the 7B size:
no gradients and no optimizer state for the rest. Its checkpoints hold the adapters alone and need that of `--init`;
`jaxmm export` writes both as one model.

Hardware: the digits run on a laptop. By arithmetic, not by trial: `:lora` of the 7B size holds 14 GB of frozen
bfloat16 weights, and activations, which fit on one accelerator of 80 GB; the whole of it wants a host of eight.

Rows of 1024 tokens hold about three pictures of 256 x 256 pixels. Small pictures want the `--config.data.tokens` and
`--config.data.images` of the experiment that the checkpoint comes from.

What to expect: with some hundred pictures, drawings take on their look within a few hundred steps. Train longer and
they repeat the pictures: look at the samples (`--config.samples.prompts`, `--config.sample_every`) and stop early. All
hyper-parameters are ours; the paper fine-tunes on image editing alone and gives none.
"""

from ml_collections import ConfigDict

from jaxmm.errors import InputError, nearest
from jaxmm.models.transfusion import PRESETS
from jaxmm.training.config import base_config

MATRICES = (r"transformer\..*\.(query|key|value|out)\.kernel", r"transformer\..*\.mlp\.(gate|up|down)\.kernel")


def get_config(arg: str = "") -> ConfigDict:
    """`arg`: "" for the whole model, "lora" for adapters."""
    if arg not in ("", "lora"):
        raise InputError(f"unknown argument {arg!r}{nearest(arg, ['lora'])}")
    config = base_config("transfusion", PRESETS["0.16b"])  # replaced by the checkpoint's
    config.init.adopt = True
    config.data.source = "folder"
    config.data.options = ConfigDict(dict(path="", captions="captions.jsonl"))
    config.data.rows, config.data.tokens, config.data.images = 16, 1024, 4
    config.recipe.caption_dropout = 0.1
    config.optimizer.learning_rate, config.optimizer.warmup_steps = 2e-5, 50
    config.optimizer.weight_decay = 0.0
    config.steps, config.log_every, config.checkpoint_every, config.ema = 1000, 20, 200, 0.99
    if arg == "lora":
        config.optimizer.learning_rate = 5e-4
        config.lora.rank, config.lora.alpha, config.lora.targets = 16, 16.0, MATRICES
    return config
