"""Accumulation, and steps whose numbers are not finite."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from jaxmm.errors import InputError, RunError
from jaxmm.layers.parameters import Policy
from jaxmm.models.transfusion import SYSTEM
from jaxmm.sharding import make_mesh, parameter_shardings, rows_sharding
from jaxmm.training.loop import Trainer
from jaxmm.training.numerics import Guard, group_norms
from jaxmm.training.state import StateMaker
from jaxmm.training.step import make_gradient, make_step
from tests import tiny
from tests.training.test_loop import tiny_config

WEIGHTS = SYSTEM.term_weights(tiny.CONFIG)
BLUEPRINT = SYSTEM.blueprint(tiny.CONFIG)


@pytest.mark.parametrize("microbatches", [2, 4])
def test_microbatches_give_the_gradient_of_the_big_batch(microbatches):
    """The rows hold one or two documents, with and without captions: the turns count different numbers of tokens."""
    params = jax.jit(BLUEPRINT.init)(jax.random.key(0))
    batch, key = tiny.batch(rows=8, caption_dropout=0.5), jax.random.key(1)
    counts = np.sum(batch.streams["tokens"].weights.reshape(-1, microbatches, 64), axis=(0, 2))
    assert len(set(counts)) > 1
    big = jax.jit(make_gradient(BLUEPRINT, WEIGHTS, Policy()))(params, {}, batch, key)
    in_turns = jax.jit(make_gradient(BLUEPRINT, WEIGHTS, Policy(), microbatches))
    assert_equal(in_turns(params, {}, batch, key), big)
    mesh = make_mesh(fsdp=2, devices=jax.devices()[:2])
    with jax.set_mesh(mesh):
        shared = jax.device_put(batch, rows_sharding(mesh, 8))
        placed = jax.device_put(params, parameter_shardings(BLUEPRINT.parameters, mesh))
        assert_equal(in_turns(placed, {}, shared, key), big)


def assert_equal(actual, expected):
    """((total, terms), gradient) within 1e-6 of the largest number of each tensor."""
    actual, expected = (jax.tree.map(np.asarray, x) for x in (actual, expected))
    leaves = zip(jax.tree_util.tree_leaves_with_path(actual), jax.tree.leaves(expected), strict=True)
    for (path, x), y in leaves:
        assert np.max(np.abs(x - y)) <= 1e-6 * np.max(np.abs(y)), jax.tree_util.keystr(path)


def test_a_step_without_numbers_changes_nothing():
    optimizer = optax.adam(0.1)
    maker = StateMaker(BLUEPRINT, optimizer, (), make_mesh(devices=jax.devices()[:1]), Policy(), ema=0.9)
    state, batch = maker.init(jax.random.key(0)), tiny.batch(rows=2)
    batch.images["8x8"].values[0, 0, 0, 0, 0] = np.nan
    step = jax.jit(make_step(BLUEPRINT, optimizer, WEIGHTS, Policy(), ema=0.9))
    after, metrics = step(state, batch, jax.random.key(0))
    assert not metrics["finite"] and np.isnan(metrics["loss/image"])
    assert int(after["step"]) == 1
    for part in ("trainable", "optimizer", "ema"):
        jax.tree.map(np.testing.assert_array_equal, after[part], state[part])
    with pytest.raises(RunError, match=r"step 7: gradient_norm/.* is nan.*loss/image is nan.*checkpoint is intact"):
        Guard("stop", 1).check(7, metrics)


def test_skipping_counts_and_ends_after_some_in_a_row():
    guard = Guard("skip", 3)
    good, bad = {"finite": jnp.array(True)}, {"finite": jnp.array(False), "loss/text": jnp.array(np.inf)}
    for step, metrics in enumerate([bad, bad, good, bad, bad]):
        guard.check(step, metrics)
    assert guard.skipped == 4
    with pytest.raises(RunError, match=r"step 5: loss/text is inf \(3 steps in a row\)"):
        guard.check(5, bad)
    with pytest.raises(InputError, match="did you mean 'skip'"):
        Guard("skipp", 3)


def test_a_run_without_numbers_stops_and_keeps_its_checkpoint(tmp_path):
    trainer = Trainer(tiny_config("steps=8", "checkpoint_every=2", "seed=1"), tmp_path)
    step = trainer.step
    trainer.step = lambda state, batch, key: step(state, poisoned(batch) if int(state["step"]) == 4 else batch, key)
    with pytest.raises(RunError, match="step 5: "):
        trainer.run()
    assert sorted(path.name for path in (tmp_path / "checkpoints").iterdir() if path.name.isdigit()) == ["2", "4"]


def poisoned(batch):
    return jax.tree.map(lambda x: x * np.nan if x.dtype == np.float32 else x, batch)


def test_norms_of_groups_add_up():
    tree = {"a.x": jnp.array([3.0]), "a.y": jnp.array([4.0]), "b.z": jnp.array([12.0])}
    norms = {name: float(x) for name, x in group_norms("norm", tree).items()}
    assert norms == {"norm": 13.0, "norm/a": 5.0, "norm/b": 12.0}
