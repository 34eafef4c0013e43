"""One training step."""

from collections.abc import Callable, Mapping

import jax
import jax.numpy as jnp
import optax

from jaxmm.layers.losses import Mean
from jaxmm.layers.parameters import Blueprint, Params, Policy
from jaxmm.sequence import Batch
from jaxmm.training.numerics import choose, group_norms
from jaxmm.training.state import State

Metrics = dict[str, jax.Array]
Step = Callable[[State, Batch, jax.Array], tuple[State, Metrics]]


def make_loss(blueprint: Blueprint, weights: Mapping[str, float], policy: Policy):
    """(trainable, frozen, batch, key, counts=None) -> (total, {term: mean}).

    Each term is its sum over its count: that of the batch, or the one in `counts`, {term: count}. Matrices are cast to
    the format of the policy where they are stored: what the devices send each other is in that format.
    """
    matrices = {path for path, spec in blueprint.parameters.items() if len(set(spec.axes) - {"layers"}) > 1}

    def bind(trainable: Params, frozen: Params):
        cast = {path: x.astype(policy.compute) if path in matrices else x for path, x in trainable.items()}
        return blueprint.bind({**cast, **frozen})

    def loss(trainable: Params, frozen: Params, batch: Batch, key: jax.Array, counts=None):
        terms, _ = bind(trainable, frozen).loss(batch, key, policy.compute)
        means = {name: Mean(term.sum, counts[name] if counts else term.count).value() for name, term in terms.items()}
        return sum(weights[name] * mean for name, mean in means.items()), means

    return loss


def make_gradient(blueprint: Blueprint, weights: Mapping[str, float], policy: Policy, microbatches: int = 1):
    """(trainable, frozen, batch, key) -> ((total, {term: mean}), gradient), as `jax.value_and_grad` of the loss.

    With microbatches the rows are read in that many turns, each of which spans all devices. Sums are divided by the
    counts of the whole batch, so the result is that of one big batch, also where token counts differ.
    """
    value_and_grad = jax.value_and_grad(make_loss(blueprint, weights, policy), has_aux=True)
    if microbatches == 1:
        return value_and_grad

    def count(model, batch, key):
        return {name: term.count for name, term in model.loss(batch, key, policy.compute)[0].items()}

    def gradient(trainable: Params, frozen: Params, batch: Batch, key: jax.Array):
        # row i goes to turn i % microbatches: the rows of one turn are spread over the devices as the batch is
        turns = jax.tree.map(lambda x: x.reshape(-1, microbatches, *x.shape[1:]).swapaxes(0, 1), batch)
        model = blueprint.bind({**trainable, **frozen})
        # only counts are used of this pass: the compiler drops the network
        counts = jax.tree.map(lambda x: jnp.sum(x, axis=0), jax.lax.map(lambda b: count(model, b, key), turns))

        def add(total, turn):
            return jax.tree.map(jnp.add, total, value_and_grad(trainable, frozen, turn, key, counts)), None

        one = jax.tree.map(lambda x: x[0], turns)
        shapes = jax.eval_shape(value_and_grad, trainable, frozen, one, key, counts)
        return jax.lax.scan(add, jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), shapes), turns)[0]

    return gradient


def make_step(
    blueprint: Blueprint,
    optimizer: optax.GradientTransformation,
    weights: Mapping[str, float],
    policy: Policy,
    *,
    ema: float = 0.0,
    microbatches: int = 1,
) -> Step:
    """(state, batch, key) -> (state, metrics), to be jitted with the state donated.

    A step whose loss or gradient is not finite leaves everything but the step's number as it was; `metrics["finite"]`
    tells.

    Args:
      blueprint: of the network.
      optimizer: as made by `make_optimizer`.
      weights: {loss term: its weight in the total}.
      policy: number formats.
      ema: decay of the averaged weights; 0 keeps none.
      microbatches: see `make_gradient`.
    """
    value_and_grad = make_gradient(blueprint, weights, policy, microbatches)

    def step(state: State, batch: Batch, key: jax.Array) -> tuple[State, Metrics]:
        key = jax.random.fold_in(key, state["step"])
        (total, means), gradient = value_and_grad(state["trainable"], state["frozen"], batch, key)
        updates, optimizer_state = optimizer.update(gradient, state["optimizer"], state["trainable"])
        trainable = optax.apply_updates(state["trainable"], updates)
        changed = {
            "trainable": trainable,
            "optimizer": optimizer_state,
            "ema": _average(trainable, state["ema"], ema, state["step"]) if ema else {},
        }
        metrics = {"loss": total} | {f"loss/{name}": mean for name, mean in means.items()} | fill(batch)
        metrics |= group_norms("gradient_norm", gradient) | group_norms("update_norm", updates)
        metrics["finite"] = jnp.isfinite(total) & jnp.isfinite(metrics["gradient_norm"])
        changed = choose(metrics["finite"], changed, {name: state[name] for name in changed})
        return {**changed, "frozen": state["frozen"], "step": state["step"] + 1}, metrics

    return step


def fill(batch: Batch) -> Metrics:
    """The number of tokens, and the share of each budget of the rows that is used."""
    used = {f"fill/tokens/{name}": jnp.mean(tokens.places >= 0) for name, tokens in batch.streams.items()}
    used |= {f"fill/images/{name}": jnp.mean(images.slot >= 0) for name, images in batch.images.items()}
    return used | {"tokens": sum(jnp.sum(tokens.places >= 0) for tokens in batch.streams.values())}


def _average(new: Params, old: Params, decay: float, step: jax.Array) -> Params:
    """Exponential average; in the first steps it decays faster, to forget the initial weights."""
    decay = jnp.minimum(decay, (1.0 + step) / (10.0 + step))
    return optax.incremental_update(new, old, 1.0 - decay)
