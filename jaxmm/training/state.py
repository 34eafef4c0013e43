"""The train state {trainable, frozen, optimizer, ema, step}: a plain pytree, made where it belongs."""

from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.sharding import Mesh

from jaxmm.checkpoints import Checkpoints, restore_arrays, save_arrays
from jaxmm.layers.parameters import Blueprint, Params, Policy
from jaxmm.paths import matches
from jaxmm.sharding import parameter_shardings, replicated

State = dict[str, Any]


class StateMaker:
    """Knows the shape, the place and the names of everything in a train state.

    Args:
      blueprint: of the network.
      optimizer: of the trainable parameters.
      frozen: regular expressions over the paths of those that are not trained.
      mesh: where the state lives.
      policy: number formats.
      ema: decay of the averaged weights; 0 keeps none.
    """

    def __init__(
        self,
        blueprint: Blueprint,
        optimizer: optax.GradientTransformation,
        frozen: tuple[str, ...],
        mesh: Mesh,
        policy: Policy,
        ema: float = 0.0,
    ):
        self.blueprint, self.optimizer, self.mesh, self.policy, self.ema = blueprint, optimizer, mesh, policy, ema
        self.frozen = frozenset(path for path in blueprint.parameters if matches(frozen, path))
        self._shardings = parameter_shardings(blueprint.parameters, mesh)

    def init(self, key: jax.Array, given: Mapping[str, jax.Array] | None = None) -> State:
        """Draw a fresh state; parameters in `given` take its values instead."""
        shardings = jax.tree.map(lambda x: x.sharding, self.abstract())
        state = jax.jit(self._draw, out_shardings=shardings)(key)
        for path, value in (given or {}).items():
            part = "frozen" if path in self.frozen else "trainable"
            old = state[part][path]
            # from the host, so that each device receives its own part only
            state[part][path] = jax.device_put(np.asarray(value).astype(old.dtype), old.sharding)
            if state["ema"] and path in state["ema"]:
                state["ema"][path] = jnp.copy(state[part][path])
        return state

    def abstract(self) -> State:
        """The state as shapes with shardings."""
        shapes = jax.eval_shape(lambda: self._draw(jax.random.key(0)))

        def place(path, leaf):
            names = [entry.key for entry in path if isinstance(entry, jax.tree_util.DictKey)]
            sharding = self._shardings.get(names[-1]) if names else None
            return jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=sharding or replicated(self.mesh))

        return jax.tree_util.tree_map_with_path(place, shapes)

    def save(self, checkpoints: Checkpoints, state: State, iterator: Any) -> None:
        """Begin to save a step."""
        items = {"trainable": state["trainable"], "optimizer": _flatten(state["optimizer"])}
        if state["ema"]:
            items["ema"] = state["ema"]
        if state["frozen"] and not (checkpoints.folder / "frozen").exists():
            save_arrays(checkpoints.folder / "frozen", state["frozen"])
        checkpoints.save(int(state["step"]), items, iterator)

    def restore(self, checkpoints: Checkpoints, step: int, iterator: Any) -> State:
        """Restore a step onto this mesh.

        Raises:
          InputError: if the checkpoint is of another model, with every mismatch.
        """
        wanted = self.abstract()
        items = {"trainable": wanted["trainable"], "optimizer": _flatten(wanted["optimizer"])}
        if wanted["ema"]:
            items["ema"] = wanted["ema"]
        restored = checkpoints.restore(step, items, iterator)
        frozen = restore_arrays(checkpoints.folder / "frozen", wanted["frozen"]) if wanted["frozen"] else {}
        optimizer = jax.tree.unflatten(
            jax.tree.structure(wanted["optimizer"]), [restored["optimizer"][name] for name in items["optimizer"]]
        )
        return {
            "trainable": restored["trainable"],
            "frozen": frozen,
            "optimizer": optimizer,
            "ema": restored.get("ema", {}),
            "step": jax.device_put(jnp.int32(step), replicated(self.mesh)),
        }

    def _draw(self, key: jax.Array) -> State:
        params = self.blueprint.init(key)
        trainable = {path: x.astype(self.policy.params) for path, x in params.items() if path not in self.frozen}
        return {
            "trainable": trainable,
            "frozen": {path: x.astype(self.policy.compute) for path, x in params.items() if path in self.frozen},
            "optimizer": self.optimizer.init(trainable),
            "ema": dict(trainable) if self.ema else {},
            "step": jnp.zeros((), jnp.int32),
        }


def weights_of(state: State) -> Params:
    """The parameters that inference uses: the averaged ones where there are any, and the frozen ones."""
    return {**(state["ema"] or state["trainable"]), **state["frozen"]}


def _flatten(tree: Any) -> dict[str, Any]:
    """{dotted path: leaf}, in the order of the leaves."""
    leaves, _ = jax.tree_util.tree_flatten_with_path(tree)
    return {jax.tree_util.keystr(path, simple=True, separator="."): leaf for path, leaf in leaves}
