"""Comparator of goldens of the KL autoencoder: config.json and weights in diffusers' layout, arrays NCHW.

Cases: `ae/` (encode, sample, decode, with intermediates) and `clamp/` (log-variances out of range).
"""

import jax.numpy as jnp
import numpy as np

from jaxmm.autoencoders.kl import KLAutoencoder, KLConfig, kl, sample, split_moments, standard_deviation, weights_table
from jaxmm.layers.parameters import Blueprint

TOLERANCE = 2e-5


def ae(golden):
    """Encode, sample and decode."""
    config = KLConfig.from_diffusers(golden.config)
    blueprint = Blueprint(lambda rngs: KLAutoencoder(config, rngs=rngs))
    codec = blueprint.bind(weights_table(blueprint.parameters).read(golden.weights)[0])
    encoded = _compare_encoder(golden, codec)
    _compare_decoder(golden, codec, *encoded)


def _compare_encoder(golden, codec):
    """Returns the scaled latents of (mean, sample)."""
    images, noise = _nhwc(golden.cases["ae/image"]), _nhwc(golden.cases["ae/noise"])
    (mean, logvar), intermediates = codec.moments(images)
    for name in ("conv_in", *_levels(codec, "down"), "mid_attn", "mid", "conv_out"):
        _check(golden, f"ae/enc/{name}", intermediates[f"enc/{name}"])
    _check(golden, "ae/moments", intermediates["moments"])
    _check(golden, "ae/mean", mean)
    _check(golden, "ae/logvar", logvar)
    _check(golden, "ae/std", standard_deviation(logvar))
    _check(golden, "ae/sample", sample(mean, logvar, noise))
    golden.check("ae/kl", np.asarray(kl(mean, logvar)), tolerance=TOLERANCE)
    scaled = codec.encode(images, noise)[0]
    _check(golden, "ae/scaled_latent", scaled)
    return codec.encode(images)[0], scaled


def _compare_decoder(golden, codec, scaled_mean, scaled_sample):
    images, intermediates = codec.decode(scaled_sample)
    for name in ("conv_in", "mid_attn", "mid", *_levels(codec, "up")):
        _check(golden, f"ae/dec/{name}", intermediates[f"dec/{name}"])
    _check(golden, "ae/recon_from_scaled", images)
    _check(golden, "ae/recon_from_mean", codec.decode(scaled_mean)[0])


def _levels(codec, side):
    return [f"{side}/{i}" for i in range(len(codec.config.block_out_channels))]


def clamp(golden):
    """The bounds of the log-variance."""
    mean, logvar = split_moments(_nhwc(golden.cases["clamp/moments"]))
    assert np.array_equal(mean, split_moments(_nhwc(golden.cases["ae/moments"]))[0])  # only the log-variance is changed
    _check(golden, "clamp/logvar", logvar)
    _check(golden, "clamp/std", standard_deviation(logvar))


def _check(golden, name, value):
    golden.check(name, np.asarray(value).transpose(0, 3, 1, 2), tolerance=TOLERANCE)


def _nhwc(array):
    return jnp.asarray(array).transpose(0, 2, 3, 1)


CASES = {"ae": ae, "clamp": clamp}
