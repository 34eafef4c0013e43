"""Flow matching on straight paths (rectified flow, arXiv 2209.03003; arXiv 2210.02747).

sigma is the noise level: x = (1 - sigma) data + sigma noise, and the velocity dx/dsigma is noise - data. A sigma may be
one number or one per example, [*b] for x [*b, ...]. Results are float32.
"""

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from jaxmm.diffusion.timesteps import expand
from jaxmm.errors import InputError

Sigma = float | Float[Array, "*b"]


def interpolate(data: Float[Array, "*x"], noise: Float[Array, "*x"], sigma: Sigma) -> Float[Array, "*x"]:
    """Return x = (1 - sigma) data + sigma noise."""
    sigma = expand(sigma, data)
    return (1.0 - sigma) * data + sigma * noise


def velocity(data: Float[Array, "*b"], noise: Float[Array, "*b"]) -> Float[Array, "*b"]:
    """Return noise - data, what the network learns to predict."""
    return jnp.asarray(noise, jnp.float32) - jnp.asarray(data, jnp.float32)


def predict_data(x: Float[Array, "*x"], velocity: Float[Array, "*x"], sigma: Sigma) -> Float[Array, "*x"]:
    """Return the data that a velocity points at: x - sigma velocity."""
    return x - expand(sigma, x) * velocity


def shift_sigma(sigma: Float[Array, "*b"], shift: float) -> Float[Array, "*b"]:
    """Move noise levels for the resolution: shift sigma / (1 + (shift - 1) sigma) (arXiv 2403.03206, 5.3.2).

    Shift 1 changes nothing; a larger one gives more of the path to high noise. 0 and 1 stay where they are.
    """
    return shift * sigma / (1.0 + (shift - 1.0) * sigma)


def euler_sigmas(count: int, shift: float = 1.0) -> Float[np.ndarray, "count+1"]:
    """Return the count + 1 noise levels, from 1 down to 0, between which `count` Euler steps go.

    Raises:
      InputError: if there is no step, or if the shift is not positive.
    """
    if count < 1:
        raise InputError(f"{count} sampling steps: at least one is needed")
    if shift <= 0:
        raise InputError(f"a sigma shift of {shift}: it must be positive")
    return shift_sigma(np.arange(count, -1, -1) / count, shift).astype(np.float32)


def euler_step(
    x: Float[Array, "*x"], velocity: Float[Array, "*x"], sigma: Sigma, sigma_next: Sigma
) -> Float[Array, "*x"]:
    """Go from noise level sigma to sigma_next along the velocity."""
    return x + (expand(sigma_next, x) - expand(sigma, x)) * velocity
