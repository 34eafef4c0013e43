"""The train state {trainable, frozen, optimizer, ema, step}: a plain pytree, made where it belongs."""

from collections.abc import Callable, Collection, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import optax
from jax.sharding import Mesh

from jaxmm.checkpoints import Checkpoints, restore_arrays, save_arrays
from jaxmm.layers.parameters import Blueprint, Params, Policy
from jaxmm.paths import matches
from jaxmm.sharding import parameter_shardings, replicated

State = dict[str, Any]
Load = Callable[[dict[str, jax.ShapeDtypeStruct]], Params]


class StateMaker:
    """Knows the shape, the place and the names of everything in a train state.

    Args:
      blueprint: of the network.
      optimizer: of the trainable parameters.
      frozen: regular expressions over the paths of those that are not trained; a path matches itself.
      mesh: where the state lives.
      policy: number formats.
      ema: decay of the averaged weights; 0 keeps none.
      borrowed: paths of frozen parameters that another checkpoint holds; they are not saved.
    """

    def __init__(
        self,
        blueprint: Blueprint,
        optimizer: optax.GradientTransformation,
        frozen: Collection[str],
        mesh: Mesh,
        policy: Policy,
        ema: float = 0.0,
        borrowed: Collection[str] = (),
    ):
        self.blueprint, self.optimizer, self.mesh, self.policy, self.ema = blueprint, optimizer, mesh, policy, ema
        self.frozen = frozenset(path for path in blueprint.parameters if matches(frozen, path))
        self.borrowed = self.frozen.intersection(borrowed)
        self._shardings = parameter_shardings(blueprint.parameters, mesh)

    def init(self, key: jax.Array, given: Mapping[str, jax.Array] | None = None) -> State:
        """Draw a fresh state; parameters in `given` take its values instead."""
        wanted = self.abstract()
        parameters, placed = {**wanted["trainable"], **wanted["frozen"]}, {}
        for path, value in (given or {}).items():
            spec = parameters[path]
            placed[path] = jax.device_put(value.astype(spec.dtype), spec.sharding)
        shardings = jax.tree.map(lambda x: x.sharding, wanted)
        return jax.jit(self._draw, out_shardings=shardings, donate_argnums=1)(key, placed)

    def targets(self, paths: Collection[str]) -> dict[str, jax.ShapeDtypeStruct]:
        """The shapes and shardings of some parameters."""
        wanted = self.abstract()
        return {path: x for path, x in {**wanted["trainable"], **wanted["frozen"]}.items() if path in paths}

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
        frozen = {path: x for path, x in state["frozen"].items() if path not in self.borrowed}
        if frozen and not (checkpoints.folder / "frozen").exists():
            save_arrays(checkpoints.folder / "frozen", frozen)
        checkpoints.save(int(state["step"]), items, iterator)

    def restore(self, checkpoints: Checkpoints, step: int, iterator: Any, load_borrowed: Load | None = None) -> State:
        """Restore a step onto this mesh.

        Args:
          checkpoints: of the run.
          step: one that was saved.
          iterator: of the data; it takes up its saved state.
          load_borrowed: {path: shape with sharding} -> the borrowed parameters, in any format.

        Raises:
          InputError: if the checkpoint is of another model, with every mismatch.
        """
        wanted = self.abstract()
        items = {"trainable": wanted["trainable"], "optimizer": _flatten(wanted["optimizer"])}
        if wanted["ema"]:
            items["ema"] = wanted["ema"]
        restored = checkpoints.restore(step, items, iterator)
        own = {path: x for path, x in wanted["frozen"].items() if path not in self.borrowed}
        frozen = restore_arrays(checkpoints.folder / "frozen", own) if own else {}
        if self.borrowed:
            borrowed = load_borrowed({path: wanted["frozen"][path] for path in sorted(self.borrowed)})
            frozen |= {path: x.astype(wanted["frozen"][path].dtype) for path, x in borrowed.items()}
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

    def _draw(self, key: jax.Array, given: Params | None = None) -> State:
        params = {**self.blueprint.init(key), **(given or {})}  # what is given is not drawn: the compiler drops it
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
