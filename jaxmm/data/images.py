"""Reading, fitting and writing pictures. Pixels are uint8 [H, W, C], C = 1 (grey) or 3 (RGB)."""

import contextlib
import io
import math
import os
from pathlib import Path
from typing import Any

import numpy as np
import PIL.Image
from jaxtyping import Float, UInt8

from jaxmm.errors import InputError

Pixels = UInt8[np.ndarray, "H W C"]

_MODES = {1: "L", 3: "RGB"}

# EXIF orientation -> what turns the stored picture upright
_TURNS = {
    2: PIL.Image.Transpose.FLIP_LEFT_RIGHT,
    3: PIL.Image.Transpose.ROTATE_180,
    4: PIL.Image.Transpose.FLIP_TOP_BOTTOM,
    5: PIL.Image.Transpose.TRANSPOSE,
    6: PIL.Image.Transpose.ROTATE_270,
    7: PIL.Image.Transpose.TRANSVERSE,
    8: PIL.Image.Transpose.ROTATE_90,
}
_ORIENTATION = 0x0112  # EXIF tag


def read_image(path: str | os.PathLike, channels: int, content: bytes | None = None) -> Pixels:
    """Read an image file that PIL knows; of several frames, the first.

    EXIF orientation is applied, alpha is composited on white, 16 bits are rounded to 8.

    Args:
      path: the file; with `content`, only what messages call it.
      channels: 1 reads grey, 3 reads RGB, whatever the file holds.
      content: of a file that is in memory.

    Raises:
      InputError: if the file is missing, a folder, empty, corrupt, truncated, or so large that PIL takes it for a
        decompression bomb.
    """
    if channels not in _MODES:
        raise ValueError(f"{channels} channels: 1 or 3")
    if content is None and os.path.isdir(path):
        raise InputError(f"{path} is a folder, not an image")
    if content is None and not os.path.isfile(path):
        raise InputError(f"there is no image {path}")
    if (os.path.getsize(path) if content is None else len(content)) == 0:
        raise InputError(f"image {path} is empty (0 bytes)")
    try:
        with PIL.Image.open(path if content is None else io.BytesIO(content)) as image:
            image.load()
            upright = _eight_bits(_upright(image))
            return _from_pil(_on_white(upright).convert(_MODES[channels]))
    except PIL.UnidentifiedImageError as error:
        raise InputError(f"{path} is no image of a known format") from error
    except PIL.Image.DecompressionBombError as error:
        raise InputError(f"image {path} is too large: {error}") from error
    except MemoryError:
        raise
    except Exception as error:  # PIL's decoders raise nearly anything on broken files
        raise InputError(f"image {path} cannot be read: {' '.join(str(error).split())}") from error


def two_sizes(size: Any, what: str) -> tuple[int, int]:
    """(height, width) of a number or a pair; `what` names it in the InputError for anything else."""
    pair = (size, size) if isinstance(size, int) else size
    whole = isinstance(pair, (tuple, list)) and all(isinstance(n, int) and not isinstance(n, bool) for n in pair)
    if not whole or len(pair) != 2 or min(pair) < 1:
        raise InputError(f"{what}: a positive whole number or two (height, width), not {size!r}")
    return tuple(pair)


def fit(pixels: Pixels, height: int, width: int) -> UInt8[np.ndarray, "height width C"]:
    """Crop the centre to the aspect ratio of [height, width], then resize: bicubic, antialiased when it gets smaller.

    An image that was enlarged by repeating pixels comes back exactly (bicubic filtering would mix a third of the
    neighbours in): small pictures survive being written large to be looked at.
    """
    if height < 1 or width < 1:
        raise ValueError(f"cannot fit an image to {height} x {width} pixels")
    pixels = _centre_crop(pixels, height, width)
    small = _undo_enlargement(pixels, height, width)
    if small is not None:
        return small
    return _from_pil(_to_pil(pixels).resize((width, height), PIL.Image.Resampling.BICUBIC))


def square(pixels: Pixels, size: int) -> UInt8[np.ndarray, "size size C"]:
    """`fit` to a square."""
    return fit(pixels, size, size)


def grid(
    images: UInt8[np.ndarray, "N H W C"], columns: int | None = None, scale: int | None = None, gap: int = 2
) -> Pixels:
    """One picture of many, row by row on white.

    Args:
      images: at least one.
      columns: as many as make the grid about square by default.
      scale: each pixel becomes scale x scale; by default the least that makes the images 64 pixels high.
      gap: white pixels between neighbours.
    """
    count, height, width, channels = images.shape
    if not count:
        raise ValueError("a grid of no images")
    columns = columns or math.ceil(math.sqrt(count))
    scale = scale or math.ceil(64 / height)
    height, width, rows = height * scale, width * scale, math.ceil(count / columns)
    shape = (rows * (height + gap) - gap, columns * (width + gap) - gap, channels)
    picture = np.full(shape, 255, np.uint8)
    for i, image in enumerate(images):
        top, left = i // columns * (height + gap), i % columns * (width + gap)
        picture[top : top + height, left : left + width] = image.repeat(scale, 0).repeat(scale, 1)
    return picture


def write_image(path: str | os.PathLike, pixels: Pixels) -> None:
    """Write an image in the format of the suffix, beside its place, and rename it into it.

    Raises:
      InputError: if the suffix is unknown, or the folder does not exist or cannot be written to.
    """
    path = Path(path)
    kind = PIL.Image.registered_extensions().get(path.suffix.lower())
    if kind not in PIL.Image.SAVE:
        raise InputError(f"{path}: images cannot be written as {path.suffix!r}; use .png, .jpg or .webp")
    if not path.parent.is_dir():
        raise InputError(f"cannot write {path}: there is no folder {path.parent}")
    beside = path.with_name(f".{path.name}.{os.getpid()}")
    image, buffer = _to_pil(pixels), io.BytesIO()
    try:
        image.save(buffer, format=kind)
        beside.write_bytes(buffer.getvalue())
        beside.replace(path)
    except OSError as error:
        with contextlib.suppress(OSError):
            beside.unlink()
        raise InputError(f"cannot write {path}: {error.strerror or error}") from error


def from_values(values: Float[np.ndarray, "*shape"]) -> UInt8[np.ndarray, "*shape"]:
    """[-1, 1] -> 0..255, rounded; what lies outside is clipped, and what is no number becomes black."""
    values = np.nan_to_num(np.asarray(values, np.float32), nan=-1.0)
    return np.rint((np.clip(values, -1, 1) + 1) * 127.5).astype(np.uint8)


def _upright(image: PIL.Image.Image) -> PIL.Image.Image:
    try:
        turn = _TURNS.get(image.getexif().get(_ORIENTATION))
    except Exception:  # broken EXIF data leave a good picture good
        turn = None
    return image if turn is None else image.transpose(turn)


def _eight_bits(image: PIL.Image.Image) -> PIL.Image.Image:
    """Grey images of 16 bits -> 8 bits; PIL's own conversion clips them."""
    if image.mode == "F":
        raise ValueError("its pixels are floating-point numbers")
    if not image.mode.startswith("I"):
        return image
    values = np.asarray(image).astype(np.int64)
    if values.min() < 0 or values.max() > 65535:
        raise ValueError("its pixels have 32 bits")
    values = np.where(values == image.info.get("transparency", -1), 65535, values)
    return PIL.Image.fromarray(np.rint(values / 257).astype(np.uint8))


def _on_white(image: PIL.Image.Image) -> PIL.Image.Image:
    """RGB, with alpha composited on white."""
    if not image.has_transparency_data:
        return image if image.mode == "L" else image.convert("RGB")
    white = PIL.Image.new("RGBA", image.size, "white")
    return PIL.Image.alpha_composite(white, image.convert("RGBA")).convert("RGB")


def _centre_crop(pixels: Pixels, height: int, width: int) -> Pixels:
    """The largest centred part of whole pixels whose aspect ratio is nearest to height : width."""
    rows, columns = pixels.shape[:2]
    if columns * height > rows * width:
        crop = (rows, max(1, round(rows * width / height)))
    else:
        crop = (max(1, round(columns * height / width)), columns)
    top, left = (rows - crop[0]) // 2, (columns - crop[1]) // 2
    return pixels[top : top + crop[0], left : left + crop[1]]


def _undo_enlargement(pixels: Pixels, height: int, width: int) -> Pixels | None:
    """The image of [height, width] that repeated pixels make `pixels` of; None if there is none."""
    rows, columns, channels = pixels.shape
    if rows % height or columns % width:
        return None
    blocks = pixels.reshape(height, rows // height, width, columns // width, channels)
    first = blocks[:, :1, :, :1]
    return first[:, 0, :, 0].copy() if (blocks == first).all() else None


def _to_pil(pixels: Pixels) -> PIL.Image.Image:
    if pixels.dtype != np.uint8 or pixels.ndim != 3 or pixels.shape[2] not in _MODES:
        raise ValueError(f"an image is uint8 [H, W, 1 or 3], not {pixels.dtype} {list(pixels.shape)}")
    return PIL.Image.fromarray(np.ascontiguousarray(pixels[:, :, 0] if pixels.shape[2] == 1 else pixels))


def _from_pil(image: PIL.Image.Image) -> Pixels:
    return np.array(image).reshape(image.height, image.width, -1)
