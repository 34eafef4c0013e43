"""The linear patch codec: latent patches to hidden states and back (specification section 2.6)."""

from flax import nnx
from jaxtyping import Array, Float

from jaxmm.layers.linear import Linear
from jaxmm.layers.patches import patchify, unpatchify
from jaxmm.models.transfusion.config import TransfusionConfig
from jaxmm.sharding import constrain_rows


class LinearPatchEncoder(nnx.Module):
    """Noised latents and their time to one hidden state per patch."""

    def __init__(self, c: TransfusionConfig, *, rngs: nnx.Rngs):
        values = c.patch_size**2 * c.latent_channels
        self.patch_size = c.patch_size
        self.proj = Linear(values, c.width, ("patch", "embed"), rngs=rngs)
        pre = c.time_injection == "pre_linear"
        self.time_proj = Linear(c.time_width or c.width, values, ("time", "patch"), rngs=rngs) if pre else None

    def __call__(
        self, latents: Float[Array, "B N H W C"], time: Float[Array, "B N E"], dtype
    ) -> Float[Array, "B N P D"]:
        patches, time = patchify(latents, self.patch_size), time[:, :, None]
        if self.time_proj is not None:
            return constrain_rows(self.proj((patches + constrain_rows(self.time_proj(time))).astype(dtype)))
        return constrain_rows(self.proj(patches.astype(dtype)) + time.astype(dtype))


class LinearPatchDecoder(nnx.Module):
    """Hidden states of an image's patches to a prediction on the latent grid, float32."""

    def __init__(self, c: TransfusionConfig, *, rngs: nnx.Rngs):
        self.patch_size = c.patch_size
        self.proj = Linear(c.width, c.patch_size**2 * c.latent_channels, ("embed", "patch"), rngs=rngs)

    def __call__(self, hidden: Float[Array, "B N P D"], height: int, width: int) -> Float[Array, "B N H W C"]:
        return unpatchify(constrain_rows(self.proj(hidden)).astype("float32"), self.patch_size, height, width)
