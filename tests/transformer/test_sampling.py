import functools

import hypothesis
import hypothesis.strategies as st
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxmm.errors import InputError
from jaxmm.transformer import TokenSampler

DRAWS = 20_000
PROBABILITIES = np.array([0.05, 0.4, 0.1, 0.25, 0.2])
LOGITS = np.log(PROBABILITIES).astype(np.float32) + 3


@functools.cache
def compiled(sampler):
    return jax.jit(sampler)


def frequencies(sampler, logits=LOGITS):
    """How often each token is drawn, one key per row."""
    keys = jax.random.split(jax.random.key(11), DRAWS)
    ids = compiled(sampler)(keys, jnp.broadcast_to(logits, (DRAWS, len(logits))))
    assert ids.shape == (DRAWS,) and ids.dtype == jnp.int32
    return np.bincount(ids, minlength=len(logits)) / DRAWS


def assert_distributed(found, wanted):
    wanted = np.array(wanted) / np.sum(wanted)
    np.testing.assert_array_equal(found[wanted == 0], 0)
    np.testing.assert_array_less(np.abs(found - wanted), 5 * np.sqrt(wanted * (1 - wanted) / DRAWS) + 1e-12)


def test_greedy_takes_the_most_probable():
    logits = np.array([[0, 2, 1], [5, -1, 4], [-3, -2, -1]], np.float32)
    keys = jax.random.split(jax.random.key(0), 3)
    for sampler in (TokenSampler(), TokenSampler(top_p=0.1)):
        ids = sampler(keys, logits)
        np.testing.assert_array_equal(ids, [1, 0, 2])
        assert ids.dtype == jnp.int32
    np.testing.assert_array_equal(TokenSampler(suppress=(1, 2))(keys, logits), [0, 0, 0])


@pytest.mark.parametrize("temperature", [0.5, 1.0, 2.0])
def test_temperature_is_the_power_of_the_probabilities(temperature):
    assert_distributed(frequencies(TokenSampler(temperature)), PROBABILITIES ** (1 / temperature))


@pytest.mark.parametrize(
    "top_p, nucleus",
    [(0.3, [1]), (0.41, [1, 3]), (0.64, [1, 3]), (0.66, [1, 3, 4]), (0.9, [1, 2, 3, 4]), (1.0, range(5))],
)
def test_nucleus_is_the_fewest_tokens_that_reach_top_p(top_p, nucleus):
    assert_distributed(frequencies(TokenSampler(1.0, top_p)), PROBABILITIES * np.isin(np.arange(5), nucleus))


def test_nucleus_is_taken_after_the_temperature():
    # squared and normalised: 0.009, 0.57, 0.04, 0.22, 0.16
    squared = PROBABILITIES**2
    assert_distributed(frequencies(TokenSampler(0.5, 0.7)), squared * np.isin(np.arange(5), [1, 3]))
    assert_distributed(frequencies(TokenSampler(0.5, 0.5)), squared * np.isin(np.arange(5), [1]))


def test_suppressed_tokens_leave_their_share_to_the_others():
    rest = PROBABILITIES * np.array([1, 0, 1, 0, 1])
    assert_distributed(frequencies(TokenSampler(1.0, suppress=(1, 3))), rest)
    # the nucleus is that of what is left: 0.57, 0.29, 0.14
    assert_distributed(frequencies(TokenSampler(1.0, 0.8, suppress=(1, 3))), rest * np.array([0, 0, 1, 0, 1]))


def test_tokens_without_any_probability_are_never_drawn():
    logits = np.where(np.arange(5) == 2, -np.inf, LOGITS).astype(np.float32)
    assert_distributed(frequencies(TokenSampler(1.0), logits), np.where(np.arange(5) == 2, 0, PROBABILITIES))
    assert_distributed(frequencies(TokenSampler(1.0, 0.999), logits), np.where(np.arange(5) == 2, 0, PROBABILITIES))


@functools.cache
def draw_many(top_p):
    sampler = TokenSampler(1.0, top_p)
    return jax.jit(lambda keys, logits: jax.vmap(sampler, (0, None))(keys, logits))


@hypothesis.settings(max_examples=25, deadline=None)
@hypothesis.given(
    seed=st.integers(0, 2**32 - 1), top_p=st.sampled_from([0.05, 0.5, 0.95]), spread=st.sampled_from([0.1, 1.0, 4.0])
)
def test_every_draw_is_in_the_nucleus_of_its_row(seed, top_p, spread):
    logits = (spread * np.random.default_rng(seed).standard_normal((6, 40))).astype(np.float32)
    p = np.exp(logits.astype(np.float64))
    p /= p.sum(axis=1, keepdims=True)
    above = (p[:, None, :] * (p[:, None, :] > p[:, :, None])).sum(axis=2)  # the share of the more probable tokens
    keys = jax.random.split(jax.random.key(seed), (200, 6))
    ids = np.asarray(draw_many(top_p)(keys, logits))
    assert (np.take_along_axis(above, ids.T, axis=1) < top_p + 1e-5).all()
    assert (np.bincount(ids[:, 0], minlength=40) > 0)[np.argmax(p[0])] or p[0].max() < 0.1


def test_a_key_and_its_row_decide_the_token():
    logits = np.random.default_rng(0).standard_normal((8, 50)).astype(np.float32)
    keys = jax.random.split(jax.random.key(3), 8)
    sampler = compiled(TokenSampler(1.0, 0.9))
    ids = np.asarray(sampler(keys, logits))
    np.testing.assert_array_equal(sampler(keys[::-1], logits[::-1]), ids[::-1])
    half = jnp.asarray(logits, jnp.bfloat16)
    np.testing.assert_array_equal(sampler(keys, half), sampler(keys, np.asarray(half, np.float32)))
    assert (ids != np.asarray(sampler(jax.random.split(jax.random.key(4), 8), logits))).any()


@pytest.mark.parametrize("temperature, top_p", [(-0.1, 1.0), (1.0, 0.0), (1.0, 1.1), (1.0, -0.5), (float("nan"), 1.0)])
def test_values_out_of_range_are_refused(temperature, top_p):
    with pytest.raises(InputError, match=f"temperature {temperature} .* top_p {top_p} "):
        TokenSampler(temperature, top_p)
