"""What a run takes from a checkpoint, and what it adapts: the config keys `init` and `lora`."""

import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from ml_collections import ConfigDict

from jaxmm.checkpoints import has_steps, read_description
from jaxmm.convert import Saved
from jaxmm.convert.saved import Targets
from jaxmm.errors import InputError
from jaxmm.layers.lora import AdaptedBlueprint, LoRA
from jaxmm.layers.parameters import Blueprint, Params
from jaxmm.paths import matches, select
from jaxmm.sharding import Parameter


class Finetuning:
    """The parts that parameters of a run play. Without `init` and `lora` all are drawn, and trained unless frozen.

    A workdir with a saved step goes on from there: `init` is not looked at again.

    Args:
      config: of the run.
      blueprint: of its network.
      workdir: of the run.

    Attributes:
      blueprint: with adapters, if the run has any.
      frozen: paths that are not trained.
      borrowed: those of them that only the base checkpoint of a LoRA run holds.

    Raises:
      InputError: if the checkpoint cannot be read or does not fit, with every mismatch; for patterns that match
        nothing, and for adapters without a checkpoint to begin with.
    """

    def __init__(self, config: ConfigDict, blueprint: Blueprint, workdir: Path):
        self._config, self._workdir, self.blueprint = config, workdir, blueprint
        self._old = read_description(workdir) if has_steps(workdir) else None
        self._base, self._taken = None, frozenset()
        if self._old is None and config.init.checkpoint:
            self._base = Saved.open(config.init.checkpoint)
            self._taken = _compare(self._base, blueprint.parameters, config)
        fixed = tuple(config.optimizer.frozen)
        self.frozen = frozenset(path for path in blueprint.parameters if matches(fixed, path))
        self.borrowed, self._lora = frozenset(), {}
        if config.lora.rank:
            self._adapt(fixed)

    def _adapt(self, fixed: tuple[str, ...]) -> None:
        lora, known = self._config.lora, self.blueprint.parameters
        if self._base is None and self._old is None:
            raise InputError("config key 'lora.rank' adapts a trained model: give --init CHECKPOINT")
        if not lora.targets:
            raise InputError("config key 'lora.targets' names no matrix, for example ('.*(query|value).kernel',)")
        whole = select(lora.train, [path for path in known if not matches(fixed, path)], "lora.train")
        self.blueprint = AdaptedBlueprint(self.blueprint, LoRA(lora.rank, lora.alpha, tuple(lora.targets)), fixed)
        both = sorted(set(whole).intersection(self.blueprint.targets))
        if both:
            raise InputError(f"config keys 'lora.targets' and 'lora.train' both match {', '.join(both)}")
        self.frozen = frozenset(known) - set(whole)
        self.borrowed = self.frozen & self._taken if self._old is None else self.frozen - set(self._old["frozen"])
        paths = {"targets": sorted(self.blueprint.targets), "train": sorted(whole)}
        self._lora = {"rank": lora.rank, "alpha": lora.alpha} | paths

    @property
    def resumes(self) -> bool:
        """Whether the workdir has a saved step."""
        return self._old is not None

    @property
    def trainable(self) -> list[str]:
        """The paths that are trained."""
        return [path for path in self.blueprint.parameters if path not in self.frozen]

    def describe(self) -> dict[str, Any]:
        """What model.json says of it: "frozen", "init" of a run that began with a checkpoint, "lora" and "base"."""
        frozen = sorted(self.frozen - self.borrowed) if self._lora else list(self._config.optimizer.frozen)
        description = {"frozen": frozen} | ({"lora": self._lora} if self._lora else {})
        if self._old is not None:
            return description | {name: self._old[name] for name in ("init", "base") if name in self._old}
        if self._base is None:
            return description
        place = {"checkpoint": _short(self._base.folder, self._workdir), "step": self._base.step}
        description["init"] = place | {"load": list(self._config.init.load)}
        return description | ({"base": place} if self._lora else {})

    def load(self, targets: Targets) -> Params:
        """The parameters that a fresh run takes from its checkpoint, of those in `targets`."""
        taken = {path: x for path, x in targets.items() if path in self._taken}
        return self._base.load(taken) if taken else {}

    def load_borrowed(self, targets: Targets) -> Params:
        """The parameters that a LoRA run which goes on takes from its base.

        Raises:
          InputError: if the base is gone.
        """
        return Saved.open(self._workdir).base().load(targets)


def _compare(base: Saved, parameters: Mapping[str, Parameter], config: ConfigDict) -> frozenset[str]:
    """The paths that a run takes from a checkpoint; a codec that the config gives is not taken.

    Raises:
      InputError: with every difference between what is to be taken and what there is.
    """
    given = (r"codec\..*",) if config.codec else ()
    ours, theirs = (
        {path: list(spec.shape) for path, spec in known.items() if not matches(given, path)}
        for known in (parameters, base.blueprint.parameters)
    )
    taken, problems = select(config.init.load, ours | theirs, "config key 'init.load':"), []
    for path in sorted(taken):
        if path not in theirs:
            problems.append(f"{path}: not in the checkpoint")
        elif path not in ours:
            problems.append(f"{path}: not in this model")
        elif ours[path] != theirs[path]:
            problems.append(f"{path}: {theirs[path]} in the checkpoint, {ours[path]} here")
    if problems:
        raise InputError(
            f"{base.folder} does not fit this model: {'; '.join(problems)}; restrict config key 'init.load' to what is"
            " to be taken"
        )
    return frozenset(taken)


def _short(folder: Path, workdir: Path) -> str:
    """The folder from the workdir if the two lie side by side, so that both can be moved; from the root otherwise."""
    folder, workdir = folder.absolute(), workdir.absolute()
    beside = workdir.parent in folder.parents and ".." not in folder.parts + workdir.parts
    return os.path.relpath(folder, workdir) if beside else os.path.abspath(folder)
