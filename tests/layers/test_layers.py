import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from jaxmm.layers.linear import Embedding, Head, Linear, gather_rows, scatter_rows
from jaxmm.layers.losses import Mean, cross_entropy, weighted
from jaxmm.layers.mlp import SwiGLU
from jaxmm.layers.norms import GroupNorm, RMSNorm
from jaxmm.layers.parameters import Blueprint, Policy, normal, param, stack, subset
from jaxmm.layers.patches import patchify, unpatchify
from jaxmm.layers.rotary import rotary_tables, rotate
from jaxmm.layers.timestep import TimestepEmbedding, sinusoid
from jaxmm.sharding import Parameter

RNG = np.random.default_rng(0)


def build(layer, *args, **options):
    """A layer whose parameters are all random, and those parameters as float64."""
    blueprint = Blueprint(lambda rngs: layer(*args, **options, rngs=rngs))
    rng = np.random.default_rng(1)
    params = {k: rng.uniform(-1, 2, p.shape).astype(np.float32) for k, p in blueprint.parameters.items()}
    return blueprint.bind(params), {path: x.astype(np.float64) for path, x in params.items()}


def random(*shape, offset=0.0):
    return (RNG.standard_normal(shape) + offset).astype(np.float32)


@pytest.mark.parametrize("eps, size", [(1e-5, 1.0), (1e-2, 0.1)])
def test_rms_norm(eps, size):
    norm, p = build(RMSNorm, 12, eps=eps)
    x = np.float32(size) * random(3, 5, 12, offset=1)
    wanted = x / np.sqrt((x.astype(np.float64) ** 2).mean(axis=-1, keepdims=True) + eps) * p["scale"]
    np.testing.assert_allclose(norm(x), wanted, rtol=2e-6, atol=1e-6)
    half = norm(jnp.asarray(x, jnp.bfloat16))
    assert half.dtype == jnp.bfloat16
    np.testing.assert_allclose(half.astype(jnp.float32), wanted, rtol=2e-2, atol=2e-2)


def test_rms_norm_squares_in_float32():
    norm, _ = build(RMSNorm, 512, eps=1e-6)
    x = jnp.full((1, 512), 300, jnp.bfloat16)  # in bfloat16 the sum of 512 squares would stall
    np.testing.assert_array_equal(norm(x), norm(jnp.full((1, 512), 300.0)).astype(jnp.bfloat16))


@pytest.mark.parametrize("groups", [1, 2, 6])
def test_group_norm(groups):
    norm, p = build(GroupNorm, 6, groups=groups, eps=1e-3)
    x = random(2, 3, 4, 6, offset=2) * np.arange(1, 7, dtype=np.float32)
    wanted = np.empty(x.shape)
    for n, g in np.ndindex(2, groups):
        channels = slice(g * 6 // groups, (g + 1) * 6 // groups)
        group = x[n, :, :, channels].astype(np.float64)
        wanted[n, :, :, channels] = (group - group.mean()) / np.sqrt(group.var() + 1e-3)
    np.testing.assert_allclose(norm(x), wanted * p["scale"] + p["bias"], rtol=1e-5, atol=1e-5)
    assert norm(jnp.asarray(x, jnp.bfloat16)).dtype == jnp.bfloat16


def test_group_norm_needs_groups_of_one_size():
    with pytest.raises(ValueError, match="6 channels cannot be cut into 4 groups"):
        GroupNorm(6, groups=4, eps=1e-3, rngs=nnx.Rngs(0))


@pytest.mark.parametrize("size, theta", [(8, 10000.0), (6, 500.0)])
def test_rotary_is_a_complex_rotation(size, theta):
    positions = np.array([[0, 1, 2, 50], [7, 3, 3, 900]], np.int32)
    x = random(2, 4, 3, size)
    angles = positions[:, :, None, None] * theta ** (-2 * np.arange(size // 2) / size)
    turned = (x[..., : size // 2] + 1j * x[..., size // 2 :]) * np.exp(1j * angles)
    found = rotate(x, rotary_tables(positions, size, theta))
    # float32 angles of up to 900 radians are off by up to 3e-5
    np.testing.assert_allclose(found, np.concatenate([turned.real, turned.imag], axis=-1), atol=2e-4)
    np.testing.assert_array_equal(found[0, 0], x[0, 0])
    assert rotate(jnp.asarray(x, jnp.bfloat16), rotary_tables(positions, size, theta)).dtype == jnp.bfloat16


def test_rotary_scores_depend_on_the_distance():
    q, k = random(1, 1, 1, 16), random(1, 1, 1, 16)
    at = lambda x, place: np.asarray(rotate(x, rotary_tables(np.array([[place]]), 16, 10000.0)))  # noqa: E731
    near, far = (np.sum(at(q, begin + 5) * at(k, begin)) for begin in (0, 300))
    assert near == pytest.approx(far, abs=1e-3) and abs(near - np.sum(at(q, 9) * at(k, 0))) > 0.1


def test_rotary_needs_an_even_head():
    with pytest.raises(ValueError, match="even head size, not 7"):
        rotary_tables(np.zeros((1, 2), np.int32), 7, 10000.0)


@pytest.mark.parametrize("features, max_period", [(256, 10000.0), (32, 10000.0), (8, 100.0)])
@pytest.mark.parametrize(
    "t, bound", [(np.arange(1001.0), 1e-6), (np.linspace(0, 1, 500), 1e-6), (np.linspace(0, 1000, 997), 1e-4)]
)
def test_sinusoid_against_float64(features, max_period, t, bound):
    t = t.astype(np.float32)
    angles = t.astype(np.float64)[:, None] * max_period ** (-np.arange(features // 2) / (features // 2))
    wanted = np.concatenate([np.cos(angles), np.sin(angles)], axis=1)
    found = jax.jit(lambda t: sinusoid(t, features, max_period))(t)
    assert found.dtype == jnp.float32
    np.testing.assert_allclose(found, wanted, rtol=0, atol=bound)


def test_timestep_embedding():
    embed, p = build(TimestepEmbedding, 16, 12)
    t = np.array([[0.0, 7.0], [400.0, 999.0]], np.float32)
    found, names = embed(t)
    angles = t[..., None].astype(np.float64) * 10000.0 ** (-np.arange(8) / 8)
    features = np.concatenate([np.cos(angles), np.sin(angles)], axis=-1)
    inner = features @ p["input.kernel"] + p["input.bias"]
    wanted = inner / (1 + np.exp(-inner)) @ p["output.kernel"] + p["output.bias"]
    np.testing.assert_allclose(found, wanted, rtol=1e-5, atol=1e-4)
    assert names.keys() == {"time_sinusoid", "time_embed"}


def test_swiglu():
    mlp, p = build(SwiGLU, 5, 7)
    x = random(2, 3, 5)
    gate = x.astype(np.float64) @ p["gate.kernel"]
    wanted = (gate / (1 + np.exp(-gate)) * (x @ p["up.kernel"])) @ p["down.kernel"]
    np.testing.assert_allclose(mlp(x), wanted, rtol=1e-5, atol=1e-4)
    assert set(p) == {"gate.kernel", "up.kernel", "down.kernel"}


def test_linear_follows_the_format_of_its_input():
    linear, p = build(Linear, 4, 3, ("embed", "mlp"))
    x = random(2, 4)
    np.testing.assert_allclose(linear(x), x @ p["kernel"] + p["bias"], rtol=1e-5, atol=1e-5)
    assert linear(jnp.asarray(x, jnp.bfloat16)).dtype == jnp.bfloat16
    table, p = build(Embedding, 6, 4)
    np.testing.assert_array_equal(table(np.array([[5, 0, 5]])), p["table"][[[5, 0, 5]]].astype(np.float32))
    half = jnp.asarray(x, jnp.bfloat16)
    assert table(np.array([1]), jnp.bfloat16).dtype == jnp.bfloat16 and table.attend(half).dtype == jnp.float32
    np.testing.assert_allclose(table.attend(x), x @ p["table"].T, rtol=1e-5, atol=1e-5)
    head, p = build(Head, 4, 6)
    np.testing.assert_allclose(head(x), x @ p["kernel"], rtol=1e-5, atol=1e-5)
    assert head(half).dtype == jnp.float32


def test_patches_are_flattened_as_row_column_channel():
    x = np.arange(2 * 4 * 6 * 3).reshape(2, 4, 6, 3)
    patches = patchify(x, 2)
    assert patches.shape == (2, 6, 12)
    for n, (i, j) in enumerate(np.ndindex(2, 3)):
        for p, (row, column, channel) in enumerate(np.ndindex(2, 2, 3)):
            np.testing.assert_array_equal(patches[:, n, p], x[:, 2 * i + row, 2 * j + column, channel])
    np.testing.assert_array_equal(unpatchify(patches, 2, 4, 6), x)
    np.testing.assert_array_equal(patchify(x[0], 2), patches[0])
    for given in (x[:, :3], x[:, :, :5]):
        with pytest.raises(ValueError, match=f"{given.shape[1]} x {given.shape[2]} .* 2 x 2"):
            patchify(given, 2)


def test_gather_and_scatter_rows():
    x, values = random(2, 5, 3), random(2, 3, 3)
    index = np.array([[4, 0, 2], [1, -1, 3]])
    gathered = np.asarray(gather_rows(x, index))
    assert gathered.shape == (2, 3, 3)
    np.testing.assert_array_equal(gathered[0], x[0, [4, 0, 2]])
    np.testing.assert_array_equal(gathered[1, [0, 2]], x[1, [1, 3]])
    found = np.asarray(jax.jit(scatter_rows)(x, index, values))
    wanted = x.copy()
    wanted[0, [4, 0, 2]], wanted[1, [1, 3]] = values[0], values[1, [0, 2]]
    np.testing.assert_array_equal(found, wanted)
    np.testing.assert_array_equal(scatter_rows(x, np.full((2, 3), -1), values), x)
    np.testing.assert_array_equal(scatter_rows(x, np.full((2, 3), -5), values), x)
    np.testing.assert_array_equal(scatter_rows(x, np.full((2, 3), 5), values), x)
    assert scatter_rows(jnp.asarray(x, jnp.bfloat16), index, values).dtype == jnp.bfloat16


def test_gradients_of_scatter_go_where_the_values_went():
    x, values = random(1, 4, 2), random(1, 2, 2)
    up = random(1, 4, 2)
    _, pull = jax.vjp(lambda x, values: scatter_rows(x, np.array([[2, -1]]), values), x, values)
    dx, dvalues = pull(up)
    np.testing.assert_array_equal(dx[0], up[0] * np.array([[1], [1], [0], [1]]))
    np.testing.assert_array_equal(dvalues[0], [up[0, 2], [0, 0]])


class Tiny(nnx.Module):
    def __init__(self, *, rngs):
        self.input = Linear(3, 4, ("patch", "embed"), rngs=rngs)
        self.layers = stack(5, lambda r: SwiGLU(4, 6, rngs=r), rngs)
        self.scale = param(rngs, (4,), ("norm",), normal(1.0))

    def __call__(self, x):
        x, _ = jax.lax.scan(lambda x, layer: (x + layer(x), None), self.input(x), self.layers)
        return x * self.scale[...]


def test_blueprint_describes_every_parameter():
    blueprint = Blueprint(lambda rngs: Tiny(rngs=rngs))
    assert blueprint.parameters == {
        "input.kernel": Parameter((3, 4), np.dtype(np.float32), ("patch", "embed"), 1),
        "input.bias": Parameter((4,), np.dtype(np.float32), ("embed",)),
        "layers.gate.kernel": Parameter((5, 4, 6), np.dtype(np.float32), ("layers", "embed", "mlp"), 1),
        "layers.up.kernel": Parameter((5, 4, 6), np.dtype(np.float32), ("layers", "embed", "mlp"), 1),
        "layers.down.kernel": Parameter((5, 6, 4), np.dtype(np.float32), ("layers", "mlp", "embed"), 1),
        "scale": Parameter((4,), np.dtype(np.float32), ("norm",)),
    }
    assert blueprint.size == 3 * 4 + 4 + 3 * 5 * 24 + 4
    assert all(isinstance(p.shape, tuple) and p.size == np.prod(p.shape) for p in blueprint.parameters.values())


def test_blueprint_draws_the_same_from_the_same_key():
    blueprint = Blueprint(lambda rngs: Tiny(rngs=rngs))
    first, again, other = (blueprint.init(jax.random.key(seed)) for seed in (0, 0, 1))
    jitted = jax.jit(blueprint.init)(jax.random.key(0))
    assert {k: (x.shape, x.dtype) for k, x in first.items()} == {
        k: (p.shape, p.dtype) for k, p in blueprint.parameters.items()
    }
    for path, x in first.items():
        np.testing.assert_array_equal(x, again[path])
        np.testing.assert_allclose(jitted[path], x, rtol=1e-5, atol=1e-8)
        assert path == "input.bias" or (np.asarray(x) != np.asarray(other[path])).all()
    gate = np.asarray(first["layers.gate.kernel"])
    assert len(np.unique(gate)) == gate.size  # no two layers begin alike
    assert 0.015 < gate.std() < 0.02 and np.abs(gate).max() <= 0.04


def test_a_bound_network_computes_with_what_it_was_given():
    blueprint = Blueprint(lambda rngs: Tiny(rngs=rngs))
    params = {path: 10 * x for path, x in blueprint.init(jax.random.key(0)).items()}
    x = random(2, 3)
    wanted = x @ params["input.kernel"] + params["input.bias"]
    for i in range(5):
        gate, up, down = (params[f"layers.{name}.kernel"][i] for name in ("gate", "up", "down"))
        wanted = wanted + (jax.nn.silu(wanted @ gate) * (wanted @ up)) @ down
    wanted = wanted * params["scale"]
    np.testing.assert_allclose(blueprint.bind(params)(x), wanted, rtol=1e-5, atol=1e-6)
    gradients = jax.jit(jax.grad(lambda params: blueprint.bind(params)(x).sum()))(params)
    assert gradients.keys() == params.keys()
    np.testing.assert_allclose(gradients["scale"] * params["scale"], wanted.sum(axis=0), rtol=1e-4, atol=1e-6)


def test_missing_and_unknown_parameters_are_listed():
    blueprint = Blueprint(lambda rngs: Tiny(rngs=rngs))
    params = blueprint.init(jax.random.key(0))
    params["layers.gate.bias"] = params.pop("scale")
    with pytest.raises(ValueError, match=r"missing: \['scale'\]; unknown: \['layers.gate.bias'\]"):
        blueprint.bind(params)


def test_subset_and_policies():
    assert subset({"codec.a.b": 1, "codec.c": 2, "codecs.d": 3, "e": 4}, "codec.") == {"a.b": 1, "c": 2}
    assert Policy.named("mixed") == Policy(jnp.float32, jnp.bfloat16)
    assert Policy.named("bfloat16") == Policy(jnp.bfloat16, jnp.bfloat16)
    assert Policy.named("auto") == Policy.named("float32") == Policy()


def test_cross_entropy():
    logits, labels = 5 * random(4, 6, 11), RNG.integers(0, 11, (4, 6))
    p = np.exp(logits.astype(np.float64))
    wanted = -np.log(np.take_along_axis(p / p.sum(-1, keepdims=True), labels[..., None], -1)[..., 0])
    np.testing.assert_allclose(cross_entropy(logits, labels), wanted, rtol=1e-5, atol=1e-5)
    assert cross_entropy(jnp.asarray(logits, jnp.bfloat16), labels).dtype == jnp.float32
    certain = np.array([[1e4, 0.0, -1e4]], np.float32)
    np.testing.assert_array_equal(cross_entropy(np.repeat(certain, 3, axis=0), np.arange(3)), [0, 1e4, 2e4])


def test_weighted_mean():
    mean = weighted(np.array([[1.0, 2.0], [4.0, 100.0]]), np.array([[1.0, 0.5], [0.25, 0.0]]))
    assert (mean.sum, mean.count) == (3.0, 1.75) and mean.value() == pytest.approx(3 / 1.75)
    parts = [weighted(np.array(v), np.array(w)) for v, w in (([1.0, 2.0], [1.0, 0.5]), ([4.0, 100.0], [0.25, 0.0]))]
    assert Mean(*(sum(x) for x in zip(*parts))).value() == mean.value()


def test_mean_of_nothing_is_zero():
    mean = weighted(np.array([3.0, np.inf, np.nan]), np.zeros(3))
    assert (mean.sum, mean.count, mean.value()) == (0, 0, 0)
    gradient = jax.grad(lambda x: weighted(x, jnp.zeros(2)).value())(jnp.array([1.0, 2.0]))
    np.testing.assert_array_equal(gradient, [0, 0])
