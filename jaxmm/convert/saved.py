"""Reads the parameters of a checkpoint folder, whole or in part, as inference uses them.

A LoRA run holds only what it has trained. Its model.json says what stands upon what:

    "lora": {"rank", "alpha", "targets": adapted paths, "train": paths that are trained whole}
    "base": {"checkpoint": folder, from here or from the root, "step"}
    "frozen": paths in frozen/: what was neither trained nor taken from the base
"""

import dataclasses
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jax
from jax.sharding import Mesh, Sharding

from jaxmm.checkpoints import latest_step, read_description, restore_arrays
from jaxmm.errors import InputError
from jaxmm.layers.lora import AdaptedBlueprint, LoRA, merge
from jaxmm.layers.parameters import Blueprint, Params
from jaxmm.models import System, get_system
from jaxmm.paths import matches
from jaxmm.sharding import Parameter, parameter_shardings

Targets = Mapping[str, jax.ShapeDtypeStruct]  # with the shardings wanted; the formats are those of the files


@dataclasses.dataclass(frozen=True)
class Saved:
    """The model of a checkpoint folder at one step.

    Attributes:
      folder: the checkpoint.
      step: its number.
      description: the content of model.json.
      system: of the model.
      config: its sizes.
      blueprint: of the network, without adapters.
    """

    folder: Path
    step: int
    description: Mapping[str, Any]
    system: System
    config: Any
    blueprint: Blueprint

    @classmethod
    def open(cls, folder: str | os.PathLike, step: int | None = None) -> "Saved":
        """Open a folder at a step, by default the latest.

        Raises:
          InputError: if it is no checkpoint, or the step is not there.
        """
        folder, description = Path(folder), read_description(folder)
        if "weights" in description:
            raise InputError(
                f"{folder} holds official weights (jaxmm export); export the run with --format jaxmm to load it"
            )
        latest = int(latest_step(folder).name)
        if step is not None and not (folder / "checkpoints" / str(step)).is_dir():
            raise InputError(f"{folder} has no step {step} (its latest is {latest})")
        system = get_system(description["system"])
        config = system.config.from_dict(description["model"])
        return cls(folder, latest if step is None else step, description, system, config, system.blueprint(config))

    def load(self, targets: Targets) -> Params:
        """Restore some of the parameters, or all, straight to where they belong.

        They are the averaged ones where the run has any; the adapters of a LoRA run are merged.

        Args:
          targets: {path: shape with sharding}.

        Raises:
          InputError: if the files do not fit the description, or the base of a LoRA run is gone.
        """
        partial = len(targets) < len(self.blueprint.parameters)
        if "lora" not in self.description:
            frozen = {path for path in targets if matches(self.description["frozen"], path)}
            return self._restore(targets, frozen, partial)
        adapted = self._adapted()
        train, frozen = set(self.description["lora"]["train"]), set(self.description["frozen"])
        base = {path: x for path, x in targets.items() if path not in train | frozen}
        params = self.base().load(base) if base else {}
        wanted = {path: adapted.parameters[path] for path in adapted.adapters if path.rpartition(".")[0] in targets}
        own = {path: x for path, x in targets.items() if path not in base}
        if wanted:
            sharding = next(iter(targets.values())).sharding
            own |= place(wanted, getattr(sharding, "mesh", sharding))
        return merge(params | self._restore(own, frozen & own.keys(), partial), adapted.lora)

    def base(self) -> "Saved":
        """The checkpoint whose parameters this LoRA run adapts.

        Raises:
          InputError: if it is gone.
        """
        base = self.description["base"]
        folder, step = Path(os.path.normpath(self.folder / base["checkpoint"])), base["step"]
        try:
            return Saved.open(folder, step)
        except InputError as error:
            raise InputError(
                f"{self.folder} holds adapters of step {step} of {folder}, which is gone: {error}; bring it back"
                " (keep_last and keep_every of a run say which steps stay; what `jaxmm export` writes needs no base)"
            ) from error

    def _adapted(self) -> AdaptedBlueprint:
        lora = self.description["lora"]
        return AdaptedBlueprint(self.blueprint, LoRA(lora["rank"], lora["alpha"], tuple(lora["targets"])))

    def _restore(self, targets: Targets, frozen: set[str], partial: bool) -> Params:
        """Parameters of this folder; `frozen` are those that lie in frozen/."""
        step, params = self.folder / "checkpoints" / str(self.step), {}
        item = step / "ema" if (step / "ema").exists() else step / "trainable"
        for folder, paths in ((item, targets.keys() - frozen), (self.folder / "frozen", frozen)):
            if paths:
                some = {path: targets[path] for path in sorted(paths)}
                params |= restore_arrays(folder, some, as_saved=True, partial=partial)
        return params


def place(parameters: Mapping[str, Parameter], where: Mesh | Sharding) -> dict[str, jax.ShapeDtypeStruct]:
    """Targets of `Saved.load`: cut over a mesh, or all with one sharding."""
    shardings = parameter_shardings(parameters, where) if isinstance(where, Mesh) else dict.fromkeys(parameters, where)
    return {p: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=shardings[p]) for p, x in parameters.items()}
