"""What a run reads: its tokenizer, its batches, the weights of a frozen codec."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import grain
import numpy as np
from jax.sharding import Mesh
from ml_collections import ConfigDict

from jaxmm.autoencoders import load_diffusers
from jaxmm.data.bad_examples import BadExamples
from jaxmm.data.pipeline import PackedBatches, fitting, layout_dataset, process_lanes
from jaxmm.data.sources import make_source
from jaxmm.data.tokenizers import TextTokenizer, load_tokenizer, word_tokenizer
from jaxmm.errors import InputError
from jaxmm.models.system import Layouts
from jaxmm.sequence import Batch


def make_tokenizer(config: ConfigDict) -> TextTokenizer:
    """The tokenizer that a config names."""
    if config.tokenizer == "words":
        return word_tokenizer(list(config.data.words))
    return load_tokenizer(config.tokenizer)


def check_vocabulary(tokenizer: TextTokenizer, model: Any) -> None:
    """Raise InputError if the tokenizer has more ids than the model leaves to text."""
    if tokenizer.size > model.text_vocab_size:
        raise InputError(f"the tokenizer has {tokenizer.size} ids; the model leaves {model.text_vocab_size} to text")


def check_rows(rows: int, mesh: Mesh, microbatches: int) -> None:
    """Raise InputError if the rows of each microbatch cannot be shared by the devices."""
    shares = mesh.shape["data"] * mesh.shape["fsdp"]
    if microbatches < 1 or rows < 1 or rows % (shares * microbatches):
        raise InputError(
            f"config key 'data.rows': {rows} rows cannot be shared by {shares} devices of data and fsdp"
            f" in {microbatches} microbatches"
        )


def make_batches(
    config: ConfigDict, model: Any, layouts: Layouts, place: Callable[[Batch], Batch], bad_file: Path | None = None
) -> tuple[grain.IterDataset, BadExamples]:
    """The Grain dataset of packed batches, and the account of the records that it leaves out.

    Args:
      config: of the run.
      model: its sizes; pictures of a folder have its size and channels unless `data.options` gives others.
      layouts: of its system.
      place: puts the rows of this process on its devices; a thread does it ahead of the steps.
      bad_file: where bad records are named.
    """
    data = config.data
    for name in ("tokens", "open_rows", "prefetch"):
        if data[name] < 1:
            raise InputError(f"config key 'data.{name}' must be at least 1, not {data[name]}")
    sizes = dict(size=model.image_size, channels=model.pixel_channels) if data.source == "folder" else {}
    source = make_source(data.source, {**sizes, **data.options.to_dict()})
    bad = BadExamples(bad_file, data.bad_share, len(source))
    budget = layouts.budget(data.tokens, data.images)
    documents = layout_dataset(source, fitting(layouts.train, budget), seed=config.seed)
    batches = PackedBatches(documents, budget, data.rows, process_lanes(data.rows), data.open_rows, bad)
    return grain.experimental.ThreadPrefetchIterDataset(batches.map(place), prefetch_buffer_size=data.prefetch), bad


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
