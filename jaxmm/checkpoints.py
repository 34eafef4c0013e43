"""Our checkpoint on disk.

    FOLDER/model.json          the system, its sizes, how it writes documents, where it comes from
    FOLDER/tokenizer/          its tokenizer's files
    FOLDER/frozen/             parameters that are not trained, saved once
    FOLDER/checkpoints/STEP/   trainable, ema, optimizer (arrays), data (the state of the data iterator)

Everything needed to run the model is in the folder. A stack of layers is one leaf per layer on disk. Steps and files
are written beside their place and renamed into it: a killed process leaves the old one or the new one, and perhaps an
unfinished one beside it, which the next run removes.
"""

import contextlib
import json
import os
import re
import shutil
from collections.abc import Iterator, Mapping
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
# Orbax measures its timeouts by the wall clock, which may jump: none within a year, and no waiting for directories.
_WRITING = ocp.AsyncOptions(timeout_secs=365 * 86400, create_directories_asynchronously=False)
_UNFINISHED = re.compile(r".+\.orbax-checkpoint-tmp.*|\..+\.\d+")  # Orbax's names, and those of `write_text`


class Checkpoints:
    """The checkpoints of one run, saved while training goes on.

    Args:
      folder: of the run; it is made if it is not there.
      keep_last: how many of the latest steps stay.
      keep_every: besides them, each step that is a multiple of it stays; None keeps no other.

    Raises:
      InputError: if the folder cannot be written to.
    """

    def __init__(self, folder: str | os.PathLike, *, keep_last: int = 3, keep_every: int | None = None):
        self.folder = Path(folder).absolute()
        options = ocp.CheckpointManagerOptions(
            max_to_keep=keep_last, keep_period=keep_every, create=True, async_options=_WRITING
        )
        try:
            self._manager = ocp.CheckpointManager(self.folder / "checkpoints", options=options)
        except OSError as error:
            raise InputError(f"cannot write to {self.folder}: {error.strerror or error}") from error

    def latest(self) -> int | None:
        """The latest complete step, or None."""
        return self._manager.latest_step()

    def save(self, step: int, items: Mapping[str, Arrays], data: Any = None) -> None:
        """Begin to save one step: arrays by item ("trainable", "optimizer", ...) and the state of a Grain iterator.

        They are saved as they are now, whatever becomes of them before the step is on disk. What went wrong with the
        save before is raised here.
        """
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
          InputError: if the checkpoint holds other arrays (every mismatch is listed), or is damaged.
        """
        folder = self.folder / "checkpoints" / str(step)
        earlier = max((other for other in saved_steps(self.folder) if other < step), default=None)
        remedy = "start anew" if earlier is None else f"go on from step {earlier}"
        wanted = {name: _disk_form(arrays) for name, arrays in items.items()}
        args = {name: ocp.args.StandardRestore(arrays) for name, arrays in wanted.items()}
        if data is not None:
            import grain

            args["data"] = grain.checkpoint.CheckpointRestore(data)
        with _readable(folder, f"remove that folder to {remedy}"):
            problems = []
            for name, arrays in wanted.items():
                saved = _saved(folder / name) if (folder / name).exists() else None
                found = ["not in the checkpoint"] if saved is None else _mismatches(arrays, saved)
                problems += [f"{name}: {problem}" for problem in found]
            _refuse(folder, problems)
            restored = self._manager.restore(step, args=ocp.args.Composite(**args))
            return {name: _from_disk(restored[name], arrays) for name, arrays in items.items()}

    def check(self) -> None:
        """Raise what has gone wrong by now with a save that was begun."""
        self._manager.check_for_errors()

    def wait(self) -> None:
        """Wait until what was begun is on disk; raises what went wrong."""
        self._manager.wait_until_finished()

    def close(self) -> None:
        """Wait, end, and remove what a failed save left; it raises nothing: what went wrong is heard from `wait`."""
        try:
            self._manager.close()
        except Exception:  # the save's error, which is raised once: the threads have yet to be ended
            with contextlib.suppress(Exception):
                self._manager.close()
        with contextlib.suppress(OSError):
            remove_unfinished(self.folder)


def remove_unfinished(folder: Path) -> None:
    """Remove the steps and files that a killed process left half written; none may be at work in the folder."""
    for place in (folder, folder / "checkpoints", folder / "samples"):
        for path in place.iterdir() if place.is_dir() else ():
            if _UNFINISHED.fullmatch(path.name):
                shutil.rmtree(path) if path.is_dir() else path.unlink()


def save_arrays(folder: Path, arrays: Arrays) -> None:
    """Save arrays once, outside the steps (the frozen parameters)."""
    with ocp.StandardCheckpointer(async_options=_WRITING) as checkpointer:
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
      InputError: if the folder holds other arrays (every mismatch is listed), or is damaged.
    """
    if not folder.exists():
        raise InputError(f"{folder} holds no saved arrays")
    with _readable(folder, "take the folder from a copy, or another checkpoint"):
        wanted, saved = _disk_form(arrays), _saved(folder)
        if as_saved:
            formats = {path: saved[path].dtype if path in saved else x.dtype for path, x in wanted.items()}
            wanted = {p: jax.ShapeDtypeStruct(x.shape, formats[p], sharding=x.sharding) for p, x in wanted.items()}
        _refuse(folder, _mismatches(wanted, {p: saved[p] for p in saved if p in wanted} if partial else saved))
        restore_args = ocp.checkpoint_utils.construct_restore_args(wanted)
        with ocp.Checkpointer(ocp.PyTreeCheckpointHandler()) as checkpointer:
            args = ocp.args.PyTreeRestore(wanted, restore_args=restore_args, partial_restore=partial)
            return _from_disk(checkpointer.restore(folder.absolute(), args=args), arrays)


def write_text(path: Path, text: str) -> None:
    """Write a file beside its place and rename it into it."""
    beside = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        with beside.open("w") as file:
            file.write(text)
            file.flush()
            os.fsync(file.fileno())
        beside.replace(path)
    except OSError:
        with contextlib.suppress(OSError):
            beside.unlink()
        raise


def write_json(path: Path, content: Any) -> None:
    """Write a JSON file as `write_text` does."""
    path.parent.mkdir(parents=True, exist_ok=True)
    write_text(path, json.dumps(content, indent=2) + "\n")


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
    if missing := sorted({"system", "model"} - description.keys()):
        raise InputError(f"{path} cannot be read: it does not say {' and '.join(missing)}")
    return description


def has_steps(folder: str | os.PathLike) -> bool:
    """Whether a folder is a checkpoint with at least one complete step."""
    return bool(saved_steps(folder))


def latest_step(folder: str | os.PathLike) -> Path:
    """The folder of the latest complete step of a checkpoint.

    Raises:
      InputError: if there is none.
    """
    found = saved_steps(folder)
    if not found:
        raise InputError(f"{folder} has no saved step yet")
    return Path(folder) / "checkpoints" / str(found[-1])


def saved_steps(folder: str | os.PathLike) -> list[int]:
    """The complete steps of a checkpoint, in order."""
    steps = Path(folder) / "checkpoints"
    return sorted(int(path.name) for path in steps.iterdir() if path.name.isdigit()) if steps.is_dir() else []


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
    with ocp.StandardCheckpointer() as checkpointer:
        return checkpointer.metadata(folder.absolute()).item_metadata.tree


@contextlib.contextmanager
def _readable(folder: Path, remedy: str) -> Iterator[None]:
    """What goes wrong within means that the folder is damaged; Orbax and TensorStore raise errors of many kinds."""
    try:
        yield
    except InputError:
        raise
    except Exception as error:
        cause = str(error).strip() or type(error).__name__
        raise InputError(f"{folder} cannot be read, {remedy}: {cause.splitlines()[0][:300]}") from error


def _mismatches(wanted: Mapping[str, jax.ShapeDtypeStruct], saved: Mapping[str, Any]) -> list[str]:
    problems = [f"{path}: not in the checkpoint" for path in wanted.keys() - saved.keys()]
    problems += [f"{path}: not in this model" for path in saved.keys() - wanted.keys()]
    for path in wanted.keys() & saved.keys():
        ours, theirs = wanted[path], saved[path]
        if tuple(ours.shape) != tuple(theirs.shape) or np.dtype(ours.dtype) != np.dtype(theirs.dtype):
            problems.append(
                f"{path}: {theirs.dtype}{list(theirs.shape)} in the checkpoint, {ours.dtype}{list(ours.shape)} here"
            )
    return sorted(problems)


def _refuse(folder: Path, problems: list[str]) -> None:
    if problems:
        raise InputError(f"{folder} does not fit: " + "; ".join(problems))
