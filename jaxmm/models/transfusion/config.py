"""Sizes of Transfusion and the choices that the paper leaves open (specification sections 2 and 10)."""

import dataclasses

from jaxmm import autoencoders
from jaxmm.autoencoders import KLConfig
from jaxmm.errors import InputError
from jaxmm.transformer import TransformerConfig


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
      patch_size: k; a patch is k x k latent pixels.
      time_features, time_width: of the time embedding; the width is the hidden width by default.
      time_injection: "pre_linear" adds the projected time to each patch before the linear map, "post_linear" after it.
      objective: "ddpm" (noise prediction, cosine schedule) or "flow" (velocity).
      diffusion_steps, cosine_offset, max_beta: of the cosine schedule.
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
    context: int = 4096
    tie_embeddings: bool = False
    image_size: tuple[int, int] = (256, 256)
    codec: KLConfig | None = None
    latent_channels: int = 8
    patch_size: int = 2
    time_features: int = 256
    time_width: int | None = None
    time_max_period: float = 10000.0
    time_injection: str = "pre_linear"
    objective: str = "ddpm"
    diffusion_steps: int = 1000
    cosine_offset: float = 0.008
    max_beta: float = 0.999
    bidirectional: bool = True
    image_loss_weight: float = 5.0
    norm_eps: float = 1e-5
    rope_theta: float = 10000.0
    remat: str = "none"
    init_std: float = 0.02

    def __post_init__(self):
        for field, allowed in (("time_injection", ("pre_linear", "post_linear")), ("objective", ("ddpm", "flow"))):
            if getattr(self, field) not in allowed:
                raise InputError(f"{field} must be one of {allowed}, not {getattr(self, field)!r}")
        if self.codec is not None and self.codec.latent_channels != self.latent_channels:
            raise InputError(f"codec has {self.codec.latent_channels} latent channels, not {self.latent_channels}")
        if self.time_injection == "post_linear" and self.time_width not in (None, self.width):
            raise InputError(f"post_linear adds the time to the hidden state: time_width must be {self.width}")
        if self.vocab_size <= max(self.bos_id, self.eos_id, self.boi_id, self.eoi_id, self.pad_id):
            raise InputError(f"the special ids do not fit into a vocabulary of {self.vocab_size}")
        self.patches(*self.image_size)
        _ = self.transformer  # raises what is wrong with the sizes

    @classmethod
    def from_dict(cls, fields: dict) -> "TransfusionConfig":
        """The inverse of `dataclasses.asdict`, from JSON as well."""
        fields = dict(fields)
        if fields.get("codec") is not None:
            codec = fields["codec"]
            fields["codec"] = KLConfig(**codec | {"block_out_channels": tuple(codec["block_out_channels"])})
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


def _preset(width: int, layers: int, heads: int, mlp_width: int) -> TransfusionConfig:
    codec = autoencoders.PRESETS["sd"]
    return TransfusionConfig(width=width, layers=layers, heads=heads, mlp_width=mlp_width, codec=codec, remat="full")


# The five sizes of the paper's table 2, linear codec with patches of 2 x 2, vocabulary of Llama 2.
PRESETS = {
    "0.16b": _preset(768, 16, 12, 2048),
    "0.37b": _preset(1024, 24, 16, 2816),
    "0.76b": _preset(1536, 24, 24, 4096),
    "1.4b": _preset(2048, 24, 16, 5632),
    "7b": _preset(4096, 32, 32, 11008),
}
