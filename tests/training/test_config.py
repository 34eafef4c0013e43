"""Configs: overrides are typed, and mistakes are named."""

import pytest

from jaxmm.errors import InputError
from jaxmm.models.transfusion import PRESETS, SYSTEM
from jaxmm.training.config import load_config, model_config

DIGITS = "experiments/digits/transfusion.py"
PRETRAIN = "experiments/transfusion/pretrain.py"


def test_overrides_keep_the_types_of_what_they_replace():
    config = load_config(
        DIGITS, ["seed=3", "optimizer.learning_rate=1", "data.source=folder", "model.bidirectional=false"]
    )
    assert config.seed == 3 and config.data.source == "folder" and config.model.bidirectional is False
    assert config.optimizer.learning_rate == 1.0 and isinstance(config.optimizer.learning_rate, float)


@pytest.mark.parametrize(
    "override, message",
    [
        ("optimizer.lr=1e-3", "unknown config key 'optimizer.lr'"),
        ("optimizer.learning_rat=1e-3", "did you mean 'optimizer.learning_rate'"),
        ("sede=3", "did you mean 'seed'"),
        ("seed=three", "'seed' takes int, not 'three'"),
        ("seed=1.5", "'seed' takes int"),
        ("steps=true", "'steps' takes int"),
        ("optimizer.frozen=codec", "'optimizer.frozen' takes tuple"),
        ("data=3", "unknown config key 'data'"),
        ("seed", "write --config.seed=value"),
    ],
)
def test_mistaken_overrides_are_named(override, message):
    with pytest.raises(InputError, match=message.replace("(", r"\(")):
        load_config(DIGITS, [override])


def test_fields_without_a_value_can_be_given_one():
    config = load_config(DIGITS, ["model.kv_heads=2", "samples.solver.solver=euler", "samples.solver.clip=1"])
    assert model_config(config).transformer.kv_heads == 2 and model_config(load_config(DIGITS)).kv_heads is None
    assert config.samples.solver.solver == "euler" and config.samples.solver.clip == 1.0
    with pytest.raises(InputError, match="'model.kv_heads' takes int, not 'two'"):
        load_config(DIGITS, ["model.kv_heads=two"])


def test_options_of_a_source_may_be_new_and_another_source_keeps_what_it_has():
    config = load_config(DIGITS, ["data.source=tfds:coco_captions", "data.options.text=captions/text"])
    assert config.data.source == "tfds:coco_captions"
    assert config.data.options.to_dict() == {"split": "train", "text": "captions/text"}
    config = load_config(
        f"{PRETRAIN}:7b",
        ["data.mixture.images.source=tfds:mnist", "data.mixture.images.options.split=test", "data.options.size=(8,4)"],
    )
    assert config.data.mixture.images.options.to_dict() == {"size": 256, "channels": 3, "split": "test"}
    assert config.data.mixture.text.source == "text" and config.data.options.size == (8, 4)
    for key in ("data.mixture.imges.options.split", "data.mixture.images.option.split", "data.option.split"):
        with pytest.raises(InputError, match=f"unknown config key '{key}'"):
            load_config(f"{PRETRAIN}:7b", [f"{key}=test"])


def test_the_mixture_of_pretraining_is_one_to_one_in_tokens():
    for size in (*PRESETS, "runlocal"):
        data = load_config(f"{PRETRAIN}:{size}").data
        assert data.mixture_unit == "tokens" and set(data.mixture) == {"images", "text"}
        assert data.mixture.images.weight == data.mixture.text.weight


def test_missing_and_broken_config_files(tmp_path):
    with pytest.raises(InputError, match="no config file nowhere.py"):
        load_config("nowhere.py")
    broken = tmp_path / "broken.py"
    broken.write_text("def get_config(:\n")
    with pytest.raises(InputError, match=r"broken.py:1: "):
        load_config(str(broken))
    empty = tmp_path / "empty.py"
    empty.write_text("")
    with pytest.raises(InputError, match="has no get_config"):
        load_config(str(empty))


def test_the_model_of_a_config_is_the_preset():
    for size, preset in PRESETS.items():
        config = load_config(f"{PRETRAIN}:{size}")
        assert model_config(config) == preset
        assert config.optimizer.learning_rate == 3e-4 and config.optimizer.final_learning_rate == 1.5e-5
        assert (config.optimizer.b1, config.optimizer.b2, config.optimizer.eps) == (0.9, 0.95, 1e-8)
        assert config.data.rows * config.data.tokens == 2**21 and config.steps == 250_000
    with pytest.raises(InputError, match="did you mean '7b'"):
        load_config(f"{PRETRAIN}:7bb")


def test_a_config_survives_json():
    import dataclasses
    import json

    for preset in PRESETS.values():
        assert SYSTEM.config.from_dict(json.loads(json.dumps(dataclasses.asdict(preset)))) == preset
