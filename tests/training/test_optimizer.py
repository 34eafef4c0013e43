"""Schedules, decay masks and multipliers."""

import jax.numpy as jnp
import numpy as np
import pytest

from jaxmm.errors import InputError
from jaxmm.training.config import load_config
from jaxmm.training.optimizer import make_optimizer, make_schedule


def options(**changes):
    c = load_config("experiments/digits/transfusion.py").optimizer
    with c.unlocked():
        c.update(dict(learning_rate=1e-2, final_learning_rate=1e-3, warmup_steps=10) | changes)
    return c


def test_cosine_schedule_by_its_formula():
    schedule = make_schedule(options(), 110)
    assert float(schedule(0)) == pytest.approx(1e-3)  # a tenth of the peak
    assert float(schedule(9)) == pytest.approx(1e-2)
    for step in (10, 35, 60, 110):
        expected = 1e-3 + 9e-3 * (1 + np.cos(np.pi * (step - 10) / 100)) / 2
        assert float(schedule(step)) == pytest.approx(expected, rel=1e-5)


def test_linear_and_constant_schedules():
    assert float(make_schedule(options(schedule="linear"), 110)(60)) == pytest.approx(5.5e-3)
    assert float(make_schedule(options(schedule="constant"), 110)(100)) == pytest.approx(1e-2)
    with pytest.raises(InputError, match="did you mean 'cosine'"):
        make_schedule(options(schedule="cosin"), 10)


def test_first_update_is_adam_with_decay_only_where_it_belongs():
    c = options(weight_decay=0.5, warmup_steps=0, schedule="constant", multipliers=((r"b\..*", 0.1),), clip_norm=0.0)
    params = {path: jnp.full(3, 2.0) for path in ("a.kernel", "a.bias", "b.kernel")}
    optimizer = make_optimizer(c, 10, params)
    gradient = {path: jnp.full(3, 4.0) for path in params}
    updates, _ = optimizer.update(gradient, optimizer.init(params), params)
    # Adam's first step is the sign of the gradient; decay adds 0.5 * 2
    np.testing.assert_allclose(updates["a.kernel"], -1e-2 * (1 + 1.0), rtol=1e-5)
    np.testing.assert_allclose(updates["a.bias"], -1e-2, rtol=1e-5)
    np.testing.assert_allclose(updates["b.kernel"], -1e-3 * (1 + 1.0), rtol=1e-5)


def test_a_pattern_that_matches_nothing_is_refused():
    with pytest.raises(InputError, match="matches no trainable parameter"):
        make_optimizer(options(multipliers=(("nothing", 0.1),)), 10, ["a.kernel"])


@pytest.mark.parametrize("schedule", ["cosine", "linear", "constant"])
def test_a_rate_of_zero_moves_nothing_and_a_wrong_one_is_named(schedule):
    zero = make_schedule(options(schedule=schedule, learning_rate=0.0), 110)
    assert [float(zero(step)) for step in (0, 10, 109)] == [0, 0, 0]
    with pytest.raises(InputError, match="optimizer.learning_rate.*-0.1"):
        make_schedule(options(schedule=schedule, learning_rate=-0.1), 110)
    with pytest.raises(InputError, match="optimizer.final_learning_rate.*nan"):
        make_schedule(options(schedule=schedule, final_learning_rate=float("nan")), 110)
