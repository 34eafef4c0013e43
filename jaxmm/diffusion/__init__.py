"""The mathematics of noise, without networks. Use it by module: `ddpm.add_noise`, `flow.velocity`.

- `ddpm`: discrete schedules, noising, conversions of predictions, ancestral and DDIM solvers.
- `flow`: straight paths from data to noise, and their Euler solver.
- `timesteps`: which noise levels a training step draws, and noise that belongs to an example.
- `guidance`: how two predictions are combined when sampling.

Everywhere noise grows with time: index 0 of a schedule has the least noise, and sigma is 0 for data and 1 for noise.
Arithmetic is float32; tables are made in float64 on the host.
"""

from jaxmm.diffusion import ddpm, flow, guidance, timesteps

__all__ = ["ddpm", "flow", "guidance", "timesteps"]
