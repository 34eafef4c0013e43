"""The sizes of a KL autoencoder, and how they are read from diffusers' config.json."""

import dataclasses
import math
from collections.abc import Mapping

from jaxmm.errors import InputError

# What a key of diffusers' config.json may say; other values make a network that is not built here.
_SUPPORTED = {
    "_class_name": ("AutoencoderKL",),
    "act_fn": ("silu", "swish"),
    "mid_block_add_attention": (True,),
    "latents_mean": (None,),
    "latents_std": (None,),
}
_BLOCK_TYPES = {"down_block_types": "DownEncoderBlock2D", "up_block_types": "UpDecoderBlock2D"}

# diffusers' values for keys that a config.json leaves out
_DEFAULTS = {
    "in_channels": 3,
    "out_channels": 3,
    "block_out_channels": (64,),
    "layers_per_block": 1,
    "latent_channels": 4,
    "norm_num_groups": 32,
    "scaling_factor": 0.18215,
    "shift_factor": None,
    "use_quant_conv": True,
    "use_post_quant_conv": True,
}

_SIZES = ("in_channels", "out_channels", "layers_per_block", "latent_channels", "norm_groups")
_SWITCHES = ("use_quant_conv", "use_post_quant_conv")


@dataclasses.dataclass(frozen=True, kw_only=True)
class KLConfig:
    """Sizes of a KL autoencoder, and the scale of its latents.

    Attributes:
      in_channels, out_channels: channels of the images that are read and drawn.
      block_out_channels: channels of each level, from the finest; the image is halved between levels.
      layers_per_block: residual blocks of an encoder level; a decoder level has one more.
      latent_channels: channels of the latents.
      norm_groups: groups of every group norm.
      scaling_factor, shift_factor: latents are handed out as (z - shift) * scale.
      use_quant_conv, use_post_quant_conv: whether a 1x1 convolution follows the encoder, precedes the decoder.

    Raises:
      InputError: if sizes are not positive integers, the scale is zero, or the groups do not divide the channels.
    """

    in_channels: int
    out_channels: int
    block_out_channels: tuple[int, ...]
    layers_per_block: int
    latent_channels: int
    norm_groups: int = 32
    scaling_factor: float
    shift_factor: float = 0.0
    use_quant_conv: bool = True
    use_post_quant_conv: bool = True

    def __post_init__(self):
        channels = self.block_out_channels
        for name in _SIZES:
            self._require(_is_size(getattr(self, name)), name, "a positive integer")
        for name in _SWITCHES:
            self._require(isinstance(getattr(self, name), bool), name, "true or false")
        sizes = isinstance(channels, tuple) and len(channels) > 0 and all(map(_is_size, channels))
        self._require(sizes, "block_out_channels", "a list of positive integers")
        divisible = all(size % self.norm_groups == 0 for size in channels)
        self._require(divisible, "block_out_channels", f"divisible by {self.norm_groups}, the groups of the norms")
        nonzero = _is_number(self.scaling_factor) and self.scaling_factor != 0
        self._require(nonzero, "scaling_factor", "a number other than 0")
        self._require(_is_number(self.shift_factor), "shift_factor", "a number")

    def _require(self, fits: bool, name: str, what: str):
        if not fits:
            raise InputError(f"{name} is {getattr(self, name)!r}, but must be {what}")

    @classmethod
    def from_diffusers(cls, config: Mapping[str, object]) -> "KLConfig":
        """Read the content of diffusers' config.json; keys that do not shape the network are ignored.

        Raises:
          InputError: if it describes a network other than those built here, or a value is ill-typed.
        """
        for key, known in _SUPPORTED.items():
            if key in config and config[key] not in known:
                raise InputError(f"{key} {config[key]!r} is not supported; known: {', '.join(map(repr, known))}")
        values = {key: config.get(key, default) for key, default in _DEFAULTS.items()}
        channels, shift = values.pop("block_out_channels"), values.pop("shift_factor")
        result = cls(
            block_out_channels=tuple(channels) if isinstance(channels, list) else channels,
            norm_groups=values.pop("norm_num_groups"),
            shift_factor=0.0 if shift is None else shift,
            **values,
        )
        _refuse_blocks(config, len(result.block_out_channels))
        return result

    @property
    def downscale(self) -> int:
        """Pixels per latent, along height and along width."""
        return 2 ** (len(self.block_out_channels) - 1)


def _is_size(value: object) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and value > 0


def _is_number(value: object) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)


def _refuse_blocks(config: Mapping[str, object], levels: int):
    for key, name in _BLOCK_TYPES.items():
        if key in config and config[key] not in ([name] * levels, (name,) * levels):
            raise InputError(f"{key} {config[key]!r} is not supported; known: {name!r} for each of {levels} levels")
