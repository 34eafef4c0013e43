"""Sizes of Transfusion and the choices that the paper leaves open (specification sections 2 and 10)."""

import dataclasses

from jaxmm import autoencoders
from jaxmm.autoencoders import KLConfig
from jaxmm.errors import InputError, nearest
from jaxmm.transformer import TransformerConfig

# what a field may be
CHOICES = {
    "patch_codec": ("linear", "unet"),
    "patch_order": ("row_column_channel", "channel_row_column"),
    "time_injection": ("pre_linear", "post_linear"),
    "image_positions": ("counter", "shared"),
    "grid_positions": ("none", "sincos", "learned"),
    "objective": ("ddpm", "flow"),
    "time_distribution": ("uniform", "logit_normal"),
    "noise_limiting": ("restrict", "clamp"),
}


def _check_choice(field: str, value: str, allowed: tuple[str, ...]) -> None:
    if value not in allowed:
        raise InputError(f"{field} must be one of {allowed}, not {value!r}{nearest(str(value), allowed)}")


@dataclasses.dataclass(frozen=True)
class UNetConfig:
    """The U-Net patch codec (specification section 2.7); it halves the grid len(channels) - 1 times.

    Attributes:
      channels: of each resolution, the finest first.
      blocks: residual blocks per resolution on the way down; on the way up there is one more.
      attention_levels: resolutions whose blocks are followed by attention over all pixels; 0 is the finest.
      heads: of that attention.
      norm: "layer" (over the channels of each pixel) or "group" (`norm_groups` of them, over channels and pixels).
      norm_groups, norm_eps: of the norms.
      skips: whether the way up gets the activations of the way down.
    """

    channels: tuple[int, ...] = (320, 1280)
    blocks: int = 2
    attention_levels: tuple[int, ...] = (1,)
    heads: int = 20
    norm: str = "layer"
    norm_groups: int = 32
    norm_eps: float = 1e-5
    skips: bool = True

    def __post_init__(self):
        _check_choice("unet.norm", self.norm, ("layer", "group"))
        if not self.channels or min(*self.channels, self.blocks, self.heads, self.norm_groups) < 1:
            raise InputError("unet: channels, blocks, heads and norm_groups must be at least 1")
        levels = range(len(self.channels))
        if not set(self.attention_levels) <= set(levels):
            raise InputError(f"unet.attention_levels {self.attention_levels}: there are levels 0 to {levels[-1]}")
        for level in self.attention_levels:
            if self.channels[level] % self.heads:
                raise InputError(f"unet: {self.channels[level]} channels cannot be shared by {self.heads} heads")
        if self.norm == "group" and any(width % self.norm_groups for width in self.channels):
            raise InputError(f"unet: channels {self.channels} cannot be cut into {self.norm_groups} groups")

    @property
    def groups(self) -> int | None:
        """Of the group norm; None is layer norm."""
        return self.norm_groups if self.norm == "group" else None


@dataclasses.dataclass(frozen=True)
class TransfusionConfig:
    """One Transfusion.

    Attributes:
      width, layers, heads, mlp_width: of the Llama backbone; kv_heads and head_size follow from them by default.
      vocab_size: of both text matrices, BOI and EOI included.
      bos_id, eos_id, boi_id, eoi_id: special tokens; pad_id fills image slots, and nothing reads it.
      context: the longest document, in tokens.
      tie_embeddings: use the input embedding as the output matrix; the published sizes do not.
      image_size: (H, W) of the pixels that are drawn by default.
      codec: of pixels to latents; None takes pixels as latents.
      latent_channels: C of the latents.
      null_id: replaces each word of a dropped caption, and of the unconditional prompt; None leaves the words out.
      patch_size: k; a patch is k x k latent pixels.
      patch_codec: of latents to hidden states and back, "linear" or "unet".
      unet: of the U-Net codec.
      patch_order: in which order the linear codec flattens a patch.
      time_features, time_width: of the time embedding; the width is by default the hidden one, with a U-Net that of its
        last level.
      time_injection: "pre_linear" adds the projected time to each patch before the linear map, "post_linear" after it.
      image_positions: rotary positions of patches: "counter" (one per patch) or "shared" (one per image).
      grid_positions: added to patches by row and column: "none", "sincos" or "learned".
      document_mask: whether documents of a row are hidden from each other; if not, positions run through the row.
      objective: "ddpm" (noise prediction, cosine schedule) or "flow" (velocity).
      diffusion_steps, cosine_offset, max_beta: of the cosine schedule.
      time_distribution: of training: "uniform", or for flow "logit_normal" with logit_mean and logit_std.
      max_noise: the share of the noise schedule that training uses.
      noise_limiting: how training keeps to that share, and to the limit of images that come first: "restrict" draws
        below it, "clamp" draws from the whole schedule and takes the limit for what is above.
      given_time: the share of the noise schedule that the network is told for images that are given, which are clean.
      bidirectional: whether the patches of an image see each other; False is the paper's ablation.
      image_loss_weight: lambda of the total loss.
      norm_eps, rope_theta, remat, init_std: of the transformer.
    """

    width: int
    layers: int
    heads: int
    mlp_width: int
    kv_heads: int | None = None
    head_size: int | None = None
    vocab_size: int = 32002
    bos_id: int = 1
    eos_id: int = 2
    pad_id: int = 0
    boi_id: int = 32000
    eoi_id: int = 32001
    null_id: int | None = None
    context: int = 4096
    tie_embeddings: bool = False
    image_size: tuple[int, int] = (256, 256)
    codec: KLConfig | None = None
    latent_channels: int = 8
    patch_size: int = 2
    patch_codec: str = "linear"
    unet: UNetConfig = UNetConfig()
    patch_order: str = "row_column_channel"
    time_features: int = 256
    time_width: int | None = None
    time_max_period: float = 10000.0
    time_injection: str = "pre_linear"
    image_positions: str = "counter"
    grid_positions: str = "none"
    document_mask: bool = True
    objective: str = "ddpm"
    diffusion_steps: int = 1000
    cosine_offset: float = 0.008
    max_beta: float = 0.999
    time_distribution: str = "uniform"
    logit_mean: float = 0.0
    logit_std: float = 1.0
    max_noise: float = 1.0
    noise_limiting: str = "restrict"
    given_time: float = 0.0
    bidirectional: bool = True
    image_loss_weight: float = 5.0
    norm_eps: float = 1e-5
    rope_theta: float = 10000.0
    remat: str = "none"
    init_std: float = 0.02

    def __post_init__(self):
        for field, allowed in CHOICES.items():
            _check_choice(field, getattr(self, field), allowed)
        if self.codec is not None and self.codec.latent_channels != self.latent_channels:
            raise InputError(f"codec has {self.codec.latent_channels} latent channels, not {self.latent_channels}")
        self._check_codec()
        self._check_times()
        special = [self.bos_id, self.eos_id, self.boi_id, self.eoi_id]
        if self.vocab_size <= max(*special, self.pad_id, self.null_id or 0):
            raise InputError(f"the special ids do not fit into a vocabulary of {self.vocab_size}")
        if self.null_id in special:
            raise InputError(f"null_id {self.null_id} is another special id: give it one of its own")
        self.patches(*self.image_size)
        _ = self.transformer  # raises what is wrong with the sizes

    def _check_codec(self) -> None:
        if self.patch_codec == "unet":
            if 2 ** (len(self.unet.channels) - 1) != self.patch_size:
                raise InputError(
                    f"unet.channels {self.unet.channels} make patches of {2 ** (len(self.unet.channels) - 1)}, "
                    f"not of patch_size {self.patch_size}"
                )
            for field in ("patch_order", "time_injection"):
                if getattr(self, field) != CHOICES[field][0]:
                    raise InputError(f"{field} {getattr(self, field)!r} is of the linear patch codec")
        if self.time_injection == "post_linear" and self.time_width not in (None, self.width):
            raise InputError(f"post_linear adds the time to the hidden state: time_width must be {self.width}")
        if self.grid_positions == "sincos" and self.width % 4:
            raise InputError(f"grid_positions 'sincos' need a width that 4 divides, not {self.width}")

    def _check_times(self) -> None:
        if self.time_distribution == "logit_normal" and self.objective != "flow":
            raise InputError("time_distribution 'logit_normal' is of the objective 'flow'")
        if self.logit_std <= 0:
            raise InputError(f"logit_std must be positive, not {self.logit_std}")
        if not 0 < self.max_noise <= 1:
            raise InputError(f"max_noise is a share of the schedule above 0 and up to 1, not {self.max_noise}")
        if not 0 <= self.given_time < 1:
            raise InputError(f"given_time is a share of the schedule from 0 and below 1, not {self.given_time}")

    @classmethod
    def from_dict(cls, fields: dict) -> "TransfusionConfig":
        """The inverse of `dataclasses.asdict`, from JSON as well."""
        fields = dict(fields)
        if fields.get("codec") is not None:
            codec = fields["codec"]
            fields["codec"] = KLConfig(**codec | {"block_out_channels": tuple(codec["block_out_channels"])})
        if isinstance(unet := fields.get("unet"), dict):
            tuples = {name: tuple(unet[name]) for name in ("channels", "attention_levels") if name in unet}
            fields["unet"] = UNetConfig(**unet | tuples)
        if "image_size" in fields:
            fields["image_size"] = tuple(fields["image_size"])
        return cls(**fields)

    @property
    def transformer(self) -> TransformerConfig:
        """The backbone."""
        return TransformerConfig(
            width=self.width,
            layers=self.layers,
            heads=self.heads,
            kv_heads=self.kv_heads or self.heads,
            head_size=self.head_size or self.width // self.heads,
            mlp_width=self.mlp_width,
            norm_eps=self.norm_eps,
            rope_theta=self.rope_theta,
            remat=self.remat,
            init_std=self.init_std,
        )

    @property
    def time_size(self) -> int:
        """Width of the time embedding; with a U-Net it does not grow with the transformer."""
        return self.time_width or (self.unet.channels[-1] if self.patch_codec == "unet" else self.width)

    @property
    def unwritten(self) -> tuple[int, ...]:
        """Ids that are no target of training: text that is sampled has none of them."""
        return (self.eoi_id,) if self.null_id is None else (self.eoi_id, self.null_id)

    @property
    def downscale(self) -> int:
        """Pixels per latent pixel."""
        return 1 if self.codec is None else self.codec.downscale

    @property
    def pixel_channels(self) -> int:
        """Channels of an image."""
        return self.latent_channels if self.codec is None else self.codec.in_channels

    @property
    def moment_channels(self) -> int | None:
        """Channels of an image's cached moments; None if pixels have as many, or are the latents."""
        moments = 2 * self.latent_channels
        return None if self.codec is None or self.codec.in_channels == moments else moments

    @property
    def text_vocab_size(self) -> int:
        """Text may use the ids below it: BOI and EOI are appended to those of the tokenizer."""
        return min(self.boi_id, self.eoi_id)

    def patches(self, height: int, width: int) -> int:
        """The number of patches of an image of height x width pixels.

        Raises:
          InputError: if the image cannot be cut into patches.
        """
        step = self.downscale * self.patch_size
        if height % step or width % step:
            raise InputError(f"an image of {height} x {width} pixels cannot be cut into patches of {step} pixels")
        return (height // step) * (width // step)


# By patch size: about 0.27B parameters with two blocks per level and attention at the last one, in heads of 64.
UNETS = {
    2: UNetConfig(),
    4: UNetConfig((320, 640, 1024), attention_levels=(2,), heads=16),
    8: UNetConfig((256, 512, 768, 1024), attention_levels=(3,), heads=16),
}


def _presets() -> dict[str, TransfusionConfig]:
    """The five sizes of the paper's table 2, vocabulary of Llama 2.

    "<size>" has the linear codec and "<size>-unet" the U-Net, both with patches of 2 x 2; "0.76b-patch1" and so on are
    those of the study of patch sizes.
    """
    sizes = {
        "0.16b": (768, 16, 12, 2048),
        "0.37b": (1024, 24, 16, 2816),
        "0.76b": (1536, 24, 24, 4096),
        "1.4b": (2048, 24, 16, 5632),
        "7b": (4096, 32, 32, 11008),
    }
    presets, codec = {}, autoencoders.PRESETS["sd"]
    for name, (width, layers, heads, mlp_width) in sizes.items():
        presets[name] = TransfusionConfig(width, layers, heads, mlp_width, codec=codec, remat="full")
        presets[f"{name}-unet"] = dataclasses.replace(presets[name], patch_codec="unet")
    for k in (1, 4, 8):
        presets[f"0.76b-patch{k}"] = dataclasses.replace(presets["0.76b"], patch_size=k)
    for k in (4, 8):
        presets[f"0.76b-unet-patch{k}"] = dataclasses.replace(presets["0.76b-unet"], patch_size=k, unet=UNETS[k])
    return presets


PRESETS = _presets()
