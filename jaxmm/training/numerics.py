"""What a step tells about its numbers, and what is done when they are none."""

from collections.abc import Mapping

import jax
import jax.numpy as jnp
import numpy as np
import optax

from jaxmm.errors import InputError, RunError, nearest

POLICIES = ("stop", "skip")


def group_norms(name: str, tree: Mapping[str, jax.Array]) -> dict[str, jax.Array]:
    """The global norm of a flat tree, and those of its groups: {name: ..., name/<first part of the path>: ...}."""
    groups: dict[str, list] = {}
    for path, x in tree.items():
        groups.setdefault(path.split(".")[0], []).append(x)
    norms = {f"{name}/{group}": optax.global_norm(members) for group, members in groups.items()}
    return {name: optax.global_norm(dict(tree)), **norms}


def choose(finite: jax.Array, new, old):
    """The new tree if the numbers of a step are finite, the old one otherwise."""
    return jax.tree.map(lambda a, b: jnp.where(finite, a, b), new, old)


class Guard:
    """Looks at the numbers of each step.

    A step whose losses or gradients are not finite changes nothing but the step's number (see `make_step`).

    Args:
      policy: "stop" ends the run; "skip" counts the step and goes on.
      most: with "skip", so many in a row end the run.
    """

    def __init__(self, policy: str, most: int):
        if policy not in POLICIES:
            raise InputError(f"config key 'nonfinite' must be one of {POLICIES}{nearest(policy, POLICIES)}")
        self.policy, self.most = policy, most
        self.skipped = self.in_a_row = 0

    def check(self, step: int, metrics: Mapping[str, jax.Array]) -> None:
        """Look at one step.

        Raises:
          RunError: if the run must end; it names the step, the loss terms and the groups of parameters.
        """
        if bool(metrics["finite"]):
            self.in_a_row = 0
            return
        self.skipped, self.in_a_row = self.skipped + 1, self.in_a_row + 1
        if self.policy == "stop" or self.in_a_row >= self.most:
            culprits = [f"{name} is {float(x)}" for name, x in sorted(metrics.items()) if _wrong(name, x)]
            repeated = f" ({self.in_a_row} steps in a row)" if self.in_a_row > 1 else ""
            raise RunError(f"step {step}: {', '.join(culprits)}{repeated}; the last checkpoint is intact")


def _wrong(name: str, x: jax.Array) -> bool:
    return name.startswith(("loss", "gradient_norm/")) and not np.isfinite(float(x))
