"""The ablations of Transfusion's paper (arXiv 2408.11039, section 4.3) at 0.76B, each a change of one recipe.

    jaxmm train --config experiments/transfusion/ablations.py:unet-causal --workdir /runs/unet-causal \
        --config.data.mixture.images.options.path=/data/captioned --config.data.mixture.text.options.path=/data/text \
        --config.codec=/data/vae --config.tokenizer=/data/llama-tokenizer

The recipe is that of `pretrain.py` (250,000 steps of 2 million tokens; the paper names no hardware); images are drawn
with guidance 3. What the paper measured (C4 perplexity, COCO CIDEr and FID):

    attention inside images    linear-causal 10.4, 12.7, 61.3     linear 10.4, 16.0, 20.3
                               unet-causal 10.3, 23.3, 16.8       unet 10.3, 25.4, 16.7
    patch size, linear         linear-patch1 10.3, 12.0, 21.0     linear (2) 10.4, 16.0, 20.3
                               linear-patch4 10.9, 14.3, 25.6     linear-patch8 11.7, 11.3, 43.5
    patch size, U-Net          unet (2) 10.3, 25.4, 16.7          unet-patch4 10.7, 29.9, 16.0
                               unet-patch8 11.4, 29.5, 16.1
    noise limit                unet (off) 10.3, 25.4, 16.7        unet-noise-limit (on) 10.3, 29.4, 16.5

`linear-flow` and `unet-flow` learn by flow matching, which the paper names as future work. The study of codecs by model
size is `pretrain.py` with the sizes 0.16b, 0.16b-unet and so on. All of them on digits, in minutes on a laptop:
`experiments/digits/transfusion.py:unet`, `:causal`, `:patch1`, `:patch4`, `:no_noise_limit`, `:ddpm`.
"""

from pathlib import Path

from ml_collections import ConfigDict

from jaxmm.errors import InputError, nearest
from jaxmm.training.config import load_config

# argument -> (preset, changes of the config)
ABLATIONS = {
    "linear": ("0.76b", {}),
    "linear-causal": ("0.76b", {"model.bidirectional": False}),
    "linear-patch1": ("0.76b-patch1", {}),
    "linear-patch4": ("0.76b-patch4", {}),
    "linear-patch8": ("0.76b-patch8", {}),
    "linear-flow": ("0.76b", {"model.objective": "flow"}),
    "unet": ("0.76b-unet", {}),
    "unet-causal": ("0.76b-unet", {"model.bidirectional": False}),
    "unet-patch4": ("0.76b-unet-patch4", {}),
    "unet-patch8": ("0.76b-unet-patch8", {}),
    "unet-noise-limit": ("0.76b-unet", {"recipe.noise_limit": 0.5}),
    "unet-flow": ("0.76b-unet", {"model.objective": "flow"}),
}


def get_config(arg: str = "linear") -> ConfigDict:
    """`arg`: a name of `ABLATIONS`."""
    arg = arg or "linear"
    if arg not in ABLATIONS:
        raise InputError(f"unknown ablation {arg!r}{nearest(arg, ABLATIONS)}")
    preset, changes = ABLATIONS[arg]
    config = load_config(f"{Path(__file__).with_name('pretrain.py')}:{preset}").unlock()
    config.samples.solver.guidance = 3.0
    config.update_from_flattened_dict(changes)
    return config
