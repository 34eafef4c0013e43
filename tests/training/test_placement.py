"""No state is ever whole on one device: when it is drawn, given, or restored."""

import jax
import numpy as np
import pytest

from jaxmm.checkpoints import _disk_form, _from_disk
from jaxmm.models.transfusion import PRESETS
from jaxmm.sharding import make_mesh
from tests import tiny
from tests.hlo import collectives
from tests.training.compiled import lower_init, state_maker, tpu_devices
from tests.training.test_compiled_step import CODEC

CONFIG = tiny.config(width=256, mlp_width=512, layers=8)


def size(tree) -> int:
    return sum(x.size * x.dtype.itemsize for x in jax.tree.leaves(tree))


def share(tree) -> int:
    """Bytes of one device's part."""
    return sum(int(np.prod(x.sharding.shard_shape(x.shape))) * x.dtype.itemsize for x in jax.tree.leaves(tree))


def test_each_device_draws_its_own_part():
    lowered, state = lower_init(CONFIG, make_mesh(fsdp=8))
    compiled = lowered.compile()
    memory = compiled.memory_analysis()
    assert share(state) < 1.02 * size(state) / 8
    assert memory.output_size_in_bytes < 1.01 * share(state)
    # what is drawn of the largest matrix, as bits and as numbers
    largest = max(share(x) for x in jax.tree.leaves(state))
    assert memory.temp_size_in_bytes < 8 * largest < size(state) / 8
    assert not collectives(compiled.as_text())


@pytest.mark.slow
def test_init_of_7b_on_a_tpu():
    lowered, state = lower_init(PRESETS["7b"], make_mesh(devices=tpu_devices("v5e:4x8")))
    memory = lowered.compile().memory_analysis()
    assert size(state) > 80e9 and share(state) < 1.01 * size(state) / 32
    assert memory.output_size_in_bytes + memory.temp_size_in_bytes < 1.02 * size(state) / 32


def test_layers_are_stacked_part_by_part():
    wanted = state_maker(CONFIG, make_mesh(fsdp=4, tensor=2)).abstract()["trainable"]
    leaves = _disk_form(wanted)
    assert share(leaves) == share(wanted)
    compiled = jax.jit(lambda leaves: _from_disk(leaves, wanted)).lower(leaves).compile()
    assert not collectives(compiled.as_text())
    memory = compiled.memory_analysis()
    assert memory.output_size_in_bytes + memory.temp_size_in_bytes < 1.05 * share(wanted)


def test_given_weights_go_from_the_host_to_their_shards(monkeypatch):
    mesh = make_mesh(fsdp=8)
    maker = state_maker(tiny.config(codec=CODEC, latent_channels=5, image_size=(12, 12)), mesh)
    path, zeros = "codec.encoder.conv_in.kernel", lambda spec: jax.numpy.zeros(spec.shape, spec.dtype)
    monkeypatch.setattr(maker.blueprint, "init", lambda key: jax.tree.map(zeros, maker.blueprint.parameters))
    value = np.random.default_rng(0).normal(size=maker.blueprint.parameters[path].shape).astype(np.float32)
    put, seen = jax.device_put, []
    monkeypatch.setattr(jax, "device_put", lambda x, *a, **k: seen.append(x) or put(x, *a, **k))
    state = maker.init(jax.random.key(0), {path: value})
    assert seen and all(isinstance(x, np.ndarray) for x in seen)
    kernel = state["frozen"][path]
    assert {shard.data.shape for shard in kernel.addressable_shards} == {(3, 3, 3, 2)}
    np.testing.assert_array_equal(kernel, value.astype(kernel.dtype))
