"""Low-rank adaptation: a network with adapters equals the network with the merged matrices."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxmm.errors import InputError
from jaxmm.layers.linear import Embedding, FromHeads, Head, Linear, ToHeads
from jaxmm.layers.lora import AdaptedBlueprint, LoRA, merge
from jaxmm.layers.parameters import Blueprint
from jaxmm.models.transfusion import SYSTEM
from jaxmm.sharding import make_mesh, parameter_shardings
from tests import tiny

BLOCK = "transformer.layers.streams.tokens."
TARGETS = (r"transformer\..*\.kernel", r"head\.kernel")
LORA = LoRA(3, 6.0, TARGETS)
LAYERS = {
    "linear": (lambda rngs: Linear(6, 8, ("embed", "mlp"), rngs=rngs), (2, 5, 6), (6, 3), (3, 8)),
    "to heads": (lambda rngs: ToHeads(6, 4, 5, "heads", rngs=rngs), (2, 5, 6), (6, 3), (3, 4, 5)),
    "from heads": (lambda rngs: FromHeads(4, 5, 6, rngs=rngs), (2, 5, 4, 5), (4, 5, 3), (3, 6)),
    "head": (lambda rngs: Head(6, 9, rngs=rngs), (2, 5, 6), (6, 3), (3, 9)),
}


def drawn(blueprint):
    """Parameters with adapters that are not zero."""
    rng = np.random.default_rng(0)
    params = {path: 0.1 * rng.normal(size=spec.shape) for path, spec in sorted(blueprint.parameters.items())}
    return {path: jnp.asarray(x, jnp.float32) for path, x in params.items()}


@pytest.mark.parametrize("name", LAYERS)
def test_each_affine_layer_equals_the_merged_one(name):
    build, shape, a, b = LAYERS[name]
    base = Blueprint(build)
    adapted = AdaptedBlueprint(base, LoRA(3, 1.5, ("kernel",)))
    params = drawn(adapted)
    assert (params["kernel.lora_a"].shape, params["kernel.lora_b"].shape) == (a, b)
    x = jax.random.normal(jax.random.key(9), shape)
    product = np.asarray(params["kernel.lora_a"], np.float64).reshape(-1, 3) @ np.asarray(
        params["kernel.lora_b"], np.float64
    ).reshape(3, -1)
    by_hand = np.asarray(params["kernel"]) + 0.5 * product.reshape(params["kernel"].shape)
    merged = merge(params, adapted.lora)
    np.testing.assert_allclose(merged["kernel"], by_hand, atol=1e-6)
    assert merged.keys() == base.parameters.keys()
    np.testing.assert_allclose(adapted.bind(params)(x), base.bind(merged)(x), atol=1e-5)


def test_the_network_and_its_gradients_equal_those_of_the_merged_one():
    """dL/dA = scale dL/dW B^T and dL/dB = scale A^T dL/dW, in every layer of the stack, with rematerialisation."""
    config = tiny.config(remat="full")
    base, batch = SYSTEM.blueprint(config), tiny.batch(rows=2)
    adapted = AdaptedBlueprint(base, LORA)
    params = drawn(adapted)

    def gradient(blueprint, params):
        def loss(params):
            terms, _ = blueprint.bind(params).loss(batch, jax.random.key(1))
            return sum(term.value() for term in terms.values())

        return jax.jit(jax.value_and_grad(loss))(params)

    value, ours = gradient(adapted, params)
    expected, theirs = gradient(base, merge(params, LORA))
    np.testing.assert_allclose(value, expected, rtol=1e-6)
    for path, full in theirs.items():
        close(ours[path], full, path)
    for path in adapted.targets:
        spec, stacked = base.parameters[path], ".layers." in path
        layers = theirs[path] if stacked else theirs[path][None]
        a, b = (params[path + end] if stacked else params[path + end][None] for end in (".lora_a", ".lora_b"))
        for layer in range(len(layers)):
            full = np.asarray(layers[layer]).reshape(np.prod(spec.shape[stacked : stacked + spec.inputs]), -1)
            flat_a, flat_b = np.asarray(a[layer]).reshape(-1, 3), np.asarray(b[layer]).reshape(3, -1)
            of_a, of_b = (ours[path + end][layer] if stacked else ours[path + end] for end in (".lora_a", ".lora_b"))
            close(of_a.reshape(-1, 3), LORA.scale * full @ flat_b.T, path)
            close(of_b.reshape(3, -1), LORA.scale * flat_a.T @ full, path)


def close(ours, expected, path):
    error = np.max(np.abs(ours - expected)) / max(np.max(np.abs(expected)), 1e-6)
    assert error < 1e-4, f"{path}: {error:.1e}"


@functools.cache
def fresh():
    return jax.jit(AdaptedBlueprint(SYSTEM.blueprint(tiny.CONFIG), LORA).init)(jax.random.key(0))


def test_adapters_leave_the_other_draws_alone():
    for path, value in jax.jit(SYSTEM.blueprint(tiny.CONFIG).init)(jax.random.key(0)).items():
        assert np.array_equal(fresh()[path], value), path


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
def test_fresh_adapters_change_nothing(dtype):
    base, batch = SYSTEM.blueprint(tiny.CONFIG), tiny.batch(rows=2)
    adapted = AdaptedBlueprint(base, LORA)
    params = fresh()
    plain = {path: params[path] for path in base.parameters}

    def logits(blueprint, params):
        return jax.jit(lambda p: blueprint.bind(p).loss(batch, jax.random.key(1), dtype)[1]["logits"])(params)

    ours = logits(adapted, params)
    assert ours.dtype == jnp.float32
    assert np.array_equal(ours, logits(base, plain))
    assert all(np.array_equal(x, plain[path]) for path, x in merge(params, LORA).items())


def test_adapters_are_described_and_drawn():
    adapted = AdaptedBlueprint(SYSTEM.blueprint(tiny.CONFIG), LoRA(4, 4.0, (r".*\.(query|out|up)\.kernel",)))
    assert set(adapted.targets) == {BLOCK + name for name in ("query.kernel", "out.kernel", "mlp.up.kernel")}
    described = {path: adapted.parameters[path] for path in adapted.adapters}
    assert {path: (spec.shape, spec.axes) for path, spec in described.items()} == {
        BLOCK + "query.kernel.lora_a": ((2, 32, 4), ("layers", "embed", "rank")),
        BLOCK + "query.kernel.lora_b": ((2, 4, 4, 8), ("layers", "rank", "heads", "head")),
        BLOCK + "out.kernel.lora_a": ((2, 4, 8, 4), ("layers", "heads", "head", "rank")),
        BLOCK + "out.kernel.lora_b": ((2, 4, 32), ("layers", "rank", "embed")),
        BLOCK + "mlp.up.kernel.lora_a": ((2, 32, 4), ("layers", "embed", "rank")),
        BLOCK + "mlp.up.kernel.lora_b": ((2, 4, 64), ("layers", "rank", "mlp")),
    }
    assert adapted.size == adapted.base.size + sum(spec.size for spec in described.values())
    params, a = fresh(), fresh()[BLOCK + "out.kernel.lora_a"]
    assert np.std(a) == pytest.approx(1 / np.sqrt(32), rel=0.15)
    assert not np.array_equal(params[BLOCK + "query.kernel.lora_a"], params[BLOCK + "mlp.up.kernel.lora_a"])
    assert not np.any(params[BLOCK + "out.kernel.lora_b"])


def test_adapters_are_cut_as_their_matrices_and_merged_there():
    adapted, mesh = AdaptedBlueprint(SYSTEM.blueprint(tiny.CONFIG), LORA), make_mesh(fsdp=4, tensor=2)
    shardings = parameter_shardings(adapted.parameters, mesh)
    assert tuple(shardings[BLOCK + "query.kernel.lora_a"].spec) == (None, "fsdp", None)
    assert tuple(shardings[BLOCK + "query.kernel.lora_b"].spec) == (None, None, "tensor", None)
    params = drawn(adapted)
    expected = merge(params, LORA)
    merged = merge({path: jax.device_put(x, shardings[path]) for path, x in params.items()}, LORA)
    for path, value in merged.items():
        assert value.sharding == shardings[path]
        np.testing.assert_allclose(value, expected[path], atol=1e-6)


def test_the_merged_matrix_is_rounded_once():
    params = {"kernel": jnp.full((1, 1), 1.0, jnp.bfloat16), "kernel.lora_a": jnp.full((1, 1), 2.0**-9)}
    params["kernel.lora_b"] = jnp.full((1, 1), 0.75)
    merged = merge(params, LoRA(1, 4.0, ("kernel",)))["kernel"]
    assert merged.dtype == jnp.bfloat16
    assert float(merged[0, 0]) == 1 + 2.0**-7  # 1 + 1.5 / 256, rounded to the next of 1/128


@pytest.mark.parametrize(
    "target, message",
    [
        (r".*\.quer\.kernel", rf"'.*quer.*' matches nothing; the nearest path is '{BLOCK}query.kernel'"),
        (r"embed\.table", "matches embed.table, which cannot be adapted"),
        (r".*norm\.scale", "norm.scale, which cannot be adapted"),
        (r"*kernel", "is no regular expression"),
    ],
)
def test_a_mistaken_target_is_named(target, message):
    with pytest.raises(InputError, match=message):
        AdaptedBlueprint(SYSTEM.blueprint(tiny.CONFIG), LoRA(2, 1.0, (r".*\.up\.kernel", target)))


def test_what_is_fixed_is_no_target():
    blueprint = SYSTEM.blueprint(tiny.CONFIG)
    adapted = AdaptedBlueprint(blueprint, LoRA(2, 1.0, (r".*kernel",)), fixed=(r"(time|head)\..*",))
    assert BLOCK + "query.kernel" in adapted.targets
    assert not any(path.startswith(("time.", "head.")) for path in adapted.targets)
    with pytest.raises(InputError, match="the rank of LoRA must be at least 1"):
        LoRA(0, 1.0, ())


def test_an_embedding_has_no_inputs():
    assert Blueprint(lambda rngs: Embedding(4, 6, rngs=rngs)).parameters["table"].inputs == 0
