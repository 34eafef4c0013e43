import functools
import json
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from hypothesis import given
from hypothesis import strategies as st
from safetensors.numpy import save_file

from jaxmm.autoencoders import PRESETS, KLAutoencoder, KLConfig, load_diffusers, weights_table
from jaxmm.autoencoders.kl import kl, sample, split_moments, standard_deviation
from jaxmm.errors import InputError
from jaxmm.layers.convolution import Conv2D
from jaxmm.layers.parameters import Blueprint
from jaxmm.weights import Mismatch

DIFFUSERS = {
    "_class_name": "AutoencoderKL",
    "in_channels": 3,
    "out_channels": 3,
    "down_block_types": ["DownEncoderBlock2D"] * 2,
    "up_block_types": ["UpDecoderBlock2D"] * 2,
    "block_out_channels": [4, 8],
    "layers_per_block": 1,
    "latent_channels": 2,
    "norm_num_groups": 2,
    "act_fn": "silu",
    "scaling_factor": 0.5,
    "shift_factor": 0.25,
}
CONFIG = KLConfig.from_diffusers(DIFFUSERS)
KEY_BIASES = {f"{part}.mid.attention.key.bias" for part in ("encoder", "decoder")}


def blueprint_of(config):
    return Blueprint(lambda rngs: KLAutoencoder(config, rngs=rngs))


@functools.cache
def tiny():
    """(blueprint, parameters, table); every parameter is random, so that none hides behind a zero."""
    blueprint = blueprint_of(CONFIG)
    random = np.random.default_rng(0)
    params = {
        path: np.float32(random.normal(path.endswith("scale"), 0.3, spec.shape))
        for path, spec in blueprint.parameters.items()
    }
    return blueprint, params, weights_table(blueprint.parameters)


@functools.cache
def codec():
    blueprint, params, _ = tiny()
    return blueprint.bind({path: jnp.asarray(value) for path, value in params.items()})


def images(count=2, height=8, width=12):
    return jnp.asarray(np.random.default_rng(1).uniform(-1, 1, (count, height, width, 3)), jnp.float32)


# counted with the official class
@pytest.mark.parametrize(("name", "size"), [("sd", 83_709_419), ("sdxl", 83_653_863), ("flux", 83_819_683)])
def test_preset_has_the_official_number_of_parameters(name, size):
    assert blueprint_of(PRESETS[name]).size == size
    assert PRESETS[name].downscale == 8


def test_presets_of_one_size_differ_in_scale_only():
    assert {**vars(PRESETS["sd1"]), "scaling_factor": 0.13025} == vars(PRESETS["sdxl"])
    assert {**vars(PRESETS["sd3"]), "scaling_factor": 0.3611, "shift_factor": 0.1159} == vars(PRESETS["flux"])


def test_config_from_diffusers():
    assert KLConfig(
        in_channels=3,
        out_channels=3,
        block_out_channels=(4, 8),
        layers_per_block=1,
        latent_channels=2,
        norm_groups=2,
        scaling_factor=0.5,
        shift_factor=0.25,
    ) == KLConfig.from_diffusers(DIFFUSERS)
    assert KLConfig.from_diffusers({**DIFFUSERS, "shift_factor": None}).shift_factor == 0.0


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("_class_name", "AutoencoderKLWan"),
        ("act_fn", "relu"),
        ("mid_block_add_attention", False),
        ("latents_mean", [0.0, 0.0]),
        ("down_block_types", ["DownEncoderBlock2D", "AttnDownEncoderBlock2D"]),
        ("up_block_types", ["UpDecoderBlock2D"]),
        ("latent_channels", "2"),
        ("layers_per_block", 0),
        ("block_out_channels", [4, 7]),
        ("scaling_factor", 0),
        ("use_quant_conv", "no"),
    ],
)
def test_config_refuses_what_is_not_built(key, value):
    with pytest.raises(InputError, match=key):
        KLConfig.from_diffusers({**DIFFUSERS, key: value})


def test_table_keeps_every_bit_in_both_directions():
    blueprint, _, table = tiny()
    random = np.random.default_rng(2)
    params = {
        path: random.integers(0, 2**32, spec.shape, np.uint32).view(np.float32)
        for path, spec in blueprint.parameters.items()
    }
    official = table.write(params)
    again, carried = table.read(official)
    assert carried == {} and again.keys() == params.keys()
    assert all(again[path].tobytes() == params[path].tobytes() for path in params)
    rewritten = table.write(again)
    assert all(rewritten[key].tobytes() == official[key].tobytes() for key in official)


def test_table_has_the_keys_and_layouts_of_diffusers():
    _, params, table = tiny()
    official = table.write(params)
    shapes = {key: value.shape for key, value in official.items()}
    assert len(shapes) == 124
    assert shapes["encoder.down_blocks.1.resnets.0.conv_shortcut.weight"] == (8, 4, 1, 1)
    assert shapes["encoder.down_blocks.0.downsamplers.0.conv.weight"] == (4, 4, 3, 3)
    assert shapes["encoder.mid_block.attentions.0.group_norm.weight"] == (8,)
    assert shapes["decoder.up_blocks.0.upsamplers.0.conv.bias"] == (8,)
    assert shapes["decoder.up_blocks.1.resnets.1.norm2.bias"] == (4,)
    assert shapes["decoder.mid_block.attentions.0.to_out.0.weight"] == (8, 8)
    assert shapes["quant_conv.weight"] == (4, 4, 1, 1) and shapes["post_quant_conv.bias"] == (2,)
    query = params["encoder.mid.attention.query.kernel"]
    np.testing.assert_array_equal(official["encoder.mid_block.attentions.0.to_q.weight"], query.T)
    kernel = params["encoder.conv_in.kernel"]
    assert official["encoder.conv_in.weight"][3, 1, 2, 0] == kernel[2, 0, 1, 3]


def test_table_names_every_key_that_does_not_fit():
    _, params, table = tiny()
    official = table.write(params)
    del official["decoder.conv_out.bias"], official["encoder.mid_block.resnets.1.norm1.weight"]
    official["encoder.conv_in.weight"] = official["encoder.conv_in.weight"][:, :2]
    official["loss.logvar"] = official["decoder.up_blocks.7.resnets.0.conv1.bias"] = np.zeros(4, np.float32)
    with pytest.raises(Mismatch) as caught:
        table.read(official)
    assert caught.value.problems == [
        "decoder.conv_out.bias: missing",
        "decoder.up_blocks.7.resnets.0.conv1.bias: unknown key",
        "encoder.conv_in.weight: shape [4, 2, 3, 3], expected [4, 3, 3, 3]",
        "encoder.mid_block.resnets.1.norm1.weight: missing",
        "loss.logvar: unknown key",
    ]


def test_table_without_quant_convolutions_refuses_them():
    bare = KLConfig.from_diffusers({**DIFFUSERS, "use_quant_conv": False, "use_post_quant_conv": False})
    _, params, table = tiny()
    with pytest.raises(Mismatch) as caught:
        weights_table(blueprint_of(bare).parameters).read(table.write(params))
    names = [f"{part}.{kind}: unknown key" for part in ("post_quant_conv", "quant_conv") for kind in ("bias", "weight")]
    assert caught.value.problems == names


def write_folder(folder, tensors, shards=1):
    (folder / "config.json").write_text(json.dumps(DIFFUSERS))
    if shards == 1:
        save_file(tensors, folder / "diffusion_pytorch_model.safetensors")
        return
    names = [f"diffusion_pytorch_model-{i + 1:05}-of-{shards:05}.safetensors" for i in range(shards)]
    index = {key: names[i % shards] for i, key in enumerate(tensors)}
    for name in names:
        save_file({key: tensors[key] for key in tensors if index[key] == name}, folder / name)
    (folder / "diffusion_pytorch_model.safetensors.index.json").write_text(json.dumps({"weight_map": index}))


@pytest.mark.parametrize("shards", [1, 3])
@pytest.mark.parametrize("old_names", [False, True])
def test_folder_is_read(tmp_path, shards, old_names):
    blueprint, params, _ = tiny()
    tensors = weights_table(blueprint.parameters, old_attention_names=old_names).write(params)
    assert ("encoder.mid_block.attentions.0.proj_attn.weight" in tensors) == old_names
    write_folder(tmp_path, tensors, shards)
    config, read = load_diffusers(tmp_path)
    assert config == CONFIG and read.keys() == params.keys()
    assert all(np.array_equal(read[path], params[path]) for path in params)


def test_folder_of_bfloat16_stays_bfloat16(tmp_path):
    _, params, table = tiny()
    tensors = {key: value.astype(jnp.bfloat16) for key, value in table.write(params).items()}
    write_folder(tmp_path, tensors)
    read = load_diffusers(tmp_path)[1]
    assert {value.dtype for value in read.values()} == {np.dtype(jnp.bfloat16)}
    kernel = params["decoder.conv_in.kernel"]
    np.testing.assert_array_equal(read["decoder.conv_in.kernel"], kernel.astype(jnp.bfloat16))


def test_folder_errors_name_the_file(tmp_path):
    _, params, table = tiny()
    weights = tmp_path / "diffusion_pytorch_model.safetensors"
    with pytest.raises(InputError, match=r"config\.json: cannot be read"):
        load_diffusers(tmp_path)
    write_folder(tmp_path, table.write(params))
    weights.write_bytes(weights.read_bytes()[:-4])
    with pytest.raises(InputError, match=r"diffusion_pytorch_model\.safetensors: is damaged"):
        load_diffusers(tmp_path)
    weights.unlink()
    with pytest.raises(InputError, match=r"diffusion_pytorch_model\.safetensors: cannot be read"):
        load_diffusers(tmp_path)
    (tmp_path / "config.json").write_text("{")
    with pytest.raises(InputError, match=r"config\.json: is damaged"):
        load_diffusers(tmp_path)


def test_missing_shard_is_named(tmp_path):
    _, params, table = tiny()
    write_folder(tmp_path, table.write(params), shards=2)
    (tmp_path / "diffusion_pytorch_model-00002-of-00002.safetensors").unlink()
    with pytest.raises(InputError, match="model-00002-of-00002"):
        load_diffusers(tmp_path)


def test_shapes_of_encoding_and_decoding():
    latents, encoded = codec().encode(images())
    drawn, decoded = codec().decode(latents)
    assert latents.shape == (2, 4, 6, 2) and drawn.shape == (2, 8, 12, 3)
    assert encoded["enc/down/0/blocks"].shape == (2, 8, 12, 4) and encoded["enc/down/0"].shape == (2, 4, 6, 4)
    assert encoded["enc/mid"].shape == (2, 4, 6, 8) and encoded["moments"].shape == (2, 4, 6, 4)
    assert decoded["dec/up/0/blocks"].shape == (2, 4, 6, 8) and decoded["dec/up/0"].shape == (2, 8, 12, 8)
    assert decoded["dec/up/1"].shape == (2, 8, 12, 4)


def test_images_of_a_batch_do_not_see_each_other():
    together = codec().decode(codec().encode(images())[0])[0]
    alone = codec().decode(codec().encode(images()[1:])[0])[0]
    np.testing.assert_allclose(together[1:], alone, rtol=0, atol=1e-5 * float(jnp.abs(alone).max()))


def test_halving_pads_below_and_at_the_right_only():
    blueprint, params, _ = tiny()
    path = "encoder.down.0.resample"
    params = params | {f"{path}.kernel": np.ones((3, 3, 4, 4), np.float32), f"{path}.bias": np.zeros(4, np.float32)}
    halve = blueprint.bind(params).encoder.down[0].resample
    np.testing.assert_array_equal(halve(jnp.ones((1, 4, 4, 4)))[0, :, :, 0], [[36, 24], [24, 16]])


def test_encode_gives_the_mean_or_a_scaled_sample():
    (mean, logvar), _ = codec().moments(images())
    np.testing.assert_allclose(codec().encode(images())[0], (mean - 0.25) * 0.5, rtol=1e-6, atol=1e-6)
    noise = jnp.asarray(np.random.default_rng(3).normal(size=mean.shape), jnp.float32)
    expected = (mean + jnp.exp(logvar / 2) * noise - 0.25) * 0.5
    np.testing.assert_allclose(codec().encode(images(), noise)[0], expected, rtol=1e-5, atol=1e-5)


def test_samples_have_the_moments_of_the_posterior():
    noise = jax.random.normal(jax.random.key(0), (40_000, 2))
    drawn = sample(jnp.array([1.5, -2.0]), jnp.log(jnp.array([0.25, 9.0])), noise)
    np.testing.assert_allclose(drawn.mean(0), [1.5, -2.0], atol=0.06)
    np.testing.assert_allclose(drawn.std(0), [0.5, 3.0], rtol=0.02)


def test_log_variance_is_clamped():
    mean, logvar = split_moments(jnp.array([100.0, -100.0, -31.0, 25.0, 1.0, -29.0]).reshape(1, 6).astype(jnp.bfloat16))
    assert mean.dtype == logvar.dtype == jnp.float32
    np.testing.assert_array_equal(mean, [[100.0, -100.0, -31.0]])
    np.testing.assert_array_equal(logvar, [[20.0, 1.0, -29.0]])
    np.testing.assert_allclose(standard_deviation(logvar), [np.exp([10.0, 0.5, -14.5])], rtol=1e-6)


@given(st.floats(-3, 3), st.floats(-5, 5))
def test_divergence_in_closed_form(mean, logvar):
    shape = (2, 3, 4, 5)
    value = kl(jnp.full(shape, mean, jnp.float32), jnp.full(shape, logvar, jnp.float32))
    expected = 60 * 0.5 * (mean**2 + math.exp(logvar) - 1 - logvar)
    np.testing.assert_allclose(value, [expected, expected], rtol=1e-5, atol=1e-4)


def test_divergence_agrees_with_sampling():
    mean, logvar = jnp.full((1, 100, 100, 4), 0.7), jnp.full((1, 100, 100, 4), -0.8)
    noise = jax.random.normal(jax.random.key(1), mean.shape)
    z = sample(mean, logvar, noise)
    log_ratio = 0.5 * (jnp.square(z) - jnp.square(noise) - logvar)
    np.testing.assert_allclose(kl(mean, logvar) / mean.size, log_ratio.mean(), rtol=0.02)


@given(st.floats(-8, 8))
def test_scale_and_its_inverse(value):
    scaled = codec().scale(jnp.float32(value))
    np.testing.assert_allclose(scaled, (value - 0.25) * 0.5, rtol=1e-6, atol=1e-6)
    np.testing.assert_allclose(codec().unscale(scaled), value, rtol=1e-6, atol=1e-6)


def test_every_parameter_has_a_finite_gradient():
    blueprint, params, _ = tiny()

    def loss(params):
        net = blueprint.bind(params)
        (mean, logvar), _ = net.moments(images())
        drawn = net.decode(net.scale(sample(mean, logvar, jnp.ones_like(mean))))[0]
        return jnp.abs(drawn - images()).sum() + kl(mean, logvar).sum()

    gradients = jax.jit(jax.grad(loss))({path: jnp.asarray(value) for path, value in params.items()})
    sizes = {path: float(jnp.abs(gradient).max()) for path, gradient in gradients.items()}
    assert all(math.isfinite(size) for size in sizes.values())
    # a bias of the keys shifts all logits of a query alike: the softmax cancels it
    assert {path for path, size in sizes.items() if size < 1e-3} == KEY_BIASES


def test_bfloat16_networks_give_float32_latents():
    latents, intermediates = codec().encode(images().astype(jnp.bfloat16))
    exact = codec().encode(images())[0]
    assert latents.dtype == jnp.float32 and intermediates["enc/mid_attn"].dtype == jnp.bfloat16
    assert 0 < float(jnp.abs(latents - exact).max()) < 0.05 * float(jnp.abs(exact).max())
    assert codec().decode(latents.astype(jnp.bfloat16))[0].dtype == jnp.bfloat16


def test_convolutions_start_like_those_of_pytorch():
    conv = Conv2D(16, 32, 3, rngs=nnx.Rngs(0))
    bound = 1 / math.sqrt(16 * 9)
    assert 0.99 * bound < float(jnp.abs(conv.kernel[...]).max()) <= bound
    np.testing.assert_allclose(conv.kernel[...].std(), bound / math.sqrt(3), rtol=0.03)
    np.testing.assert_array_equal(conv.bias[...], np.zeros(32))
