"""Train steps and initialisations compiled without arrays, for the CPU's devices or for TPUs that are not there."""

import functools
import os
import tempfile
from pathlib import Path

import jax

from jaxmm.layers.parameters import Policy
from jaxmm.models.transfusion import SYSTEM, TransfusionConfig
from jaxmm.paths import matches
from jaxmm.sequence import Budget, build_batch
from jaxmm.sharding import replicated, rows_sharding
from jaxmm.training.config import base_config
from jaxmm.training.optimizer import make_optimizer
from jaxmm.training.state import StateMaker
from jaxmm.training.step import make_step

# what libtpu wants to know where there is no TPU
TPU = {
    "TPU_SKIP_MDS_QUERY": "1",
    "TPU_WORKER_HOSTNAMES": "localhost",
    "TPU_ACCELERATOR_TYPE": "v5litepod-8",
    "ALLOW_MULTIPLE_LIBTPU_LOAD": "1",
}


@functools.cache
def tpu_devices(topology: str) -> list:
    """The devices of a topology like "v5e:2x4"; libtpu makes them up."""
    from jax.experimental import topologies

    os.environ.update(TPU)
    return list(topologies.get_topology_desc(topology, platform="tpu").devices)


def state_maker(config: TransfusionConfig, mesh) -> StateMaker:
    """As the trainer makes it for mixed precision, with the codec frozen."""
    blueprint, options = SYSTEM.blueprint(config), base_config("transfusion", config).optimizer
    optimizer = make_optimizer(options, 10, [p for p in blueprint.parameters if not matches(options.frozen, p)])
    return StateMaker(blueprint, optimizer, options.frozen, mesh, Policy.named("mixed"))


def lower_step(config: TransfusionConfig, budget: Budget, rows: int, mesh):
    """The train step of mixed precision, lowered."""
    maker = state_maker(config, mesh)
    step = make_step(maker.blueprint, maker.optimizer, SYSTEM.term_weights(config), maker.policy)
    sharding = rows_sharding(mesh, rows)
    batch = jax.tree.map(
        lambda x: jax.ShapeDtypeStruct((rows, *x.shape[1:]), x.dtype, sharding=sharding), build_batch([[]], budget)
    )
    state = maker.abstract()
    with jax.set_mesh(mesh):
        return jax.jit(step, donate_argnums=0).lower(state, batch, _key(mesh))


def lower_init(config: TransfusionConfig, mesh):
    """The initialisation of the train state, lowered, and the state as shapes."""
    maker = state_maker(config, mesh)
    state = maker.abstract()
    shardings = jax.tree.map(lambda x: x.sharding, state)
    return jax.jit(maker._draw, out_shardings=shardings).lower(_key(mesh)), state


def partitioned(lowered) -> tuple[str, str]:
    """(the program just after it was cut for the devices, the compiled one).

    The first is what jaxmm asks for; what follows is the backend's own: the CPU gathers in float32 what is bfloat16.
    """
    with tempfile.TemporaryDirectory() as folder:
        options = {"xla_dump_to": folder, "xla_dump_hlo_pass_re": "spmd-partitioning", "xla_dump_hlo_as_text": True}
        compiled = lowered.compile(options)
        (path,) = Path(folder).glob("*after_spmd-partitioning*")
        return path.read_text(), compiled.as_text()


def _key(mesh) -> jax.ShapeDtypeStruct:
    dtype = jax.eval_shape(lambda: jax.random.key(0)).dtype
    return jax.ShapeDtypeStruct((), dtype, sharding=replicated(mesh))
