"""Export: a LoRA checkpoint and what is written of it are the same model."""

import dataclasses
import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from safetensors.numpy import load_file

from jaxmm.checkpoints import Checkpoints, save_arrays, write_description
from jaxmm.convert import Saved, export, exporter
from jaxmm.errors import InputError
from jaxmm.inference import Pipeline, load
from jaxmm.layers.lora import AdaptedBlueprint, LoRA, merge
from jaxmm.models.transfusion import SYSTEM
from jaxmm.sharding import make_mesh
from tests import tiny

BASE = SYSTEM.blueprint(tiny.CONFIG)
LORA = LoRA(2, 3.0, (r".*\.(query|out|down)\.kernel",))
ADAPTED = AdaptedBlueprint(BASE, LORA)
WHOLE, FROZEN = "transformer.norms.tokens.scale", "time.input.bias"


def numbers(paths, seed):
    rng = np.random.default_rng(seed)
    specs = {path: ADAPTED.parameters[path] for path in sorted(paths)}
    return {path: jnp.asarray(0.1 * rng.normal(size=x.shape), jnp.float32) for path, x in specs.items()}


def write(folder, step, description, items):
    """A checkpoint folder."""
    described = {"system": "transfusion", "model": dataclasses.asdict(tiny.CONFIG), "draw_options": {"steps": 2}}
    write_description(folder, {"frozen": [], **described, **description}, tiny.TOKENIZER)
    checkpoints = Checkpoints(folder)
    checkpoints.save(step, items)
    checkpoints.close()


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """A folder with a base of whole parameters, and a LoRA run on its averages that holds one frozen parameter."""
    folder = tmp_path_factory.mktemp("folders")
    average = numbers(BASE.parameters, 1)
    write(folder / "base", 7, {}, {"trainable": numbers(BASE.parameters, 0), "ema": average})
    own = numbers([*ADAPTED.adapters, WHOLE], 2)
    lora = {"rank": 2, "alpha": 3.0, "targets": sorted(ADAPTED.targets), "train": [WHOLE]}
    base = {"checkpoint": "../base", "step": 7}
    write(folder / "lora", 3, {"lora": lora, "base": base, "frozen": [FROZEN]}, {"trainable": own})
    save_arrays(folder / "lora" / "frozen", numbers([FROZEN], 3))
    return folder


@pytest.fixture(scope="module")
def merged():
    """The parameters that the LoRA run stands for, put together by hand."""
    parts = [numbers(BASE.parameters, 1), numbers([*ADAPTED.adapters, WHOLE], 2), numbers([FROZEN], 3)]
    return merge(parts[0] | parts[1] | parts[2], LORA)


def same(ours, expected):
    assert ours.keys() == expected.keys()
    for path in expected:
        assert np.array_equal(ours[path], expected[path]), path


def test_a_lora_checkpoint_loads_merged(folders, merged):
    pipeline = load(folders / "lora")
    same(pipeline.params, merged)
    mesh = make_mesh(fsdp=4, tensor=2)
    for path, value in load(folders / "lora", mesh=mesh).params.items():
        np.testing.assert_allclose(value, merged[path], atol=1e-6)
        assert len(value.sharding.device_set) == 8


def test_parts_are_loaded_alone(folders, merged):
    saved, spec = Saved.open(folders / "lora"), BASE.parameters
    device = jax.sharding.SingleDeviceSharding(jax.devices()[0])
    for path in (ADAPTED.targets[0], WHOLE, FROZEN, "embed.table"):
        target = jax.ShapeDtypeStruct(spec[path].shape, jnp.float32, sharding=device)
        same(saved.load({path: target}), {path: merged[path]})


@pytest.mark.parametrize("sharded", [False, True])
def test_official_weights_read_back_bit_for_bit(folders, merged, tmp_path, sharded, monkeypatch):
    if sharded:
        monkeypatch.setattr(exporter, "SHARD_BYTES", 20_000)
    assert export(folders / "lora", tmp_path / "out") == tmp_path / "out"
    files = sorted(path.name for path in (tmp_path / "out").iterdir())
    tensors = {}
    if sharded:
        index = json.loads((tmp_path / "out" / "model.safetensors.index.json").read_text())
        names = sorted(set(index["weight_map"].values()))
        assert len(names) > 2 and names[0] == f"model-00001-of-{len(names):05d}.safetensors"
        assert files == [*names, "model.json", "model.safetensors.index.json", "tokenizer"]
        for name in names:
            part = load_file(tmp_path / "out" / name)
            assert sum(x.nbytes for x in part.values()) <= 20_000 or len(part) == 1
            assert all(index["weight_map"][key] == name for key in part)
            tensors |= part
        assert index["metadata"]["total_size"] == sum(x.nbytes for x in tensors.values())
        assert tensors.keys() == index["weight_map"].keys()
    else:
        assert files == ["model.json", "model.safetensors", "tokenizer"]
        tensors = load_file(tmp_path / "out" / "model.safetensors")
    params, carried = SYSTEM.table(tiny.CONFIG, BASE).read(tensors)
    assert not carried
    same(params, merged)


def test_the_exports_draw_what_the_run_draws(folders, tmp_path):
    ask = dict(prompts="a two", count=2, seed=1)
    expected = load(folders / "lora").generate(**ask)
    assert not np.array_equal(expected, load(folders / "base").generate(**ask))
    export(folders / "lora", tmp_path / "jaxmm", "jaxmm")
    pipeline = load(tmp_path / "jaxmm")
    assert np.array_equal(pipeline.generate(**ask), expected)
    export(tmp_path / "jaxmm", tmp_path / "official")
    tensors = load_file(tmp_path / "official" / "model.safetensors")
    params = SYSTEM.table(tiny.CONFIG, BASE).read(tensors)[0]
    again = Pipeline(SYSTEM, tiny.CONFIG, params, pipeline.tokenizer, draw_options={"steps": 2})
    assert np.array_equal(again.generate(**ask), expected)


def test_an_export_keeps_formats_and_says_where_it_comes_from(tmp_path):
    kinds = {path: jnp.bfloat16 if path.startswith("time.") else jnp.float32 for path in BASE.parameters}
    params = {path: x.astype(kinds[path]) for path, x in numbers(BASE.parameters, 0).items()}
    write(tmp_path / "run", 5, {}, {"trainable": params})
    for kind in ("official", "jaxmm"):
        export(tmp_path / "run", tmp_path / kind, kind)
        description = json.loads((tmp_path / kind / "model.json").read_text())
        assert description["exported"] == {"checkpoint": str(tmp_path / "run"), "step": 5}
        assert description["draw_options"] == {"steps": 2}
    tensors = load_file(tmp_path / "official" / "model.safetensors")
    assert {key for key, x in tensors.items() if x.dtype == jnp.bfloat16} == {
        f"time_embed.mlp.{i}.{name}" for i in (0, 2) for name in ("weight", "bias")
    }
    same(load(tmp_path / "jaxmm").params, {path: x.astype(jnp.float32) for path, x in params.items()})


def test_what_cannot_be_exported_is_named(folders, tmp_path):
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "notes.txt").write_text("mine")
    with pytest.raises(InputError, match="full is there already and not empty"):
        export(folders / "lora", tmp_path / "full")
    with pytest.raises(InputError, match="did you mean 'official'"):
        export(folders / "lora", tmp_path / "new", "offical")
    with pytest.raises(InputError, match="is no checkpoint"):
        export(tmp_path / "full", tmp_path / "new")
    (tmp_path / "empty").mkdir()
    export(folders / "base", tmp_path / "empty")
    with pytest.raises(InputError, match="empty holds official weights .* --format jaxmm"):
        load(tmp_path / "empty")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["empty", "full"]


def test_a_base_that_is_gone_is_named(folders, tmp_path):
    import shutil

    for name in ("lora", "base"):
        shutil.copytree(folders / name, tmp_path / name)
    load(tmp_path / "lora")  # the base is found from the run, wherever both are
    (tmp_path / "base" / "checkpoints" / "7").rename(tmp_path / "base" / "checkpoints" / "8")
    with pytest.raises(InputError, match="adapters of step 7 of .*base, which is gone: .* has no step 7 .*latest is 8"):
        load(tmp_path / "lora")
    shutil.rmtree(tmp_path / "base")
    with pytest.raises(InputError, match="which is gone: .*base is no checkpoint.*jaxmm export"):
        load(tmp_path / "lora")
