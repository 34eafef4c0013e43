"""Transfusion (arXiv 2408.11039): next-token prediction and image diffusion in one transformer.

config.py    sizes and presets
layout.py    documents and prompts as tokens
codec.py     latent patches <-> hidden states, linear
unet.py      the same by a U-Net
objective.py DDPM and flow matching
model.py     the network and its losses
decode.py    text until BOI, an image, text again
weights.py   the keys of the reference checkpoint
"""

from jaxmm.layers.parameters import Blueprint
from jaxmm.models.system import System
from jaxmm.models.transfusion.config import PRESETS, TransfusionConfig, UNetConfig
from jaxmm.models.transfusion.decode import TransfusionDecoder
from jaxmm.models.transfusion.layout import Recipe, TransfusionLayouts
from jaxmm.models.transfusion.model import Transfusion
from jaxmm.models.transfusion.objective import SolverOptions
from jaxmm.models.transfusion.weights import weights_table

__all__ = ["PRESETS", "SYSTEM", "Recipe", "SolverOptions", "Transfusion", "TransfusionConfig", "UNetConfig"]


def _blueprint(config: TransfusionConfig) -> Blueprint:
    return Blueprint(lambda rngs: Transfusion(config, rngs=rngs))


SYSTEM = System(
    name="transfusion",
    config=TransfusionConfig,
    presets=PRESETS,
    blueprint=_blueprint,
    layouts=TransfusionLayouts,
    decoder=TransfusionDecoder,
    recipe=Recipe,
    draw_options=SolverOptions,
    table=weights_table,
    term_weights=lambda config: {"text": 1.0, "image": config.image_loss_weight},
)
