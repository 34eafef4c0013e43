"""AdamW by regular expressions over parameter paths: what is frozen, what decays, what learns faster."""

import re
from collections.abc import Iterable, Sequence

import optax
from ml_collections import ConfigDict

from jaxmm.errors import InputError, nearest
from jaxmm.paths import matches

SCHEDULES = ("cosine", "linear", "constant")


def make_schedule(c: ConfigDict, steps: int) -> optax.Schedule:
    """Linear warm-up to `learning_rate`, then to `final_learning_rate` at the last step.

    Raises:
      InputError: for an unknown schedule, or a rate that is none.
    """
    for name in ("learning_rate", "final_learning_rate"):
        if not 0 <= c[name] < float("inf"):
            raise InputError(f"config key 'optimizer.{name}' must be a number of at least 0, not {c[name]}")
    if c.schedule not in SCHEDULES:
        raise InputError(f"unknown schedule {c.schedule!r}{nearest(c.schedule, SCHEDULES)}")
    rest = max(steps - c.warmup_steps, 1)
    if c.learning_rate == 0:
        return optax.constant_schedule(0.0)
    if c.schedule == "cosine":
        after = optax.cosine_decay_schedule(c.learning_rate, rest, c.final_learning_rate / c.learning_rate)
    elif c.schedule == "linear":
        after = optax.linear_schedule(c.learning_rate, c.final_learning_rate, rest)
    else:
        after = optax.constant_schedule(c.learning_rate)
    if not c.warmup_steps:
        return after
    # the first step must not be lost to a rate of zero
    warmup = lambda count: c.learning_rate * (count + 1) / c.warmup_steps  # noqa: E731
    return optax.join_schedules([warmup, after], [c.warmup_steps])


def make_optimizer(c: ConfigDict, steps: int, paths: Iterable[str]) -> optax.GradientTransformation:
    """Clipping by the global norm, Adam, decay, schedule, and multipliers of the learning rate.

    Args:
      c: `config.optimizer`.
      steps: length of the run.
      paths: of the trainable parameters.
    """
    paths = list(paths)
    _check_used([pattern for pattern, _ in c.multipliers], paths)
    decays = {path: not matches(c.no_decay, path) for path in paths}
    factors = {path: _first(c.multipliers, path) for path in paths}
    return optax.chain(
        optax.clip_by_global_norm(c.clip_norm) if c.clip_norm else optax.identity(),
        optax.scale_by_adam(c.b1, c.b2, c.eps),
        optax.add_decayed_weights(c.weight_decay, mask=decays),
        optax.scale_by_learning_rate(make_schedule(c, steps)),
        optax.stateless(lambda updates, _: {path: update * factors[path] for path, update in updates.items()}),
    )


def _first(table: Sequence[tuple[str, float]], path: str) -> float:
    return next((factor for pattern, factor in table if re.fullmatch(pattern, path)), 1.0)


def _check_used(patterns: Sequence[str], paths: Sequence[str]) -> None:
    for pattern in patterns:
        if not any(re.fullmatch(pattern, path) for path in paths):
            raise InputError(f"optimizer pattern {pattern!r} matches no trainable parameter")
