"""Convolutional blocks over images [N, H, W, C]: what autoencoders and U-Nets of the diffusion family are made of."""

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float

from jaxmm.attention import attend
from jaxmm.layers.linear import Linear
from jaxmm.layers.norms import GroupNorm
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
    """x + conv(silu(norm(conv(silu(norm(x)))))), with a 1x1 convolution on x where the number of channels changes."""

    def __init__(self, channels_in: int, channels_out: int, *, groups: int, eps: float, rngs: nnx.Rngs):
        self.norm1 = GroupNorm(channels_in, groups=groups, eps=eps, rngs=rngs)
        self.conv1 = Conv2D(channels_in, channels_out, 3, rngs=rngs)
        self.norm2 = GroupNorm(channels_out, groups=groups, eps=eps, rngs=rngs)
        self.conv2 = Conv2D(channels_out, channels_out, 3, rngs=rngs)
        self.shortcut = None if channels_in == channels_out else Conv2D(channels_in, channels_out, 1, rngs=rngs)

    def __call__(self, x: Float[Array, "N H W C"]) -> Float[Array, "N H W c"]:
        y = self.conv1(jax.nn.silu(self.norm1(x)))
        y = self.conv2(jax.nn.silu(self.norm2(y)))
        return y + (x if self.shortcut is None else self.shortcut(x))


class PixelAttention(nnx.Module):
    """x + attention of one head, as wide as the channels, in which every pixel sees every pixel of its image."""

    def __init__(self, channels: int, *, groups: int, eps: float, rngs: nnx.Rngs):
        def project() -> Linear:
            return Linear(channels, channels, ("channels_in", "channels_out"), init=uniform_fan_in(), rngs=rngs)

        self.norm = GroupNorm(channels, groups=groups, eps=eps, rngs=rngs)
        self.query, self.key, self.value, self.out = project(), project(), project(), project()

    def __call__(self, x: Float[Array, "N H W C"]) -> Float[Array, "N H W C"]:
        n, h, w, c = x.shape
        y = self.norm(x).reshape(n, h * w, c)
        q, k, v = (project(y)[:, :, None] for project in (self.query, self.key, self.value))
        places = jnp.zeros((n, h * w), jnp.int32)
        mixed = attend(q, k, v, places, Intervals(places, places + 1))
        return x + self.out(mixed[:, :, 0]).reshape(x.shape)
