"""Convolutional blocks over images [N, H, W, C]: what autoencoders and U-Nets of the diffusion family are made of."""

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float

from jaxmm.attention import attend
from jaxmm.layers.linear import Linear
from jaxmm.layers.norms import GroupNorm, LayerNorm
from jaxmm.layers.parameters import Initializer, param, read, zeros
from jaxmm.sequence import Intervals

Padding = tuple[tuple[int, int], tuple[int, int]]


def uniform_fan_in() -> Initializer:
    """Uniform in +-1/sqrt(inputs of one output), PyTorch's initialisation of convolutions and linear layers."""
    return jax.nn.initializers.variance_scaling(1 / 3, "fan_in", "uniform")


class Conv2D(nnx.Module):
    """Convolution over the pixels of NHWC images with a square HWIO kernel, and a bias.

    Args:
      channels_in, channels_out: sizes of the last axis before and after.
      kernel: height and width of the kernel.
      stride: step between outputs, in pixels.
      padding: zeros ((above, below), (left, right)) put around the image; by default kernel // 2 on every side.
    """

    def __init__(
        self,
        channels_in: int,
        channels_out: int,
        kernel: int,
        *,
        stride: int = 1,
        padding: Padding | None = None,
        init: Initializer = uniform_fan_in(),
        rngs: nnx.Rngs,
    ):
        axes = ("kernel", "kernel", "channels_in", "channels_out")
        self.kernel = param(rngs, (kernel, kernel, channels_in, channels_out), axes, init)
        self.bias = param(rngs, (channels_out,), ("channels_out",), zeros)
        self.strides = (stride, stride)
        self.padding = ((kernel // 2, kernel // 2),) * 2 if padding is None else padding

    def __call__(self, x: Float[Array, "N H W C"]) -> Float[Array, "N h w c"]:
        kernel = read(self.kernel, x.dtype)
        layout = ("NHWC", "HWIO", "NHWC")
        y = jax.lax.conv_general_dilated(x, kernel, self.strides, self.padding, dimension_numbers=layout)
        return y + read(self.bias, x.dtype)


def upsample(x: Float[Array, "N H W C"]) -> Float[Array, "N 2*H 2*W C"]:
    """Double height and width by nearest neighbour: every pixel becomes a square of four."""
    n, h, w, c = x.shape
    return jnp.broadcast_to(x[:, :, None, :, None], (n, h, 2, w, 2, c)).reshape(n, 2 * h, 2 * w, c)


class ResidualBlock(nnx.Module):
    """x + conv(silu(norm(conv(silu(norm(x)))))), with a 1x1 convolution on x where the number of channels changes.

    Args:
      channels_in, channels_out: sizes of the last axis before and after.
      groups: of the group norms; None is layer norm, over the channels of each pixel.
      eps: of the norms.
      time: size of a time embedding; its silu is projected and added behind the first convolution.
    """

    def __init__(
        self,
        channels_in: int,
        channels_out: int,
        *,
        groups: int | None,
        eps: float,
        time: int | None = None,
        rngs: nnx.Rngs,
    ):
        self.norm1 = channel_norm(channels_in, groups, eps, rngs)
        self.conv1 = Conv2D(channels_in, channels_out, 3, rngs=rngs)
        axes = ("time", "channels_out")
        self.time_proj = None if time is None else Linear(time, channels_out, axes, init=uniform_fan_in(), rngs=rngs)
        self.norm2 = channel_norm(channels_out, groups, eps, rngs)
        self.conv2 = Conv2D(channels_out, channels_out, 3, rngs=rngs)
        self.shortcut = None if channels_in == channels_out else Conv2D(channels_in, channels_out, 1, rngs=rngs)

    def __call__(self, x: Float[Array, "N H W C"], time: Float[Array, "N E"] | None = None) -> Float[Array, "N H W c"]:
        y = self.conv1(jax.nn.silu(self.norm1(x)))
        if self.time_proj is not None:
            y = y + self.time_proj(jax.nn.silu(time)).astype(y.dtype)[:, None, None]
        y = self.conv2(jax.nn.silu(self.norm2(y)))
        return y + (x if self.shortcut is None else self.shortcut(x))


class PixelAttention(nnx.Module):
    """x + attention over the channels in which every pixel sees every pixel of its image.

    Args:
      channels: size of the last axis, shared by the heads.
      groups, eps: of the norm, as in `ResidualBlock`.
      heads: number of heads.
      bias: whether queries, keys and values have one; the output always has.
    """

    def __init__(
        self, channels: int, *, groups: int | None, eps: float, heads: int = 1, bias: bool = True, rngs: nnx.Rngs
    ):
        def project(bias: bool = bias) -> Linear:
            axes = ("channels_in", "channels_out")
            return Linear(channels, channels, axes, bias=bias, init=uniform_fan_in(), rngs=rngs)

        self.norm = channel_norm(channels, groups, eps, rngs)
        self.query, self.key, self.value, self.out = project(), project(), project(), project(bias=True)
        self.heads = heads

    def __call__(self, x: Float[Array, "N H W C"]) -> Float[Array, "N H W C"]:
        n, h, w, c = x.shape
        y = self.norm(x).reshape(n, h * w, c)
        q, k, v = (project(y).reshape(n, h * w, self.heads, -1) for project in (self.query, self.key, self.value))
        places = jnp.zeros((n, h * w), jnp.int32)
        mixed = attend(q, k, v, places, Intervals(places, places + 1))
        return x + self.out(mixed.reshape(n, h * w, c)).reshape(x.shape)


def channel_norm(channels: int, groups: int | None, eps: float, rngs: nnx.Rngs) -> GroupNorm | LayerNorm:
    """Group norm over pixels and channels, or with `groups` None layer norm over the channels of each pixel."""
    if groups is None:
        return LayerNorm(channels, eps=eps, rngs=rngs)
    return GroupNorm(channels, groups=groups, eps=eps, rngs=rngs)
