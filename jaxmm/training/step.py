"""One training step."""

from collections.abc import Callable, Mapping

import jax
import jax.numpy as jnp
import optax

from jaxmm.layers.parameters import Blueprint, Params, Policy
from jaxmm.sequence import Batch
from jaxmm.training.state import State

Metrics = dict[str, jax.Array]
Step = Callable[[State, Batch, jax.Array], tuple[State, Metrics]]


def make_loss(blueprint: Blueprint, weights: Mapping[str, float], policy: Policy):
    """(trainable, frozen, batch, key) -> (total, {term: mean}); each term is one division of its global sums."""

    def loss(trainable, frozen, batch: Batch, key: jax.Array):
        model = blueprint.bind({**trainable, **frozen})
        terms, _ = model.loss(batch, key, policy.compute)
        means = {name: term.value() for name, term in terms.items()}
        return sum(weights[name] * mean for name, mean in means.items()), means

    return loss


def make_step(
    blueprint: Blueprint,
    optimizer: optax.GradientTransformation,
    weights: Mapping[str, float],
    policy: Policy,
    *,
    ema: float = 0.0,
) -> Step:
    """(state, batch, key) -> (state, metrics), to be jitted with the state donated.

    Args:
      blueprint: of the network.
      optimizer: as made by `make_optimizer`.
      weights: {loss term: its weight in the total}.
      policy: number formats.
      ema: decay of the averaged weights; 0 keeps none.
    """
    loss = make_loss(blueprint, weights, policy)

    def step(state: State, batch: Batch, key: jax.Array) -> tuple[State, Metrics]:
        key = jax.random.fold_in(key, state["step"])
        value_and_grad = jax.value_and_grad(loss, has_aux=True)
        (total, means), gradient = value_and_grad(state["trainable"], state["frozen"], batch, key)
        updates, optimizer_state = optimizer.update(gradient, state["optimizer"], state["trainable"])
        trainable = optax.apply_updates(state["trainable"], updates)
        metrics = {"loss": total} | {f"loss/{name}": mean for name, mean in means.items()}
        metrics |= {"gradient_norm": optax.global_norm(gradient), "update_norm": optax.global_norm(updates)}
        metrics |= fill(batch)
        state = {
            "trainable": trainable,
            "frozen": state["frozen"],
            "optimizer": optimizer_state,
            "ema": _average(trainable, state["ema"], ema, state["step"]) if ema else {},
            "step": state["step"] + 1,
        }
        return state, metrics

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
