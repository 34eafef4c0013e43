"""The U-Net patch codec (specification section 2.7): latents -> hidden states -> prediction.

The encoder halves the latent grid until a pixel of it is a patch; the decoder doubles it again. Both are told the time.
The encoder's activations go past the transformer to the decoder of the same image: the skip connections.
"""

from collections.abc import Callable

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float

from jaxmm.layers.convolution import Conv2D, PixelAttention, ResidualBlock, channel_norm, uniform_fan_in, upsample
from jaxmm.layers.linear import Linear
from jaxmm.models.transfusion.config import TransfusionConfig
from jaxmm.sharding import constrain
from jaxmm.transformer.config import REMAT_POLICIES

Skips = tuple[Float[Array, "B N h w c"], ...]


class Level(nnx.Module):
    """Residual blocks at one resolution, each followed by attention if the level has it, and the change to the next.

    Args:
      c: of the model.
      number: of the level; 0 is the finest.
      inputs: channels that go into each block.
      resample: convolution of the change to the next resolution; None at the last.
    """

    def __init__(
        self, c: TransfusionConfig, number: int, inputs: list[int], resample: Conv2D | None, *, rngs: nnx.Rngs
    ):
        u, channels = c.unet, c.unet.channels[number]
        norm = dict(groups=u.groups, eps=u.norm_eps)
        self.res = nnx.List([ResidualBlock(i, channels, time=c.time_size, rngs=rngs, **norm) for i in inputs])
        attends = number in u.attention_levels
        self.attn = nnx.List(
            [PixelAttention(channels, heads=u.heads, bias=False, rngs=rngs, **norm) for _ in inputs if attends]
        )
        self.resample = resample

    def blocks(self) -> list[tuple[ResidualBlock, PixelAttention | None]]:
        """The blocks in order."""
        return [(res, self.attn[i] if len(self.attn) else None) for i, res in enumerate(self.res)]


class UNetPatchEncoder(nnx.Module):
    """Noised latents and their time to one hidden state per patch, and the skip connections."""

    def __init__(self, c: TransfusionConfig, *, rngs: nnx.Rngs):
        u, down = c.unet, []
        self.conv_in = Conv2D(c.latent_channels, u.channels[0], 3, rngs=rngs)
        for i, width in enumerate(u.channels):
            last = i == len(u.channels) - 1
            halve = None if last else Conv2D(width, width, 3, stride=2, rngs=rngs)
            inputs = [u.channels[max(i - 1, 0)]] + [width] * (u.blocks - 1)
            down.append(Level(c, i, inputs, halve, rngs=rngs))
        self.down = nnx.List(down)
        self.norm_out = channel_norm(u.channels[-1], u.groups, u.norm_eps, rngs)
        axes = ("channels_in", "embed")
        self.proj_out = Linear(u.channels[-1], c.width, axes, init=uniform_fan_in(), rngs=rngs)
        self.remat, self.skips = c.remat, u.skips

    def __call__(
        self, latents: Float[Array, "B N H W C"], time: Float[Array, "B N E"], dtype
    ) -> tuple[Float[Array, "B N P D"], Skips]:
        b, n = latents.shape[:2]
        block, time = _block(self.remat), _merge(time)
        x = _rows(self.conv_in(_merge(latents).astype(dtype)))
        kept = [x]
        for level in self.down:
            for res, attention in level.blocks():
                x = block(res, attention, x, time)
                kept.append(x)
            if level.resample is not None:
                x = level.resample(x)
                kept.append(x)
        patches = self.proj_out(self.norm_out(x)).reshape(b, n, x.shape[1] * x.shape[2], -1)
        return patches, tuple(y.reshape(b, n, *y.shape[1:]) for y in kept) if self.skips else ()


class UNetPatchDecoder(nnx.Module):
    """Hidden states of an image's patches to a prediction on the latent grid, float32.

    `up` is in the order of the levels, 0 the finest; it is run from the coarsest on.
    """

    def __init__(self, c: TransfusionConfig, *, rngs: nnx.Rngs):
        u, up = c.unet, []
        self.patch_size, self.remat = c.patch_size, c.remat
        axes = ("embed", "channels_out")
        self.proj_in = Linear(c.width, u.channels[-1], axes, init=uniform_fan_in(), rngs=rngs)
        for i, inputs in enumerate(_inputs(u.channels, u.blocks, u.skips)):
            double = None if i == 0 else Conv2D(u.channels[i], u.channels[i], 3, rngs=rngs)
            up.append(Level(c, i, inputs, double, rngs=rngs))
        self.up = nnx.List(up)
        self.norm_out = channel_norm(u.channels[0], u.groups, u.norm_eps, rngs)
        self.conv_out = Conv2D(u.channels[0], c.latent_channels, 3, rngs=rngs)

    def __call__(
        self, hidden: Float[Array, "B N P D"], skips: Skips, time: Float[Array, "B N E"], height: int, width: int
    ) -> Float[Array, "B N H W C"]:
        b, n = hidden.shape[:2]
        block, time, skips = _block(self.remat), _merge(time), list(skips)
        x = self.proj_in(hidden).reshape(b * n, height // self.patch_size, width // self.patch_size, -1)
        for level in reversed(self.up):
            for res, attention in level.blocks():
                x = jnp.concatenate([x, _merge(skips.pop())], axis=-1) if skips else x
                x = block(res, attention, x, time)
            x = x if level.resample is None else level.resample(upsample(x))
        x = self.conv_out(jax.nn.silu(self.norm_out(x)))
        return x.reshape(b, n, height, width, -1).astype(jnp.float32)


def _inputs(channels: tuple[int, ...], blocks: int, skips: bool) -> list[list[int]]:
    """Channels that go into each block of the decoder, by level: those of the block before, and of its skip."""
    kept = [channels[0]]
    for i, width in enumerate(channels):
        kept += [width] * (blocks + (i < len(channels) - 1))
    inputs, current = {}, channels[-1]
    for i in reversed(range(len(channels))):
        before = [current] + [channels[i]] * blocks
        inputs[i] = [width + (kept.pop() if skips else 0) for width in before]
        current = channels[i]
    return [inputs[i] for i in range(len(channels))]


def _block(remat: str) -> Callable:
    """(residual block, attention or None, x, time) -> x, its activations kept as the transformer's are."""

    def run(res, attention, x, time):
        x = res(x, time)
        return _rows(x if attention is None else attention(x))

    return run if remat == "none" else jax.checkpoint(run, policy=REMAT_POLICIES[remat])


def _rows(x: Float[Array, "B*N H W C"]) -> Float[Array, "B*N H W C"]:
    """Pin activations where their rows are, whatever the cut of the weights."""
    return constrain(x, "rows", None, None, None)


def _merge(x: Float[Array, "B N *x"]) -> Float[Array, "B*N *x"]:
    return x.reshape(-1, *x.shape[2:])
