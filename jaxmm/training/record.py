"""What a run was started with: WORKDIR/starts.jsonl, one line for each start and each resumption."""

import dataclasses
import importlib.metadata
import json
import platform
import re
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
from jax.sharding import Mesh
from ml_collections import ConfigDict

import jaxmm

DIFF_LIMIT = 1 << 20  # bytes of an uncommitted difference that are kept


@dataclasses.dataclass(frozen=True)
class Origin:
    """Where a config comes from.

    Attributes:
      config: "path.py:argument", or "" for one that was made in Python.
      overrides: "a.b=value" each.
    """

    config: str = ""
    overrides: Sequence[str] = ()


def record_start(
    workdir: Path, config: ConfigDict, origin: Origin, mesh: Mesh, step: int, unsharded: Mapping[str, int]
) -> None:
    """Append a line to starts.jsonl.

    Args:
      workdir: of the run.
      config: with all overrides applied; it is recorded whole.
      origin: its file and the overrides.
      mesh: the devices.
      step: the step that the run goes on from.
      unsharded: {path: size} of the parameters that every device holds whole.
    """
    line = {
        "time": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
        "step": step,
        "command": sys.argv,
        "config_file": origin.config,
        "overrides": list(origin.overrides),
        "config": config.to_dict(),
        "packages": package_versions(),
        "python": platform.python_version(),
        "platform": platform.platform(),
        "devices": {"kind": mesh.devices.flat[0].device_kind, "count": mesh.size, "processes": jax.process_count()},
        "mesh": dict(mesh.shape),
        "unsharded": dict(unsharded),
        "git": git_states([Path(jaxmm.__file__).parent, Path(origin.config.partition(":")[0]).absolute().parent]),
    }
    with (workdir / "starts.jsonl").open("a") as file:
        file.write(json.dumps(line, default=str) + "\n")


def package_versions() -> dict[str, str]:
    """{package: version} of jaxmm and what it requires; what is not installed is left out."""
    versions = {"jaxmm": jaxmm.__version__}
    try:
        required = importlib.metadata.requires("jaxmm") or []
    except importlib.metadata.PackageNotFoundError:
        required = ["jax", "flax", "optax", "orbax-checkpoint", "grain", "numpy"]
    for name in ["jaxlib", *(re.split(r"[^\w.-]", line)[0] for line in required)]:
        try:
            versions[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            continue
    return versions


def git_states(folders: Sequence[Path]) -> dict[str, dict[str, Any]]:
    """The checkouts that folders belong to, and what was changed there since the last commit.

    Returns:
      {root of the checkout: {"commit", "changed": paths, "diff": against the commit, cut after 1 MiB}}.
    """
    states = {}
    for root in {_git(folder, "rev-parse", "--show-toplevel").strip() for folder in folders} - {""}:
        changed = _git(Path(root), "status", "--porcelain").splitlines()
        states[root] = {
            "commit": _git(Path(root), "rev-parse", "HEAD").strip(),
            "changed": [line[3:] for line in changed],
            "diff": _git(Path(root), "diff", "HEAD")[:DIFF_LIMIT] if changed else "",
        }
    return states


def _git(folder: Path, *arguments: str) -> str:
    """The output of a git command; "" if git is not there, or the folder is in no checkout."""
    try:
        done = subprocess.run(
            ["git", "-C", str(folder), *arguments], capture_output=True, text=True, timeout=30, errors="replace"
        )
    except (OSError, subprocess.TimeoutExpired):
        return ""
    return done.stdout if done.returncode == 0 else ""
