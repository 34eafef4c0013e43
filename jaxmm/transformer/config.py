"""Sizes and choices of a transformer."""

import dataclasses

import jax

from jaxmm.errors import InputError, nearest

# What the backward pass finds kept from the forward pass; the rest is computed again, layer by layer.
REMAT_POLICIES = {
    "none": None,  # everything is kept
    "dots": jax.checkpoint_policies.dots_saveable,  # results of matrix products, those of attention included
    "projections": jax.checkpoint_policies.dots_with_no_batch_dims_saveable,  # products with weights
    "full": jax.checkpoint_policies.nothing_saveable,  # the input of each layer
}


@dataclasses.dataclass(frozen=True)
class TransformerConfig:
    """A decoder-only transformer of Llama-style blocks: pre-norm RMSNorm, rotary positions, SwiGLU, no biases.

    Attributes:
      width: D, the size of the hidden state.
      layers: number of blocks.
      heads, kv_heads: H query heads share G = kv_heads key heads.
      head_size: K.
      mlp_width: hidden size of the feed-forward block.
      norm_eps, rope_theta: constants of the norms and of the rotary positions.
      streams: names of the streams; each has weights of its own, and all attend as one sequence.
      remat: a name of `REMAT_POLICIES`.
      init_std: standard deviation of fresh weights; those that write to the residual stream get it divided by
        sqrt(2 layers).
    """

    width: int
    layers: int
    heads: int
    kv_heads: int
    head_size: int
    mlp_width: int
    norm_eps: float = 1e-5
    rope_theta: float = 10000.0
    streams: tuple[str, ...] = ("tokens",)
    remat: str = "none"
    init_std: float = 0.02

    def __post_init__(self):
        for name in ("width", "layers", "heads", "kv_heads", "head_size", "mlp_width"):
            if getattr(self, name) < 1:
                raise InputError(f"{name} must be at least 1, not {getattr(self, name)}")
        if self.head_size % 2:
            raise InputError(f"rotary positions need an even head size, not {self.head_size}")
        if self.heads % self.kv_heads:
            raise InputError(f"{self.heads} heads cannot share {self.kv_heads} key heads evenly")
        if self.remat not in REMAT_POLICIES:
            raise InputError(f"unknown remat policy {self.remat!r}{nearest(self.remat, REMAT_POLICIES)}")
