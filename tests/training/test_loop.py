"""The loop: resuming, what it writes, what it refuses."""

import json
import shutil

import jax
import numpy as np
import pytest

from jaxmm.checkpoints import Checkpoints
from jaxmm.errors import InputError
from jaxmm.inference import load
from jaxmm.sharding import make_mesh
from jaxmm.training.config import load_config
from jaxmm.training.loop import Trainer

CONFIG = "experiments/digits/transfusion.py:short"


def tiny_config(*overrides):
    """Two seconds of training."""
    smaller = ["model.width=32", "model.mlp_width=64", "model.layers=2", "steps=8", "checkpoint_every=4", "log_every=2"]
    return load_config(CONFIG, [*smaller, "data.rows=8", "sample_every=0", "evaluation.name=", *overrides])


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """A finished run."""
    workdir = tmp_path_factory.mktemp("run")
    Trainer(tiny_config(), workdir).run()
    return workdir


def arrays(workdir, step, item="trainable"):
    """The arrays of one item of a step, as they are on disk."""
    import orbax.checkpoint as ocp

    with ocp.StandardCheckpointer() as checkpointer:
        folder = workdir / "checkpoints" / str(step) / item
        target = jax.tree.map(
            lambda x: jax.ShapeDtypeStruct(
                x.shape, x.dtype, sharding=jax.sharding.SingleDeviceSharding(jax.devices()[0])
            ),
            dict(checkpointer.metadata(folder).item_metadata.tree),
        )
        return checkpointer.restore(folder, target)


def lines(workdir):
    return [json.loads(line) for line in (workdir / "metrics.jsonl").read_text().splitlines()]


def test_metrics_have_every_term(run):
    assert [line["step"] for line in lines(run)] == [2, 4, 6, 8]
    for line in lines(run):
        assert line["loss"] == pytest.approx(line["loss/text"] + 2 * line["loss/image"], rel=1e-5)
        assert line["tokens_per_second"] > 0 and np.isfinite(line["gradient_norm"])
    assert lines(run)[0]["learning_rate"] == pytest.approx(2e-3 * 2 / 100)


def test_resuming_gives_the_same_numbers(run, tmp_path):
    again = tmp_path / "again"
    shutil.copytree(run, again)
    shutil.rmtree(again / "checkpoints" / "8")
    with (again / "metrics.jsonl").open("a") as file:
        file.write('{"step": 9, "loss')  # a line that a kill cut short
    Trainer(tiny_config(), again).run()
    for item in ("trainable", "ema", "optimizer"):
        first, second = arrays(run, 8, item), arrays(again, 8, item)
        assert first.keys() == second.keys()
        for path in first:
            assert np.array_equal(first[path], second[path]), path
    assert [line["loss"] for line in lines(again)] == [line["loss"] for line in lines(run)]


def test_layers_are_separate_on_disk(run):
    names = arrays(run, 8).keys()
    assert "transformer.layers.1.streams.tokens.mlp.up.kernel" in names
    assert "transformer.layers.streams.tokens.mlp.up.kernel" not in names


def test_a_finished_run_is_not_trained_again(run):
    before = lines(run)
    Trainer(tiny_config(), run).run()
    assert lines(run) == before


def test_a_checkpoint_restores_onto_another_mesh(run):
    trainer = Trainer(tiny_config("mesh.fsdp=4", "mesh.tensor=2"), run)
    state = trainer.maker.restore(Checkpoints(run), 8, iter(trainer.batches))
    saved = arrays(run, 8)
    for path in ("embed.table", "patch_decoder.proj.kernel"):
        assert np.array_equal(state["trainable"][path], saved[path])
        assert len(state["trainable"][path].sharding.device_set) == 8
    stacked = state["trainable"]["transformer.layers.streams.tokens.query.kernel"]
    assert np.array_equal(stacked[1], saved["transformer.layers.1.streams.tokens.query.kernel"])


def test_another_model_is_refused(run):
    with pytest.raises(InputError, match="another model"):
        Trainer(tiny_config("model.width=64"), run).run()


def test_a_checkpoint_of_other_shapes_lists_every_mismatch(run):
    trainer = Trainer(tiny_config("model.mlp_width=96"), run)
    with pytest.raises(InputError) as error:
        trainer.maker.restore(Checkpoints(run), 8, None)
    assert str(error.value).count("mlp.up.kernel") == 2 * 4  # of both layers; weights, ema, two moments
    assert "float32[32, 64] in the checkpoint, float32[32, 96] here" in str(error.value)


def test_the_loaded_pipeline_has_the_averaged_weights(run):
    pipeline = load(run)
    saved = arrays(run, 8, "ema")
    assert np.array_equal(pipeline.params["embed.table"], saved["embed.table"])
    assert not np.array_equal(saved["embed.table"], arrays(run, 8)["embed.table"])


def test_one_seed_draws_the_same_on_one_and_on_eight_devices(run):
    options = dict(count=8, seed=5, steps=4, guidance=2.0)
    one = load(run).generate("a two", **options).astype(int)
    eight = load(run, mesh=make_mesh()).generate("a two", **options).astype(int)
    assert np.abs(one - eight).max() <= 1
    assert np.abs(one[0] - one[1]).max() > 1


@pytest.mark.slow
def test_a_run_in_mixed_precision_resumes_and_loads(tmp_path):
    """Frozen parameters are saved in bfloat16 there, and read in the format that is asked for."""
    config = tiny_config("policy=mixed", "optimizer.frozen=('time\\..*',)", "steps=4")
    Trainer(config, tmp_path).run()
    with config.unlocked():
        config.steps = 6
    Trainer(config, tmp_path).run()
    assert [line["step"] for line in lines(tmp_path)] == [2, 4, 6]
    assert arrays(tmp_path, 4)["embed.table"].dtype == np.float32
    for policy, kind in (("float32", "float32"), ("bfloat16", "bfloat16")):
        pipeline = load(tmp_path, policy=policy)
        assert {str(x.dtype) for x in pipeline.params.values()} == {kind}
        assert pipeline.generate("a two", steps=2).shape == (1, 8, 8, 1)


def test_frozen_parameters_do_not_move(tmp_path):
    trainer = Trainer(tiny_config("optimizer.frozen=('time\\..*',)", "steps=4"), tmp_path)
    trainer.run()
    import orbax.checkpoint as ocp

    start = trainer.maker.init(jax.random.fold_in(jax.random.key(0), 0))
    frozen = ocp.StandardCheckpointer().restore(tmp_path.absolute() / "frozen")
    assert set(frozen) == {path for path in trainer.blueprint.parameters if path.startswith("time.")}
    for path, value in frozen.items():
        assert np.array_equal(value, start["frozen"][path])
    assert not any(path.startswith("time.") for path in arrays(tmp_path, 4))
    assert set(load(tmp_path).params) == set(trainer.blueprint.parameters)
