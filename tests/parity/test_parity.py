"""Every golden under the root against jaxmm: `tests/goldens`, or the folder that JAXMM_GOLDENS names.

A folder is registered by a pattern; each case prefix of a registered folder needs a comparator, and each of its tensors
must be read. Folders that no pattern matches belong to systems that do not exist yet: they are reported.
"""

import fnmatch
import functools
import os
import warnings
from pathlib import Path

import jax
import pytest

from tests.parity import transfusion, vae_kl
from tests.parity.golden import Golden

DEFAULT_ROOT = Path(__file__).parents[1] / "goldens"
ROOT = Path(os.environ.get("JAXMM_GOLDENS") or DEFAULT_ROOT).resolve()

# folder pattern -> {case prefix: comparator}
REGISTRY = {
    "*/ref_linear*": transfusion.CASES,
    "*/ref_unet*": transfusion.CASES,
    "*/vae_kl*": vae_kl.CASES,
}


def folders() -> list[Path]:
    return sorted(path.parent for path in ROOT.rglob("cases.safetensors"))


def registered(folder: Path) -> dict | None:
    return next((cases for pattern, cases in REGISTRY.items() if fnmatch.fnmatch(str(folder), pattern)), None)


@functools.cache
def load(folder: Path) -> Golden:
    return Golden(folder)


def all_cases() -> list:
    found = []
    for folder in folders():
        if registered(folder) is not None:
            name = folder.relative_to(ROOT)
            found += [pytest.param(folder, prefix, id=f"{name}/{prefix}") for prefix in load(folder).prefixes()]
    return found


@pytest.mark.parametrize("folder, prefix", all_cases())
def test_case(folder, prefix):
    golden, comparators = load(folder), registered(folder)
    assert prefix in comparators, f"{folder}: nothing compares the case {prefix!r}"
    with jax.default_matmul_precision("highest"):
        comparators[prefix](golden)
    unread = set(golden.cases.names(prefix + "/")) - golden.cases.read
    assert not unread, f"{folder}: never read: {sorted(unread)}"


def test_root_has_registered_folders():
    assert any(registered(folder) is not None for folder in folders()), f"no golden that jaxmm knows under {ROOT}"
    unknown = [str(folder.relative_to(ROOT)) for folder in folders() if registered(folder) is None]
    if unknown:
        warnings.warn(f"goldens without a comparator: {', '.join(unknown)}", stacklevel=1)
