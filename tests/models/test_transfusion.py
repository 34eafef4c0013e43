"""Transfusion beyond the goldens: sizes, labels, batching, decoding."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxmm.errors import InputError
from jaxmm.layers.parameters import Blueprint
from jaxmm.models.transfusion import PRESETS, SYSTEM, decode
from jaxmm.models.transfusion.layout import Picture, arrange
from jaxmm.models.transfusion.objective import SolverOptions, make_objective
from jaxmm.sequence import OPEN, Document, Text
from jaxmm.transformer import TokenSampler
from tests import tiny

# specification 2.2: parameters in millions without the patch codec, vocabulary 32000
SIZES = {"0.16b": 162.4, "0.37b": 373.9, "0.76b": 777.9, "1.4b": 1364.3, "7b": 6738.4}
# specification 2.5: what the linear codec adds, in percent
CODEC_SHARE = {"0.16b": 0.53, "0.37b": 0.38, "0.76b": 0.37, "1.4b": 0.36, "7b": 0.27}


def count(blueprint: Blueprint, *prefixes: str) -> int:
    return sum(spec.size for path, spec in blueprint.parameters.items() if path.startswith(prefixes))


@pytest.mark.parametrize("name", SIZES)
def test_preset_has_the_published_count(name):
    blueprint = SYSTEM.blueprint(PRESETS[name])
    backbone = count(blueprint, "embed.", "head.", "transformer.") - 2 * 2 * PRESETS[name].width  # BOI and EOI
    codec = count(blueprint, "time.", "patch_encoder.", "patch_decoder.")
    assert round(backbone / 1e6, 1) == SIZES[name]
    assert round(100 * codec / backbone, 2) == CODEC_SHARE[name]


@pytest.fixture(scope="module")
def decoder():
    blueprint = SYSTEM.blueprint(tiny.CONFIG)
    return SYSTEM.decoder(tiny.CONFIG, blueprint), jax.jit(blueprint.init)(jax.random.key(3))


@pytest.fixture(scope="module")
def layouts():
    return SYSTEM.layouts(tiny.CONFIG, tiny.TOKENIZER)


def keys(*rows: int):
    return jax.vmap(jax.random.fold_in, (None, 0))(jax.random.key(0), jnp.array(rows))


def test_drawing_in_a_batch_equals_drawing_alone(decoder, layouts):
    decoder, params = decoder
    options = SolverOptions(steps=4, guidance=2.0, clip=1.0)
    prompts = [layouts.draw("a one"), layouts.draw("a seven a seven"), layouts.draw("a")]
    empty = layouts.draw(None)
    together = decoder.draw(params, prompts, [empty] * 3, keys(0, 1, 2), options)
    alone = [decoder.draw(params, [p], [empty], keys(i), options)[0] for i, p in enumerate(prompts)]
    np.testing.assert_allclose(together, np.stack(alone), atol=2e-5)
    assert np.abs(together[0] - together[1]).max() > 1e-2


def test_describing_in_a_batch_equals_describing_alone(decoder, layouts):
    decoder, params = decoder
    rng = np.random.default_rng(0)
    prompts = [layouts.describe(rng.integers(0, 256, (8, 8, 1), np.uint8)) for _ in range(3)]
    together = decoder.describe(params, prompts, keys(0, 1, 2), TokenSampler(), 6)
    alone = [decoder.describe(params, [p], keys(i), TokenSampler(), 6)[0] for i, p in enumerate(prompts)]
    assert together == alone
    assert tiny.CONFIG.boi_id not in sum(together, []) and tiny.CONFIG.eoi_id not in sum(together, [])


def test_guidance_of_one_is_the_conditional_branch(decoder, layouts):
    decoder, params = decoder
    prompts, empty = [layouts.draw("a two")], [layouts.draw(None)]
    plain = decoder.draw(params, prompts, empty, keys(0), SolverOptions(steps=3, guidance=1.0, clip=1.0))
    nearly = decoder.draw(params, prompts, empty, keys(0), SolverOptions(steps=3, guidance=1.0 + 1e-6, clip=1.0))
    np.testing.assert_allclose(plain, nearly, atol=1e-4)


def test_mixed_modal_loop_draws_where_the_text_asks_for_it(decoder, layouts):
    """The sampler decides: with all else suppressed BOI is next; where BOI is closed too, the first id is."""
    decoder, params = decoder
    c = tiny.CONFIG
    only_boi = TokenSampler(suppress=tuple(i for i in range(c.vocab_size) if i != c.boi_id))
    parts = decoder.complete(
        params, [layouts.prompt("a one")], keys(0), only_boi, SolverOptions(steps=2, clip=1.0), limit=3, images=1
    )[0]
    kinds = [part.shape if isinstance(part, np.ndarray) else part for part in parts]
    assert kinds == [c.boi_id, (8, 8, 1), c.eoi_id, 0, 0, 0]


def test_what_follows_a_drawn_image_sees_it_clean(decoder, layouts):
    """Text after the loop's image equals text after the same image given in the prompt."""
    decoder, params = decoder
    c = tiny.CONFIG
    only_boi = TokenSampler(suppress=tuple(i for i in range(c.vocab_size) if i != c.boi_id))
    options = SolverOptions(steps=2, clip=1.0, guidance=1.0)
    prompt = layouts.prompt("a one")
    image = decoder.complete(params, [prompt], keys(0), only_boi, options, limit=1)[0][1]
    ids = [c.bos_id, *tiny.TOKENIZER.encode("a one"), c.boi_id, Picture(image, 0.0, 0.0), c.eoi_id]
    given = decoder.describe(params, [arrange(c, ids, end=OPEN)], keys(0), TokenSampler(), 5)[0]
    model = SYSTEM.blueprint(c).bind(params)
    rows = decode.read(model, decode.prompt_batch(c, [arrange(c, ids[:-2], end=OPEN)]), 64)
    rows = decode.keep_image(model, rows, jnp.asarray(image)[None, None], jnp.ones(1, bool))
    sampler = TokenSampler(suppress=(c.boi_id, c.eoi_id))
    _, written = decode.write_text(model, rows, keys(0), jnp.ones(1, bool), 5, sampler, (c.eos_id,))
    assert [int(i) for i in written[0] if i not in (-1, c.eos_id)] == given


def test_labels_follow_the_specification():
    c = tiny.CONFIG
    image = Picture(np.zeros((8, 8, 1), np.float32))
    layout = arrange(c, [c.bos_id, 5, c.boi_id, image, c.eoi_id, 6, c.eos_id])
    stream = layout.streams["tokens"]
    labels = np.where(stream.weights > 0, stream.labels, -100).tolist()
    assert labels == [5, c.boi_id, -100] + [-100] * 16 + [6, c.eos_id, -100]
    assert layout.images[0].slot == 3 and layout.length == 22


def test_other_documents_keep_their_order(layouts):
    first, second = (document.segments[1] for document in tiny.documents(2))
    document = Document((Text("a one"), first, Text("a two"), second), 3)
    layout = layouts.train(document, np.random.default_rng(0))
    c, one, two = tiny.CONFIG, tiny.TOKENIZER.encode("a one"), tiny.TOKENIZER.encode("a two")
    patches = [c.pad_id] * 16
    expected = [c.bos_id, *one, c.boi_id, *patches, c.eoi_id, *two, c.boi_id, *patches, c.eoi_id, c.eos_id]
    assert layout.streams["tokens"].ids.tolist() == expected
    assert [(image.slot, image.order, image.noise_limit) for image in layout.images] == [(4, 0, 1.0), (24, 1, 1.0)]
    text_only = layouts.train(Document((Text("a one"),)), np.random.default_rng(0))
    assert text_only.streams["tokens"].ids.tolist() == [c.bos_id, *one, c.eos_id] and not text_only.images


@pytest.mark.parametrize("patch_size", [1, 2, 4, 8])
def test_patch_codec_at_each_size(patch_size):
    """With identity matrices, and no weight on the time, decoding inverts encoding; there are (8 / k)^2 patches."""
    c = tiny.config(patch_size=patch_size, width=64)
    blueprint = SYSTEM.blueprint(c)
    params = jax.jit(blueprint.init)(jax.random.key(0))
    values = patch_size**2
    params["patch_encoder.time_proj.kernel"] = jnp.zeros((64, values))
    params["patch_encoder.proj.kernel"] = jnp.eye(values, 64)
    params["patch_decoder.proj.kernel"] = jnp.eye(64, values)
    model = blueprint.bind(params)
    latents = jax.random.normal(jax.random.key(1), (2, 3, 8, 8, 1))
    hidden, skips = model.patch_encoder(latents, jnp.ones((2, 3, 64)), jnp.float32)
    assert hidden.shape == (2, 3, (8 // patch_size) ** 2, 64) and c.patches(8, 8) == hidden.shape[2]
    np.testing.assert_allclose(model.patch_decoder(hidden, skips, None, 8, 8), latents, atol=1e-6)
    np.testing.assert_allclose(hidden[0, 0, 0, :patch_size], latents[0, 0, 0, :patch_size, 0], atol=1e-6)


def test_clean_images_are_not_noised():
    """A noise limit of zero gives the network the image itself, at the clean time of either objective."""
    for objective in ("ddpm", "flow"):
        blueprint = SYSTEM.blueprint(tiny.config(objective=objective))
        params = jax.jit(blueprint.init)(jax.random.key(0))
        batch = tiny.batch(rows=2)
        images = dataclasses.replace(
            batch.images["8x8"], noise_limit=np.where(np.arange(3) == 0, 0.0, 1.0).astype(np.float32) * np.ones((2, 1))
        )
        batch = dataclasses.replace(batch, images={"8x8": images})
        _, notes = blueprint.bind(params).loss(batch, jax.random.key(0))
        noised = np.asarray(notes["noised/8x8"])
        np.testing.assert_array_equal(noised[:, 0], images.values[:, 0])
        assert np.abs(noised[1, 1] - images.values[1, 1]).max() > 1e-3


def test_the_noise_limit_halves_the_times():
    """Noise limit 0.5: indices stay below 500, sigma of the flow below 0.5."""
    ids, limit = np.arange(4000), np.full(4000, 0.5, np.float32)
    t = make_objective(tiny.CONFIG).draw_time(jax.random.key(0), ids, limit)
    assert t.min() == 0 and t.max() == 499 and float(jnp.mean(t)) == pytest.approx(249.5, abs=4 * 144 / 4000**0.5)
    t = make_objective(tiny.config(objective="flow")).draw_time(jax.random.key(0), ids, limit)
    assert 0.5 < t.min() < 0.51 and t.max() <= 1.0


def test_recipe_orders_and_drops(layouts):
    c, rng = tiny.CONFIG, np.random.default_rng(0)
    layouts = SYSTEM.layouts(c, tiny.TOKENIZER, image_first=0.3, noise_limit=0.5, caption_dropout=0.2)
    made = [layouts.train(tiny.documents(1)[0], rng) for _ in range(2000)]
    first = [layout for layout in made if layout.images[0].slot == 2 and layout.images[0].noise_limit == 0.5]
    dropped = [layout for layout in made if layout.length == 20]
    assert len(first) / 2000 == pytest.approx(0.3, abs=0.04)  # four standard deviations
    assert len(dropped) / 2000 == pytest.approx(0.7 * 0.2, abs=0.035)
    assert all(layout.images[0].noise_limit == 1.0 for layout in made if layout.images[0].slot != 2)


def test_noise_belongs_to_the_example_not_to_its_row():
    """Two batches that hold the same documents in other rows have the same losses."""
    blueprint = SYSTEM.blueprint(tiny.CONFIG)
    params = jax.jit(blueprint.init)(jax.random.key(0))
    batch = tiny.batch(rows=4)
    swapped = jax.tree.map(lambda x: x[::-1], batch)
    loss = jax.jit(lambda b: blueprint.bind(params).loss(b, jax.random.key(7))[0])
    for name, term in loss(batch).items():
        np.testing.assert_allclose(term.value(), loss(swapped)[name].value(), rtol=1e-6)


def test_a_prompt_longer_than_the_context_is_refused(layouts):
    with pytest.raises(InputError, match="context holds 64"):
        layouts.draw("a one " * 30)


def test_wrong_sizes_are_refused():
    for changes in ({"layers": 0}, {"width": -1}, {"heads": 3, "head_size": 5}, {"kv_heads": 3}, {"vocab_size": 10}):
        with pytest.raises(InputError):
            tiny.config(**changes)
    with pytest.raises(InputError, match="cannot be cut into patches"):
        tiny.config(image_size=(9, 8))
    with pytest.raises(InputError, match="objective must be one of"):
        tiny.config(objective="score")
