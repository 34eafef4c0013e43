"""Our checkpoint on disk.

    FOLDER/model.json          the system, its sizes, how it writes documents, where it comes from
    FOLDER/tokenizer/          its tokenizer's files
    FOLDER/frozen/             parameters that are not trained, saved once
    FOLDER/checkpoints/STEP/   trainable, ema, optimizer (arrays), data (the state of the data iterator)

Everything needed to run the model is in the folder. A stack of layers is one leaf per layer on disk. Steps and files
are written beside their place and renamed into it: a killed process leaves the old one or the new one.
"""

import json
import os
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import orbax.checkpoint as ocp
from jax.sharding import NamedSharding, PartitionSpec

from jaxmm.errors import InputError
from jaxmm.paths import is_stacked, layer_path, unstack_layers

FORMAT = 1
Arrays = Mapping[str, Any]  # {path: array or jax.ShapeDtypeStruct}, stacks of layers as in memory


class Checkpoints:
    """The checkpoints of one run, saved while training goes on.

    Args:
      folder: of the run; it is made if it is not there.
      keep_last: how many of the latest steps stay.
      keep_every: besides them, each step that is a multiple of it stays; None keeps no other.
    """

    def __init__(self, folder: str | os.PathLike, *, keep_last: int = 3, keep_every: int | None = None):
        self.folder = Path(folder).absolute()
        options = ocp.CheckpointManagerOptions(max_to_keep=keep_last, keep_period=keep_every, create=True)
        self._manager = ocp.CheckpointManager(self.folder / "checkpoints", options=options)

    def latest(self) -> int | None:
        """The latest complete step, or None."""
        return self._manager.latest_step()

    def save(self, step: int, items: Mapping[str, Arrays], data: Any = None) -> None:
        """Begin to save one step: arrays by item ("trainable", "optimizer", ...) and the state of a Grain iterator."""
        args = {name: ocp.args.StandardSave(_to_disk(arrays)) for name, arrays in items.items()}
        if data is not None:
            import grain

            args["data"] = grain.checkpoint.CheckpointSave(data)
        self._manager.save(step, args=ocp.args.Composite(**args), force=True)

    def restore(self, step: int, items: Mapping[str, Arrays], data: Any = None) -> dict[str, dict[str, jax.Array]]:
        """Restore one step.

        Args:
          step: one that was saved.
          items: {item: {path: jax.ShapeDtypeStruct}} with the shardings wanted now, which need not be those of then.
          data: the iterator that takes up its saved state.

        Raises:
          InputError: if the checkpoint holds other arrays; every mismatch is listed.
        """
        folder = self.folder / "checkpoints" / str(step)
        for name, arrays in items.items():
            _compare(folder / name, _disk_form(arrays), _saved(folder / name))
        args = {name: ocp.args.StandardRestore(_disk_form(arrays)) for name, arrays in items.items()}
        if data is not None:
            import grain

            args["data"] = grain.checkpoint.CheckpointRestore(data)
        restored = self._manager.restore(step, args=ocp.args.Composite(**args))
        return {name: _from_disk(restored[name], arrays) for name, arrays in items.items()}

    def wait(self) -> None:
        """Wait until what was begun is on disk; raises what went wrong."""
        self._manager.wait_until_finished()

    def close(self) -> None:
        """Wait and end."""
        self._manager.close()


def save_arrays(folder: Path, arrays: Arrays) -> None:
    """Save arrays once, outside the steps (the frozen parameters)."""
    with ocp.StandardCheckpointer() as checkpointer:
        checkpointer.save(folder.absolute(), _to_disk(arrays), force=True)


def restore_arrays(
    folder: Path, arrays: Arrays, *, as_saved: bool = False, partial: bool = False
) -> dict[str, jax.Array]:
    """Restore what `save_arrays` saved, or one item of a step.

    Args:
      folder: of the arrays.
      arrays: {path: jax.ShapeDtypeStruct} with the shardings wanted.
      as_saved: take the number formats of the file instead of those of `arrays`.
      partial: the folder may hold more arrays; they are not read.

    Raises:
      InputError: if the folder holds other arrays; every mismatch is listed.
    """
    wanted, saved = _disk_form(arrays), _saved(folder)
    if as_saved:
        formats = {path: saved[path].dtype if path in saved else x.dtype for path, x in wanted.items()}
        wanted = {p: jax.ShapeDtypeStruct(x.shape, formats[p], sharding=x.sharding) for p, x in wanted.items()}
    _compare(folder, wanted, {path: saved[path] for path in saved if path in wanted} if partial else saved)
    restore_args = ocp.checkpoint_utils.construct_restore_args(wanted)
    with ocp.Checkpointer(ocp.PyTreeCheckpointHandler()) as checkpointer:
        args = ocp.args.PyTreeRestore(wanted, restore_args=restore_args, partial_restore=partial)
        return _from_disk(checkpointer.restore(folder.absolute(), args=args), arrays)


def write_json(path: Path, content: Any) -> None:
    """Write a JSON file beside its place and rename it into it."""
    path.parent.mkdir(parents=True, exist_ok=True)
    beside = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        beside.write_text(json.dumps(content, indent=2) + "\n")
        beside.replace(path)
    finally:
        beside.unlink(missing_ok=True)


def write_description(folder: Path, description: Mapping[str, Any], tokenizer: Any) -> None:
    """Write model.json, and the tokenizer's files (`tokenizer.save(folder)`) unless they are there."""
    if not (folder / "tokenizer").exists():
        beside = folder / f".tokenizer.{os.getpid()}"
        shutil.rmtree(beside, ignore_errors=True)
        tokenizer.save(beside)
        beside.replace(folder / "tokenizer")
    write_json(folder / "model.json", {"format": FORMAT, **description})


def read_description(folder: str | os.PathLike) -> dict[str, Any]:
    """Read model.json.

    Raises:
      InputError: if the folder is no checkpoint.
    """
    path = Path(folder) / "model.json"
    try:
        description = json.loads(path.read_text())
        version = description["format"]
    except FileNotFoundError as error:
        raise InputError(f"{folder} is no checkpoint: it has no model.json") from error
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise InputError(f"{path} cannot be read: {error}") from error
    if version != FORMAT:
        raise InputError(f"{path} has format {version}; this version of jaxmm reads format {FORMAT}")
    return description


def has_steps(folder: str | os.PathLike) -> bool:
    """Whether a folder is a checkpoint with at least one complete step."""
    return any(path.name.isdigit() for path in (Path(folder) / "checkpoints").glob("*"))


def latest_step(folder: str | os.PathLike) -> Path:
    """The folder of the latest complete step of a checkpoint.

    Raises:
      InputError: if there is none.
    """
    steps = Path(folder) / "checkpoints"
    found = [int(path.name) for path in steps.glob("*") if path.name.isdigit()] if steps.is_dir() else []
    if not found:
        raise InputError(f"{folder} has no saved step yet")
    return steps / str(max(found))


def _to_disk(arrays: Arrays) -> dict[str, jax.Array]:
    return unstack_layers(arrays)


def _disk_form(arrays: Arrays) -> dict[str, jax.ShapeDtypeStruct]:
    """The shapes and shardings of the leaves on disk."""
    leaves = {}
    for path, x in arrays.items():
        if not is_stacked(path):
            leaves[path] = jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=x.sharding)
            continue
        sharding = x.sharding
        if isinstance(sharding, NamedSharding):
            sharding = NamedSharding(sharding.mesh, PartitionSpec(*sharding.spec[1:]))
        for i in range(x.shape[0]):
            leaves[layer_path(path, i)] = jax.ShapeDtypeStruct(x.shape[1:], x.dtype, sharding=sharding)
    return leaves


def _from_disk(leaves: Mapping[str, jax.Array], arrays: Arrays) -> dict[str, jax.Array]:
    """Stack the layers again, each stack where it belongs."""
    result = {}
    for path, x in arrays.items():
        if is_stacked(path):
            layers = [leaves[layer_path(path, i)] for i in range(x.shape[0])]
            result[path] = jax.jit(lambda *layers: jnp.stack(layers), out_shardings=x.sharding)(*layers)
        else:
            result[path] = leaves[path]
    return result


def _saved(folder: Path) -> Mapping[str, Any]:
    """Shapes and number formats of the arrays in a folder."""
    try:
        with ocp.StandardCheckpointer() as checkpointer:
            return checkpointer.metadata(folder.absolute()).item_metadata.tree
    except (FileNotFoundError, ValueError, AttributeError) as error:
        raise InputError(f"{folder} holds no saved arrays") from error


def _compare(folder: Path, wanted: Mapping[str, jax.ShapeDtypeStruct], saved: Mapping[str, Any]) -> None:
    problems = [f"{path}: not in the checkpoint" for path in wanted.keys() - saved.keys()]
    problems += [f"{path}: not in this model" for path in saved.keys() - wanted.keys()]
    for path in wanted.keys() & saved.keys():
        ours, theirs = wanted[path], saved[path]
        if tuple(ours.shape) != tuple(theirs.shape) or np.dtype(ours.dtype) != np.dtype(theirs.dtype):
            problems.append(
                f"{path}: {theirs.dtype}{list(theirs.shape)} in the checkpoint, {ours.dtype}{list(ours.shape)} here"
            )
    if problems:
        raise InputError(f"{folder} does not fit: " + "; ".join(sorted(problems)))
