"""Networks between pixels and latents. Each owns its sizes, its presets and its weights table.

`kl`: the KL autoencoder of latent diffusion (diffusers' `AutoencoderKL`).
`identity`: none; pixels are the latents.
"""

from jaxmm.autoencoders.identity import Identity
from jaxmm.autoencoders.kl import PRESETS, KLAutoencoder, KLConfig, load_diffusers, weights_table

__all__ = ["PRESETS", "Identity", "KLAutoencoder", "KLConfig", "load_diffusers", "weights_table"]
