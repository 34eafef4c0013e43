"""One step: number formats, averaged weights, what is frozen."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from jaxmm.errors import InputError
from jaxmm.layers.parameters import Policy
from jaxmm.models.transfusion import SYSTEM
from jaxmm.sharding import make_mesh
from jaxmm.training.state import StateMaker, weights_of
from jaxmm.training.step import make_loss, make_step
from tests import tiny

WEIGHTS = SYSTEM.term_weights(tiny.CONFIG)
BLUEPRINT = SYSTEM.blueprint(tiny.CONFIG)
MESH = make_mesh(devices=jax.devices()[:1])


def start(policy=Policy(), frozen=(), ema=0.0):
    return StateMaker(BLUEPRINT, optax.sgd(0.1), frozen, MESH, policy, ema).init(jax.random.key(0))


def test_mixed_precision_is_near_float32_and_keeps_float32_parameters():
    batch, key, losses = tiny.batch(rows=4), jax.random.key(1), {}
    for name in ("float32", "mixed"):
        policy = Policy.named(name)
        state = start(policy)
        loss = jax.jit(jax.value_and_grad(make_loss(BLUEPRINT, WEIGHTS, policy), has_aux=True))
        (losses[name], _), gradient = loss(state["trainable"], {}, batch, key)
        assert all(x.dtype == jnp.float32 and jnp.all(jnp.isfinite(x)) for x in gradient.values())
    assert losses["mixed"] == pytest.approx(float(losses["float32"]), rel=2e-2)
    assert losses["mixed"] != losses["float32"]  # it did compute in another format


def test_activations_are_in_the_compute_format_and_logits_in_float32():
    params = start()["trainable"]
    model, batch = BLUEPRINT.bind(params), tiny.batch(rows=2)
    _, notes = jax.eval_shape(lambda: model.loss(batch, jax.random.key(0), jnp.bfloat16))
    assert notes["hidden"].dtype == notes["final_hidden"].dtype == jnp.bfloat16
    assert notes["logits"].dtype == notes["prediction/8x8"].dtype == notes["time_embed/8x8"].dtype == jnp.float32


def test_unknown_formats_are_named():
    with pytest.raises(InputError, match="did you mean 'bfloat16'"):
        Policy.named("bfloat")


def test_the_average_forgets_the_first_weights():
    before = start(ema=0.99)
    step = jax.jit(make_step(BLUEPRINT, optax.sgd(0.1), WEIGHTS, Policy(), ema=0.99))
    after, _ = step(before, tiny.batch(rows=2), jax.random.key(0))
    for path, average in after["ema"].items():
        expected = 0.9 * after["trainable"][path] + 0.1 * before["trainable"][path]
        np.testing.assert_allclose(average, expected, atol=1e-6)
    assert weights_of(after)["embed.table"] is after["ema"]["embed.table"]


def test_the_same_step_draws_the_same_noise_and_the_next_one_other():
    step = jax.jit(make_step(BLUEPRINT, optax.sgd(0.0), WEIGHTS, Policy()))
    state, batch, key = start(), tiny.batch(rows=2), jax.random.key(0)
    after, first = step(state, batch, key)
    _, again = step(state, batch, key)
    _, following = step(after, batch, key)  # a learning rate of zero: only the step differs
    assert first["loss/image"] == again["loss/image"]
    assert abs(float(first["loss/image"] - following["loss/image"])) > 1e-4
    np.testing.assert_allclose(first["loss/text"], following["loss/text"], atol=0.2)


def test_frozen_parameters_get_no_update():
    state = start(frozen=(r"time\..*", r"embed\.table"))
    assert sorted(state["frozen"]) == ["embed.table"] + sorted(p for p in BLUEPRINT.parameters if p.startswith("time."))
    step = jax.jit(make_step(BLUEPRINT, optax.sgd(0.1), WEIGHTS, Policy()))
    after, _ = step(state, tiny.batch(rows=2), jax.random.key(0))
    for path, value in state["frozen"].items():
        assert np.array_equal(after["frozen"][path], value)
    assert not np.array_equal(
        after["trainable"]["patch_encoder.proj.kernel"], state["trainable"]["patch_encoder.proj.kernel"]
    )
