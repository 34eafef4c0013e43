"""The alternatives to Transfusion's open choices (specification section 10), each against what it should do."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxmm.attention import visible
from jaxmm.errors import InputError
from jaxmm.models.transfusion import SYSTEM, SolverOptions, decode
from jaxmm.models.transfusion.codec import grid_sincos
from jaxmm.models.transfusion.layout import Picture, arrange, unconditional_prompt
from jaxmm.models.transfusion.model import Noised
from jaxmm.models.transfusion.objective import check_solver, make_objective
from jaxmm.sequence import OPEN, build_batch
from jaxmm.transformer import TokenSampler
from tests import tiny


def make(**changes):
    """(config, blueprint, parameters) of the tiny model with changes."""
    config = tiny.config(**changes)
    blueprint = SYSTEM.blueprint(config)
    return config, blueprint, tiny.random_parameters(blueprint)


def picture(seed=0):
    return Picture(np.random.default_rng(seed).normal(size=(8, 8, 1)).astype(np.float32))


def read(blueprint, params, layout):
    """One prompt, read into a cache of 48 slots."""
    batch = decode.prompt_batch(blueprint.bind(params).config, [layout])
    return jax.jit(lambda p: decode.read(blueprint.bind(p), batch, 48))(params)


def keys(count=1):
    return jax.vmap(jax.random.fold_in, (None, 0))(jax.random.key(0), jnp.arange(count))


def only(c, *ids):
    return TokenSampler(suppress=tuple(i for i in range(c.vocab_size) if i not in ids))


def test_patches_of_an_image_can_share_one_position():
    c = tiny.config(image_positions="shared")
    layout = arrange(c, [c.bos_id, c.boi_id, picture(), c.eoi_id, picture(1), 5])
    positions = layout.streams["tokens"].positions.tolist()
    assert positions == [0, 1] + [2] * 16 + [3] + [4] * 16 + [5]
    assert layout.streams["tokens"].places.tolist() == list(range(36))


@pytest.mark.parametrize("image_positions", ["counter", "shared"])
def test_drawing_continues_the_positions_of_training(image_positions):
    """A prompt, an image and EOI written piece by piece give the logits of the whole document read at once."""
    c, blueprint, params = make(image_positions=image_positions)
    image, active = picture(), jnp.ones(1, bool)
    prompt = [c.bos_id, *tiny.TOKENIZER.encode("a one"), c.boi_id]
    rows = read(blueprint, params, arrange(c, prompt, end=OPEN))
    latents = jnp.asarray(image.values)[None, None]
    rows = jax.jit(lambda p: decode.keep_image(blueprint.bind(p), rows, latents, active))(params)
    given = dataclasses.replace(image, noise_limit=0.0)
    whole = read(blueprint, params, arrange(c, [*prompt, given, c.eoi_id], end=OPEN))
    np.testing.assert_allclose(rows.logits, whole.logits, rtol=1e-4, atol=1e-5)
    assert int(rows.position[0]) == int(whole.position[0])
    assert int(rows.position[0]) == (21 if image_positions == "counter" else 6)


def test_sincos_positions_are_those_of_row_and_column():
    table = grid_sincos(3, 5, 8)
    row, column = 2, 4
    expected = [np.sin(row), np.sin(row / 100), np.cos(row), np.cos(row / 100)]
    expected += [np.sin(column), np.sin(column / 100), np.cos(column), np.cos(column / 100)]
    np.testing.assert_allclose(table[row, column], expected, rtol=1e-6)
    assert table.shape == (3, 5, 8)


@pytest.mark.parametrize("kind", ["sincos", "learned"])
def test_grid_positions_are_added_to_the_patches(kind):
    c, blueprint, params = make(grid_positions=kind)
    plain = SYSTEM.blueprint(tiny.CONFIG).bind({p: x for p, x in params.items() if not p.startswith("grid_")})
    noised = Noised(jnp.asarray(picture().values)[None, None], jnp.zeros((1, 1)))
    added = blueprint.bind(params).encode_patches(noised)[0].values - plain.encode_patches(noised)[0].values
    table = grid_sincos(4, 4, 32) if kind == "sincos" else params["grid_positions.table"]
    np.testing.assert_allclose(added[0, 0], np.asarray(table).reshape(16, 32), atol=1e-5)
    assert ("grid_positions.table" in params) == (kind == "learned")
    SYSTEM.table(c, blueprint).official_keys()  # raises where a parameter has no key
    if kind == "learned":
        large = Noised(jnp.zeros((1, 1, 16, 8, 1)), jnp.zeros((1, 1)))
        with pytest.raises(InputError, match="8 x 4 patches"):
            blueprint.bind(params).encode_patches(large)


def test_the_order_within_a_patch():
    """A kernel whose rows are permuted alike makes both orders the same codec."""
    c, blueprint, params = make(latent_channels=3, patch_order="channel_row_column")
    order = np.arange(12).reshape(4, 3).T.reshape(-1)  # (channel, row, column) of (row, column, channel)
    model = blueprint.bind(params)
    permuted = dict(params)
    for path in ("patch_encoder.proj.kernel", "patch_encoder.time_proj.kernel", "patch_encoder.time_proj.bias"):
        axis = 0 if path == "patch_encoder.proj.kernel" else -1
        permuted[path] = jnp.take(params[path], np.argsort(order), axis=axis)
    for path in ("patch_decoder.proj.kernel", "patch_decoder.proj.bias"):
        permuted[path] = jnp.take(params[path], np.argsort(order), axis=-1)
    row_first = SYSTEM.blueprint(dataclasses.replace(c, patch_order="row_column_channel"))
    plain = row_first.bind(permuted)
    latents = jax.random.normal(jax.random.key(1), (1, 2, 8, 8, 3))
    noised = Noised(latents, jnp.full((1, 2), 9.0))
    first, second = model.encode_patches(noised)[0], plain.encode_patches(noised)[0]
    np.testing.assert_allclose(first.values, second.values, atol=1e-5)
    decoded = [m.patch_decoder(first.values, (), first.time, 8, 8) for m in (model, plain)]
    np.testing.assert_allclose(*decoded, atol=1e-5)
    unpermuted = row_first.bind(params).encode_patches(noised)[0]
    assert np.abs(unpermuted.values - first.values).max() > 1e-3


@pytest.mark.parametrize("document_mask", [True, False])
def test_documents_of_a_row_can_be_one_text(document_mask):
    c = tiny.config(document_mask=document_mask)
    layouts = SYSTEM.layouts(c, tiny.TOKENIZER, image_first=0.0, caption_dropout=0.0)
    made = [layouts.train(document, np.random.default_rng(0)) for document in tiny.documents(2)]
    batch = build_batch([made], tiny.BUDGET)
    tokens, n = batch.streams["tokens"], made[0].length
    seen = np.asarray(visible(tokens.places, tokens.intervals))[0]
    assert np.all(seen[n : 2 * n, :n] == (not document_mask)) and not seen[:n, n:].any()
    assert not seen[2 * n :].any() and not seen[:, 2 * n :].any()
    expected = np.concatenate([np.arange(n), np.arange(n) + (0 if document_mask else n)])
    assert tokens.positions[0, : 2 * n].tolist() == expected.tolist()
    assert tokens.weights[0, n - 1] == 0  # the next document is no target


NULL = tiny.CONFIG.vocab_size
WITH_NULL = dict(vocab_size=NULL + 1, null_id=NULL)


def test_dropped_captions_can_be_null_words():
    c = tiny.config(**WITH_NULL)
    layouts = SYSTEM.layouts(c, tiny.TOKENIZER, image_first=0.0, caption_dropout=1.0)
    stream = layouts.train(tiny.documents(1)[0], np.random.default_rng(0)).streams["tokens"]
    assert stream.ids[:4].tolist() == [c.bos_id, NULL, NULL, c.boi_id] and len(stream) == 22
    targets = np.where(stream.weights > 0, stream.labels, -1)
    assert targets[:3].tolist() == [-1, -1, c.boi_id]


def test_null_words_are_the_unconditional_prompt():
    """Guidance of 0 draws what the null prompt alone draws, and text has no null words."""
    c, blueprint, params = make(**WITH_NULL)
    decoder, layouts = SYSTEM.decoder(c, blueprint), SYSTEM.layouts(c, tiny.TOKENIZER)
    options = SolverOptions(steps=2, guidance=0.0, clip=1.0)
    prompt, wrong = layouts.draw("a one"), layouts.draw(None)
    nulled = arrange(c, [c.bos_id, NULL, NULL, c.boi_id], end=OPEN)
    drawn = decoder.draw(params, [prompt], [wrong], keys(), options)
    alone = decoder.draw(params, [nulled], [wrong], keys(), dataclasses.replace(options, guidance=1.0))
    np.testing.assert_allclose(drawn, alone, atol=1e-5)
    with_image = arrange(c, [c.bos_id, 5, c.boi_id, picture(), c.eoi_id, 6], end=OPEN)
    made = unconditional_prompt(c, with_image)
    expected = [c.bos_id, NULL, c.boi_id, *[c.pad_id] * 16, c.eoi_id, NULL, c.boi_id]
    assert made.streams["tokens"].ids.tolist() == expected
    np.testing.assert_array_equal(made.images[0].values, with_image.images[0].values)
    ids = decoder.describe(params, [prompt], keys(), only(c, NULL, 5), 3)
    assert ids == [[5, 5, 5]]


def test_times_above_a_limit_can_be_clamped():
    """Half of the schedule, clamped: the upper half of the draws is at the limit."""
    ids, limit = np.arange(4000), np.full(4000, 0.5, np.float32)
    t = np.asarray(make_objective(tiny.config(noise_limiting="clamp")).draw_time(jax.random.key(0), ids, limit))
    assert t.max() == 499 and np.mean(t == 499) == pytest.approx(0.5, abs=4 * 0.5 / 4000**0.5)
    assert np.mean(t[t < 499]) == pytest.approx(249, abs=4 * 144 / 2000**0.5)
    flow = make_objective(tiny.config(objective="flow", noise_limiting="clamp"))
    t = np.asarray(flow.draw_time(jax.random.key(0), ids, limit))
    assert t.min() == 0.5 and np.mean(t == 0.5) == pytest.approx(0.5, abs=4 * 0.5 / 4000**0.5)


def test_logit_normal_times_of_flow():
    flow = make_objective(
        tiny.config(objective="flow", time_distribution="logit_normal", logit_mean=0.5, logit_std=2.0)
    )
    t = np.asarray(flow.draw_time(jax.random.key(0), np.arange(4000), np.ones(4000, np.float32)))
    logit = np.log((1 - t) / t)
    assert np.mean(logit) == pytest.approx(0.5, abs=4 * 2 / 4000**0.5)
    assert np.std(logit) == pytest.approx(2.0, abs=4 * 2 / 8000**0.5)


def test_training_can_keep_to_a_share_of_the_schedule():
    """With max_noise 0.01 the noised images of DDPM are almost the images themselves."""
    batch = tiny.batch(rows=2)
    distance = {}
    for share in (0.01, 1.0):
        c, blueprint, params = make(max_noise=share)
        notes = jax.jit(lambda p: blueprint.bind(p).loss(batch, jax.random.key(0))[1])(params)  # noqa: B023
        present = batch.images["8x8"].slot >= 0
        distance[share] = np.abs(np.asarray(notes["noised/8x8"]) - batch.images["8x8"].values)[present].max()
    # index 9 at most: 1 - abar is below 0.0009, so noise of five standard deviations stays below 0.16
    assert distance[0.01] < 0.16 < distance[1.0]


def test_given_images_can_be_told_a_small_time():
    """The image stays clean; what the network is told is that share of the schedule."""
    assert make_objective(tiny.config(objective="flow", given_time=0.02)).clean == pytest.approx(0.98)
    c, blueprint, params = make(given_time=0.02)
    assert make_objective(c).clean == 20.0
    prompt = arrange(c, [c.bos_id, c.boi_id, dataclasses.replace(picture(), noise_limit=0.0), c.eoi_id], end=OPEN)
    batch = decode.prompt_batch(c, [prompt])
    told = {"8x8": Noised(jnp.asarray(batch.images["8x8"].values), jnp.full((1, 1), 20.0))}
    expected = jax.jit(lambda p: blueprint.bind(p)(batch, told)[0].logits[0, 18])(params)
    np.testing.assert_allclose(read(blueprint, params, prompt).logits[0], expected, atol=1e-5)
    plain = read(SYSTEM.blueprint(tiny.CONFIG), params, prompt)
    assert np.abs(plain.logits[0] - expected).max() > 1e-4


def test_text_can_see_the_last_evaluation_of_an_image():
    """`remember="last"`: the cache holds the keys of the state that the last step started from."""
    c, blueprint, params = make(objective="flow")
    active = jnp.ones(1, bool)
    rows = read(blueprint, params, arrange(c, [c.bos_id, c.boi_id], end=OPEN))
    noise = jax.random.normal(jax.random.key(1), (1, 1, 8, 8, 1))
    options = SolverOptions(steps=4, guidance=1.0)
    latents, states, last = jax.jit(
        lambda params: decode.draw_latents(blueprint.bind(params), rows, None, noise, lambda i: noise, active, options)
    )(params)
    np.testing.assert_array_equal(last.latents, states[2])
    np.testing.assert_allclose(last.time, 0.75)
    predict = jax.jit(lambda params: decode.predict_image(blueprint.bind(params), rows, *last, active)[0])
    prediction = predict(params)
    np.testing.assert_allclose(last.latents + prediction / 4, latents, atol=1e-5)
    keep = jax.jit(lambda params, x, t: decode.keep_image(blueprint.bind(params), rows, x, active, time=t).logits)
    difference = keep(params, latents, jnp.ones((1, 1))) - keep(params, last.latents, last.time)
    assert np.abs(difference).max() > 1e-3


def test_the_loop_remembers_what_its_option_says(monkeypatch):
    c, blueprint, params = make(objective="flow")
    prompt, seen, original = SYSTEM.layouts(c, tiny.TOKENIZER).prompt("a one"), [], decode.keep_image

    def keep(model, rows, latents, active, dtype, time):
        seen.append(time)
        return original(model, rows, latents, active, dtype, time)

    monkeypatch.setattr(decode, "keep_image", keep)
    decoder = SYSTEM.decoder(c, blueprint)
    for remember in ("clean", "last"):
        options = SolverOptions(steps=1, guidance=1.0, remember=remember)
        decoder.complete(params, [prompt], keys(), only(c, c.boi_id), options, 1)
    assert seen[0] is None and seen[1].shape == (1, 1)


@pytest.mark.parametrize(
    "changes, message",
    [
        (dict(image_positions="none"), "image_positions must be one of"),
        (dict(grid_positions="sinus"), "did you mean 'sincos'"),
        (dict(patch_order="row"), "patch_order must be one of"),
        (dict(noise_limiting="cut"), "noise_limiting must be one of"),
        (dict(time_distribution="logit_normal"), "is of the objective 'flow'"),
        (dict(time_distribution="normal"), "time_distribution must be one of"),
        (dict(objective="flow", logit_std=0.0), "logit_std must be positive"),
        (dict(max_noise=0.0), "max_noise is a share"),
        (dict(given_time=1.0), "given_time is a share"),
        (dict(null_id=1), "another special id"),
        (dict(null_id=1000), "do not fit into a vocabulary"),
        (dict(time_injection="both"), "time_injection must be one of"),
        (dict(grid_positions="sincos", width=30, heads=3, head_size=10, kv_heads=3), "that 4 divides"),
    ],
    ids=str,
)
def test_wrong_options_are_refused(changes, message):
    with pytest.raises(InputError, match=message):
        tiny.config(**changes)


def test_wrong_solver_options_are_refused():
    with pytest.raises(InputError, match="did you mean 'clean'"):
        check_solver(make_objective(tiny.CONFIG), SolverOptions(remember="cleaned"))
