"""The KL autoencoder of latent diffusion (arXiv 2112.10752), with the layers and weights of diffusers' `AutoencoderKL`.

The encoder gives mean and log-variance of a normal distribution per latent value; the decoder maps latents to pixels.
Both are convolutional, halve or double the image between levels, and attend over all pixels at the coarsest one.
The members of the family differ in sizes, in the scale of the latents, and in whether 1x1 "quant" convolutions stand
between the networks and the latents.
"""

import dataclasses
import itertools
import json
from collections.abc import Mapping
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jaxtyping import Array, Float
from safetensors import SafetensorError, safe_open

from jaxmm.autoencoders.kl_config import KLConfig
from jaxmm.errors import InputError
from jaxmm.layers.convolution import Conv2D, PixelAttention, ResidualBlock, upsample
from jaxmm.layers.norms import GroupNorm
from jaxmm.layers.parameters import Blueprint
from jaxmm.sharding import Parameter
from jaxmm.weights import CONV, LINEAR, Mismatch, Row, Table, Transform

WEIGHTS = "diffusion_pytorch_model.safetensors"
EPS = 1e-6  # of every group norm
LOG_VARIANCE = (-30.0, 20.0)

Intermediates = dict[str, jax.Array]

# The size of Transfusion's unreleased codec. Its scale is to be measured on data, as 1 / standard deviation of latents.
_SD = KLConfig(
    in_channels=3,
    out_channels=3,
    block_out_channels=(128, 256, 512, 512),
    layers_per_block=2,
    latent_channels=8,
    scaling_factor=1.0,
)
_SD_16 = dataclasses.replace(_SD, latent_channels=16, use_quant_conv=False, use_post_quant_conv=False)
PRESETS = {
    "sd": _SD,
    "sd1": dataclasses.replace(_SD, latent_channels=4, scaling_factor=0.18215),
    "sdxl": dataclasses.replace(_SD, latent_channels=4, scaling_factor=0.13025),
    "sd3": dataclasses.replace(_SD_16, scaling_factor=1.5305, shift_factor=0.0609),
    "flux": dataclasses.replace(_SD_16, scaling_factor=0.3611, shift_factor=0.1159),
}


class Level(nnx.Module):
    """Residual blocks at one resolution, and the convolution of the change to the next one (None at the last)."""

    def __init__(self, channels: list[int], groups: int, resample: Conv2D | None, *, rngs: nnx.Rngs):
        pairs = itertools.pairwise(channels)
        self.blocks = nnx.List([ResidualBlock(a, b, groups=groups, eps=EPS, rngs=rngs) for a, b in pairs])
        self.resample = resample

    def __call__(self, x: Float[Array, "N H W C"]) -> Float[Array, "N H W c"]:
        for block in self.blocks:
            x = block(x)
        return x


class Middle(nnx.Module):
    """The coarsest resolution: residual block, attention over all pixels, residual block."""

    def __init__(self, channels: int, groups: int, *, rngs: nnx.Rngs):
        self.block1 = ResidualBlock(channels, channels, groups=groups, eps=EPS, rngs=rngs)
        self.attention = PixelAttention(channels, groups=groups, eps=EPS, rngs=rngs)
        self.block2 = ResidualBlock(channels, channels, groups=groups, eps=EPS, rngs=rngs)

    def __call__(self, x: Float[Array, "N H W C"]) -> tuple[Float[Array, "N H W C"], Intermediates]:
        block = self.block1(x)
        attention = self.attention(block)
        x = self.block2(attention)
        return x, {"mid_block1": block, "mid_attn": attention, "mid": x}


class Encoder(nnx.Module):
    """Images -> the raw 2 * latent_channels values of `KLAutoencoder.moments`, without the quant convolution."""

    def __init__(self, config: KLConfig, *, rngs: nnx.Rngs):
        groups, widths, down = config.norm_groups, config.block_out_channels, []
        self.conv_in = Conv2D(config.in_channels, widths[0], 3, rngs=rngs)
        for i, width in enumerate(widths):
            last = i == len(widths) - 1
            # the image is padded only below and at the right
            halve = None if last else Conv2D(width, width, 3, stride=2, padding=((0, 1), (0, 1)), rngs=rngs)
            channels = [widths[max(i - 1, 0)]] + [width] * config.layers_per_block
            down.append(Level(channels, groups, halve, rngs=rngs))
        self.down = nnx.List(down)
        self.mid = Middle(widths[-1], groups, rngs=rngs)
        self.norm_out = GroupNorm(widths[-1], groups=groups, eps=EPS, rngs=rngs)
        self.conv_out = Conv2D(widths[-1], 2 * config.latent_channels, 3, rngs=rngs)

    def __call__(self, x: Float[Array, "N H W C"]) -> tuple[Float[Array, "N h w c"], Intermediates]:
        named = {"conv_in": (x := self.conv_in(x))}
        for i, level in enumerate(self.down):
            named[f"down/{i}/blocks"] = x = level(x)
            named[f"down/{i}"] = x = x if level.resample is None else level.resample(x)
        x, middle = self.mid(x)
        named |= middle
        named["norm_out"] = x = self.norm_out(x)
        named["conv_out"] = x = self.conv_out(jax.nn.silu(x))
        return x, {f"enc/{name}": value for name, value in named.items()}


class Decoder(nnx.Module):
    """Latents -> images. Level 0 is the coarsest."""

    def __init__(self, config: KLConfig, *, rngs: nnx.Rngs):
        groups, widths, up = config.norm_groups, config.block_out_channels[::-1], []
        self.conv_in = Conv2D(config.latent_channels, widths[0], 3, rngs=rngs)
        self.mid = Middle(widths[0], groups, rngs=rngs)
        for i, width in enumerate(widths):
            double = None if i == len(widths) - 1 else Conv2D(width, width, 3, rngs=rngs)
            channels = [widths[max(i - 1, 0)]] + [width] * (config.layers_per_block + 1)
            up.append(Level(channels, groups, double, rngs=rngs))
        self.up = nnx.List(up)
        self.norm_out = GroupNorm(widths[-1], groups=groups, eps=EPS, rngs=rngs)
        self.conv_out = Conv2D(widths[-1], config.out_channels, 3, rngs=rngs)

    def __call__(self, x: Float[Array, "N h w c"]) -> tuple[Float[Array, "N H W C"], Intermediates]:
        named = {"conv_in": (x := self.conv_in(x))}
        x, middle = self.mid(x)
        named |= middle
        for i, level in enumerate(self.up):
            named[f"up/{i}/blocks"] = x = level(x)
            named[f"up/{i}"] = x = x if level.resample is None else level.resample(upsample(x))
        named["norm_out"] = x = self.norm_out(x)
        x = self.conv_out(jax.nn.silu(x))
        return x, {f"dec/{name}": value for name, value in named.items()}


class KLAutoencoder(nnx.Module):
    """Images [N, H, W, C] in [-1, 1] <-> latents [N, h, w, c], smaller by `config.downscale` along H and W.

    The networks compute in the format of their input; moments and latents from the encoder are float32.
    """

    def __init__(self, config: KLConfig, *, rngs: nnx.Rngs):
        latent = config.latent_channels
        self.config = config
        self.encoder = Encoder(config, rngs=rngs)
        self.decoder = Decoder(config, rngs=rngs)
        self.quant_conv = Conv2D(2 * latent, 2 * latent, 1, rngs=rngs) if config.use_quant_conv else None
        self.post_quant_conv = Conv2D(latent, latent, 1, rngs=rngs) if config.use_post_quant_conv else None

    def moments(self, images: Float[Array, "N H W C"]) -> tuple[tuple[jax.Array, jax.Array], Intermediates]:
        """Return ((mean, log-variance) of the unscaled latents, each [N, h, w, c], intermediates)."""
        x, intermediates = self.encoder(images)
        x = x if self.quant_conv is None else self.quant_conv(x)
        return split_moments(x), intermediates | {"moments": x}

    def encode(
        self, images: Float[Array, "N H W C"], noise: Float[Array, "N h w c"] | None = None
    ) -> tuple[Float[Array, "N h w c"], Intermediates]:
        """Return (scaled latents, intermediates): a sample mean + std * noise, or the mean without noise."""
        _, intermediates = self.moments(images)
        return self.draw(intermediates["moments"], noise), intermediates

    def draw(
        self, moments: Float[Array, "N h w 2*c"], noise: Float[Array, "N h w c"] | None = None
    ) -> Float[Array, "N h w c"]:
        """Return scaled latents of moments as `moments` (or a cache of it) has them, mean before log-variance."""
        mean, logvar = split_moments(moments)
        return self.scale(mean if noise is None else sample(mean, logvar, noise))

    def decode(self, latents: Float[Array, "N h w c"]) -> tuple[Float[Array, "N H W C"], Intermediates]:
        """Return (images, intermediates) of scaled latents. Images are not clipped."""
        x = self.unscale(latents)
        return self.decoder(x if self.post_quant_conv is None else self.post_quant_conv(x))

    def scale(self, z: Float[Array, "..."]) -> Float[Array, "..."]:
        """Latents of the encoder's own size -> (z - shift) * scale."""
        return ((z.astype(jnp.float32) - self.config.shift_factor) * self.config.scaling_factor).astype(z.dtype)

    def unscale(self, latents: Float[Array, "..."]) -> Float[Array, "..."]:
        """The inverse of `scale`."""
        z = latents.astype(jnp.float32) / self.config.scaling_factor + self.config.shift_factor
        return z.astype(latents.dtype)


def split_moments(moments: Float[Array, "*b 2*c"]) -> tuple[Float[Array, "*b c"], Float[Array, "*b c"]]:
    """Raw encoder output -> (mean, log-variance within [-30, 20]), both float32."""
    mean, logvar = jnp.split(moments.astype(jnp.float32), 2, axis=-1)
    return mean, jnp.clip(logvar, *LOG_VARIANCE)


def standard_deviation(logvar: Float[Array, "..."]) -> Float[Array, "..."]:
    """exp(logvar / 2)."""
    return jnp.exp(0.5 * logvar)


def sample(mean: Float[Array, "..."], logvar: Float[Array, "..."], noise: Float[Array, "..."]) -> Float[Array, "..."]:
    """mean + std * noise: a draw from the posterior for standard normal noise."""
    return mean + standard_deviation(logvar) * noise


def kl(mean: Float[Array, "N h w c"], logvar: Float[Array, "N h w c"]) -> Float[Array, " N"]:
    """Divergence of the posterior from the standard normal distribution, in nats, summed over each image."""
    return 0.5 * jnp.sum(jnp.square(mean) + jnp.exp(logvar) - 1.0 - logvar, axis=(1, 2, 3))


# ours -> diffusers' name within a block
_RESIDUAL = {"norm1": "norm1", "conv1": "conv1", "norm2": "norm2", "conv2": "conv2", "shortcut": "conv_shortcut"}
_ATTENTION = {"norm": "group_norm", "query": "to_q", "key": "to_k", "value": "to_v", "out": "to_out.0"}
_OLD_ATTENTION = {"norm": "group_norm", "query": "query", "key": "key", "value": "value", "out": "proj_attn"}


def weights_table(parameters: Mapping[str, Parameter], *, old_attention_names: bool = False) -> Table:
    """Make the table between our paths and the keys of diffusers' `AutoencoderKL`.

    Args:
      parameters: `Blueprint.parameters` of a `KLAutoencoder`.
      old_attention_names: for old files, where the projections of the attention are called query, key, value and
        proj_attn.
    """
    attention = _OLD_ATTENTION if old_attention_names else _ATTENTION
    rows = _layer("quant_conv", "quant_conv", CONV) + _layer("post_quant_conv", "post_quant_conv", CONV)
    for part, side, resample in (("encoder", "down", "downsamplers"), ("decoder", "up", "upsamplers")):
        level, ours = f"{part}.{side}_blocks.{{i}}", f"{part}.{side}.{{i}}"
        rows += _layer(f"{part}.conv_in", f"{part}.conv_in", CONV)
        rows += _block(f"{level}.resnets.{{j}}", f"{ours}.blocks.{{j}}", _RESIDUAL, CONV)
        rows += _layer(f"{level}.{resample}.0.conv", f"{ours}.resample", CONV)
        rows += _block(f"{part}.mid_block.resnets.0", f"{part}.mid.block1", _RESIDUAL, CONV)
        rows += _block(f"{part}.mid_block.attentions.0", f"{part}.mid.attention", attention, LINEAR)
        rows += _block(f"{part}.mid_block.resnets.1", f"{part}.mid.block2", _RESIDUAL, CONV)
        rows += _norm(f"{part}.conv_norm_out", f"{part}.norm_out")
        rows += _layer(f"{part}.conv_out", f"{part}.conv_out", CONV)
    return Table(rows, parameters)


def _layer(official: str, ours: str, transform: Transform) -> list[Row]:
    return [Row(f"{official}.weight", f"{ours}.kernel", transform), Row(f"{official}.bias", f"{ours}.bias")]


def _norm(official: str, ours: str) -> list[Row]:
    return [Row(f"{official}.weight", f"{ours}.scale"), Row(f"{official}.bias", f"{ours}.bias")]


def _block(official: str, ours: str, names: Mapping[str, str], transform: Transform) -> list[Row]:
    rows = []
    for mine, theirs in names.items():
        pair = f"{official}.{theirs}", f"{ours}.{mine}"
        rows += _norm(*pair) if mine.startswith("norm") else _layer(*pair, transform)
    return rows


def load_diffusers(folder: str | Path) -> tuple[KLConfig, dict[str, np.ndarray]]:
    """Read a folder with config.json and diffusion_pytorch_model.safetensors, or that file's shards and their index.

    Returns:
      (config, parameters in the number format of the files, on the host).

    Raises:
      InputError: if a file is missing or damaged, the network is not supported, or keys or shapes do not fit it.
    """
    folder = Path(folder)
    content = _read_json(folder / "config.json")
    try:
        config = KLConfig.from_diffusers(content)
    except InputError as error:
        raise InputError(f"{folder / 'config.json'}: {error}") from error
    blueprint = Blueprint(lambda rngs: KLAutoencoder(config, rngs=rngs))
    tensors = _read_weights(folder)
    old = any(key.endswith(".mid_block.attentions.0.proj_attn.weight") for key in tensors)
    try:
        return config, weights_table(blueprint.parameters, old_attention_names=old).read(tensors)[0]
    except Mismatch as error:
        raise InputError(f"{folder}: {error}") from error


def _read_json(path: Path) -> dict:
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise InputError(f"{path}: cannot be read: {error.strerror}") from error
    except ValueError as error:
        raise InputError(f"{path}: is damaged: {error}") from error
    if not isinstance(content, dict):
        raise InputError(f"{path}: holds no JSON object")
    return content


def _read_weights(folder: Path) -> dict[str, np.ndarray]:
    index = folder / f"{WEIGHTS}.index.json"
    if (folder / WEIGHTS).exists() or not index.exists():
        return _read_safetensors(folder / WEIGHTS)
    shards = _read_json(index).get("weight_map")
    if not isinstance(shards, dict) or not all(isinstance(name, str) for name in shards.values()):
        raise InputError(f"{index}: has no weight_map from keys to file names")
    tensors = {}
    for name in sorted(set(shards.values())):
        tensors |= _read_safetensors(folder / name)
    return tensors


def _read_safetensors(path: Path) -> dict[str, np.ndarray]:
    try:
        with safe_open(path, framework="numpy") as file:
            return {key: file.get_tensor(key) for key in file.keys()}
    except OSError as error:
        raise InputError(f"{path}: cannot be read: {error}") from error
    except SafetensorError as error:
        raise InputError(f"{path}: is damaged: {error}") from error
