"""The network and its losses (specification sections 2 and 5)."""

import dataclasses
from typing import NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float

from jaxmm.attention import KVCache
from jaxmm.autoencoders import Identity, KLAutoencoder
from jaxmm.diffusion import timesteps
from jaxmm.layers.linear import Embedding, Head, gather_rows, scatter_rows
from jaxmm.layers.losses import Mean, cross_entropy, weighted
from jaxmm.layers.parameters import normal
from jaxmm.layers.timestep import TimestepEmbedding
from jaxmm.models.transfusion.codec import GridPositions, LinearPatchDecoder, LinearPatchEncoder
from jaxmm.models.transfusion.config import TransfusionConfig
from jaxmm.models.transfusion.objective import make_objective
from jaxmm.models.transfusion.unet import UNetPatchDecoder, UNetPatchEncoder
from jaxmm.sequence import Batch, ImageSet
from jaxmm.transformer import Transformer

STREAM = "tokens"  # Transfusion has a single stream
PATCH_CODECS = {"linear": (LinearPatchEncoder, LinearPatchDecoder), "unet": (UNetPatchEncoder, UNetPatchDecoder)}


class Noised(NamedTuple):
    """The images of one bucket as the network sees them: latents [B, N, H, W, C] at times [B, N]."""

    latents: Array
    time: Array


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Patches:
    """The images of one bucket behind the patch encoder; rows are the first axis of every array.

    Attributes:
      values: [B, N, P, D], what the transformer reads.
      skips: what goes past the transformer to the patch decoder.
      time: float32 [B, N, E], the embedded times.
      height, width: of the latents.
    """

    values: Array
    skips: tuple[Array, ...]
    time: Array
    height: int = dataclasses.field(metadata=dict(static=True))
    width: int = dataclasses.field(metadata=dict(static=True))


class Output(NamedTuple):
    """What the network says of a batch.

    Attributes:
      logits: float32 [B, L, V].
      predictions: {bucket: float32 [B, N, H, W, C]}: noise (DDPM) or data - noise (flow).
      cache: with the keys of this call written, if one was given.
    """

    logits: Array
    predictions: dict[str, Array]
    cache: KVCache | None


class Transfusion(nnx.Module):
    """One decoder-only transformer over text tokens and image patches."""

    def __init__(self, config: TransfusionConfig, *, rngs: nnx.Rngs):
        c = self.config = config
        init = normal(c.init_std)
        self.embed = Embedding(c.vocab_size, c.width, init=init, rngs=rngs)
        self.transformer = Transformer(c.transformer, rngs=rngs)
        self.head = None if c.tie_embeddings else Head(c.width, c.vocab_size, init=init, rngs=rngs)
        self.time = TimestepEmbedding(c.time_features, c.time_size, max_period=c.time_max_period, rngs=rngs)
        encoder, decoder = PATCH_CODECS[c.patch_codec]
        self.patch_encoder, self.patch_decoder = encoder(c, rngs=rngs), decoder(c, rngs=rngs)
        self.grid_positions = None if c.grid_positions == "none" else GridPositions(c, rngs=rngs)
        self.codec = Identity(c.latent_channels) if c.codec is None else KLAutoencoder(c.codec, rngs=rngs)

    def __call__(
        self, batch: Batch, images: dict[str, Noised], cache: KVCache | None = None, dtype=jnp.float32
    ) -> tuple[Output, dict[str, Array]]:
        """Read a batch whose images are already noised.

        Args:
          batch: tokens and the slots of its images; `images` replaces its values.
          images: {bucket: Noised}.
          cache: keys of what came before each row.
          dtype: the format of the activations.
        """
        made = {bucket: self.encode_patches(noised, dtype) for bucket, noised in images.items()}
        output, notes = self.read(batch, {bucket: patches for bucket, (patches, _) in made.items()}, cache, dtype)
        return output, notes | {f"{name}/{bucket}": x for bucket, (_, more) in made.items() for name, x in more.items()}

    def encode_patches(self, noised: Noised, dtype=jnp.float32) -> tuple[Patches, dict[str, Array]]:
        """Noised images to patches: they depend on latents and times alone, not on the text."""
        time, notes = self.time(make_objective(self.config).network_time(noised.time))
        values, skips = self.patch_encoder(noised.latents, time, dtype)
        height, width = noised.latents.shape[2:4]
        if self.grid_positions is not None:
            rows, columns = height // self.config.patch_size, width // self.config.patch_size
            values = values + self.grid_positions(rows, columns).reshape(rows * columns, -1).astype(dtype)
        return Patches(values, skips, time, height, width), notes | {"patch_embeds": values}

    def read(
        self, batch: Batch, images: dict[str, Patches], cache: KVCache | None = None, dtype=jnp.float32
    ) -> tuple[Output, dict[str, Array]]:
        """As a call, with images behind the patch encoder."""
        tokens = batch.streams[STREAM]
        hidden = self.embed(tokens.ids, dtype)
        for bucket, patches in images.items():
            index = _patch_index(batch.images[bucket], patches.values.shape[2])
            hidden = scatter_rows(hidden, index, patches.values.reshape(*index.shape, -1))
        notes = {"inputs_embeds": hidden}
        hidden, cache, more = self.transformer({STREAM: hidden}, batch.streams, cache)
        final = hidden[STREAM]
        logits = self.embed.attend(final) if self.head is None else self.head(final)
        predictions = {bucket: self._predict(final, batch.images[bucket], x) for bucket, x in images.items()}
        return Output(logits, predictions, cache), notes | more | {"final_hidden": final}

    def loss(self, batch: Batch, key: jax.Array, dtype=jnp.float32) -> tuple[dict[str, Mean], dict[str, Array]]:
        """Text and image losses of a training batch of pixels, as sums and counts.

        Noise and times of an image depend on (key, its own number) alone, wherever it is packed.
        """
        keys = dict(zip(("posterior", "time", "noise"), jax.random.split(key, 3)))
        data, noise, times = {}, {}, {}
        for bucket, images in batch.images.items():
            data[bucket] = self.encode(images, keys["posterior"])
            noise[bucket] = timesteps.normal_per_example(keys["noise"], images.example, data[bucket].shape[2:])
            limit = jnp.minimum(images.noise_limit, self.config.max_noise)
            times[bucket] = make_objective(self.config).draw_time(keys["time"], images.example, limit)
        return self.loss_at(batch, data, noise, times, dtype)

    def loss_at(
        self, batch: Batch, data: dict[str, Array], noise: dict[str, Array], times: dict[str, Array], dtype=jnp.float32
    ) -> tuple[dict[str, Mean], dict[str, Array]]:
        """The losses for given latents, noise and times, each {bucket: ...}."""
        objective, tokens = make_objective(self.config), batch.streams[STREAM]
        images = {}
        for bucket, x in data.items():
            limit = batch.images[bucket].noise_limit
            noised = objective.add_noise(x, noise[bucket], times[bucket])
            clean = (limit == 0)[..., None, None, None]
            images[bucket] = Noised(jnp.where(clean, x, noised), jnp.where(limit == 0, objective.clean, times[bucket]))
        output, notes = self(batch, images, dtype=dtype)
        terms = {"text": weighted(cross_entropy(output.logits, tokens.labels), tokens.weights)}
        sums, counts = [], []
        for bucket, prediction in output.predictions.items():
            target = objective.target(data[bucket], noise[bucket])
            each = jnp.mean(jnp.square(target - prediction), axis=(2, 3, 4))
            term = weighted(each, batch.images[bucket].weight)
            sums, counts = [*sums, term.sum], [*counts, term.count]
            notes |= {f"noised/{bucket}": images[bucket].latents, f"target/{bucket}": target}
            notes |= {f"image_loss/{bucket}": each, f"prediction/{bucket}": prediction}
        terms["image"] = Mean(sum(sums, jnp.zeros(())), sum(counts, jnp.zeros(())))
        return terms, notes | {"logits": output.logits}

    def encode(self, images: ImageSet, key: jax.Array | None = None) -> Float[Array, "B N H W C"]:
        """Pixels to latents by the frozen codec: the mean, or with a key a posterior sample per image.

        Cached moments, told by their channels, take the place of what the encoder would say of the pixels.
        """
        b, n, *shape = images.values.shape
        flat = images.values.reshape(b * n, *shape)
        cached = shape[2] == self.config.moment_channels
        scale = 1 if cached else self.config.downscale
        size = (shape[0] // scale, shape[1] // scale, self.config.latent_channels)
        noise = None if key is None else timesteps.normal_per_example(key, images.example.reshape(-1), size)
        latents = self.codec.draw(flat, noise) if cached else self.codec.encode(flat, noise)[0]
        return jax.lax.stop_gradient(latents.reshape(b, n, *size).astype(jnp.float32))

    def _predict(self, hidden: Array, images: ImageSet, patches: Patches) -> Float[Array, "B N H W C"]:
        b, n, count, _ = patches.values.shape
        found = gather_rows(hidden, _patch_index(images, count)).reshape(b, n, count, -1)
        return self.patch_decoder(found, patches.skips, patches.time, patches.height, patches.width)


def _patch_index(images: ImageSet, patches: int) -> Array:
    """Where the patches of each image are in their row, [B, N * patches]; negative where there is no image."""
    index = images.slot[:, :, None] + jnp.arange(patches)
    return jnp.where(images.slot[:, :, None] < 0, -1, index).reshape(len(images.slot), -1)
