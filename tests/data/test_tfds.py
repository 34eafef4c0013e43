"""Datasets of TensorFlow Datasets, written here by TFDS itself, and read without TensorFlow."""

import io
import json
import shutil
import subprocess
import sys

import numpy as np
import PIL.Image
import pytest

from jaxmm.data.images import fit
from jaxmm.data.sources import make_source
from jaxmm.errors import InputError
from jaxmm.sequence import Text

COUNT = 6


def picture(i: int, shape=(10, 14, 3)) -> np.ndarray:
    return np.random.default_rng(i).integers(0, 256, shape, np.uint8)


def file(pixels: np.ndarray) -> io.BytesIO:
    buffer = io.BytesIO()
    PIL.Image.fromarray(pixels).save(buffer, "PNG")
    return io.BytesIO(buffer.getvalue())


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A folder of datasets: pairs 1.0.0 and 1.1.0, whose record with picture 3 is broken."""
    import tensorflow_datasets as tfds

    f = tfds.features

    class Pairs(tfds.core.GeneratorBasedBuilder):
        VERSION = tfds.core.Version("1.1.0")

        def _info(self):
            text = {"id": np.int64, "text": f.Text()}
            features = dict(image=f.Image(), captions=f.Sequence(text), number=np.int64, blob=f.Text())
            features |= dict(label=f.ClassLabel(names=["cat", "dog"]), inner=dict(view=f.Image(), said=f.Text()))
            return tfds.core.DatasetInfo(builder=self, features=f.FeaturesDict(features))

        def _split_generators(self, manager):
            return {"train": self._generate_examples(COUNT), "test": self._generate_examples(2)}

        def _generate_examples(self, count):
            for i in range(count):
                captions = [dict(id=n, text=f"caption {i} {n}") for n in range(i % 3)]
                image = io.BytesIO(b"no picture") if i == 3 else file(picture(i))
                inner = dict(view=file(picture(i + 100)), said="" if i == 1 else f"said {i}")
                blob = b"\xff" if i == 2 else f"blob {i}"
                yield i, dict(image=image, captions=captions, number=i, blob=blob, label=i % 2, inner=inner)

    root = tmp_path_factory.mktemp("tfds")
    offline = tfds.download.DownloadConfig(try_download_gcs=False)
    Pairs(data_dir=root, file_format="array_record").download_and_prepare(download_config=offline)
    older = root / "pairs" / "1.0.0"
    shutil.copytree(root / "pairs" / "1.1.0", older)
    info = json.loads((older / "dataset_info.json").read_text()) | {"version": "1.0.0"}
    (older / "dataset_info.json").write_text(json.dumps(info))
    return root


def make(folder, **options):
    return make_source("tfds:pairs", {"data_dir": str(folder), "size": 8} | options)


def by_number(source) -> dict:
    """{the number in the record's texts: document}; TFDS shuffles what it writes."""
    found = {}
    for i in range(len(source)):
        try:
            document = source[i]
        except InputError as error:
            found[str(error)] = i
        else:
            found[document.segments[0].text] = document
    return found


def test_images_with_a_template(folder):
    source = make(folder, template="{number}: a {label}")
    assert len(source) == COUNT and source.kind == "pixels" and source.name == "pairs:1.1.0"
    found = by_number(source)
    for i in {0, 1, 2, 4, 5}:
        document = found[f"{i}: a {('cat', 'dog')[i % 2]}"]
        np.testing.assert_array_equal(document.segments[1].pixels, fit(picture(i), 8, 8))
        assert document.name == f"pairs:1.1.0 train {document.example}"
    broken = next(key for key in found if "no image of a known format" in key)
    assert broken == f"pairs:1.1.0 train {found[broken]}: image is no image of a known format" and len(found) == COUNT


def test_nested_features_and_lists(folder):
    inner = by_number(make(folder, image="inner/view", text="inner/said", channels=1, size=[4, 6]))
    assert inner["said 4"].segments[1].pixels.shape == (4, 6, 1) and any("the text is empty" in key for key in inner)
    captions = by_number(make(folder, text="captions/text", image="inner/view"))
    assert captions["caption 5 0"].segments[0] == Text("caption 5 0", "caption", ("caption 5 1",))
    assert captions["caption 1 0"].segments[0].alternatives == ()
    assert sum("captions/text is an empty list" in key for key in captions) == 2  # 0 and 3
    both = by_number(make(folder, template="{label}, {captions/text}", image="inner/view"))
    assert both["dog, caption 5 0"].segments[0].alternatives == ("dog, caption 5 1",)


def test_text_alone_and_images_alone(folder):
    source = make(folder, image="", text="blob")
    found = by_number(source)
    assert source.kind == "text" and found["blob 4"].segments == (Text("blob 4", "text"),)
    assert sum("blob: byte 1 is not UTF-8" in key for key in found) == 1
    assert len(make(folder)[0].segments) == 1 and make(folder).kind == "pixels"


def test_splits_and_versions(folder):
    assert len(make(folder, split="train[:50%]")) == COUNT // 2 and len(make(folder, split="test")) == 2
    assert make_source("tfds", {"name": "pairs:1.0.0", "data_dir": str(folder)}).name == "pairs:1.0.0"


@pytest.mark.parametrize(
    "options, problem",
    [
        (dict(split="trian"), "has no split 'trian'; did you mean 'train'"),
        (dict(split="train[2"), "split 'train.2'"),
        (dict(text="caption/text"), "no feature 'caption/text'; did you mean 'captions/text'"),
        (dict(image="imag"), "no feature 'imag'; did you mean 'image'"),
        (dict(image="label"), "'label' of pairs:1.1.0 is no image; images: image, inner/view"),
        (dict(text="image"), "'image' of pairs:1.1.0 is neither a text nor a class label"),
        (dict(template="a {label"), "template 'a {label' of dataset pairs"),
        (dict(text="label", template="{label}"), "exclude each other"),
        (dict(image=""), "name a feature"),
        (dict(channels=2), "channels of dataset pairs: 1 or 3"),
        (dict(size=0), "size of the images of dataset pairs"),
        (dict(txt="label"), "has no option 'txt'; did you mean 'text'"),
    ],
)
def test_wrong_options(folder, options, problem):
    with pytest.raises(InputError, match=problem):
        make(folder, **options)


def test_datasets_that_are_not_there(folder):
    for name, problem in (
        ("pair", "there is no dataset pair in .*; did you mean 'pairs:1"),
        ("pairs:2.0.0", "there is no dataset pairs:2.0.0"),
        ("", "name of a dataset"),
    ):
        with pytest.raises(InputError, match=problem):
            make_source("tfds", {"name": name, "data_dir": str(folder)})
    with pytest.raises(InputError, match="it holds no prepared dataset"):
        make(folder / "nothing")


def test_configs_must_be_named(folder, tmp_path):
    for config in ("small", "large"):
        shutil.copytree(folder / "pairs" / "1.1.0", tmp_path / "pairs" / config / "1.1.0")
    with pytest.raises(InputError, match="dataset pairs has several configs in .*: pairs/large, pairs/small"):
        make(tmp_path)
    assert make_source("tfds:pairs/small", {"data_dir": str(tmp_path)}).name == "pairs/small:1.1.0"


def test_a_format_without_random_access(folder, tmp_path):
    """tfrecord is what TFDS writes by default."""
    copy = tmp_path / "pairs" / "1.1.0"
    shutil.copytree(folder / "pairs" / "1.1.0", copy)
    info = json.loads((copy / "dataset_info.json").read_text()) | {"fileFormat": "tfrecord"}
    (copy / "dataset_info.json").write_text(json.dumps(info))
    for file in copy.glob("*array_record*"):
        file.rename(copy / file.name.replace("array_record", "tfrecord"))
    with pytest.raises(InputError, match="file_format=.array_record"):
        make(tmp_path)


def test_tensorflow_is_never_imported(folder, tmp_path):
    """Also where it is installed: here stands a package of that name that ends the process."""
    (tmp_path / "tensorflow").mkdir()
    (tmp_path / "tensorflow" / "__init__.py").write_text("raise SystemExit('TensorFlow was imported')")
    code = f"""
import sys
sys.path.insert(0, {str(tmp_path)!r})
from jaxmm.data.sources import make_source
source = make_source("tfds:pairs", dict(data_dir={str(folder)!r}, text="captions/text", image="inner/view", size=8))
shapes = set()
for i in range(len(source)):
    try:
        shapes.add(source[i].segments[1].pixels.shape)
    except ValueError:
        pass
assert shapes == {{(8, 8, 3)}}, shapes
assert "tensorflow" not in sys.modules and "torch" not in sys.modules
print("read")
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.stdout.strip() == "read", done.stderr
