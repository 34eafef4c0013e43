"""The U-Net patch codec beyond its golden: sizes, routing of skip connections, one encoder pass for both branches."""

import dataclasses
import functools
import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from safetensors.numpy import load_file

from jaxmm.errors import InputError
from jaxmm.models.transfusion import PRESETS, SYSTEM, TransfusionConfig, UNetConfig, decode
from jaxmm.models.transfusion.config import UNETS
from jaxmm.models.transfusion.model import Noised
from jaxmm.models.transfusion.objective import SolverOptions
from jaxmm.sharding import make_mesh, parameter_shardings
from jaxmm.weights import Mismatch
from tests import tiny
from tests.parity.golden import Golden
from tests.parity.test_parity import DEFAULT_ROOT
from tests.parity.transfusion import model_of

UNET = UNetConfig((8, 12), blocks=1, heads=2)
CONFIG = tiny.config(patch_codec="unet", unet=UNET)
CODEC = ("time.", "patch_encoder.", "patch_decoder.")


def size(config: TransfusionConfig) -> int:
    """Parameters of patch codec and time embedding."""
    parameters = SYSTEM.blueprint(dataclasses.replace(config, codec=None)).parameters
    return sum(spec.size for path, spec in parameters.items() if path.startswith(CODEC))


def expected_size(width: int, channels: tuple[int, ...], r: int = 2, latent: int = 8, features: int = 256) -> int:
    """The count by the description of specification 2.7, attention at the last level."""
    te, last = channels[-1], len(channels) - 1

    def res(a, b):
        return 2 * a + 9 * a * b + b + te * b + b + 2 * b + 9 * b * b + b + (0 if a == b else a * b + b)

    def attention(level):
        return 2 * channels[level] + 4 * channels[level] ** 2 + channels[level] if level == last else 0

    total = features * te + te + te * te + te
    total += 9 * latent * channels[0] + channels[0] + 2 * te + te * width + width  # conv_in, norm, proj_out
    total += width * te + te + 2 * channels[0] + 9 * channels[0] * latent + latent  # proj_in, norm, conv_out
    pushed, current = [channels[0]], channels[0]
    for i, c in enumerate(channels):
        for _ in range(r):
            total += res(current, c) + attention(i)
            current = c
            pushed.append(c)
        if i < last:
            total += 9 * c * c + c
            pushed.append(c)
    for i, c in reversed(list(enumerate(channels))):
        for _ in range(r + 1):
            total += res(current + pushed.pop(), c) + attention(i)
            current = c
        total += 9 * c * c + c if i > 0 else 0
    return total


# specification 2.7, in millions
@pytest.mark.parametrize(
    "name, changes, millions",
    [
        ("0.16b-unet", {}, 257),
        ("7b-unet", {}, 266),
        ("7b-unet", dict(patch_size=4, unet=UNETS[4]), 244),
        ("7b-unet", dict(patch_size=8, unet=UNETS[8]), 305),
    ],
    ids=["0.16b", "7b", "7b patch 4", "7b patch 8"],
)
def test_sizes_of_the_specification(name, changes, millions):
    config = dataclasses.replace(PRESETS[name], **changes)
    assert round(size(config) / 1e6) == millions
    assert size(config) == expected_size(config.width, config.unet.channels)


@pytest.mark.slow
@pytest.mark.parametrize("name", [name for name in PRESETS if "unet" in name])
def test_every_preset_has_the_size_of_its_description(name):
    config = PRESETS[name]
    assert size(config) == expected_size(config.width, config.unet.channels)
    assert 0.23e9 < size(config) < 0.31e9


def test_presets_differ_in_nothing_but_the_codec():
    changed = {"patch_codec", "patch_size", "unet"}
    for name, config in PRESETS.items():
        plain = vars(PRESETS[name.split("-")[0]])
        assert {field for field, value in vars(config).items() if value != plain[field]} <= changed
        assert (config.patch_codec == "unet") == ("unet" in name)
        assert config.patch_size == (int(name[-1]) if "patch" in name else 2)
    assert len(PRESETS) == 15


def test_most_of_the_codec_is_cut():
    """On eight devices of fsdp, at the size of the paper."""
    blueprint = SYSTEM.blueprint(dataclasses.replace(PRESETS["7b-unet"], codec=None))
    shardings = parameter_shardings(blueprint.parameters, make_mesh(fsdp=8))
    codec = {path: spec for path, spec in blueprint.parameters.items() if path.startswith(CODEC)}
    whole = sum(spec.size for path, spec in codec.items() if not any(shardings[path].spec))
    assert whole < 1e-3 * sum(spec.size for spec in codec.values())


@pytest.fixture(scope="module")
def network():
    blueprint = SYSTEM.blueprint(CONFIG)
    return blueprint, tiny.random_parameters(blueprint)


def image(seed, shape=(2, 3, 8, 8, 1)):
    return jax.random.normal(jax.random.key(seed), shape)


def test_skips_and_time_stay_with_their_image(network):
    """Behind given hidden states, the latents of one image change its own prediction alone, through the skips."""
    blueprint, params = network
    hidden = image(1, (2, 3, 16, 32))

    @jax.jit
    def predict(params, latents, times):
        model = blueprint.bind(params)
        patches, _ = model.encode_patches(Noised(latents, times))
        return model.patch_decoder(hidden, patches.skips, patches.time, 8, 8)

    latents, times = image(2), jnp.full((2, 3), 300.0)
    before = predict(params, latents, times)
    for changed in ((latents.at[1, 2].add(1.0), times), (latents, times.at[1, 2].set(700.0))):
        after = predict(params, *changed)
        moved = np.abs(after - before).max(axis=(2, 3, 4))
        assert moved[1, 2] > 1e-3
        moved[1, 2] = 0.0
        assert moved.max() == 0.0


def test_without_skips_the_latents_reach_the_decoder_through_the_transformer_alone():
    c = dataclasses.replace(CONFIG, unet=dataclasses.replace(UNET, skips=False))
    blueprint = SYSTEM.blueprint(c)
    hidden = image(1, (2, 3, 16, 32))

    @jax.jit
    def predict(params, latents):
        model = blueprint.bind(params)
        patches, _ = model.encode_patches(Noised(latents, jnp.zeros((2, 3))))
        assert patches.skips == () and patches.values.shape == (2, 3, 16, 32)
        out = model.patch_decoder(hidden, patches.skips, patches.time, 8, 8)
        return patches.values, out

    params = tiny.random_parameters(blueprint)
    first, second = predict(params, image(0)), predict(params, image(2))
    assert np.abs(first[0] - second[0]).max() > 1e-2
    np.testing.assert_array_equal(first[1], second[1])
    assert blueprint.parameters["patch_decoder.up.0.res.0.conv1.kernel"].shape == (3, 3, 12, 8)


def convolutions(jaxpr) -> dict[int, int]:
    """{images in a convolution: how many there are}, of a program and all that it calls."""
    found = {}
    for equation in jaxpr.eqns:
        if equation.primitive.name == "conv_general_dilated":
            images = equation.invars[0].aval.shape[0]
            found[images] = found.get(images, 0) + 1
        for inner in jax.core.jaxprs_in_params(equation.params):
            for images, count in convolutions(inner).items():
                found[images] = found.get(images, 0) + count
    return found


def drawing(config: TransfusionConfig, rows: int = 3):
    """(function of the parameters that draws with guidance, its parameters)."""
    blueprint = SYSTEM.blueprint(config)
    layouts = SYSTEM.layouts(config, tiny.TOKENIZER)
    batches = [decode.prompt_batch(config, [layouts.draw(prompt)] * rows) for prompt in ("a one", None)]
    noise, options = image(0, (rows, 1, 8, 8, 1)), SolverOptions(steps=2, guidance=2.0)

    def draw(params):
        model = blueprint.bind(params)
        read, guide = (decode.read(model, batch, 48) for batch in batches)
        active = jnp.ones(rows, bool)
        return decode.draw_latents(model, read, guide, noise, lambda step: noise, active, options)[0]

    return draw, jax.eval_shape(blueprint.init, jax.random.key(0))


def test_both_branches_share_one_pass_of_the_unet():
    """Convolutions of the encoder are of 3 images, those of the decoder of both branches' 6."""
    draw, params = drawing(CONFIG)
    # conv_in, two levels of one block (two convolutions, a shortcut where channels change), one down-sampling
    encoder = 1 + 2 + 3 + 1
    # two levels of two blocks with skips (each with a shortcut), one up-sampling, conv_out
    decoder = 4 * 3 + 1 + 1
    assert convolutions(jax.make_jaxpr(draw)(params).jaxpr) == {3: encoder, 6: decoder}


@pytest.mark.parametrize("config", [tiny.CONFIG, CONFIG], ids=["linear", "unet"])
def test_both_branches_share_one_call_of_the_encoder(config, monkeypatch):
    draw, params = drawing(config)
    kind = type(SYSTEM.blueprint(config).bind(params).patch_encoder)
    calls, original = [], kind.__call__

    def counted(self, latents, time, dtype):
        calls.append(latents.shape[0])
        return original(self, latents, time, dtype)

    monkeypatch.setattr(kind, "__call__", counted)
    jax.make_jaxpr(draw)(params)
    assert calls == [3]  # the body of the loop over steps is traced once


def test_drawing_in_a_batch_equals_drawing_alone(network):
    blueprint, params = network
    decoder, layouts = SYSTEM.decoder(CONFIG, blueprint), SYSTEM.layouts(CONFIG, tiny.TOKENIZER)
    options, empty = SolverOptions(steps=3, guidance=2.0, clip=1.0), layouts.draw(None)
    keys = jax.vmap(jax.random.fold_in, (None, 0))(jax.random.key(0), jnp.arange(2))
    prompts = [layouts.draw("a one"), layouts.draw("a seven a seven")]
    together = decoder.draw(params, prompts, [empty] * 2, keys, options)
    alone = [decoder.draw(params, [p], [empty], keys[i : i + 1], options)[0] for i, p in enumerate(prompts)]
    np.testing.assert_allclose(together, np.stack(alone), atol=2e-5)
    assert np.abs(together[0] - together[1]).max() > 1e-2


@pytest.mark.slow
def test_recomputed_activations_change_no_gradient(network):
    blueprint, params = network
    batch = tiny.batch(rows=2)

    def gradient(config):
        model = SYSTEM.blueprint(config)

        def loss(params):
            terms, _ = model.bind(params).loss(batch, jax.random.key(0))
            return terms["image"].value()

        return jax.jit(jax.grad(loss))(params)

    kept, again = gradient(CONFIG), gradient(dataclasses.replace(CONFIG, remat="full"))
    for path in kept:
        np.testing.assert_allclose(again[path], kept[path], rtol=1e-4, atol=1e-6, err_msg=path)
    assert all(np.abs(kept[path]).max() > 0 for path in kept if path.startswith(CODEC) and not path.endswith("bias"))


def test_bfloat16_stays_close(network):
    blueprint, params = network

    @functools.partial(jax.jit, static_argnums=1)
    def predict(params, dtype):
        model = blueprint.bind(params)
        patches, _ = model.encode_patches(Noised(image(0), jnp.full((2, 3), 300.0)), dtype)
        assert patches.values.dtype == dtype and {x.dtype for x in patches.skips} == {jnp.dtype(dtype)}
        return model.patch_decoder(patches.values, patches.skips, patches.time, 8, 8)

    exact, rounded = predict(params, jnp.float32), predict(params, jnp.bfloat16)
    assert rounded.dtype == jnp.float32
    assert float(jnp.abs(rounded - exact).max() / jnp.abs(exact).max()) < 0.05


def test_weights_go_both_ways_bit_for_bit():
    folder = DEFAULT_ROOT / "transfusion" / "ref_unet"
    tensors = load_file(folder / "weights.safetensors")
    _, _, params, table = model_of(Golden(folder))
    written = table.write({path: np.asarray(x) for path, x in params.items()})
    assert written.keys() == tensors.keys()
    assert all(np.array_equal(written[key], tensors[key]) for key in tensors)
    del tensors["patch_decoder.up.1.upsample.bias"]
    tensors["patch_encoder.proj.weight"] = np.zeros((32, 32), np.float32)
    with pytest.raises(Mismatch) as error:
        table.read(tensors)
    assert "patch_encoder.proj.weight: unknown key" in str(error.value)
    assert "patch_decoder.up.1.upsample.bias: missing" in str(error.value)


def test_the_config_survives_json():
    config = PRESETS["0.76b-unet-patch4"]
    assert TransfusionConfig.from_dict(json.loads(json.dumps(dataclasses.asdict(config)))) == config


@pytest.mark.parametrize(
    "changes, message",
    [
        (dict(patch_size=4), "make patches of 2, not of patch_size 4"),
        (dict(patch_order="channel_row_column"), "patch_order 'channel_row_column' is of the linear"),
        (dict(time_injection="post_linear"), "is of the linear"),
        (dict(unet=dict(norm="batch")), "unet.norm must be one of"),
        (dict(unet=dict(heads=5)), "12 channels cannot be shared by 5 heads"),
        (dict(unet=dict(attention_levels=(2,))), "there are levels 0 to 1"),
        (dict(unet=dict(norm="group", norm_groups=8)), "cannot be cut into 8 groups"),
        (dict(unet=dict(blocks=0)), "must be at least 1"),
        (dict(patch_codec="u-net"), "did you mean 'unet'"),
    ],
    ids=str,
)
def test_wrong_codecs_are_refused(changes, message):
    with pytest.raises(InputError, match=message):
        if isinstance(changes.get("unet"), dict):
            changes = changes | {"unet": dataclasses.replace(UNET, **changes["unet"])}
        dataclasses.replace(CONFIG, **changes)
