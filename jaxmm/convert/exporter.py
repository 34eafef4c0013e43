"""Writes a checkpoint as one folder that needs no other: adapters merged, averaged weights where the run has them."""

import itertools
import os
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import jax
import numpy as np
from jax.sharding import SingleDeviceSharding
from safetensors.numpy import save_file

from jaxmm.checkpoints import FORMAT, Checkpoints, write_json
from jaxmm.convert.saved import Saved, place
from jaxmm.errors import InputError, nearest
from jaxmm.paths import unstack_layers

SHARD_BYTES = 5 * 10**9
WEIGHTS = "model"


def export(checkpoint: str | os.PathLike, output: str | os.PathLike, format: str = "official") -> Path:
    """Write a checkpoint's parameters, its description and its tokenizer into a new folder.

    Args:
      checkpoint: a workdir of `jaxmm train`; its latest step is taken.
      output: the folder; it is written beside its place and renamed.
      format: "official", safetensors under the official keys of the system, or "jaxmm", a checkpoint.

    Returns:
      output.

    Raises:
      InputError: if the output holds something, or the checkpoint cannot be read.
    """
    if format not in FORMATS:
        raise InputError(f"unknown format {format!r}{nearest(format, FORMATS)}")
    output, saved = Path(os.path.abspath(output)), Saved.open(checkpoint)
    if output.exists() and (not output.is_dir() or any(output.iterdir())):
        raise InputError(f"{output} is there already and not empty: give another --output")
    beside = output.with_name(f".{output.name}.{os.getpid()}")
    try:
        try:
            beside.mkdir(parents=True)
            extra = FORMATS[format](saved, beside)
            shutil.copytree(saved.folder / "tokenizer", beside / "tokenizer")
            write_json(beside / "model.json", _describe(saved) | extra)
            beside.replace(output)
        finally:
            shutil.rmtree(beside, ignore_errors=True)
    except OSError as error:
        raise InputError(f"cannot export to {output}: {error.strerror or error}") from error
    return output


def _describe(saved: Saved) -> dict[str, Any]:
    kept = {name: saved.description[name] for name in ("system", "model", "draw_options") if name in saved.description}
    made = {"made_by": "jaxmm export", "exported": {"checkpoint": str(saved.folder.absolute())}}
    made["exported"]["step"] = saved.step
    return {"format": FORMAT, **kept, "frozen": [], **made}


def _write_jaxmm(saved: Saved, folder: Path) -> dict[str, Any]:
    params = saved.load(place(saved.blueprint.parameters, _host()))
    checkpoints = Checkpoints(folder)
    checkpoints.save(saved.step, {"trainable": params})
    checkpoints.close()
    return {}


def _write_official(saved: Saved, folder: Path) -> dict[str, Any]:
    """Safetensors files of at most SHARD_BYTES, or of one tensor; with an index if there are several."""
    shards, shard, size = [], {}, 0
    for key, tensor in _official_tensors(saved):
        if shard and size + tensor.nbytes > SHARD_BYTES:
            shards.append(_write_shard(folder, len(shards), shard))
            shard, size = {}, 0
        shard[key], size = tensor, size + tensor.nbytes
    shards.append(_write_shard(folder, len(shards), shard))
    if len(shards) == 1:
        (folder / "0").rename(folder / f"{WEIGHTS}.safetensors")
        return {"weights": "official"}
    where = {}
    for i, keys in enumerate(shards):
        name = f"{WEIGHTS}-{i + 1:05d}-of-{len(shards):05d}.safetensors"
        (folder / str(i)).rename(folder / name)
        where |= dict.fromkeys(keys, name)
    total = sum(itertools.chain.from_iterable(keys.values() for keys in shards))
    write_json(folder / f"{WEIGHTS}.safetensors.index.json", {"metadata": {"total_size": total}, "weight_map": where})
    return {"weights": "official"}


def _write_shard(folder: Path, number: int, tensors: dict[str, np.ndarray]) -> dict[str, int]:
    """Write one file and return {key: bytes}."""
    save_file(tensors, folder / str(number), metadata={"format": "pt"})
    return {key: tensor.nbytes for key, tensor in tensors.items()}


def _official_tensors(saved: Saved) -> Iterator[tuple[str, np.ndarray]]:
    """The tensors one after the other; of the parameters, one stack of layers at a time is in memory."""
    table, targets = saved.system.table(saved.config, saved.blueprint), place(saved.blueprint.parameters, _host())
    for path, target in targets.items():
        value = np.asarray(saved.load({path: target})[path])
        for flat, layer in unstack_layers({path: value}).items():
            yield table.write_one(flat, layer)


def _host() -> SingleDeviceSharding:
    return SingleDeviceSharding(jax.local_devices(backend="cpu")[0])


FORMATS: dict[str, Callable[[Saved, Path], dict[str, Any]]] = {"official": _write_official, "jaxmm": _write_jaxmm}
