import hypothesis
import hypothesis.strategies as st
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxmm.diffusion import flow, guidance


def normal(*shape, seed=0):
    return np.random.default_rng(seed).standard_normal(shape).astype(np.float32)


def integrate(sigmas, x, predict):
    """Run the Euler solver with the velocity field `predict(x, sigma)`."""

    def body(x, pair):
        return flow.euler_step(x, predict(x, pair[0]), *pair), None

    return jax.lax.scan(body, x, (sigmas[:-1], sigmas[1:]))[0]


def test_interpolate_goes_from_data_to_noise():
    data, noise = normal(3, 2, 4), normal(3, 2, 4, seed=1)
    x = flow.interpolate(data, noise, np.array([0.0, 0.25, 1.0]))
    assert x.dtype == jnp.float32
    np.testing.assert_array_equal(x[0], data[0])
    np.testing.assert_array_equal(x[2], noise[2])
    np.testing.assert_allclose(x[1], 0.75 * data[1] + 0.25 * noise[1], rtol=1e-6, atol=1e-7)


def test_velocity_is_the_derivative_of_the_path():
    data, noise, sigma = normal(2, 5), normal(2, 5, seed=1), jnp.array([0.2, 0.9])
    x, slope = jax.jvp(lambda s: flow.interpolate(data, noise, s), (sigma,), (jnp.ones(2),))
    np.testing.assert_allclose(flow.velocity(data, noise), slope, atol=1e-6)
    np.testing.assert_allclose(flow.predict_data(x, slope, sigma), data, atol=1e-6)
    np.testing.assert_allclose(flow.velocity(np.zeros(1), np.ones(1)), [1.0])


@pytest.mark.parametrize(
    "function, args", [(flow.interpolate, (0.3,)), (flow.velocity, ()), (flow.euler_step, (0.9, 0.8))]
)
def test_half_precision_is_computed_in_float32(function, args):
    data, noise = jnp.asarray(normal(8), jnp.bfloat16), jnp.asarray(normal(8, seed=1), jnp.bfloat16)
    half = function(data, noise, *args)
    assert half.dtype == jnp.float32
    np.testing.assert_array_equal(half, function(data.astype(jnp.float32), noise.astype(jnp.float32), *args))


def test_one_sigma_or_one_per_example():
    data, noise = normal(3, 2), normal(3, 2, seed=1)
    np.testing.assert_array_equal(flow.interpolate(data, noise, 0.4), flow.interpolate(data, noise, np.full(3, 0.4)))
    with pytest.raises(ValueError, match="do not belong to the leading axes"):
        flow.interpolate(data, noise, np.zeros(2))
    with pytest.raises(ValueError, match="do not belong to the leading axes"):
        flow.interpolate(data, noise, np.zeros((3, 2, 1)))


def test_sigmas_descend_from_noise_to_data():
    np.testing.assert_allclose(flow.euler_sigmas(4), [1, 0.75, 0.5, 0.25, 0], rtol=0, atol=0)
    np.testing.assert_allclose(flow.euler_sigmas(4, shift=3.0), [1, 0.9, 0.75, 0.5, 0], rtol=1e-7)
    assert flow.euler_sigmas(7).dtype == np.float32


@hypothesis.settings(deadline=None)
@hypothesis.given(st.integers(1, 300), st.floats(0.05, 20))
def test_shifted_sigmas_keep_their_ends_and_their_order(count, shift):
    sigmas = flow.euler_sigmas(count, shift)
    assert sigmas.shape == (count + 1,) and sigmas[0] == 1 and sigmas[-1] == 0 and np.all(np.diff(sigmas) < 0)
    # a shift scales the odds of noise
    odds = shift * np.arange(count - 1, 0, -1) / np.arange(1, count)
    np.testing.assert_allclose(sigmas[1:-1], odds / (1 + odds), rtol=1e-6)


def test_shift_runs_on_traced_sigmas():
    np.testing.assert_allclose(jax.jit(flow.shift_sigma)(jnp.array([0.0, 0.5, 1.0]), 3.0), [0, 0.75, 1], rtol=1e-6)


def test_bad_sigmas_are_refused():
    with pytest.raises(ValueError, match="0 sampling steps"):
        flow.euler_sigmas(0)
    with pytest.raises(ValueError, match="shift of 0.0: it must be positive"):
        flow.euler_sigmas(4, 0.0)


def test_euler_is_exact_on_a_straight_path():
    data, noise = normal(6), normal(6, seed=1)
    end = integrate(flow.euler_sigmas(5, 2.0), jnp.asarray(noise), lambda x, s: flow.velocity(data, noise))
    np.testing.assert_allclose(end, data, atol=1e-6)


@pytest.mark.parametrize("std", [0.3, 2.0])
@pytest.mark.parametrize("shift", [1.0, 3.0])
def test_euler_converges_to_the_std_of_gaussian_data(std, shift):
    # E[noise - data | x] for data N(0, std^2) is linear in x, so one number carries the std
    def predict(x, sigma):
        variance = (1 - sigma) ** 2 * std**2 + sigma**2
        return (sigma - (1 - sigma) * std**2) / variance * x

    ends = [integrate(flow.euler_sigmas(n, shift), jnp.ones(1), predict)[0] for n in (50, 100, 200)]
    errors = [abs(float(end) / std - 1) for end in ends]
    # first order: twice the steps, half the error
    assert errors[2] < 0.03
    assert errors[0] / errors[1] == pytest.approx(2, abs=0.25) and errors[1] / errors[2] == pytest.approx(2, abs=0.15)


def test_classifier_free_guidance():
    conditional, unconditional = normal(2, 3), normal(2, 3, seed=1)
    assert guidance.classifier_free(np.array([2.0]), np.array([1.0]), 5.0)[0] == 6.0
    np.testing.assert_array_equal(guidance.classifier_free(conditional, unconditional, 0.0), unconditional)
    np.testing.assert_allclose(guidance.classifier_free(conditional, unconditional, 1.0), conditional, atol=1e-6)
    mixed = guidance.classifier_free(conditional, unconditional, np.array([3.0, 0.0]))
    np.testing.assert_allclose(mixed[0], 3 * conditional[0] - 2 * unconditional[0], rtol=1e-5, atol=1e-5)
    np.testing.assert_array_equal(mixed[1], unconditional[1])


def test_guidance_subtracts_in_float32():
    # 256 - 0.5 has nine bits: in bfloat16 it would be 256
    conditional, unconditional = jnp.asarray([256.0], jnp.bfloat16), jnp.asarray([0.5], jnp.bfloat16)
    guided = guidance.classifier_free(conditional, unconditional, 2.0)
    assert guided.dtype == jnp.float32
    assert guided[0] == 511.5
