"""Denoising diffusion with a discrete schedule (DDPM, arXiv 2006.11239; DDIM, arXiv 2010.02502).

Timesteps are indices 0 .. T-1 and noise grows with them: x_t = sqrt(abar_t) data + sqrt(1 - abar_t) noise. In the
literature's count that starts at one, index i is t = i + 1. A sampler is a table of coefficients, one row per step,
made on the host in float64, and `solver_step`, which a caller runs over the rows with `jax.lax.scan`.
"""

import dataclasses
import functools
from collections.abc import Sequence

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int

from jaxmm.diffusion.timesteps import expand
from jaxmm.errors import InputError, nearest


@dataclasses.dataclass(frozen=True, eq=False)
class Schedule:
    """How much noise each timestep has.

    Attributes:
      betas: float64 [T], the share of the variance that each step replaces by noise, each between 0 and 1.

    Raises:
      ValueError: if betas are not a list of numbers strictly between 0 and 1.
    """

    betas: Float[np.ndarray, "T"]

    def __post_init__(self):
        betas = np.array(self.betas, np.float64)
        if betas.ndim != 1 or not betas.size or not np.all((betas > 0) & (betas < 1)):
            raise ValueError(f"betas of shape {betas.shape}: a list of numbers strictly between 0 and 1 is needed")
        betas.flags.writeable = False
        object.__setattr__(self, "betas", betas)

    @property
    def steps(self) -> int:
        """The number of timesteps, T."""
        return len(self.betas)

    @functools.cached_property
    def alphas_bar(self) -> Float[np.ndarray, "T"]:
        """The share of the data in the variance at each timestep: prod_{s <= t} (1 - beta_s), float64."""
        return np.cumprod(1.0 - self.betas)


def cosine_schedule(steps: int = 1000, offset: float = 0.008, max_beta: float = 0.999) -> Schedule:
    """The cosine schedule (arXiv 2102.09672, 3.2).

    beta_i = min(1 - f((i + 1) / T) / f(i / T), max_beta) with f(u) = cos^2((u + offset) / (1 + offset) pi / 2).
    The cap makes abar of the last timestep far smaller than that of the one before, by 1000 at the defaults.
    """
    f = np.cos((np.arange(steps + 1) / steps + offset) / (1.0 + offset) * np.pi / 2) ** 2
    return Schedule(np.minimum(1.0 - f[1:] / f[:-1], max_beta))


def linear_schedule(steps: int = 1000, start: float = 1e-4, end: float = 2e-2) -> Schedule:
    """Betas that grow linearly from `start` to `end` (arXiv 2006.11239, 4)."""
    return Schedule(np.linspace(start, end, steps))


def spaced(steps: int, count: int, spacing: str = "leading") -> Int[np.ndarray, "count"]:
    """Choose at which of the schedule's `steps` timesteps a sampler of `count` steps evaluates the network.

    Args:
      spacing: "leading", i * (steps // count), which stays away from the last timesteps; or "iddpm",
        round(i (steps - 1) / (count - 1)), which includes the last one (arXiv 2102.09672, 4).

    Returns:
      int32, descending, down to 0.

    Raises:
      InputError: if there are fewer than one or more than `steps` evaluations, or if the spacing is unknown.
    """
    if not 1 <= count <= steps:
        raise InputError(f"{count} sampling steps: a schedule of {steps} timesteps allows 1 to {steps}")
    index = np.arange(count - 1, -1, -1)
    if spacing == "leading":
        return (index * (steps // count)).astype(np.int32)
    if spacing == "iddpm":
        return np.rint(index * (steps - 1) / max(count - 1, 1)).astype(np.int32)
    raise InputError(f"spacing {spacing!r}{nearest(spacing, ('leading', 'iddpm'))}")


def add_noise(
    schedule: Schedule, data: Float[Array, "*x"], noise: Float[Array, "*x"], t: Int[Array, "*b"]
) -> Float[Array, "*x"]:
    """Return x_t = sqrt(abar_t) data + sqrt(1 - abar_t) noise, float32, one timestep of 0 .. T-1 per example."""
    signal_level, noise_level = _levels(schedule, t, data)
    return signal_level * data + noise_level * noise


def predict_data(
    schedule: Schedule,
    x: Float[Array, "*x"],
    prediction: Float[Array, "*x"],
    t: Int[Array, "*b"],
    kind: str = "noise",
) -> Float[Array, "*x"]:
    """Return the data that a prediction at x_t stands for.

    Args:
      kind: what was predicted: "noise"; "data"; or "v", sqrt(abar) noise - sqrt(1 - abar) data (arXiv 2202.00512).

    Raises:
      InputError: if the kind is unknown.
    """
    signal_level, noise_level = _levels(schedule, t, x)
    if kind == "noise":
        return (x - noise_level * prediction) / signal_level
    if kind == "data":
        return jnp.asarray(prediction, jnp.float32)
    if kind == "v":
        return signal_level * x - noise_level * prediction
    raise _unknown_kind(kind)


def predict_noise(
    schedule: Schedule,
    x: Float[Array, "*x"],
    prediction: Float[Array, "*x"],
    t: Int[Array, "*b"],
    kind: str,
) -> Float[Array, "*x"]:
    """Return the noise that a prediction at x_t stands for; kinds as in `predict_data`."""
    signal_level, noise_level = _levels(schedule, t, x)
    if kind == "noise":
        return jnp.asarray(prediction, jnp.float32)
    if kind == "data":
        return (x - signal_level * prediction) / noise_level
    if kind == "v":
        return noise_level * x + signal_level * prediction
    raise _unknown_kind(kind)


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Steps:
    """The steps of a sampler, in the order in which they are taken: arrays of length n, for `jax.lax.scan`.

    A step predicts the data and mixes, with z fresh normal noise:

        data = (x - noise_level noise) / signal_level
        x_next = from_data data + from_x x + from_noise noise + from_fresh z

    or, the same with the data eliminated, which needs no large intermediate number:

        x_next = direct_x x + direct_noise noise + from_fresh z

    Attributes:
      timestep: int32, the timestep that the network is told. All others are float32.
    """

    timestep: Int[np.ndarray, "n"]
    signal_level: Float[np.ndarray, "n"]
    noise_level: Float[np.ndarray, "n"]
    from_data: Float[np.ndarray, "n"]
    from_x: Float[np.ndarray, "n"]
    from_noise: Float[np.ndarray, "n"]
    from_fresh: Float[np.ndarray, "n"]
    direct_x: Float[np.ndarray, "n"]
    direct_noise: Float[np.ndarray, "n"]


def ancestral_steps(schedule: Schedule, timesteps: Sequence[int], variance: str = "small") -> Steps:
    """Return the steps of DDPM's sampler at these timesteps, which need not be evenly spaced.

    Args:
      timesteps: descending; the state after the last one is the data.
      variance: of the fresh noise: "small" is that of the posterior given the data, "large" the forward step's own.
        The last step adds none.

    Raises:
      ValueError: if the timesteps do not descend or are not the schedule's.
      InputError: if the variance is unknown.
    """
    abar, abar_next = _abar_pairs(schedule, timesteps)
    beta = 1.0 - abar / abar_next
    posterior = beta * (1.0 - abar_next) / (1.0 - abar)
    variances = {"small": posterior, "large": np.where(abar_next < 1.0, beta, 0.0)}
    if variance not in variances:
        raise InputError(f"variance {variance!r}{nearest(variance, variances)}")
    return _steps(
        timesteps,
        abar,
        from_data=np.sqrt(abar_next) * beta / (1.0 - abar),
        from_x=np.sqrt(abar / abar_next) * (1.0 - abar_next) / (1.0 - abar),
        from_noise=np.zeros_like(abar),
        from_fresh=np.sqrt(variances[variance]),
    )


def ddim_steps(schedule: Schedule, timesteps: Sequence[int], eta: float = 0.0) -> Steps:
    """Return the steps of the DDIM sampler at these timesteps, which need not be evenly spaced.

    Args:
      timesteps: descending; the state after the last one is the data.
      eta: 0 adds no fresh noise, 1 is `ancestral_steps` with the small variance (unless the data is clipped: DDIM
        keeps the network's noise beside clipped data).

    Raises:
      ValueError: if the timesteps do not descend or are not the schedule's.
      InputError: if eta is not between 0 and 1.
    """
    if not 0.0 <= eta <= 1.0:
        raise InputError(f"eta {eta}: it must be between 0 and 1")
    abar, abar_next = _abar_pairs(schedule, timesteps)
    fresh = eta**2 * (1.0 - abar / abar_next) * (1.0 - abar_next) / (1.0 - abar)
    return _steps(
        timesteps,
        abar,
        from_data=np.sqrt(abar_next),
        from_x=np.zeros_like(abar),
        from_noise=np.sqrt(1.0 - abar_next - fresh),
        from_fresh=np.sqrt(fresh),
    )


def solver_step(
    step: Steps,
    x: Float[Array, "*b"],
    predicted_noise: Float[Array, "*b"],
    fresh_noise: Float[Array, "*b"] | float,
    clip: float | None = None,
) -> Float[Array, "*b"]:
    """Take one step of a sampler, DDPM or DDIM.

    Args:
      step: one row of `Steps` (scalars), as `jax.lax.scan` hands it out.
      fresh_noise: standard normal; 0.0 will do for DDIM with eta 0.
      clip: if given, the predicted data is clamped to [-clip, clip].

    Returns:
      the next state, float32.
    """
    x, noise = jnp.asarray(x, jnp.float32), jnp.asarray(predicted_noise, jnp.float32)
    fresh = step.from_fresh * jnp.asarray(fresh_noise, jnp.float32)
    if clip is None:
        return step.direct_x * x + step.direct_noise * noise + fresh
    data = jnp.clip((x - step.noise_level * noise) / step.signal_level, -clip, clip)
    return step.from_data * data + step.from_x * x + step.from_noise * noise + fresh


def _levels(schedule: Schedule, t: jax.Array, like: jax.Array) -> tuple[jax.Array, jax.Array]:
    """sqrt(abar_t) and sqrt(1 - abar_t) as float32, to broadcast over `like`."""
    levels = np.sqrt(schedule.alphas_bar), np.sqrt(1.0 - schedule.alphas_bar)
    return tuple(expand(jnp.take(jnp.asarray(level, jnp.float32), t), like) for level in levels)


def _unknown_kind(kind: str) -> InputError:
    return InputError(f"prediction {kind!r}{nearest(kind, ('noise', 'data', 'v'))}")


def _abar_pairs(schedule: Schedule, timesteps: Sequence[int]) -> tuple[np.ndarray, np.ndarray]:
    """abar at each timestep and at the one that follows it, float64; data follows the last."""
    t = np.asarray(timesteps)
    if t.ndim != 1 or not t.size or not np.issubdtype(t.dtype, np.integer) or np.any(np.diff(t) >= 0):
        raise ValueError(f"timesteps {timesteps}: a descending list of integers is needed")
    if t[0] >= schedule.steps or t[-1] < 0:
        raise ValueError(f"timesteps {t[0]} .. {t[-1]}: the schedule has 0 .. {schedule.steps - 1}")
    abar = schedule.alphas_bar[t]
    return abar, np.append(abar[1:], 1.0)


def _steps(timesteps: Sequence[int], abar: np.ndarray, **weights: np.ndarray) -> Steps:
    """Complete the table from abar and the weights (`from_...`), all float64, and round it to float32."""
    signal_level, noise_level = np.sqrt(abar), np.sqrt(1.0 - abar)
    table = {
        "signal_level": signal_level,
        "noise_level": noise_level,
        **weights,
        "direct_x": weights["from_x"] + weights["from_data"] / signal_level,
        "direct_noise": weights["from_noise"] - weights["from_data"] * noise_level / signal_level,
    }
    return Steps(np.asarray(timesteps, np.int32), **{name: value.astype(np.float32) for name, value in table.items()})
