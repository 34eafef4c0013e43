"""The two objectives: what is added to the latents, what is predicted, and how times are drawn and solved.

DDPM feeds the integer index t, which grows with the noise (specification 5.2). The flow variant has t = 1 - sigma,
which falls with it, and feeds 1000 t (5.6). Nothing outside this file knows the direction.
"""

import dataclasses
from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from jaxmm.diffusion import ddpm, flow, timesteps
from jaxmm.errors import InputError, nearest
from jaxmm.models.transfusion.config import TransfusionConfig

Latents = Float[Array, "*b H W C"]
Predict = Callable[[Latents, Float[Array, "*b"]], Latents]


@dataclasses.dataclass(frozen=True)
class SolverOptions:
    """How images are drawn.

    Attributes:
      steps: evaluations of the network.
      solver: "ancestral" or "ddim" for DDPM, "euler" for flow; None takes the first of the objective.
      spacing: of the DDPM indices: "leading" or "iddpm".
      variance: of ancestral steps: "small" (posterior) or "large" (beta).
      clip: bound of the predicted clean latents, or None.
      guidance: scale w; 1 evaluates the conditional branch alone.
      remember: what text behind a drawn image sees: the "clean" image, read once more, or the "last" evaluation's.
    """

    steps: int = 250
    solver: str | None = None
    spacing: str = "leading"
    variance: str = "small"
    clip: float | None = None
    guidance: float = 5.0
    remember: str = "clean"


@dataclasses.dataclass(frozen=True)
class DDPM:
    """Noise prediction on the cosine schedule.

    Attributes:
      schedule: the levels of noise.
      clean: the index that stands for clean images.
      clamp: whether times above a limit are put at it, instead of drawing below it.
    """

    schedule: ddpm.Schedule
    clean: float = 0.0
    clamp: bool = False
    solvers = ("ancestral", "ddim")

    def draw_time(self, key: jax.Array, ids: Array, limit: Array) -> Float[Array, "*b"]:
        """Index of each image, uniform over the share `limit` of the schedule, or of all of it and clamped."""
        steps = self.schedule.steps

        def draw(key, limit):
            index = timesteps.uniform_index(key, (), steps, 1.0 if self.clamp else limit)
            return jnp.minimum(index, timesteps.count_below(steps, limit) - 1)

        keys = timesteps.per_example_keys(key, ids.reshape(-1))
        return jax.vmap(draw)(keys, limit.reshape(-1)).reshape(ids.shape).astype(jnp.float32)

    def add_noise(self, data: Latents, noise: Latents, t: Float[Array, "*b"]) -> Latents:
        return ddpm.add_noise(self.schedule, data, noise, t.astype(jnp.int32))

    def target(self, data: Latents, noise: Latents) -> Latents:
        return noise

    def network_time(self, t: Float[Array, "*b"]) -> Float[Array, "*b"]:
        return t

    def solve(self, predict: Predict, x: Latents, fresh_noise: Callable, options: SolverOptions, indices=None) -> tuple:
        """Denoise x from the first index to the last.

        Args:
          predict: (x, t) -> guided noise prediction.
          x: pure noise.
          fresh_noise: step number -> noise like x.
          options: the solver's options.
          indices: evaluation indices in descending order, instead of `options.spacing`.

        Returns:
          the clean latents, the state after each step [steps, *x.shape], and the times of the evaluations [steps].
        """
        if indices is None:
            indices = ddpm.spaced(self.schedule.steps, options.steps, options.spacing)
        if (options.solver or "ancestral") == "ancestral":
            steps = ddpm.ancestral_steps(self.schedule, indices, options.variance)
        else:
            steps = ddpm.ddim_steps(self.schedule, indices)

        def body(x, xs):
            step, number = xs
            t = jnp.full(x.shape[:-3], step.timestep, jnp.float32)
            x = ddpm.solver_step(step, x, predict(x, t), fresh_noise(number), options.clip)
            return x, x

        x, states = jax.lax.scan(body, x, (steps, jnp.arange(len(indices))))
        return x, states, jnp.asarray(steps.timestep, jnp.float32)


@dataclasses.dataclass(frozen=True)
class Flow:
    """Velocity prediction on straight paths: x_t = t data + (1 - t) noise, target data - noise.

    Attributes:
      time_scale: of what is fed to the network.
      clean: the t that stands for clean images.
      clamp: whether noise levels above a limit are put at it, instead of scaling all of them by it.
      logit: mean and standard deviation of the logit of the noise level; None draws it uniformly.
    """

    time_scale: float = 1000.0
    clean: float = 1.0
    clamp: bool = False
    logit: tuple[float, float] | None = None
    solvers = ("euler",)

    def draw_time(self, key: jax.Array, ids: Array, limit: Array) -> Float[Array, "*b"]:
        """t of each image; sigma = 1 - t keeps to [0, limit]."""
        if self.logit is None:
            sigma = timesteps.uniform_per_example(key, ids)
        else:
            keys = timesteps.per_example_keys(key, ids.reshape(-1))
            sigma = jax.vmap(lambda key: timesteps.logit_normal(key, (), *self.logit))(keys).reshape(ids.shape)
        return 1.0 - (jnp.minimum(sigma, limit) if self.clamp else sigma * limit)

    def add_noise(self, data: Latents, noise: Latents, t: Float[Array, "*b"]) -> Latents:
        return flow.interpolate(data, noise, 1.0 - t)

    def target(self, data: Latents, noise: Latents) -> Latents:
        return -flow.velocity(data, noise)

    def network_time(self, t: Float[Array, "*b"]) -> Float[Array, "*b"]:
        return self.time_scale * t

    def solve(self, predict: Predict, x: Latents, fresh_noise: Callable, options: SolverOptions, indices=None) -> tuple:
        """Uniform Euler steps from noise to data; arguments and results as in `DDPM.solve`."""
        sigmas = np.asarray(flow.euler_sigmas(options.steps), np.float32)

        def body(x, pair):
            sigma, following = pair
            velocity = -predict(x, jnp.full(x.shape[:-3], 1.0 - sigma, jnp.float32))
            x = flow.euler_step(x, velocity, sigma, following)
            return x, x

        x, states = jax.lax.scan(body, x, (sigmas[:-1], sigmas[1:]))
        return x, states, jnp.asarray(1.0 - sigmas[:-1])


def make_objective(c: TransfusionConfig) -> DDPM | Flow:
    """The objective that a config names."""
    clamp = c.noise_limiting == "clamp"
    if c.objective == "flow":
        logit = (c.logit_mean, c.logit_std) if c.time_distribution == "logit_normal" else None
        return Flow(clean=1.0 - c.given_time, clamp=clamp, logit=logit)
    schedule = ddpm.cosine_schedule(c.diffusion_steps, c.cosine_offset, c.max_beta)
    return DDPM(schedule, clean=float(int(c.given_time * c.diffusion_steps)), clamp=clamp)


def check_solver(objective: DDPM | Flow, options: SolverOptions) -> None:
    """Raise InputError if the options are none of this objective's."""
    if options.solver is not None and options.solver not in objective.solvers:
        raise InputError(f"solver {options.solver!r} is none of this checkpoint's: {', '.join(objective.solvers)}")
    if options.remember not in ("clean", "last"):
        raise InputError(f"remember {options.remember!r}{nearest(str(options.remember), ('clean', 'last'))}")
    if isinstance(objective, Flow) and options.clip is not None:
        raise InputError("clip bounds the clean latents of DDPM; this checkpoint predicts velocities")
    if options.steps < 1 or (isinstance(objective, DDPM) and options.steps > objective.schedule.steps):
        raise InputError(f"{options.steps} steps: there must be at least 1, and no more than the schedule has")
