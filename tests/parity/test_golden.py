"""The parity suite itself: it must fail when a number is off, and when a case is not read."""

import warnings

import jax
import numpy as np
import pytest
from safetensors.numpy import save_file

from tests.parity.golden import Golden, relative_error
from tests.parity.test_parity import DEFAULT_ROOT, REGISTRY, registered

FOLDERS = ("transfusion/ref_linear", "transfusion/ref_unet", "transfusion/vae_kl")
PER_CASE = 4


@pytest.fixture
def golden(tmp_path):
    tensors = {
        "a/x": np.array([1.0, -4.0], np.float32),
        "a/n": np.array([1, 2], np.int32),
        "b/y": np.ones(1, np.float32),
    }
    save_file(tensors, tmp_path / "cases.safetensors")
    save_file({"w": np.ones(1, np.float32)}, tmp_path / "weights.safetensors")
    (tmp_path / "config.json").write_text("{}")
    return Golden(tmp_path)


def test_floats_are_compared_relative_to_the_largest(golden):
    golden.check("a/x", np.array([1.0, -4.0003]))
    with pytest.raises(AssertionError, match=r"a/x: error 1.25e-04, at most 1e-04"):
        golden.check("a/x", np.array([1.0, -4.0005]))
    with pytest.raises(AssertionError, match="error inf"):
        golden.check("a/x", np.array([1.0, np.nan]))
    with pytest.raises(AssertionError, match="shape"):
        golden.check("a/x", np.ones(3))


def test_integers_are_compared_exactly(golden):
    golden.check("a/n", np.array([1, 2]))
    with pytest.raises(AssertionError, match="1 numbers differ"):
        golden.check("a/n", np.array([1, 3]))


def test_reading_is_recorded(golden):
    golden.check("a/n", np.array([1, 2]))
    assert golden.cases.read == {"a/n"} and golden.prefixes() == ["a", "b"]
    assert set(golden.cases.names("a/")) - golden.cases.read == {"a/x"}


def test_zeros_are_compared_absolutely():
    assert relative_error(np.full(2, 1e-12), np.zeros(2)) == pytest.approx(1e-6)


def perturbed() -> list:
    """A few tensors of every case, drawn with a fixed seed."""
    rng, found = np.random.default_rng(0), []
    for folder in FOLDERS:
        golden = Golden(DEFAULT_ROOT / folder)
        for prefix in golden.prefixes():
            names = golden.cases.names(prefix + "/")
            found += [(folder, str(name)) for name in rng.choice(names, min(PER_CASE, len(names)), replace=False)]
    return found


@pytest.fixture(scope="module")
def loaded():
    return {folder: Golden(DEFAULT_ROOT / folder) for folder in FOLDERS}


@pytest.mark.slow
@pytest.mark.parametrize("folder, name", perturbed())
def test_one_number_off_fails(loaded, folder, name):
    """Change the first number of a tensor a little: the comparison of its case must notice."""
    golden = loaded[folder]
    compare = registered(golden.folder)[name.split("/")[0]]
    tensors, original = golden.cases._tensors, golden.cases._tensors[name]
    changed = original.copy()
    step = 1 if np.issubdtype(original.dtype, np.integer) else 2e-3 * max(np.max(np.abs(original)), 1e-3)
    changed.flat[0] += step
    tensors[name] = changed
    try:
        with jax.default_matmul_precision("highest"), warnings.catch_warnings(), pytest.raises(Exception):  # noqa: B017
            warnings.simplefilter("ignore")
            compare(golden)
    finally:
        tensors[name] = original


def test_every_pattern_of_the_registry_has_a_folder():
    for pattern in REGISTRY:
        import fnmatch

        assert any(fnmatch.fnmatch(str(DEFAULT_ROOT / folder), pattern) for folder in FOLDERS), pattern
