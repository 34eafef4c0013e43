"""One train step on eight simulated devices equals the step on one."""

import functools

import jax
import numpy as np
import optax
import pytest

from jaxmm.layers.parameters import Policy
from jaxmm.models.transfusion import SYSTEM, UNetConfig
from jaxmm.sharding import make_mesh, rows_sharding
from jaxmm.training.state import StateMaker
from jaxmm.training.step import make_loss, make_step
from tests import tiny

MESHES = {"fsdp": dict(fsdp=8), "fsdp x tensor": dict(fsdp=4, tensor=2), "fsdp x context": dict(fsdp=4, context=2)}


MODELS = {
    "linear": tiny.CONFIG,
    "unet": tiny.config(patch_codec="unet", unet=UNetConfig((8, 16), blocks=1, heads=2), remat="full"),
}
SLOW = {"unet": pytest.mark.slow}


def run(mesh, config=tiny.CONFIG):
    """(loss, gradients, parameters after a step, state) on a mesh."""
    blueprint = SYSTEM.blueprint(config)
    optimizer = optax.adamw(1e-3)
    maker = StateMaker(blueprint, optimizer, (), mesh, Policy())
    weights = SYSTEM.term_weights(config)
    batch = jax.device_put(tiny.batch(), rows_sharding(mesh, 8))
    key = jax.random.key(1)
    with jax.set_mesh(mesh):
        state = maker.init(jax.random.key(0))
        loss = jax.jit(jax.value_and_grad(make_loss(blueprint, weights, Policy()), has_aux=True))
        (total, _), gradient = loss(state["trainable"], state["frozen"], batch, key)
        after, metrics = jax.jit(make_step(blueprint, optimizer, weights, Policy()))(state, batch, key)
    return total, jax.tree.map(np.asarray, gradient), after, metrics


@functools.cache
def on_one_device(model):
    return run(make_mesh(devices=jax.devices()[:1]), MODELS[model])


@pytest.mark.parametrize("model", [pytest.param(model, marks=SLOW.get(model, ())) for model in MODELS])
@pytest.mark.parametrize("name", MESHES)
def test_step_equals_single_device(name, model):
    total, gradient, after, metrics = run(make_mesh(**MESHES[name]), MODELS[model])
    expected_total, expected_gradient, expected_after, expected_metrics = on_one_device(model)
    np.testing.assert_allclose(total, expected_total, rtol=1e-5)
    np.testing.assert_allclose(metrics["loss"], expected_metrics["loss"], rtol=1e-5)
    for path, expected in expected_gradient.items():
        error = np.max(np.abs(gradient[path] - expected)) / max(np.max(np.abs(expected)), 1e-6)
        assert error <= 1e-4, f"{path}: gradient differs by {error:.1e}"
    assert int(after["step"]) == int(expected_after["step"]) == 1


def test_parameters_and_optimizer_are_cut():
    _, _, after, _ = run(make_mesh(fsdp=4, tensor=2))
    kernel = after["trainable"]["transformer.layers.streams.tokens.query.kernel"]
    assert tuple(kernel.sharding.spec)[:3] == (None, "fsdp", "tensor")
    moment = after["optimizer"][0].mu["transformer.layers.streams.tokens.query.kernel"]
    assert moment.sharding.spec == kernel.sharding.spec
    assert kernel.addressable_shards[0].data.size * 8 == kernel.size
