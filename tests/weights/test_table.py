"""Weights tables: coverage in both directions, and bit-exact round trips."""

import numpy as np
import pytest

from jaxmm.models.transfusion import SYSTEM
from jaxmm.paths import matches, stack_layers, unstack_layers
from jaxmm.sharding import Parameter
from jaxmm.weights import CONV, HEADS_IN, HEADS_OUT, LINEAR, SAME, Mismatch, Row, Table
from tests import tiny


def parameters(config):
    rng = np.random.default_rng(0)
    blueprint = SYSTEM.blueprint(config)
    return blueprint, {path: rng.normal(size=x.shape).astype(np.float32) for path, x in blueprint.parameters.items()}


@pytest.mark.parametrize("changes", [{}, {"tie_embeddings": True}, {"time_injection": "post_linear"}, {"kv_heads": 2}])
def test_export_and_import_are_inverse(changes):
    config = tiny.config(**changes)
    blueprint, params = parameters(config)
    table = SYSTEM.table(config, blueprint)
    official = table.write(params)
    again, carried = table.read(official)
    assert again.keys() == params.keys() and not carried
    assert all(np.array_equal(again[path], params[path]) for path in params)
    kernel = params["transformer.layers.streams.tokens.key.kernel"][1]
    np.testing.assert_array_equal(
        official["model.layers.1.self_attn.k_proj.weight"], kernel.reshape(config.width, -1).T
    )
    assert ("lm_head.weight" in official) != config.tie_embeddings


def test_every_difference_is_listed():
    blueprint, params = parameters(tiny.CONFIG)
    table = SYSTEM.table(tiny.CONFIG, blueprint)
    official = table.write(params)
    del official["model.norm.weight"], official["model.layers.0.mlp.up_proj.weight"]
    official["model.layers.7.mlp.up_proj.weight"] = official["lm_head.weight"]
    official["lm_head.weight"] = official["lm_head.weight"].T
    with pytest.raises(Mismatch) as error:
        table.read(official)
    assert error.value.problems == [
        "lm_head.weight: shape [32, 16], expected [16, 32]",
        "model.layers.0.mlp.up_proj.weight: missing",
        "model.layers.7.mlp.up_proj.weight: unknown key",
        "model.norm.weight: missing",
    ]


def test_carried_tensors_come_back():
    config = tiny.config(time_injection="post_linear")
    blueprint, params = parameters(config)
    table = SYSTEM.table(config, blueprint)
    unused = {"patch_encoder.time_proj.weight": np.ones((4, 32), np.float32)}
    again, carried = table.read(table.write(params) | unused)
    assert carried.keys() == unused.keys()
    assert table.write(again, carried).keys() == table.write(params).keys() | unused.keys()


@pytest.mark.parametrize("transform", [SAME, LINEAR, CONV, HEADS_IN, HEADS_OUT], ids=lambda t: t.name)
def test_transforms_are_inverse_and_know_the_official_shape(transform):
    shape = {"linear": (3, 5), "conv": (3, 2, 4, 6)}.get(transform.name, (4, 3, 5))
    ours = np.random.default_rng(0).normal(size=shape)
    official = transform.write(ours)
    assert official.shape == transform.official_shape(shape)
    assert np.array_equal(transform.read(official, shape), ours)


def test_a_path_without_a_row_is_a_defect_of_the_table():
    shapes = {"a": Parameter((2,), np.float32, ("norm",)), "b": Parameter((2,), np.float32, ("norm",))}
    with pytest.raises(ValueError, match="b has 0 rows"):
        Table([Row("official.a", "a")], shapes).write({"a": np.zeros(2), "b": np.zeros(2)})


def test_stacks_of_layers():
    tree = {"x.layers.up.kernel": np.arange(6.0).reshape(3, 2), "layers.scale": np.arange(3.0), "norm": np.ones(1)}
    flat = unstack_layers(tree)
    assert sorted(flat) == ["layers.0.scale", "layers.1.scale", "layers.2.scale", "norm"] + [
        f"x.layers.{i}.up.kernel" for i in range(3)
    ]
    again = stack_layers(flat)
    assert all(np.array_equal(again[path], tree[path]) for path in tree)
    del flat["x.layers.1.up.kernel"]
    with pytest.raises(ValueError, match=r"layers \[0, 2\] have gaps"):
        stack_layers(flat)


def test_patterns_match_whole_paths():
    assert matches((r"codec\..*",), "codec.encoder.kernel")
    assert not matches((r"codec",), "codec.encoder.kernel")
