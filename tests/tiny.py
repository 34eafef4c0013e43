"""The tiny Transfusion that tests share: 8 x 8 pixels of one channel, a few words."""

import dataclasses

import jax.numpy as jnp
import numpy as np

from jaxmm.data.sources import DIGIT_NAMES
from jaxmm.data.tokenizers import word_tokenizer
from jaxmm.layers.parameters import Blueprint, Params
from jaxmm.models.transfusion import SYSTEM, TransfusionConfig
from jaxmm.sequence import Batch, Budget, Document, Image, Text, build_batch

WORDS = ("a", *DIGIT_NAMES)
TOKENIZER = word_tokenizer(list(WORDS))
CONFIG = TransfusionConfig(
    width=32,
    layers=2,
    heads=4,
    kv_heads=4,
    mlp_width=64,
    vocab_size=TOKENIZER.size + 2,
    boi_id=TOKENIZER.size,
    eoi_id=TOKENIZER.size + 1,
    context=64,
    image_size=(8, 8),
    latent_channels=1,
    patch_size=2,
    time_features=16,
    init_std=0.1,
)
BUDGET = Budget({"tokens": 64}, {"8x8": (3, (8, 8, 1))})


def config(**changes) -> TransfusionConfig:
    """The tiny config with changes."""
    return dataclasses.replace(CONFIG, **changes)


def random_parameters(blueprint: Blueprint) -> Params:
    """Every parameter random, so that none hides behind a zero; cheaper than to compile the initialisation."""
    random = np.random.default_rng(0)
    return {
        path: jnp.asarray(random.normal(path.endswith("scale"), 0.2, spec.shape).astype(np.float32))
        for path, spec in blueprint.parameters.items()
    }


def documents(count: int, seed: int = 0) -> list[Document]:
    """Captioned random images."""
    rng = np.random.default_rng(seed)
    return [
        Document(
            (Text(f"a {DIGIT_NAMES[i % 10]}"), Image(rng.integers(0, 256, (8, 8, 1), np.uint8))), i, f"document {i}"
        )
        for i in range(count)
    ]


def batch(rows: int = 8, per_row: int = 2, seed: int = 0, **recipe) -> Batch:
    """A training batch whose rows are not full and have different numbers of documents."""
    layouts = SYSTEM.layouts(CONFIG, TOKENIZER, **recipe)
    rng = np.random.default_rng(seed)
    made = iter([layouts.train(document, rng) for document in documents(rows * per_row, seed)])
    return build_batch([[next(made) for _ in range(1 + b % per_row)] for b in range(rows)], BUDGET)
