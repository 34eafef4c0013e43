"""Eight simulated devices on the CPU, set before JAX starts; hypothesis draws the same cases in every run."""

import jax
from hypothesis import settings

jax.config.update("jax_platforms", "cpu")
jax.config.update("jax_num_cpu_devices", 8)
settings.register_profile("repeatable", deadline=None, derandomize=True)
settings.load_profile("repeatable")
