"""What a run reads: its tokenizer, its batches, the weights of a frozen codec."""

from typing import Any

import grain
import numpy as np
from jax.sharding import Mesh
from ml_collections import ConfigDict

from jaxmm.autoencoders import load_diffusers
from jaxmm.data.pipeline import PackedBatches, layout_dataset, process_lanes
from jaxmm.data.sources import make_source
from jaxmm.data.tokenizers import TextTokenizer, load_tokenizer, word_tokenizer
from jaxmm.errors import InputError
from jaxmm.models.system import Layouts
from jaxmm.sequence import Budget


def make_tokenizer(config: ConfigDict) -> TextTokenizer:
    """The tokenizer that a config names."""
    if config.tokenizer == "words":
        return word_tokenizer(list(config.data.words))
    return load_tokenizer(config.tokenizer)


def check_vocabulary(tokenizer: TextTokenizer, model: Any) -> None:
    """Raise InputError if the ids of the text do not fit below the ids that the model adds to them."""
    added = [getattr(model, name) for name in ("boi_id", "eoi_id") if hasattr(model, name)]
    if tokenizer.size > min(added, default=model.vocab_size) or max(added, default=0) >= model.vocab_size:
        raise InputError(
            f"the tokenizer has {tokenizer.size} ids; the model has {model.vocab_size}, of which {added} are its own"
        )


def check_rows(rows: int, mesh: Mesh, microbatches: int) -> None:
    """Raise InputError if the rows of each microbatch cannot be shared by the devices."""
    shares = mesh.shape["data"] * mesh.shape["fsdp"]
    if microbatches < 1 or rows < 1 or rows % (shares * microbatches):
        raise InputError(
            f"config key 'data.rows': {rows} rows cannot be shared by {shares} devices of data and fsdp"
            f" in {microbatches} microbatches"
        )


def make_batches(config: ConfigDict, model: Any, layouts: Layouts) -> grain.IterDataset:
    """The Grain dataset of packed batches of this process."""
    data = config.data
    for name in ("tokens", "open_rows", "prefetch"):
        if data[name] < 1:
            raise InputError(f"config key 'data.{name}' must be at least 1, not {data[name]}")
    height, width = model.image_size
    images = {f"{height}x{width}": (data.images, (height, width, model.pixel_channels))}
    source = make_source(data.source, data.options.to_dict())
    documents = layout_dataset(source, layouts.train, seed=config.seed)
    budget = Budget({"tokens": data.tokens}, images)
    batches = PackedBatches(documents, budget, data.rows, process_lanes(data.rows), data.open_rows)
    return grain.experimental.ThreadPrefetchIterDataset(batches, prefetch_buffer_size=data.prefetch)


def codec_weights(folder: str, model: Any) -> dict[str, np.ndarray]:
    """The weights of a codec in diffusers' layout, under the model's paths; none if no folder is given.

    Raises:
      InputError: if its sizes are not those that the model's config gives, with every difference.
    """
    if not folder:
        return {}
    found, weights = load_diffusers(folder)
    if model.codec is None:
        raise InputError(f"codec {folder} is given, but the model's config has none")
    fields, wanted = vars(found), vars(model.codec)
    differing = [f"{name} {fields[name]}, not {wanted[name]}" for name in wanted if fields[name] != wanted[name]]
    if differing:
        raise InputError(f"codec {folder} differs from the config's model.codec: it has " + "; ".join(differing))
    return {f"codec.{path}": value for path, value in weights.items()}
