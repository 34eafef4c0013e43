import dataclasses

import hypothesis
import hypothesis.strategies as st
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxmm.diffusion import ddpm

COSINE = ddpm.cosine_schedule()
KEY = jax.random.key(0)


def normal(*shape, seed=0):
    return np.random.default_rng(seed).standard_normal(shape)


def row(steps, i):
    return jax.tree.map(lambda column: column[i], steps)


def sample(steps, x, predict, key=None, clip=None):
    """Run a sampler whose network is `predict(x, timestep)`; returns the states after every step."""

    def body(x, inputs):
        step, i = inputs
        fresh = 0.0 if key is None else jax.random.normal(jax.random.fold_in(key, i), x.shape)
        x = ddpm.solver_step(step, x, predict(x, step.timestep), fresh, clip)
        return x, x

    return jax.lax.scan(body, x, (steps, jnp.arange(len(steps.timestep))))[1]


def gaussian_network(std, mean=0.0):
    """The exact noise prediction for data N(mean, std^2): linear in x."""
    abar = jnp.asarray(COSINE.alphas_bar, jnp.float32)

    def predict(x, t):
        variance = abar[t] * std**2 + (1 - abar[t])
        return jnp.sqrt(1 - abar[t]) / variance * (x - jnp.sqrt(abar[t]) * mean)

    return predict


# schedules


def test_cosine_schedule_has_the_published_values():
    abar = COSINE.alphas_bar
    assert COSINE.steps == 1000 and COSINE.betas.dtype == abar.dtype == np.float64
    np.testing.assert_allclose(abar[[0, 499, 500]], [0.99995872, 0.49384359, 0.49228517], rtol=0, atol=5e-9)
    np.testing.assert_allclose(abar[[998, 999]], [2.42877e-6, 2.42877e-9], rtol=2e-6)
    assert COSINE.betas[-1] == 0.999 and np.all(np.diff(COSINE.betas) >= 0)


def test_cosine_schedule_follows_its_closed_form_before_the_cap():
    # without a cap the product telescopes: abar_i = f((i + 1) / T) / f(0)
    f = np.cos((np.arange(501) / 500 + 0.008) / 1.008 * np.pi / 2) ** 2
    np.testing.assert_allclose(ddpm.cosine_schedule(500).alphas_bar[:-1], f[1:-1] / f[0], rtol=1e-10)


def test_linear_schedule():
    schedule = ddpm.linear_schedule()
    np.testing.assert_allclose(schedule.betas[[0, 500, 999]], [1e-4, 1e-4 + 500 / 999 * 0.0199, 2e-2], rtol=1e-12)
    assert schedule.alphas_bar[-1] == pytest.approx(4.0358e-5, rel=1e-4)


@pytest.mark.parametrize("betas", [[], [0.5, 1.0], [0.0, 0.5], [[0.1]], [np.nan]])
def test_bad_betas_are_refused(betas):
    with pytest.raises(ValueError, match="strictly between 0 and 1"):
        ddpm.Schedule(np.array(betas))


def test_schedule_cannot_be_changed():
    betas = np.array([0.1, 0.2])
    schedule = ddpm.Schedule(betas)
    betas[0] = 0.9
    np.testing.assert_allclose(schedule.alphas_bar, [0.9, 0.72])
    with pytest.raises(ValueError, match="read-only"):
        schedule.betas[0] = 0.9


# spacing


def test_spacing_tables():
    leading, iddpm = ddpm.spaced(1000, 250), ddpm.spaced(1000, 250, "iddpm")
    assert leading.dtype == iddpm.dtype == np.int32
    np.testing.assert_array_equal(leading, np.arange(996, -1, -4))
    assert iddpm[:4].tolist() == [999, 995, 991, 987] and iddpm[-4:].tolist() == [12, 8, 4, 0]
    assert ddpm.spaced(1000, 5).tolist() == [800, 600, 400, 200, 0]
    assert ddpm.spaced(1000, 5, "iddpm").tolist() == [999, 749, 500, 250, 0]
    assert ddpm.spaced(1000, 3).tolist() == [666, 333, 0]


@hypothesis.settings(deadline=None)
@hypothesis.given(st.data(), st.integers(1, 1200), st.sampled_from(["leading", "iddpm"]))
def test_spaced_timesteps_are_distinct_and_in_range(data, steps, spacing):
    count = data.draw(st.integers(1, steps))
    t = ddpm.spaced(steps, count, spacing)
    assert len(t) == count and t[-1] == 0 and t[0] < steps and np.all(np.diff(t) < 0)
    if count == steps:
        np.testing.assert_array_equal(t, np.arange(steps)[::-1])


@pytest.mark.parametrize(
    "count, spacing, message",
    [
        (1001, "leading", "1001 sampling steps: a schedule of 1000 timesteps allows 1 to 1000"),
        (0, "iddpm", "0 sampling steps"),
        (10, "leadin", "spacing 'leadin'; did you mean 'leading'"),
    ],
)
def test_bad_spacing_is_refused(count, spacing, message):
    with pytest.raises(ValueError, match=message):
        ddpm.spaced(1000, count, spacing)


# noise


def test_add_noise_has_one_level_per_example():
    data, noise, t = normal(3, 4, 5), normal(3, 4, 5, seed=1), np.array([0, 500, 999], np.int32)
    abar = COSINE.alphas_bar[t][:, None, None]
    expected = np.sqrt(abar) * data + np.sqrt(1 - abar) * noise
    x = jax.jit(lambda *args: ddpm.add_noise(COSINE, *args))(data, noise, t)
    assert x.dtype == jnp.float32
    np.testing.assert_allclose(x, expected, rtol=1e-6, atol=1e-6)
    alone = jax.vmap(lambda d, n, t: ddpm.add_noise(COSINE, d, n, t))(data, noise, t)
    np.testing.assert_allclose(x, alone, rtol=1e-6, atol=1e-7)


def test_levels_are_rounded_only_once():
    # 1 - abar_0 = 4.1e-5 would lose three digits in float32
    x = ddpm.add_noise(COSINE, np.zeros((1, 1)), np.ones((1, 1)), np.zeros(1, np.int32))
    np.testing.assert_allclose(x[0, 0], np.sqrt(COSINE.betas[0]), rtol=1e-7)


def test_half_precision_is_noised_in_float32():
    data, noise = jnp.asarray(normal(2, 8), jnp.bfloat16), jnp.asarray(normal(2, 8, seed=1), jnp.bfloat16)
    t = jnp.array([3, 700])
    whole = ddpm.add_noise(COSINE, data.astype(jnp.float32), noise.astype(jnp.float32), t)
    x = ddpm.add_noise(COSINE, data, noise, t)
    assert x.dtype == jnp.float32
    np.testing.assert_allclose(x, whole, rtol=1e-6)


def test_timesteps_of_another_shape_are_refused():
    with pytest.raises(ValueError, match=r"shape \(2,\) do not belong to the leading axes of \(3, 4\)"):
        ddpm.add_noise(COSINE, np.zeros((3, 4)), np.zeros((3, 4)), np.zeros(2, np.int32))


@pytest.mark.parametrize("kind", ["noise", "data", "v"])
def test_predictions_are_converted(kind):
    data, noise, t = normal(4, 6), normal(4, 6, seed=1), np.array([10, 300, 600, 900])
    abar = COSINE.alphas_bar[t][:, None]
    x = np.sqrt(abar) * data + np.sqrt(1 - abar) * noise
    prediction = {"noise": noise, "data": data, "v": np.sqrt(abar) * noise - np.sqrt(1 - abar) * data}[kind]
    np.testing.assert_allclose(ddpm.predict_data(COSINE, x, prediction, t, kind), data, atol=1e-5)
    np.testing.assert_allclose(ddpm.predict_noise(COSINE, x, prediction, t, kind), noise, atol=1e-5)


@pytest.mark.parametrize("convert", [ddpm.predict_data, ddpm.predict_noise])
def test_unknown_prediction_is_refused(convert):
    with pytest.raises(ValueError, match="prediction 'nois'; did you mean 'noise'"):
        convert(COSINE, np.zeros((1, 2)), np.zeros((1, 2)), np.zeros(1, np.int32), "nois")


# solver steps against the formulas of the papers, in float64


def reference_step(t, t_next, x, noise, fresh, *, variance=None, eta=None, clip=None):
    a, ap = COSINE.alphas_bar[t], 1.0 if t_next is None else COSINE.alphas_bar[t_next]
    beta = 1 - a / ap
    data = (x - np.sqrt(1 - a) * noise) / np.sqrt(a)
    data = data if clip is None else np.clip(data, -clip, clip)
    if eta is not None:
        std = eta * np.sqrt((1 - ap) / (1 - a) * beta)
        return np.sqrt(ap) * data + np.sqrt(1 - ap - std**2) * noise + std * fresh
    mean = np.sqrt(ap) * beta / (1 - a) * data + np.sqrt(a / ap) * (1 - ap) / (1 - a) * x
    std = 0.0 if t_next is None else np.sqrt({"small": beta * (1 - ap) / (1 - a), "large": beta}[variance])
    return mean + std * fresh


@pytest.mark.parametrize("clip", [None, 1.5])
@pytest.mark.parametrize("kind", [{"variance": "small"}, {"variance": "large"}, {"eta": 0.0}, {"eta": 0.7}])
def test_steps_follow_the_formulas(kind, clip):
    timesteps = [999, 998, 640, 639, 100, 7, 0]
    make = ddpm.ddim_steps if "eta" in kind else ddpm.ancestral_steps
    steps = make(COSINE, timesteps, **kind)
    assert steps.timestep.dtype == np.int32 and steps.timestep.tolist() == timesteps
    for i, (t, t_next) in enumerate(zip(timesteps, [*timesteps[1:], None])):
        x, noise, fresh = normal(3, 200, seed=i).astype(np.float32)
        expected = reference_step(t, t_next, *np.float64([x, noise, fresh]), **kind, clip=clip)
        found = ddpm.solver_step(row(steps, i), x, noise, fresh, clip)
        assert found.dtype == jnp.float32
        assert np.abs(found - expected).max() <= 1e-6 * np.abs(expected).max(), t


def test_table_is_a_pytree_of_float32_columns():
    steps = ddpm.ancestral_steps(COSINE, ddpm.spaced(1000, 20))
    columns = jax.tree.leaves(steps)
    assert len(columns) == len(dataclasses.fields(steps)) and {column.shape for column in columns} == {(20,)}
    assert {str(column.dtype) for column in columns} == {"int32", "float32"}


def test_last_step_adds_no_noise_and_returns_the_predicted_data():
    x, noise = normal(2, 50)
    data = ddpm.predict_data(COSINE, x[None], noise[None], jnp.array([40]))[0]
    tables = [ddpm.ancestral_steps(COSINE, [700, 40], variance) for variance in ("small", "large")]
    for steps in [*tables, ddpm.ddim_steps(COSINE, [700, 40], eta=1.0)]:
        assert steps.from_fresh[1] == 0 < steps.from_fresh[0]
        np.testing.assert_allclose(ddpm.solver_step(row(steps, 1), x, noise, 1e6), data, rtol=1e-5, atol=1e-6)


def test_ddim_with_eta_one_is_ancestral_sampling():
    timesteps = ddpm.spaced(1000, 40, "iddpm")
    ddim, ancestral = ddpm.ddim_steps(COSINE, timesteps, eta=1.0), ddpm.ancestral_steps(COSINE, timesteps)
    for name in ("direct_x", "direct_noise", "from_fresh"):
        np.testing.assert_allclose(getattr(ddim, name), getattr(ancestral, name), rtol=1e-6, atol=1e-7)


def test_perfect_noise_stays_on_the_path():
    data, noise = normal(2, 1, 64)
    timesteps = ddpm.spaced(1000, 25)
    start = ddpm.add_noise(COSINE, data, noise, timesteps[:1])[0]
    states = sample(ddpm.ddim_steps(COSINE, timesteps), start, lambda x, t: jnp.asarray(noise[0], jnp.float32))
    levels = ddpm.add_noise(COSINE, *(np.repeat(z, 24, axis=0) for z in (data, noise)), timesteps[1:])
    np.testing.assert_allclose(states[:-1], levels, atol=2e-5)
    np.testing.assert_allclose(states[-1], data[0], atol=2e-5)


def test_clip_bounds_the_prediction_before_it_is_mixed():
    steps = ddpm.ddim_steps(COSINE, [990, 0])
    # the network says zero noise: data x / sqrt(abar) is far outside
    np.testing.assert_allclose(sample(steps, jnp.array([3.0, -3.0]), lambda x, t: 0 * x, clip=0.5)[1], [0.5, -0.5])
    wild = sample(steps, jnp.array([3.0]), lambda x, t: 0 * x)[1]
    assert wild[0] == pytest.approx(3 / np.sqrt(COSINE.alphas_bar[990]), rel=1e-5)


@pytest.mark.parametrize("timesteps, factor", [([999, 998], 31.6), ([999, 995], 126), ([996, 992], 2.3)])
@pytest.mark.parametrize("make", [ddpm.ancestral_steps, ddpm.ddim_steps])
def test_first_step_amplifies_by_the_published_factors(make, timesteps, factor):
    # an error of the predicted noise is multiplied by |direct_noise|, one of the state by direct_x
    first = row(make(COSINE, timesteps), 0)
    assert first.direct_x == pytest.approx(factor, rel=0.02)
    assert first.direct_x == pytest.approx(np.sqrt(np.divide(*COSINE.alphas_bar[timesteps[::-1]])), rel=1e-6)
    assert 0.5 < -first.direct_noise / first.direct_x < 1.0


@pytest.mark.parametrize(
    "timesteps, message",
    [
        ([], "descending list"),
        ([0, 10], "descending list"),
        ([10, 10], "descending list"),
        ([10.0, 2.0], "descending list of integers"),
        ([1000, 0], "timesteps 1000 .. 0: the schedule has 0 .. 999"),
        ([3, -1], "the schedule has 0 .. 999"),
    ],
)
@pytest.mark.parametrize("make", [ddpm.ancestral_steps, ddpm.ddim_steps])
def test_bad_timesteps_are_refused(make, timesteps, message):
    with pytest.raises(ValueError, match=message):
        make(COSINE, timesteps)


def test_bad_options_are_refused():
    with pytest.raises(ValueError, match="variance 'smal'; did you mean 'small'"):
        ddpm.ancestral_steps(COSINE, [3], "smal")
    with pytest.raises(ValueError, match="eta 1.5: it must be between 0 and 1"):
        ddpm.ddim_steps(COSINE, [3], eta=1.5)


# samplers against Gaussian data, for which the exact network is known


def final_std_error(count, std):
    """Relative error of the std after DDIM with the exact network; the map is linear, so one number carries it."""
    timesteps = ddpm.spaced(1000, count)
    abar = COSINE.alphas_bar[timesteps[0]]
    start = jnp.asarray([np.sqrt(abar * std**2 + 1 - abar)], jnp.float32)
    return float(sample(ddpm.ddim_steps(COSINE, timesteps), start, gaussian_network(std))[-1, 0] / std - 1)


@pytest.mark.parametrize("std", [0.3, 1.0, 2.0])
def test_ddim_converges_to_the_std_of_the_data(std):
    errors = [abs(final_std_error(count, std)) for count in (10, 100, 1000)]
    # first order: ten times the steps, about a tenth of the error
    assert errors[0] > 6 * errors[1] and errors[1] > 6 * errors[2] and errors[2] < 3e-3


def test_large_variance_keeps_unit_data_at_unit_variance():
    # for data N(0, 1) every x_t is N(0, 1), and the forward step's variance is exactly that of the reverse step
    n = 40_000
    steps = ddpm.ancestral_steps(COSINE, ddpm.spaced(1000, 20), "large")
    start = jax.random.normal(jax.random.fold_in(KEY, 99), (n,))
    states = np.asarray(sample(steps, start, gaussian_network(1.0), KEY))
    tolerance = 5 * np.sqrt(2 / n)  # the sample variance of n normal numbers has std sqrt(2 / n)
    assert np.abs(states[:-1].var(axis=1) - 1).max() < tolerance
    assert np.abs(states[-1].var() - COSINE.alphas_bar[0]) < tolerance


def test_small_variance_is_exact_for_a_single_datum():
    # for data that is always m, x at abar is N(sqrt(abar) m, 1 - abar): the posterior is the reverse step
    n, mean = 40_000, 0.8
    timesteps = ddpm.spaced(1000, 20)
    steps = ddpm.ancestral_steps(COSINE, timesteps, "small")
    noise = jax.random.normal(jax.random.fold_in(KEY, 99), (1, n))
    start = ddpm.add_noise(COSINE, jnp.full((1, n), mean), noise, timesteps[:1])[0]
    states = np.asarray(sample(steps, start, gaussian_network(0.0, mean), KEY))
    abar = COSINE.alphas_bar[timesteps[1:]]
    assert np.abs(states[:-1].var(axis=1) / (1 - abar) - 1).max() < 5 * np.sqrt(2 / n)
    assert np.abs((states[:-1].mean(axis=1) - np.sqrt(abar) * mean) / np.sqrt(1 - abar)).max() < 5 / np.sqrt(n)
    np.testing.assert_allclose(states[-1], mean, atol=1e-5)


def test_sampler_runs_under_jit_and_vmap():
    steps = ddpm.ancestral_steps(COSINE, ddpm.spaced(1000, 10))
    start = jnp.asarray(normal(3, 5), jnp.float32)

    def run(x):
        return sample(steps, x, gaussian_network(0.5), KEY)[-1]

    eager = jnp.stack([run(x) for x in start])
    np.testing.assert_allclose(jax.jit(jax.vmap(run))(start), eager, rtol=1e-5, atol=1e-6)
