import builtins
import hashlib
import json
import pickle

import numpy as np
import pytest
from ml_collections import ConfigDict

from jaxmm.data.folder import ImageFolder
from jaxmm.data.images import write_image
from jaxmm.data.sources import COLOURS, DIGIT_NAMES, SHAPES, SOURCES, Digits, GeneratedShapes, make_source
from jaxmm.errors import InputError


def folder_of(path, *lines):
    """A folder with a.png (4 x 4, red), sub/b.png (2 x 6, grey), and a file of captions of these lines."""
    (path / "sub").mkdir()
    write_image(path / "a.png", np.full((4, 4, 3), [200, 0, 0], np.uint8))
    write_image(path / "sub" / "b.png", np.arange(12, dtype=np.uint8).reshape(2, 6, 1))
    lines = [line if isinstance(line, bytes) else json.dumps(line).encode() for line in lines]
    (path / "captions.jsonl").write_bytes(b"\n".join(lines))
    return path


A, B = {"image": "a.png", "caption": "a red wall"}, {"image": "sub/b.png", "caption": "é", "author": 7}


def test_digits_are_split_by_class():
    train, test = Digits(), Digits("test")
    assert (len(train), len(test)) == (1437, 360)
    assert train.images.shape == (1437, 8, 8, 1) and train.images.dtype == np.uint8 and train.images.max() == 255
    assert np.bincount(train.labels).tolist() == [142, 146, 142, 146, 145, 145, 145, 143, 139, 144]
    assert np.bincount(test.labels).tolist() == [36, 36, 35, 37, 36, 37, 36, 36, 35, 36]
    assert test.labels[:10].tolist() == [1, 4, 8, 6, 5, 9, 9, 1, 3, 2]
    both = np.concatenate([train.images, test.images]).astype(int)
    # 16 levels of scikit-learn: their sum is 561718
    assert np.rint(both * 16 / 255).sum() == 561718
    assert len(np.unique(both)) == 17
    names = {image.tobytes() for image in test.images}
    assert not any(image.tobytes() in names for image in train.images)


def test_documents_of_digits():
    train = Digits("train")
    document = train[17]
    caption, image = document.segments
    assert caption.text == f"a {DIGIT_NAMES[train.labels[17]]}" and caption.role == "caption"
    assert image.role == "target" and document.name == "digits train 17" and document.example == 17
    np.testing.assert_array_equal(image.pixels, train.images[17])
    assert image.pixels.shape == (8, 8, 1)
    assert {d.segments[0].text for d in Digits("test")} == {f"a {name}" for name in DIGIT_NAMES}
    assert train[np.int64(3)].example == 3
    with pytest.raises(IndexError):
        train[1437]


def test_digits_refuse_other_splits_and_need_scikit_learn(monkeypatch):
    with pytest.raises(InputError, match="'train' or 'test', not 'valid'"):
        Digits("valid")
    with pytest.raises(InputError, match=r"not \['train'\]"):
        Digits(["train"])
    imported = builtins.__import__

    def without_sklearn(name, *args):
        if name.startswith("sklearn"):
            raise ImportError(name)
        return imported(name, *args)

    monkeypatch.setattr(builtins, "__import__", without_sklearn)
    with pytest.raises(InputError, match="need the package scikit-learn"):
        Digits()


def test_a_folder_of_images(tmp_path):
    source = ImageFolder(folder_of(tmp_path, A, b"", b"  \r", B), size=(2, 4))
    assert len(source) == 2
    first, second = source
    assert first.segments[0].text == "a red wall" and first.segments[0].role == "caption"
    np.testing.assert_array_equal(first.segments[1].pixels, np.full((2, 4, 3), [200, 0, 0]))
    assert second.segments[0].text == "é" and second.example == 1
    assert second.name == f"{tmp_path}/captions.jsonl:4"
    np.testing.assert_array_equal(second.segments[1].pixels[..., 0], [[1, 2, 3, 4], [7, 8, 9, 10]])
    assert ImageFolder(str(tmp_path), size=2, channels=1)[0].segments[1].pixels.tolist() == [[[60]] * 2] * 2
    assert ImageFolder(tmp_path)[0].segments[1].pixels.shape == (256, 256, 3)


def test_a_folder_with_windows_line_ends_and_byte_order_mark(tmp_path):
    folder_of(tmp_path)
    text = f"{json.dumps(A)}\r\n{json.dumps(B)}\r\n"
    (tmp_path / "other.jsonl").write_bytes(text.encode("utf-8-sig"))
    assert [line.number for line in ImageFolder(tmp_path, captions="other.jsonl").lines] == [1, 2]


@pytest.mark.parametrize(
    "line, problem",
    [
        (b'{"image": "a.png", "caption"', "not JSON: Expecting ':'"),
        (b"[" * 100000, "not JSON: maximum recursion depth"),
        (b"1" * 5000, "not JSON: Exceeds the limit"),
        (b'{"image": "a.png", "caption": "\xff"}', "byte 32 of the line is not UTF-8"),
        (["a.png", "a wall"], r'a line is {"image": ..., "caption": ...}, not \["a.png", "a wall"\]'),
        (None, "not null"),
        ({"image": "a.png", "captoin": "a"}, r"key 'caption' is missing; there are \[\"captoin\", \"image\"\]"),
        ({"caption": "a"}, "key 'image' is missing"),
        ({"image": 3, "caption": "a"}, "'image' is 3, not a text"),
        ({"image": "a.png", "caption": None}, "'caption' is null, not a text"),
        ({"image": "a.png", "caption": [0] * 99}, r"'caption' is \[0, 0.{1,60}\.\.\., not a text"),
        ({"image": "", "caption": "a"}, "'image' is empty"),
        ({"image": "a.png", "caption": " \n"}, "'caption' is empty"),
        ({"image": "a.png", "caption": "a \ud800"}, "'caption' holds half of a surrogate pair"),
        ({"image": "none.png", "caption": "a"}, "there is no image 'none.png' in "),
        ({"image": "a.png\0", "caption": "a"}, r"there is no image 'a.png\\x00' in "),
        ({"image": "sub", "caption": "a"}, "there is no image 'sub' in "),
        ({"image": ".", "caption": "a"}, "there is no image '.' in "),
        ({"image": "../a.png", "caption": "a"}, r"image '\.\./a.png' is not inside the folder"),
        ({"image": "sub/../../a.png", "caption": "a"}, "is not inside the folder"),
        ({"image": "/etc/hostname", "caption": "a"}, "image '/etc/hostname' is not inside the folder"),
    ],
)
def test_broken_lines_are_named(tmp_path, line, problem):
    (tmp_path / "data").mkdir()
    write_image(tmp_path / "a.png", np.zeros((2, 2, 3), np.uint8))
    folder_of(tmp_path / "data", A, b"", line, B)
    with pytest.raises(InputError, match=rf"captions.jsonl:3: .*{problem}") as caught:
        ImageFolder(tmp_path / "data")
    assert "\n" not in str(caught.value)


def test_images_with_odd_but_good_names(tmp_path):
    (tmp_path / "..b").touch()
    folder_of(tmp_path, {"image": "sub/../a.png", "caption": "a"}, {"image": "..b", "caption": "b"})
    source = ImageFolder(tmp_path)
    assert source[0].segments[1].pixels.shape == (256, 256, 3)
    with pytest.raises(InputError, match=r"captions.jsonl:2: image .*\.\.b is empty \(0 bytes\)"):
        source[1]


def test_corrupt_images_are_named_when_they_are_read(tmp_path):
    source = ImageFolder(folder_of(tmp_path, B, A))
    (tmp_path / "a.png").write_bytes((tmp_path / "a.png").read_bytes()[:50])
    source[0]
    with pytest.raises(InputError, match="captions.jsonl:2: image .*a.png cannot be read"):
        source[1]
    (tmp_path / "a.png").unlink()
    with pytest.raises(InputError, match="captions.jsonl:2: there is no image .*a.png"):
        source[1]


def test_folders_without_captions(tmp_path):
    with pytest.raises(InputError, match="there is no image folder .*none"):
        ImageFolder(tmp_path / "none")
    with pytest.raises(InputError, match="captions .*captions.jsonl cannot be read: No such file"):
        ImageFolder(tmp_path)
    for content in (b"", b"\n \n"):
        (tmp_path / "captions.jsonl").write_bytes(content)
        with pytest.raises(InputError, match="captions .*captions.jsonl are empty"):
            ImageFolder(tmp_path)


@pytest.mark.parametrize("size", ["64", 0, -3, 2.5, True, (4,), (4, 0), (4, "4"), (1, 2, 3), None])
def test_sizes_that_are_none(tmp_path, size):
    with pytest.raises(InputError, match="size of an image folder: a positive whole number or two"):
        ImageFolder(folder_of(tmp_path, A), size=size)


def test_other_arguments_of_a_folder(tmp_path):
    with pytest.raises(InputError, match="channels of an image folder: 1 or 3, not 4"):
        ImageFolder(tmp_path, channels=4)
    with pytest.raises(InputError, match="channels of an image folder: 1 or 3, not True"):
        ImageFolder(tmp_path, channels=True)
    with pytest.raises(InputError, match="path of an image folder: a path, not 3"):
        ImageFolder(3)
    with pytest.raises(InputError, match="captions of an image folder: a path, not None"):
        ImageFolder(tmp_path, captions=None)


def test_shapes_are_drawn_in_their_colours():
    source = GeneratedShapes(count=60, size=32, seed=3)
    seen = set()
    for document in source:
        caption, image = document.segments
        a, colour, shape = caption.text.split()
        assert a == "a" and shape in SHAPES and image.pixels.shape == (32, 32, 3) and image.pixels.dtype == np.uint8
        inside = (image.pixels == COLOURS[colour]).all(-1)
        assert image.pixels[~inside].min() < 255 and (image.pixels[[0, 0, -1, -1], [0, -1, 0, -1]] >= 200).sum() >= 9
        rows, columns = np.nonzero(inside)
        # share of the bounding box: 1 of a square, pi / 4 of a circle, 1 / 2 of a triangle
        share = inside.sum() / (np.ptp(rows) + 1) / (np.ptp(columns) + 1)
        assert share == pytest.approx({"square": 1, "circle": np.pi / 4, "triangle": 0.5}[shape], abs=0.09)
        seen.add(caption.text)
    assert len(seen) > 12
    assert document.name == "shapes 59" and document.example == 59


def test_shapes_depend_on_seed_and_index_only():
    def digest(document):
        return hashlib.sha256(document.segments[1].pixels).hexdigest(), document.segments[0].text

    source = GeneratedShapes(5, 16, 1)
    again = GeneratedShapes(100, 16, 1)
    assert [digest(source[i]) for i in (4, 0, 2)] == [digest(again[i]) for i in (4, 0, 2)]
    assert len({digest(source[i]) for i in range(5)} | {digest(GeneratedShapes(1, 16, 2)[0])}) == 6
    assert source[2].segments[0].text == "a yellow circle"


def test_make_source(tmp_path):
    assert isinstance(make_source("digits", {"split": "test"}), Digits)
    assert len(make_source("shapes", ConfigDict({"count": 7, "size": 16, "seed": 0}))) == 7
    folder_of(tmp_path, A)
    source = make_source("folder", {"path": str(tmp_path), "size": [8, 16], "channels": 1})
    assert source[0].segments[1].pixels.shape == (8, 16, 1)
    assert set(SOURCES) == {"digits", "folder", "latents", "shapes", "text", "tfds"}


@pytest.mark.parametrize(
    "name, options, problem",
    [
        ("digit", {}, "unknown source 'digit'; did you mean 'digits'"),
        ("xyz", {}, "unknown source 'xyz'; known: digits, folder, latents, shapes"),
        ("digits", {"splt": "test"}, "source 'digits' has no option 'splt'; did you mean 'split'"),
        ("folder", {}, "source 'folder' needs the option 'path'"),
        ("shapes", {"count": "7"}, "count of the shapes: a whole number of at least 1, not '7'"),
        ("shapes", {"size": 4}, "size of the shapes: a whole number of at least 8, not 4"),
        ("shapes", {"seed": True}, "seed of the shapes: a whole number of at least 0, not True"),
        ("digits", {"split": 1}, "split of the digits: 'train' or 'test', not 1"),
    ],
)
def test_wrong_names_and_options(name, options, problem):
    with pytest.raises(InputError, match=problem):
        make_source(name, options)


def test_sources_travel_to_other_processes(tmp_path):
    for source in (Digits("test"), ImageFolder(folder_of(tmp_path, A, B), size=8), GeneratedShapes(3, 16)):
        copy = pickle.loads(pickle.dumps(source))
        assert len(copy) == len(source)
        assert copy[1].segments[0] == source[1].segments[0]
        np.testing.assert_array_equal(copy[1].segments[1].pixels, source[1].segments[1].pixels)
