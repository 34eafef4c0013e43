"""What a run reads: its tokenizer, its batches, the weights of a frozen codec."""

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import grain
import numpy as np
from jax.sharding import Mesh
from ml_collections import ConfigDict

from jaxmm.autoencoders import load_diffusers
from jaxmm.data.bad_examples import BadExamples
from jaxmm.data.latents import LatentFolder, codec_fingerprint
from jaxmm.data.mixture import Interleave, check_mixture
from jaxmm.data.pipeline import (
    PackedBatches,
    ToLayout,
    document_shares,
    fitting,
    layout_dataset,
    mixed_dataset,
    process_lanes,
)
from jaxmm.data.sources import Source, make_source
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
      model: its sizes.
      layouts: of its system.
      place: puts the rows of this process on its devices; a thread does it ahead of the steps.
      bad_file: where bad records are named.
    """
    data = config.data
    for name in ("tokens", "open_rows", "prefetch"):
        if data[name] < 1:
            raise InputError(f"config key 'data.{name}' must be at least 1, not {data[name]}")
    sources = make_sources(config, model)
    bad = BadExamples(bad_file, data.bad_share, {name: len(source) for name, source in sources.items()})
    budget = layouts.budget(data.tokens, data.images, {source.kind for source in sources.values()})
    to_layout, interleave = fitting(layouts.train, budget), None
    if data.mixture:
        interleave = make_interleave(config, sources, to_layout)
        documents = mixed_dataset(sources, interleave, to_layout, seed=config.seed)
    else:
        documents = layout_dataset(sources[""], to_layout, seed=config.seed)
    batches = PackedBatches(documents, budget, data.rows, process_lanes(data.rows), data.open_rows, bad, interleave)
    return grain.experimental.ThreadPrefetchIterDataset(batches.map(place), prefetch_buffer_size=data.prefetch), bad


def make_sources(config: ConfigDict, model: Any) -> dict[str, Source]:
    """The sources of the mixture by their names, or {"": the only one}; cached latents must be those of the codec."""
    data = config.data
    check_mixture(data.mixture.to_dict(), data.mixture_unit, data.mixture_sample)
    entries = {name: data.mixture[name] for name in sorted(data.mixture)} or {"": data}
    sources = {}
    for name, entry in entries.items():
        try:
            sources[name] = source_of(entry, model)
        except InputError as error:
            raise InputError(f"data.mixture.{name}: {error}" if name else str(error)) from error
    latents = [source for source in sources.values() if isinstance(source, LatentFolder)]
    if latents:
        made_by = codec_fingerprint(model.codec, codec_weights(config.codec, model))
        for source in latents:
            source.check(made_by, model.image_size)
    return sources


def source_of(entry: ConfigDict, model: Any) -> Source:
    """The source of an entry; pictures from files get the model's size and channels unless the options give others."""
    options = entry.get("options", ConfigDict()).to_dict()
    if entry.source.partition(":")[0] in ("folder", "tfds"):
        options = {"size": model.image_size, "channels": model.pixel_channels} | options
    return make_source(entry.source, options)


def make_interleave(config: ConfigDict, sources: Mapping[str, Source], to_layout: ToLayout) -> Interleave:
    """How the sources of the mixture take turns."""
    data = config.data
    weights = {name: float(data.mixture[name].weight) for name in sources}

    def shares() -> list[float]:
        if data.mixture_unit == "documents":
            return list(weights.values())
        return document_shares(sources, weights, to_layout, config.seed, data.mixture_sample)

    key = [data.mixture_unit, data.mixture_sample, [[name, weight] for name, weight in weights.items()]]
    return Interleave(list(sources), shares, data.rows, key)


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
