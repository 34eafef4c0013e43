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
from jaxmm.errors import InputError
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
    """

    steps: int = 250
    solver: str | None = None
    spacing: str = "leading"
    variance: str = "small"
    clip: float | None = None
    guidance: float = 5.0


@dataclasses.dataclass(frozen=True)
class DDPM:
    """Noise prediction on the cosine schedule."""

    schedule: ddpm.Schedule
    solvers = ("ancestral", "ddim")
    clean = 0.0

    def draw_time(self, key: jax.Array, ids: Array, limit: Array) -> Float[Array, "*b"]:
        """Index of each image, uniform over the share `limit` of the schedule."""
        keys = timesteps.per_example_keys(key, ids.reshape(-1))
        draw = jax.vmap(lambda key, limit: timesteps.uniform_index(key, (), self.schedule.steps, limit))
        return draw(keys, limit.reshape(-1)).reshape(ids.shape).astype(jnp.float32)

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
          the clean latents and the state after each step [steps, *x.shape].
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

        return jax.lax.scan(body, x, (steps, jnp.arange(len(indices))))


@dataclasses.dataclass(frozen=True)
class Flow:
    """Velocity prediction on straight paths: x_t = t data + (1 - t) noise, target data - noise."""

    time_scale: float = 1000.0
    solvers = ("euler",)
    clean = 1.0

    def draw_time(self, key: jax.Array, ids: Array, limit: Array) -> Float[Array, "*b"]:
        """t of each image; sigma = 1 - t is uniform over [0, limit)."""
        return 1.0 - timesteps.uniform_per_example(key, ids) * limit

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

        return jax.lax.scan(body, x, (sigmas[:-1], sigmas[1:]))


def make_objective(c: TransfusionConfig) -> DDPM | Flow:
    """The objective that a config names."""
    if c.objective == "flow":
        return Flow()
    return DDPM(ddpm.cosine_schedule(c.diffusion_steps, c.cosine_offset, c.max_beta))


def check_solver(objective: DDPM | Flow, options: SolverOptions) -> None:
    """Raise InputError if the options are none of this objective's."""
    if options.solver is not None and options.solver not in objective.solvers:
        raise InputError(f"solver {options.solver!r} is none of this checkpoint's: {', '.join(objective.solvers)}")
    if isinstance(objective, Flow) and options.clip is not None:
        raise InputError("clip bounds the clean latents of DDPM; this checkpoint predicts velocities")
    if options.steps < 1 or (isinstance(objective, DDPM) and options.steps > objective.schedule.steps):
        raise InputError(f"{options.steps} steps: there must be at least 1, and no more than the schedule has")
