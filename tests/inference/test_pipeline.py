"""The Python API on an untrained model: what goes in, what comes out, what is refused."""

import jax
import numpy as np
import pytest
from PIL import Image

from jaxmm.errors import InputError
from jaxmm.inference import Pipeline
from jaxmm.models.transfusion import SYSTEM
from tests import tiny


@pytest.fixture(scope="module")
def pipeline():
    params = jax.jit(SYSTEM.blueprint(tiny.CONFIG).init)(jax.random.key(0))
    return Pipeline(SYSTEM, tiny.CONFIG, params, tiny.TOKENIZER, draw_options=dict(steps=3, guidance=2.0, clip=1.0))


@pytest.fixture(scope="module")
def drawings(pipeline):
    return pipeline.generate(["a one", "a two"], count=3, seed=4)


def test_images_are_uint8_prompt_by_prompt(pipeline, drawings):
    assert drawings.dtype == np.uint8 and drawings.shape == (6, 8, 8, 1)
    alone = pipeline.generate("a one", count=3, seed=4)
    assert np.abs(drawings[:3].astype(int) - alone).max() <= 1


def test_batch_size_does_not_change_the_images(pipeline, drawings):
    for size in (1, 4):
        again = pipeline.generate(["a one", "a two"], count=3, seed=4, batch_size=size)
        assert np.abs(drawings.astype(int) - again).max() <= 1


def test_seeds_and_options_change_the_images(pipeline, drawings):
    assert not np.array_equal(drawings, pipeline.generate(["a one", "a two"], count=3, seed=5))
    assert not np.array_equal(drawings, pipeline.generate(["a one", "a two"], count=3, seed=4, guidance=1.0))


def test_every_kind_of_image_is_described_alike(pipeline, drawings, tmp_path):
    pixels = drawings[0]
    path = tmp_path / "one.png"
    Image.fromarray(pixels[:, :, 0]).save(path)
    colour = np.repeat(pixels, 3, axis=2)
    kinds = [path, str(path), Image.open(path), pixels, pixels[:, :, 0], colour, Image.fromarray(colour)]
    assert len(set(pipeline.describe(kinds, limit=5))) == 1
    assert pipeline.describe(path, limit=5) == pipeline.describe([path], limit=5) == pipeline.describe(pixels, limit=5)


def test_sampled_descriptions_follow_the_seed(pipeline, drawings):
    images = list(drawings)
    first = pipeline.describe(images, limit=8, temperature=2.0, seed=1)
    assert first == pipeline.describe(images, limit=8, temperature=2.0, seed=1, batch_size=2)
    assert first != pipeline.describe(images, limit=8, temperature=2.0, seed=2)


def test_completion_mixes_text_and_images(pipeline):
    """Sampled hot, an untrained model sooner or later begins an image."""
    parts = pipeline.complete(["a one"] * 6, images=2, limit=12, temperature=3.0, seed=0)
    images = [part for row in parts for part in row if not isinstance(part, str)]
    texts = [part for row in parts for part in row if isinstance(part, str)]
    assert images and all(image.shape == (8, 8, 1) and image.dtype == np.uint8 for image in images)
    assert texts and all(word in tiny.WORDS for text in texts for word in text.split())
    assert all(sum(not isinstance(part, str) for part in row) <= 2 for row in parts)
    alone = pipeline.complete("a one", images=2, limit=12, temperature=3.0, seed=0)[0]
    assert [part if isinstance(part, str) else "image" for part in alone] == [
        part if isinstance(part, str) else "image" for part in parts[0]
    ]


@pytest.mark.parametrize(
    "call, message",
    [
        (lambda p: p.generate("a one", step=3), "unknown option 'step'; did you mean 'steps'"),
        (lambda p: p.generate("a one", steps=2000), "2000 steps"),
        (lambda p: p.generate("a one", solver="euler"), "none of this checkpoint's: ancestral, ddim"),
        (lambda p: p.generate("a one", batch_size=0), "batch_size must be at least 1"),
        (lambda p: p.generate("a one a one " * 20), "context holds 64"),
        (lambda p: p.complete("a one", images=-1), "images must be at least 0"),
        (lambda p: p.describe(np.zeros((8, 8, 1), np.float32)), "not float32"),
        (lambda p: p.describe(np.zeros((8, 8, 2), np.uint8)), "an image is uint8"),
        (lambda p: p.describe("missing.png"), "missing.png"),
        (lambda p: p.describe(np.zeros((8, 8, 1), np.uint8), temperature=-1), "temperature"),
    ],
)
def test_mistakes_are_named(pipeline, call, message):
    with pytest.raises(InputError, match=message):
        call(pipeline)
