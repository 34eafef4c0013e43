"""Cached latents: what `jaxmm encode` writes, and that training from it is training from the pixels."""

import dataclasses
import json
import shutil

import jax
import numpy as np
import pytest
from ml_collections import ConfigDict
from PIL import Image
from safetensors.numpy import load_file, save_file

from jaxmm.autoencoders import KLAutoencoder, KLConfig, weights_table
from jaxmm.cli import main
from jaxmm.data.latents import LatentFolder, codec_fingerprint, pack, pack_error, unpack
from jaxmm.data.sources import make_source
from jaxmm.errors import InputError
from jaxmm.layers.parameters import Blueprint, subset
from jaxmm.models.transfusion import TransfusionConfig
from jaxmm.sequence import Document, Latents, Text
from jaxmm.training import encode
from jaxmm.training.config import base_config, load_config, model_config
from jaxmm.training.encode import EncodeOptions, encode_source
from jaxmm.training.inputs import codec_weights, make_sources
from jaxmm.training.loop import Trainer

CODEC = dict(in_channels=3, out_channels=3, block_out_channels=(8, 8), layers_per_block=1, latent_channels=4)
CODEC |= dict(scaling_factor=0.4)
WORDS = tuple(f"w{i}" for i in range(10))


def random(seed):
    """shape -> small random weights."""
    rng = np.random.default_rng(seed)
    return lambda shape: (0.1 * rng.standard_normal(shape)).astype(np.float32)


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """(a random VAE in diffusers' layout, a folder of ten captioned pictures of which the fourth is broken)."""
    vae, pictures = tmp_path_factory.mktemp("vae"), tmp_path_factory.mktemp("pictures")
    codec, rng = Blueprint(lambda rngs: KLAutoencoder(KLConfig(**CODEC, norm_groups=4), rngs=rngs)), random(0)
    weights = {path: rng(spec.shape) for path, spec in codec.parameters.items()}
    save_file(weights_table(codec.parameters).write(weights), vae / "diffusion_pytorch_model.safetensors")
    (vae / "config.json").write_text(json.dumps(CODEC | {"norm_num_groups": 4}))
    rng = np.random.default_rng(0)
    with (pictures / "captions.jsonl").open("w") as file:
        for i, word in enumerate(WORDS):
            Image.fromarray(rng.integers(0, 256, (9, 9, 3), np.uint8)).resize((40, 48)).save(pictures / f"{i}.png")
            file.write(json.dumps({"image": f"{i}.png", "caption": word}) + "\n")
    (pictures / "3.png").write_bytes(b"no picture")
    return vae, pictures


def make_config(folders):
    vae, pictures = folders
    codec = KLConfig(**CODEC, norm_groups=4)
    model = TransfusionConfig(
        width=32, layers=2, heads=2, mlp_width=64, vocab_size=15, boi_id=13, eoi_id=14, context=32,
        image_size=(16, 16), codec=codec, latent_channels=4, time_features=16, init_std=0.1,
    )  # fmt: skip
    config = base_config("transfusion", model)
    config.data.source, config.data.words, config.codec = "folder", WORDS, str(vae)
    config.data.options.update(dict(path=str(pictures), size=16, channels=3))
    config.data.rows, config.data.tokens, config.data.images, config.data.bad_share = 8, 44, 2, 0.2
    return config


def of_cache(config, cache):
    config.data.source, config.data.options = "latents", ConfigDict(dict(path=str(cache)))
    return config


@pytest.fixture(scope="module", autouse=True)
def one_encoder():
    """All tests have the same codec and size: it is compiled once."""
    with pytest.MonkeyPatch.context() as patch:
        made, whole = [], encode.Encoder
        patch.setattr(encode, "Encoder", lambda *a: made[0] if made else made.append(whole(*a)) or made[0])
        yield


@pytest.fixture(scope="module")
def cache(folders, tmp_path_factory):
    folder = tmp_path_factory.mktemp("cache") / "latents"
    manifest = encode_source(make_config(folders), folder, EncodeOptions(dtype="float32", shard_size=4, batch_size=1))
    assert (manifest.records, manifest.shards, manifest.shape) == (10, 3, (8, 8, 8))
    return folder


def first_batch(config, workdir):
    """The trainer, and its first batch on the host."""
    workdir.mkdir()
    trainer = Trainer(config, workdir)
    return trainer, jax.device_get(next(iter(trainer.batches)))


def losses(config, workdir):
    """The first batch, and its losses at fixed parameters, on one device."""
    trainer, batch = first_batch(config, workdir)
    given = codec_weights(config.codec, trainer.model)
    params = {path: random(1)(spec.shape) for path, spec in trainer.blueprint.parameters.items()} | given

    terms = jax.jit(lambda params: trainer.blueprint.bind(params).loss(batch, jax.random.key(5))[0])(params)
    return batch, {name: float(term.sum / term.count) for name, term in terms.items()}


def test_losses_are_those_of_the_pixels(folders, cache, tmp_path):
    """The same rows, noise and posterior samples: the same losses, without the encoder."""
    batch, inside = losses(make_config(folders), tmp_path / "a")
    cached_batch, cached = losses(of_cache(make_config(folders), cache), tmp_path / "b")
    assert set(batch.images) == {"16x16"} and set(cached_batch.images) == {"8x8x8"}
    jax.tree.map(np.testing.assert_array_equal, batch.streams, cached_batch.streams)
    for field in ("slot", "example", "noise_limit", "weight"):
        np.testing.assert_array_equal(
            getattr(batch.images["16x16"], field), getattr(cached_batch.images["8x8x8"], field)
        )
    assert set(inside) == set(cached) == {"text", "image"}
    for name in inside:
        assert cached[name] == pytest.approx(inside[name], rel=1e-5), name


def test_records_are_the_posteriors_of_the_documents(folders, cache):
    config = make_config(folders)
    model = model_config(config)
    source, cached = make_sources(config, model)[""], LatentFolder(str(cache))
    codec, weights = Blueprint(lambda rngs: KLAutoencoder(model.codec, rngs=rngs)), codec_weights(config.codec, model)
    moments = jax.jit(lambda pixels: codec.bind(subset(weights, "codec.")).moments(pixels)[0])
    assert len(cached) == len(source) == 10
    for i in (0, 5, 9):
        document, pixels = cached[i], source[i].segments[1].pixels
        mean, logvar = moments(pixels[None].astype(np.float32) / 127.5 - 1.0)
        text, latents = document.segments
        assert text == source[i].segments[0] and (document.example, document.name) == (i, source[i].name)
        np.testing.assert_allclose(latents.moments[..., :4], mean[0], atol=2e-5)
        np.testing.assert_allclose(latents.moments[..., 4:], logvar[0], atol=2e-4)


def test_a_broken_record_keeps_its_place(folders, cache):
    with pytest.raises(InputError, match=r"captions.jsonl:4: .*3.png is no image of a known format"):
        LatentFolder(str(cache))[3]
    (line,) = (cache / "bad_examples.jsonl").read_text().splitlines()
    assert json.loads(line)["record"] == 3
    config = make_config(folders)
    config.data.bad_share = 0.05
    with pytest.raises(InputError, match="1 of 10 records cannot be used"):
        encode_source(config, cache.parent / "strict", EncodeOptions(batch_size=1))
    assert not list((cache.parent / "strict").glob("*array_record*"))


def test_a_run_that_was_stopped_goes_on(folders, cache, tmp_path, monkeypatch):
    """Finished shards are kept, the others are made; what is there in the end is what one run makes."""
    folder, config = tmp_path / "latents", make_config(folders)
    options = EncodeOptions(dtype="float32", shard_size=4, batch_size=1)
    whole, written = encode._write_shard, []

    def stop_at_last(folder, manifest, shard, *rest):
        written.append(shard)
        if shard == 2 and len(written) == 3:
            raise KeyboardInterrupt
        whole(folder, manifest, shard, *rest)

    monkeypatch.setattr(encode, "_write_shard", stop_at_last)
    with pytest.raises(KeyboardInterrupt):
        encode_source(config, folder, options)
    with pytest.raises(InputError, match="1 of 3 shards are missing .latents-00002-of-00003.*run the same"):
        LatentFolder(str(folder))
    encode_source(config, folder, options)
    assert written == [0, 1, 2, 2]
    assert sorted(file.name for file in folder.iterdir()) == sorted(file.name for file in cache.iterdir())
    for i in set(range(10)) - {3}:
        np.testing.assert_array_equal(
            LatentFolder(str(folder))[i].segments[1].moments, LatentFolder(str(cache))[i].segments[1].moments
        )
    with pytest.raises(InputError, match="holds other latents, take another --output; it has dtype 'float32'"):
        encode_source(config, folder, EncodeOptions(shard_size=4))


@pytest.mark.parametrize("dtype, bound", [("float16", 2**-11), ("bfloat16", 2**-8), ("float32", 0.0)])
def test_formats_round_as_they_should(cache, dtype, bound):
    exact = LatentFolder(str(cache))
    document, manifest = exact[0], dataclasses.replace(exact.manifest, dtype=dtype)
    again = unpack(pack(document, manifest), manifest)
    assert again.segments[0] == document.segments[0] and again.name == document.name
    moments, rounded = document.segments[1].moments, again.segments[1].moments
    assert rounded.dtype == np.float32
    error = np.abs(rounded - moments) / np.abs(moments)
    assert error.max() <= bound and (error.max() > bound / 4 or not bound)
    assert len(pack(document, manifest)) < 600 + moments.size * np.dtype(dtype).itemsize


def test_documents_of_any_segments_survive(cache):
    manifest = LatentFolder(str(cache)).manifest
    moments = np.random.default_rng(0).normal(size=(2, *manifest.shape)).astype(np.float32)
    texts = Text("a\nb", "question", ("c", "d")), Text("\u00fc", "answer")
    document = Document((Latents(moments[0], "context"), texts[0], Latents(moments[1]), texts[1]), name="x:1")
    again = unpack(pack(document, manifest), manifest)
    assert [s for s in again.segments if isinstance(s, Text)] == list(texts) and again.name == "x:1"
    assert [s.role for s in again.segments if isinstance(s, Latents)] == ["context", "target"]
    np.testing.assert_array_equal([again.segments[0].moments, again.segments[2].moments], moments)
    alone = Document((texts[0],), name="y")
    assert unpack(pack(alone, manifest), manifest) == alone
    with pytest.raises(InputError, match="^what was wrong$"):
        unpack(pack_error("what was wrong"), manifest)


def test_latents_of_another_codec_are_refused(folders, cache, tmp_path):
    vae = tmp_path / "vae"
    shutil.copytree(folders[0], vae)
    tensors = load_file(vae / "diffusion_pytorch_model.safetensors")
    tensors["encoder.conv_in.bias"] = tensors["encoder.conv_in.bias"] + np.float32(1e-6)
    save_file(tensors, vae / "diffusion_pytorch_model.safetensors")
    config = of_cache(make_config(folders), cache)
    make_sources(config, model_config(config))
    config.codec = str(vae)
    with pytest.raises(InputError, match="are of another codec .* than config key 'codec' names"):
        make_sources(config, model_config(config))
    config.codec = ""
    with pytest.raises(InputError, match="cached latents belong to a codec: name its folder, --config.codec=FOLDER"):
        make_sources(config, model_config(config))
    source = LatentFolder(str(cache))
    source.check(source.manifest.codec, [16, 16])
    with pytest.raises(InputError, match="of images of .16, 16. pixels, not .32, 16."):
        source.check(source.manifest.codec, (32, 16))


def test_without_a_codec_a_cache_is_pointless(tmp_path):
    config = load_config("experiments/digits/transfusion.py")
    with pytest.raises(InputError, match="a cache of them is pointless"):
        encode_source(config, tmp_path / "latents")
    assert not (tmp_path / "latents").exists()


def test_the_fingerprint_is_of_sizes_and_weights(folders):
    config = model_config(make_config(folders)).codec
    weights = {"a": np.arange(6, dtype=np.float32).reshape(2, 3), "b": np.ones((), np.float32)}
    same = codec_fingerprint(config, dict(reversed(weights.items())))
    assert codec_fingerprint(config, weights) == same
    others = [
        (dataclasses.replace(config, scaling_factor=0.5), weights),
        (config, weights | {"a": weights["a"].reshape(3, 2)}),
        (config, weights | {"b": np.zeros((), np.float32)}),
        (config, {"a": weights["a"]}),
    ]
    assert same not in [codec_fingerprint(*other) for other in others]


def test_damaged_folders(cache, tmp_path):
    with pytest.raises(InputError, match="is no folder of latents"):
        LatentFolder(str(tmp_path))
    copy = tmp_path / "copy"
    shutil.copytree(cache, copy)
    shard = copy / "latents-00001-of-00003.array_record"
    shard.write_bytes(shard.read_bytes()[:1000])
    with pytest.raises(InputError, match="copy: "):
        source = LatentFolder(str(copy))
        [source[i] for i in range(4, 8)]
    (copy / "manifest.json").write_text("{")
    with pytest.raises(InputError, match="manifest.json is damaged"):
        LatentFolder(str(copy))


def test_a_mixture_of_pixels_latents_and_text(folders, cache, tmp_path):
    """One batch holds both buckets, and the loss takes all of it."""
    config = make_config(folders)
    (tmp_path / "text.txt").write_text("w1 w2 w3 w4\nw5 w6\n" + "w0 " * 60)
    part = lambda source, **options: dict(source=source, options=options, weight=1.0)  # noqa: E731
    pixels = part("folder", **config.data.options.to_dict())
    text = part("text", path=str(tmp_path / "text.txt"))
    config.data.mixture = ConfigDict(dict(pixels=pixels, cached=part("latents", path=str(cache)), text=text))
    trainer, batch = first_batch(config, tmp_path / "run")
    assert set(batch.images) == {"16x16", "8x8x8"}
    params = jax.eval_shape(trainer.blueprint.init, jax.random.key(0))
    notes = jax.eval_shape(lambda p: trainer.blueprint.bind(p).loss(batch, jax.random.key(5))[1], params)
    assert notes["target/16x16"].shape == notes["target/8x8x8"].shape == (8, 2, 8, 8, 4)
    assert all((images.slot >= 0).any() for images in batch.images.values())
    with pytest.raises(InputError, match="which source of the mixture.*known: cached, pixels, text"):
        encode_source(config, tmp_path / "out")
    with pytest.raises(InputError, match="source 'text' has no pixels to encode"):
        encode_source(config, tmp_path / "out", EncodeOptions(source="text"))
    assert make_source("latents", {"path": str(cache)}).kind == "latents"


def test_wrong_options():
    with pytest.raises(InputError, match="unknown dtype 'float61'; did you mean 'float16'"):
        EncodeOptions(dtype="float61")
    with pytest.raises(InputError, match="shard_size must be at least 1"):
        EncodeOptions(shard_size=0)


def test_the_verb_writes_what_training_reads(folders, tmp_path, capsys):
    experiment = tmp_path / "experiment.py"
    experiment.write_text(
        "from pathlib import Path\nfrom tests.training.test_encode import make_config\n"
        f"def get_config(arg=''):\n    return make_config((Path({str(folders[0])!r}), Path({str(folders[1])!r})))\n"
    )
    output = tmp_path / "latents"
    arguments = ["encode", "--config", str(experiment), "--output", str(output), "--shard-size", "7"]
    assert main([*arguments, "--batch-size", "1", "--config.data.bad_share=0.1"]) == 0
    assert capsys.readouterr().out == f"{output}: 10 documents in 2 shards\n"
    assert LatentFolder(str(output)).manifest.dtype == "float16"
    overrides = ["data.source=latents", f"data.options.path={output}"]
    config = load_config(str(experiment), overrides)
    assert config.data.options.to_dict() == {"path": str(output)}
    source = make_sources(config, model_config(config))[""]
    assert source[9].segments[0].text == "w9" and source[9].segments[1].moments.shape == (8, 8, 8)


def test_the_verb_says_what_is_wrong(tmp_path, capsys):
    config = "experiments/transfusion/pretrain.py:runlocal"
    arguments = ["encode", "--config", config, "--output", str(tmp_path / "o"), "--source", "images"]
    assert main([*arguments, "--config.seed=1"]) == 2
    assert "a cache of them is pointless" in capsys.readouterr().err
