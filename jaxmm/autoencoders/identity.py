"""No codec: pixels are the latents."""

from flax import nnx
from jaxtyping import Array, Float


class Identity(nnx.Module):
    """The interface of a codec, for images small enough to be drawn pixel by pixel."""

    downscale = 1

    def __init__(self, channels: int):
        self.channels = channels

    def encode(
        self, images: Float[Array, "N H W C"], noise: Array | None = None
    ) -> tuple[Float[Array, "N H W C"], dict[str, Array]]:
        """The images themselves, and no intermediates."""
        return images, {}

    def decode(self, latents: Float[Array, "N H W C"]) -> tuple[Float[Array, "N H W C"], dict[str, Array]]:
        """The latents themselves, and no intermediates."""
        return latents, {}
