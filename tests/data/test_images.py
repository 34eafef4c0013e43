import io
import os
import struct
import subprocess
import sys
import warnings
import zlib

import hypothesis
import hypothesis.strategies as st
import jax.numpy as jnp
import numpy as np
import PIL.Image
import pytest

from jaxmm.data.images import fit, from_values, grid, read_image, square, write_image
from jaxmm.errors import InputError

HEAVY = ("tensorflow", "torch", "sklearn", "transformers", "grain")


def picture(*shape, seed=0):
    return np.random.default_rng(seed).integers(0, 256, shape, dtype=np.uint8)


def encoded(pixels, kind, **options):
    buffer = io.BytesIO()
    PIL.Image.fromarray(pixels).save(buffer, kind, **options)
    return buffer.getvalue()


def enlarged(pixels, factor):
    return pixels.repeat(factor, 0).repeat(factor, 1)


@pytest.fixture(scope="module")
def digits():
    from sklearn.datasets import load_digits

    return np.rint(load_digits().images[:300] * 255 / 16).astype(np.uint8)[..., None]


@pytest.mark.parametrize("channels", [1, 3])
@pytest.mark.parametrize("suffix", [".png", ".bmp", ".PNG"])
def test_written_images_are_read_back(tmp_path, channels, suffix):
    pixels = picture(5, 7, channels)
    write_image(tmp_path / f"a{suffix}", pixels)
    read = read_image(str(tmp_path / f"a{suffix}"), channels)
    assert read.dtype == np.uint8 and read.flags.writeable
    np.testing.assert_array_equal(read, pixels)
    assert os.listdir(tmp_path) == [f"a{suffix}"]


def test_grey_and_colour_become_each_other(tmp_path):
    write_image(tmp_path / "grey.png", np.array([[[0], [77], [255]]], np.uint8))
    np.testing.assert_array_equal(read_image(tmp_path / "grey.png", 3), [[[0] * 3, [77] * 3, [255] * 3]])
    write_image(tmp_path / "colour.png", np.array([[[255, 0, 0], [0, 255, 0], [90, 90, 90]]], np.uint8))
    # the weights of ITU-R 601: 0.299 and 0.587
    np.testing.assert_array_equal(read_image(tmp_path / "colour.png", 1), [[[76], [150], [90]]])
    with pytest.raises(ValueError, match="4 channels"):
        read_image(tmp_path / "grey.png", 4)


def test_alpha_is_composited_on_white(tmp_path):
    pixels = np.array([[[200, 0, 0, 255], [200, 0, 0, 0], [0, 0, 0, 102]]], np.uint8)
    (tmp_path / "a.png").write_bytes(encoded(pixels, "PNG"))
    np.testing.assert_array_equal(read_image(tmp_path / "a.png", 3), [[[200, 0, 0], [255] * 3, [153] * 3]])
    grey = np.array([[[10, 255], [10, 0]]], np.uint8)
    (tmp_path / "b.png").write_bytes(encoded(grey, "PNG"))
    np.testing.assert_array_equal(read_image(tmp_path / "b.png", 1), [[[10], [255]]])


def test_palette_images(tmp_path):
    image = PIL.Image.fromarray(np.array([[0, 1, 2]], np.uint8)).convert("P")
    image.putpalette([10, 20, 30, 40, 50, 60, 70, 80, 90])
    image.save(tmp_path / "solid.png")
    image.save(tmp_path / "holes.gif", transparency=1)
    np.testing.assert_array_equal(read_image(tmp_path / "solid.png", 3), [[[10, 20, 30], [40, 50, 60], [70, 80, 90]]])
    np.testing.assert_array_equal(read_image(tmp_path / "holes.gif", 3), [[[10, 20, 30], [255] * 3, [70, 80, 90]]])


def test_sixteen_bits_are_rounded_to_eight(tmp_path):
    values = np.array([[0, 128, 129, 257, 32768, 65535]], np.uint16)
    expected = [[[0], [0], [1], [1], [128], [255]]]
    for name in ("a.png", "a.tif"):
        PIL.Image.fromarray(values).save(tmp_path / name)
        np.testing.assert_array_equal(read_image(tmp_path / name, 1), expected)
    np.testing.assert_array_equal(read_image(tmp_path / "a.png", 3), np.repeat(expected, 3, 2))
    PIL.Image.fromarray(values).save(tmp_path / "hole.png", transparency=257)
    assert read_image(tmp_path / "hole.png", 1).ravel().tolist() == [0, 0, 1, 255, 128, 255]


@pytest.mark.parametrize("dtype, problem", [(np.float32, "floating-point"), (np.int32, "32 bits")])
def test_pixels_of_an_unknown_range_are_refused(tmp_path, dtype, problem):
    PIL.Image.fromarray(np.array([[0, 100000]], dtype)).save(tmp_path / "a.tif")
    with pytest.raises(InputError, match=f"a.tif.*{problem}"):
        read_image(tmp_path / "a.tif", 1)


def test_exif_orientation_is_applied(tmp_path):
    upright = picture(2, 3, 1)
    stored = {1: upright, 3: upright[::-1, ::-1], 6: np.rot90(upright), 8: np.rot90(upright, -1)}
    stored |= {2: upright[:, ::-1], 4: upright[::-1], 5: upright.swapaxes(0, 1)}
    stored[7] = upright[::-1, ::-1].swapaxes(0, 1)
    for orientation, pixels in stored.items():
        exif = PIL.Image.Exif()
        exif[0x0112] = orientation
        PIL.Image.fromarray(pixels[..., 0]).save(tmp_path / "a.png", exif=exif)
        np.testing.assert_array_equal(read_image(tmp_path / "a.png", 1), upright, err_msg=str(orientation))


def test_broken_exif_data_leave_the_image(tmp_path):
    (tmp_path / "a.png").write_bytes(encoded(picture(2, 3), "PNG", exif=b"Exif\0\0no such thing"))
    np.testing.assert_array_equal(read_image(tmp_path / "a.png", 1)[..., 0], picture(2, 3))


def test_missing_files_folders_and_empty_files_are_refused(tmp_path):
    (tmp_path / "empty.png").touch()
    with pytest.raises(InputError, match="there is no image .*none.png"):
        read_image(tmp_path / "none.png", 3)
    with pytest.raises(InputError, match="is a folder, not an image"):
        read_image(tmp_path, 3)
    with pytest.raises(InputError, match=r"empty.png is empty \(0 bytes\)"):
        read_image(tmp_path / "empty.png", 3)


def test_corrupt_and_truncated_files_are_refused(tmp_path):
    (tmp_path / "text.png").write_text("I am no image")
    with pytest.raises(InputError, match="text.png is no image of a known format"):
        read_image(tmp_path / "text.png", 3)
    for kind in ("PNG", "JPEG", "GIF", "WEBP"):
        whole = encoded(picture(40, 40, 3), kind)
        for share in (0.3, 0.9):
            (tmp_path / f"cut.{kind}").write_bytes(whole[: int(len(whole) * share)])
            with pytest.raises(InputError, match=f"cut.{kind}") as caught:
                read_image(tmp_path / f"cut.{kind}", 3)
            assert "\n" not in str(caught.value)


def test_a_decompression_bomb_is_refused(tmp_path):
    def chunk(kind, data):
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    header = struct.pack(">IIBBBBB", 40000, 40000, 8, 0, 0, 0, 0)
    content = b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(b"")) + chunk(b"IEND", b"")
    (tmp_path / "bomb.png").write_bytes(content)
    with pytest.raises(InputError, match=r"bomb.png is too large.*1600000000 pixels"):
        read_image(tmp_path / "bomb.png", 3)


@pytest.mark.parametrize("kind", ["PNG", "JPEG", "GIF", "TIFF"])
@hypothesis.settings(deadline=None, max_examples=40)
@hypothesis.given(data=st.data())
def test_damaged_files_give_pixels_or_an_input_error(tmp_path_factory, kind, data):
    content = bytearray(encoded(picture(9, 12, 3), kind))
    for _ in range(data.draw(st.integers(1, 4))):
        content[data.draw(st.integers(0, min(len(content), 200) - 1))] = data.draw(st.integers(0, 255))
    path = tmp_path_factory.getbasetemp() / f"damaged.{kind}"
    path.write_bytes(content[: data.draw(st.integers(1, len(content)))])
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try:
            pixels = read_image(path, 3)
        except InputError as error:
            assert str(path) in str(error)
        else:
            assert pixels.dtype == np.uint8 and pixels.shape[2] == 3


def test_fit_crops_the_centre():
    wide = np.arange(24, dtype=np.uint8).reshape(2, 12, 1)
    np.testing.assert_array_equal(fit(wide, 2, 4), wide[:, 4:8])
    np.testing.assert_array_equal(square(wide.swapaxes(0, 1), 2), wide.swapaxes(0, 1)[5:7])
    # to 1 : 3 of a picture of 9 x 6: rows 3 and more of the middle, two for six columns
    np.testing.assert_array_equal(fit(picture(9, 6, 3), 2, 6), picture(9, 6, 3)[3:5])
    assert fit(picture(1, 1000, 1), 7, 5).shape == (7, 5, 1)
    assert fit(picture(1000, 1, 3), 2, 300).shape == (2, 300, 3)


@hypothesis.settings(deadline=None)
@hypothesis.given(*[st.integers(1, 40)] * 4, st.sampled_from([1, 3]), st.integers(0, 255))
def test_fit_has_the_shape_asked_for_and_keeps_flat_colours(rows, columns, height, width, channels, level):
    fitted = fit(np.full((rows, columns, channels), level, np.uint8), height, width)
    assert fitted.shape == (height, width, channels) and fitted.dtype == np.uint8
    assert (fitted == level).all()


def test_fit_averages_when_it_shrinks():
    # 512 stripes shrunk to 8 columns: without antialiasing they would stay black and white
    stripes = np.tile(np.array([0, 255], np.uint8), 256)[None, :, None].repeat(512, 0)
    np.testing.assert_allclose(square(stripes, 8), 127.5, atol=1)
    half = np.zeros((512, 512, 1), np.uint8)
    half[:, :256] = 200
    assert square(half, 2)[..., 0].tolist()[0] == pytest.approx([200, 0], abs=25)


def test_fit_refuses_a_size_of_nothing_and_other_numbers():
    with pytest.raises(ValueError, match="0 x 4 pixels"):
        fit(picture(4, 4, 1), 0, 4)
    with pytest.raises(ValueError, match=r"not float32 \[4, 4, 1\]"):
        fit(np.random.default_rng(0).random((4, 4, 1), np.float32), 3, 3)


def test_enlarged_digits_come_back_exactly(digits):
    for factor in (2, 8, 32):
        for image in digits[:20]:
            np.testing.assert_array_equal(square(enlarged(image, factor), 8), image)
    # of an RGB picture wider than high, too
    wide = np.pad(enlarged(digits[0], 8), ((0, 0), (5, 5), (0, 0))).repeat(3, 2)
    np.testing.assert_array_equal(square(wide, 8), digits[0].repeat(3, 2))


def test_enlarged_digits_that_were_touched_come_back_nearly(digits):
    errors = []
    for image in digits:
        large = enlarged(image, 8)
        large[0, 0] ^= 1
        errors.append(np.abs(square(large, 8).astype(int) - image).mean())
    assert 0 < np.mean(errors) < 12


def test_a_grid_of_small_images():
    images = picture(5, 8, 8, 1)
    drawn = grid(images)
    # three columns, two rows, 64 pixels each, gaps of 2
    assert drawn.shape == (130, 196, 1) and drawn.dtype == np.uint8
    np.testing.assert_array_equal(drawn[:64, 66:130], enlarged(images[1], 8))
    np.testing.assert_array_equal(drawn[66:, :64], enlarged(images[3], 8))
    assert (drawn[64:66] == 255).all() and (drawn[:, 64:66] == 255).all() and (drawn[66:, 132:] == 255).all()


def test_a_grid_of_given_columns_scale_and_gap():
    images = picture(3, 4, 6, 3)
    np.testing.assert_array_equal(grid(images, columns=3, scale=1, gap=0), np.concatenate(images, 1))
    assert grid(images, columns=1, scale=2, gap=1).shape == (26, 12, 3)
    assert grid(picture(1, 100, 50, 3)).shape == (100, 50, 3)
    with pytest.raises(ValueError, match="no images"):
        grid(images[:0])


def test_from_values():
    values = [-1, 1, 0, 0.0040, -0.0040, -7, 7, np.inf, -np.inf, np.nan]
    assert from_values(np.array(values)).tolist() == [0, 255, 128, 128, 127, 0, 255, 255, 0, 0]
    assert from_values(jnp.array([[0.5, -0.5]], jnp.bfloat16)).tolist() == [[191, 64]]
    levels = np.arange(256, dtype=np.uint8)
    np.testing.assert_array_equal(from_values(levels / np.float32(127.5) - 1), levels)


def test_images_that_cannot_be_written(tmp_path):
    pixels = picture(2, 2, 3)
    with pytest.raises(InputError, match=r"a.xyz: images cannot be written as '.xyz'"):
        write_image(tmp_path / "a.xyz", pixels)
    with pytest.raises(InputError, match="cannot be written as ''"):
        write_image(tmp_path / "a", pixels)
    with pytest.raises(InputError, match="none/a.png: there is no folder .*none"):
        write_image(tmp_path / "none" / "a.png", pixels)
    (tmp_path / "b.png").mkdir()
    with pytest.raises(InputError, match="cannot write .*b.png: Is a directory"):
        write_image(tmp_path / "b.png", pixels)
    with pytest.raises(ValueError, match=r"not uint8 \[2, 2, 2\]"):
        write_image(tmp_path / "c.png", pixels[..., :2])
    assert os.listdir(tmp_path) == ["b.png"]


def test_a_failed_write_leaves_the_old_image(tmp_path, monkeypatch):
    write_image(tmp_path / "a.png", picture(2, 2, 3))

    def refuse(*_):
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr("pathlib.Path.replace", refuse)
    with pytest.raises(InputError, match="cannot write .*a.png: Permission denied"):
        write_image(tmp_path / "a.png", picture(2, 2, 3, seed=1))
    assert os.listdir(tmp_path) == ["a.png"]
    np.testing.assert_array_equal(read_image(tmp_path / "a.png", 3), picture(2, 2, 3))


def test_a_folder_that_is_a_file(tmp_path):
    (tmp_path / "file").write_bytes(b"")
    with pytest.raises(InputError, match="file"):
        write_image(tmp_path / "file" / "a.png", picture(2, 2, 3))


def test_import_stays_light():
    code = "import sys, jaxmm.data.images, jaxmm.data.sources, jaxmm.data.tokenizers; print(*sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert "jaxmm.data.tokenizers" in done.stdout.split()
    assert not set(HEAVY) & set(done.stdout.split())
