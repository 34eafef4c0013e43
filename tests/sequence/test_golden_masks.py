"""Every attention mask that a reference implementation wrote is an interval mask."""

import functools
import os
import pathlib
import re

import numpy as np
import pytest
from safetensors import safe_open

from jaxmm.sequence.consecutive import find_intervals

GOLDENS = pathlib.Path(__file__).parents[1] / "goldens"
NAME = re.compile(r"(\w*(attention|attn|omni)_)?mask(_\w+)?|attn_allowed(_\w+)?")


def attention_mask(tensor, name):
    """The masks [N, L, L] that a tensor holds, or None if it holds something else.

    A name that ends with `_packed` stands for bits along the key axis, the first key in the highest bit.
    """
    if tensor.ndim < 2 or tensor.dtype.kind not in "biu":
        return None
    length = tensor.shape[-2]
    if name.endswith("_packed") and tensor.dtype == np.uint8 and tensor.shape[-1] == -(-length // 8):
        tensor = np.unpackbits(tensor, axis=-1, count=length)
    if length < 2 or tensor.shape[-1] != length or not np.isin(tensor, (0, 1)).all():
        return None
    return tensor.reshape(-1, length, length).astype(bool)


def covers_pixels(file, name, keys):
    """A mask that stands beside an `image` of its own height and width selects pixels, not keys."""
    image = re.sub(r"[^/]+$", "image", name)
    return image in keys and file.get_slice(image).get_shape()[:2] == file.get_slice(name).get_shape()


@functools.cache
def masks_below(root):
    """{(file relative to the root, tensor name): masks [N, L, L]}"""
    found = {}
    for path in sorted(root.rglob("cases.safetensors")):
        with safe_open(path, "np") as file:
            keys = set(file.keys())
            for name in sorted(key for key in keys if NAME.fullmatch(key.split("/")[-1])):
                masks = attention_mask(file.get_tensor(name), name)
                if masks is not None and not covers_pixels(file, name, keys):
                    found[str(path.relative_to(root)), name] = masks
    return found


MASKS = masks_below(pathlib.Path(os.environ.get("JAXMM_GOLDENS", GOLDENS)))


@pytest.mark.parametrize("case", MASKS, ids=":".join)
def test_the_mask_is_an_interval_mask(case):
    for row, mask in enumerate(MASKS[case]):
        found = find_intervals(mask)
        assert found is not None, f"mask {row} has no intervals"
        places, start, end = found
        np.testing.assert_array_equal((start <= places[:, None]) & (places[:, None] < end), mask, f"mask {row}")


def test_the_goldens_hold_attention_masks():
    assert len(masks_below(GOLDENS)) > 0
