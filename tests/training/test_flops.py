"""FLOPs of a step against numbers counted by hand, a formula written from the config, and JAX's own gradients."""

import types

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import PartitionSpec

from jaxmm.layers.parameters import Policy
from jaxmm.models.transfusion import SYSTEM
from jaxmm.sharding import make_mesh
from jaxmm.training import flops
from jaxmm.training.flops import Work, model_flops, peak_flops, peak_flops_total
from jaxmm.training.step import make_loss
from tests import tiny


def of(*shape):
    return jax.ShapeDtypeStruct(shape, jnp.float32)


def count(loss, trainable=(), frozen=(), batch=()):
    return model_flops(lambda t, f, b, k: loss(t, f, b), trainable, frozen, batch, None)


def programme(loss, trainable=(), frozen=(), batch=()):
    """Products of the programme that JAX makes of loss and gradient, as it stands."""
    with_gradient = jax.value_and_grad(lambda t, f, b: loss(t, f, b))
    return count(lambda t, f, b: with_gradient(f[0], f[1], b), (), (trainable, frozen), batch)


def scanned_mlp(trainable, frozen, x):
    """Two layers of tanh(x W) V; all W or all V may be frozen."""
    layers = {**trainable, **frozen}

    def layer(x, w):
        return jnp.tanh(x @ w["w"]) @ w["v"], None

    return jnp.sum(jax.lax.scan(layer, x, layers)[0])


W, V, X = of(2, 8, 16), of(2, 16, 8), of(5, 8)
PRODUCT = 2 * 5 * 8 * 16


@pytest.mark.parametrize(
    "trainable, frozen, products",
    [
        ({"w": W, "v": V}, {}, 2 * (3 + 3)),  # the carry of a scan is as its last turn leaves it
        ({"w": W}, {"v": V}, 2 * (3 + 2)),
        ({"v": V}, {"w": W}, 2 * (2 + 3)),
        ({}, {"w": W, "v": V}, 2 * (1 + 1)),
    ],
)
def test_a_scanned_mlp_with_a_frozen_kernel(trainable, frozen, products):
    assert count(scanned_mlp, trainable, frozen, X) == products * PRODUCT
    if trainable:
        assert programme(scanned_mlp, trainable, frozen, X) == products * PRODUCT


def test_low_rank_adapters_pay_twice_for_the_frozen_kernel():
    def loss(t, w, x):
        x = x @ t["first"]
        return jnp.sum(x @ w + (x @ t["a"]) @ t["b"])

    t, w, x = {"first": of(8, 8), "a": of(8, 2), "b": of(2, 16)}, of(8, 16), of(5, 8)
    expected = 2 * 2 * 5 * 8 * 8 + 2 * 2 * 5 * 8 * 16 + 3 * (2 * 5 * 8 * 2 + 2 * 5 * 2 * 16)
    assert count(loss, t, w, x) == programme(loss, t, w, x) == expected


def transfusion_flops(c, rows, length, images):
    """From the config alone: what a training step of Transfusion with linear patches multiplies."""
    size, tokens = c.head_size or c.width // c.heads, rows * length
    patches, values = images * c.patches(*c.image_size), c.patch_size**2 * c.latent_channels
    projections = 2 * tokens * c.width * size * (2 * c.heads + 2 * c.kv_heads)
    attention = 2 * (2 * rows * c.heads * length * length * size)
    mlp = 3 * (2 * tokens * c.width * c.mlp_width)
    head = 2 * tokens * c.width * c.vocab_size
    codec = 2 * (2 * patches * values * c.width)
    time = 2 * images * c.width * (c.width + values)
    sinusoid = 2 * images * c.time_features * c.width  # its input is no function of a parameter
    return 3 * (c.layers * (projections + attention + mlp) + head + codec + time) + 2 * sinusoid


def shapes(config, rows):
    blueprint = SYSTEM.blueprint(config)
    params = {path: of(*p.shape) for path, p in blueprint.parameters.items()}
    loss = make_loss(blueprint, SYSTEM.term_weights(config), Policy())
    batch = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype), tiny.batch(rows=rows))
    return loss, params, batch, jax.eval_shape(lambda: jax.random.key(0))


@pytest.mark.parametrize("remat", ["none", "full"])
@pytest.mark.parametrize("changes", [{}, {"kv_heads": 2, "head_size": 10, "layers": 3}])
def test_transfusion_is_the_formula(changes, remat):
    config = tiny.config(remat=remat, **changes)
    loss, params, batch, key = shapes(config, rows=4)
    assert model_flops(loss, params, {}, batch, key) == transfusion_flops(config, 4, 64, 4 * 3)


def test_transfusion_is_what_its_gradient_multiplies():
    loss, params, batch, key = shapes(tiny.CONFIG, rows=2)
    frozen = {path: params[path] for path in params if "mlp.up" in path or path.startswith("head")}
    trainable = {path: params[path] for path in params if path not in frozen}
    both = lambda t, f, b, k: jax.value_and_grad(loss, has_aux=True)(*f, b, k)  # noqa: E731
    expected = model_flops(both, {}, (trainable, frozen), batch, key)
    assert model_flops(loss, trainable, frozen, batch, key) == expected
    whole = transfusion_flops(tiny.CONFIG, 2, 64, 2 * 3)
    assert whole - expected == 2 * 2 * 64 * 32 * (2 * 64 + tiny.CONFIG.vocab_size)  # the frozen kernels' gradients


def test_recomputation_does_not_count():
    def loss(w, _, x):
        return jnp.sum(jax.checkpoint(lambda x: jnp.tanh(jnp.tanh(x @ w["a"]) @ w["b"]))(x))

    w, x = {"a": of(8, 8), "b": of(8, 8)}, of(5, 8)
    assert count(loss, w, (), x) == (2 + 3) * 2 * 5 * 8 * 8
    assert programme(loss, w, (), x) > count(loss, w, (), x)


def test_gradients_stop_where_they_are_stopped():
    square, w = 2 * 8**3, of(8, 8)
    assert count(lambda w, f, x: jnp.sum(w @ jax.lax.stop_gradient(w @ w)), w) == (1 + 2) * square
    assert count(lambda w, f, x: jnp.sum(jax.lax.stop_gradient(w) @ x), w, (), w) == square
    assert count(lambda w, f, x: jnp.sum(x @ jnp.argmax(w, 0).astype(float)), w, (), w) == 2 * 8 * 8
    # a second result is reported, not differentiated; what is not returned is not computed
    assert count(lambda w, f, x: (jnp.sum(w), jnp.sum(w @ x)), w, (), w) == square
    assert count(lambda w, f, x: (jnp.sum(w), w @ x)[0], w, (), w) == 0


def test_dead_code_within_a_scan_is_not_counted():
    def loss(w, _, x):
        carry, _ = jax.lax.scan(lambda c, _: (c @ w, c @ (c @ w)), x, None, length=4)
        return jnp.sum(carry)

    assert count(loss, of(8, 8), (), of(8, 8)) == 4 * 3 * 2 * 8**3


def test_a_carry_that_gets_parameters_only_in_a_later_turn():
    """(a, b) -> (x a, a + w): a depends on w from the second turn on, and JAX differentiates all turns alike."""

    def loss(w, _, x):
        (a, _), _ = jax.lax.scan(lambda c, _: ((x @ c[0], c[0] + c[1] + w), None), (x, x), None, length=3)
        b, _ = jax.lax.scan(lambda c, _: ((x @ c[1], c[0] + w), None), (x, x), None, length=3)
        return jnp.sum(a) + jnp.sum(b[0])

    first, second = 3 * 1, 3 * 2  # the first product never sees w
    assert count(loss, of(8, 8), (), of(8, 8)) == (first + second) * 2 * 8**3


def test_branches_loops_and_custom_derivatives():
    square, w = 2 * 8**3, of(8, 8)

    def branches(w, f, x):
        return jnp.sum(jax.lax.cond(x[0, 0] > 0, lambda: w @ x @ x, lambda: w @ x))

    def loop(w, f, x):
        return jnp.sum(jax.lax.while_loop(lambda c: jnp.sum(c @ c) > 0, lambda c: c @ c @ c, x)) + jnp.sum(w)

    @jax.custom_vjp
    def custom(w, x):
        return w @ x

    custom.defvjp(lambda w, x: (w @ x, (w, x)), lambda kept, g: (g, g))
    assert count(branches, w, (), w) == 2 * 2 * square
    assert count(loop, w, (), w) == 3 * square
    assert count(lambda w, f, x: jnp.sum(jax.jit(custom)(w, x)), w, (), w) == 2 * square
    assert count(lambda w, f, x: jnp.sum(jax.nn.relu(w @ x) @ w), w, (), w) == (2 + 3) * square


def test_products_within_a_shard_map_count_on_all_devices():
    mesh = make_mesh(data=4, fsdp=2, devices=jax.devices())
    rows = PartitionSpec(("data", "fsdp"))
    sharded = jax.shard_map(jnp.matmul, mesh=mesh, in_specs=(rows, PartitionSpec()), out_specs=rows)
    assert count(lambda w, f, x: jnp.sum(sharded(x, w)), of(4, 5), (), of(16, 4)) == 2 * 2 * 16 * 4 * 5


def test_kernels_say_what_they_cost():
    from jax.experimental import pallas as pl

    def loss(estimate):
        def double(x_ref, out_ref):
            out_ref[...] = x_ref[...] * 2

        kernel = pl.pallas_call(double, out_shape=of(8, 8), cost_estimate=estimate, name="double")
        return lambda w, f, x: jnp.sum(kernel(w * x))

    estimate = pl.CostEstimate(flops=100, transcendentals=0, bytes_accessed=0)
    assert count(loss(estimate), of(8, 8), (), of(8, 8)) == 300
    with pytest.raises(ValueError, match="double are unknown"):
        count(loss(None), of(8, 8), (), of(8, 8))


def convolve(x, kernel, **options):
    dimensions = dict(window_strides=(1, 1), padding="VALID", dimension_numbers=("NHWC", "HWIO", "NHWC"))
    return jax.lax.conv_general_dilated(x, kernel, **dimensions | options)


@pytest.mark.parametrize(
    "image, kernel, options, expected",
    [
        ((2, 9, 9, 4), (3, 3, 4, 6), {}, 2 * (2 * 7 * 7 * 6) * (3 * 3 * 4)),
        ((2, 9, 9, 4), (3, 3, 4, 6), {"padding": "SAME", "window_strides": (2, 3)}, 2 * (2 * 5 * 3 * 6) * (3 * 3 * 4)),
        ((2, 9, 9, 4), (3, 3, 2, 6), {"feature_group_count": 2}, 2 * (2 * 7 * 7 * 6) * (3 * 3 * 2)),
        ((2, 9, 9, 4), (3, 3, 4, 6), {"rhs_dilation": (2, 4)}, 2 * (2 * 5 * 1 * 6) * (3 * 3 * 4)),
        # a transposed convolution: every input meets the whole kernel once
        ((2, 9, 9, 4), (2, 2, 4, 6), {"lhs_dilation": (2, 2), "padding": [(1, 1)] * 2}, 2 * (2 * 81 * 4) * (2 * 2 * 6)),
    ],
)
def test_convolutions(image, kernel, options, expected):
    def loss(w, f, x):
        return jnp.sum(convolve(x, w, **options))

    assert count(loss, of(*kernel), (), of(*image)) == 2 * expected
    assert count(lambda w, f, x: loss(f, w, x), (), of(*kernel), of(*image)) == expected


def device(kind, platform="tpu", process=0):
    return types.SimpleNamespace(device_kind=kind, platform=platform, process_index=process)


@pytest.mark.parametrize(
    "kind, peak",
    [
        ("TPU v4", 275e12),
        ("TPU v5 lite", 197e12),
        ("TPU v5", 459e12),
        ("TPU v6 lite", 918e12),
        ("NVIDIA A100-SXM4-80GB", 312e12),
        ("NVIDIA A100 80GB PCIe", 312e12),
        ("NVIDIA A100-SXM4-40GB MIG 1g.5gb", None),
        ("NVIDIA H100 80GB HBM3", 989e12),
        ("NVIDIA H100 PCIe", 756e12),
        ("NVIDIA H200", 989e12),
        ("NVIDIA B200", 2250e12),
        ("NVIDIA L4", 121e12),
        ("NVIDIA L40S", None),
        ("cpu", None),
    ],
)
def test_peaks(kind, peak):
    assert peak_flops([device(kind)] * 4) == peak


def test_the_peak_of_a_mesh(monkeypatch):
    monkeypatch.setattr(flops, "matmul_seconds", lambda size: size**3 * 2.0**-32)
    assert peak_flops_total([device("TPU v4")] * 8) == 8 * 275e12
    assert peak_flops([device("TPU v4"), device("TPU v5")]) is None
    assert peak_flops_total(make_mesh(fsdp=8).devices) == 2.0**33  # simulated devices share the cores of their process
    assert peak_flops_total([device("cpu", "cpu", i // 4) for i in range(8)]) == 2 * 2.0**33
    assert peak_flops_total([device("a new one", "gpu")] * 8) == 8 * 2.0**33


def test_the_measured_peak_is_a_rate():
    assert 1e8 < flops.measured_peak(256) < 1e15


def test_the_work_of_a_step_counts_filled_slots_only():
    blueprint = SYSTEM.blueprint(tiny.CONFIG)
    batch = tiny.batch(rows=8)
    loss = make_loss(blueprint, SYSTEM.term_weights(tiny.CONFIG), Policy())
    state = {"trainable": jax.eval_shape(blueprint.init, jax.random.key(0)), "frozen": {}}
    work = Work.of_step(loss, state, batch, jax.random.key(0), make_mesh())
    tokens = int(np.sum(batch.streams["tokens"].places >= 0))
    assert work.slots == 8 * 64 and 0 < tokens < work.slots
    flops = model_flops(loss, state["trainable"], {}, batch, jax.random.key(0))
    values = work.metrics(tokens, 0.5)
    assert values["model_flops"] == pytest.approx(flops * tokens / 512)
    assert values["utilisation"] == pytest.approx(flops * tokens / 512 / 0.5 / work.peak)
