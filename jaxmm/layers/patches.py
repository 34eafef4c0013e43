"""Images as sequences of patches."""

from jaxtyping import Array, Float


def patchify(x: Float[Array, "*b H W C"], size: int) -> Float[Array, "*b N P"]:
    """Cut into size x size windows, row by row; a window is flattened as (row, column, channel), P = size*size*C."""
    *b, h, w, c = x.shape
    if h % size or w % size:
        raise ValueError(f"an image of {h} x {w} cannot be cut into patches of {size} x {size}")
    x = x.reshape(*b, h // size, size, w // size, size, c)
    x = x.swapaxes(-4, -3)
    return x.reshape(*b, (h // size) * (w // size), size * size * c)


def unpatchify(x: Float[Array, "*b N P"], size: int, height: int, width: int) -> Float[Array, "*b H W C"]:
    """The inverse of `patchify`, for an image of height x width."""
    *b, _, p = x.shape
    x = x.reshape(*b, height // size, width // size, size, size, p // size**2)
    return x.swapaxes(-4, -3).reshape(*b, height, width, p // size**2)
