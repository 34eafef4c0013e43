import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxmm.diffusion import timesteps

KEY = jax.random.key(7)
N = 40_000


def test_uniform_covers_its_range():
    sigma = np.asarray(timesteps.uniform(KEY, (N,), 0.5))
    assert sigma.dtype == np.float32 and sigma.min() >= 0 and sigma.max() < 0.5
    # mean and std of a uniform variable on [0, 0.5); five standard errors of the mean
    assert sigma.mean() == pytest.approx(0.25, abs=5 * 0.5 / np.sqrt(12 * N))
    assert sigma.std() == pytest.approx(0.5 / np.sqrt(12), rel=0.02)


def test_uniform_has_one_limit_per_example():
    sigma = np.asarray(timesteps.uniform(KEY, (500, 3), np.array([0.0, 0.5, 1.0])))
    assert np.all(sigma[:, 0] == 0) and 0.49 < sigma[:, 1].max() < 0.5 and 0.98 < sigma[:, 2].max() < 1


@pytest.mark.parametrize("limit, count", [(1.0, 10), (0.5, 5), (0.3, 3), (0.31, 4), (0.7, 7), (0.0, 1), (2.0, 10)])
def test_uniform_index_draws_every_index_below_the_limit(limit, count):
    t = np.asarray(timesteps.uniform_index(KEY, (N,), 10, limit))
    assert t.dtype == np.int32
    frequencies = np.bincount(t, minlength=10) / N
    np.testing.assert_array_equal(frequencies[count:], 0)
    np.testing.assert_allclose(frequencies[:count], 1 / count, atol=5 * np.sqrt(1 / count / N))


def test_noise_limit_of_half_the_schedule():
    limits = np.array([0.5, 1.0, 0.0])
    t = np.asarray(jax.jit(lambda limit: timesteps.uniform_index(KEY, (N, 3), 1000, limit))(limits))
    assert t.min(axis=0).tolist() == [0, 0, 0] and t.max(axis=0).tolist() == [499, 999, 0]


@pytest.mark.parametrize("steps", [60, 100])
def test_limit_that_is_a_fraction_of_the_steps_is_not_rounded_up(steps):
    counts = np.arange(1, steps + 1)
    # 4000 draws miss one of 100 indices with a probability of 4e-18
    t = timesteps.uniform_index(KEY, (4000, steps), steps, counts / steps)
    np.testing.assert_array_equal(t.max(axis=0), counts - 1)


def test_logit_normal_has_its_quantiles():
    for mean, std in [(0.0, 1.0), (0.8, 0.5)]:
        sigma = np.asarray(timesteps.logit_normal(KEY, (N,), mean, std))
        assert sigma.dtype == np.float32 and 0 < sigma.min() and sigma.max() < 1
        # the quartiles of a normal variable are at 0.67449 std; the standard error of one is 1.363 std / sqrt(n)
        logits = mean + std * np.array([-0.67449, 0, 0.67449])
        found = np.quantile(np.log(sigma / (1 - sigma)), [0.25, 0.5, 0.75])
        np.testing.assert_allclose(found, logits, atol=5 * 1.363 * std / np.sqrt(N))


def test_noise_is_the_example_s_own():
    ids = np.array([12, 5, 900_000, 0, -1], np.int32)
    noise = np.asarray(timesteps.normal_per_example(KEY, ids, (4, 3)))
    assert noise.shape == (5, 4, 3) and noise.dtype == np.float32
    for order in ([3, 1, 0, 4, 2], [2], [4, 0]):
        np.testing.assert_array_equal(timesteps.normal_per_example(KEY, ids[order], (4, 3)), noise[order])
    square = timesteps.normal_per_example(KEY, ids[:4].reshape(2, 2), (4, 3))
    np.testing.assert_array_equal(square, noise[:4].reshape(2, 2, 4, 3))
    jitted = jax.jit(lambda ids: timesteps.normal_per_example(KEY, ids, (4, 3)))(ids)
    np.testing.assert_array_equal(jitted, noise)


def test_noise_differs_between_examples_and_keys():
    ids = np.arange(300)
    one, other = (np.asarray(timesteps.normal_per_example(key, ids, (64,))) for key in jax.random.split(KEY))
    bound = 6 / np.sqrt(64)  # correlations of 64 independent pairs have std 1/8
    assert np.abs(np.corrcoef(one) - np.eye(300)).max() < bound
    assert abs(np.corrcoef(one.ravel(), other.ravel())[0, 1]) < 5 / np.sqrt(one.size)
    assert one.mean() == pytest.approx(0, abs=5 / np.sqrt(one.size))
    assert one.var() == pytest.approx(1, abs=5 * np.sqrt(2 / one.size))


def test_uniform_per_example():
    ids = np.arange(N)
    u = np.asarray(timesteps.uniform_per_example(KEY, ids))
    assert u.shape == (N,) and u.dtype == np.float32 and u.min() >= 0 and u.max() < 1
    np.testing.assert_allclose(np.histogram(u, 10, (0, 1))[0] / N, 0.1, atol=5 * np.sqrt(0.1 / N))
    np.testing.assert_array_equal(timesteps.uniform_per_example(KEY, ids[::-400]), u[::-400])


def test_per_example_keys_feed_the_samplers():
    ids, limits = np.array([[3, 8], [8, 1]]), np.array([[1.0, 0.5], [0.5, 0.0]], np.float32)
    keys = timesteps.per_example_keys(KEY, ids)
    assert keys.shape == (2, 2)
    draw = jax.vmap(jax.vmap(lambda key, limit: timesteps.uniform_index(key, (), 1000, limit)))
    t = np.asarray(draw(keys, limits))
    assert t[0, 1] == t[1, 0] and t[1, 1] == 0
    alone = timesteps.uniform_index(jax.random.fold_in(KEY, 8), (), 1000, 0.5)
    assert t[0, 1] == alone


def test_expand_adds_axes_behind():
    assert timesteps.expand(np.arange(2), np.zeros((2, 3, 4))).shape == (2, 1, 1)
    assert timesteps.expand(0.5, np.zeros((2, 3))).shape == (1, 1)
    assert timesteps.expand(np.zeros((2, 1)), jnp.zeros((2, 3))).shape == (2, 1)
    with pytest.raises(ValueError, match=r"shape \(3,\) do not belong to the leading axes of \(2, 3\)"):
        timesteps.expand(np.zeros(3), np.zeros((2, 3)))
