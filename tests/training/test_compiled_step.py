"""What the devices send each other in a train step, read from the compiled program.

Sizes are told apart by their primes: 11 divides whatever counts rows, 17 whatever counts tokens of a row, 7 a stack of
layers; none of them divides one layer's weights.
"""

import dataclasses
import functools
import math
from collections import Counter

import pytest

from jaxmm.autoencoders import KLConfig
from jaxmm.models.transfusion import PRESETS, SYSTEM, TransfusionConfig
from jaxmm.sequence import Budget
from jaxmm.sharding import make_mesh
from tests.hlo import Collective, collectives
from tests.training.compiled import lower_step, partitioned, tpu_devices

ROWS, TOKENS, LAYERS = 8 * 11, 8 * 17, 7
CODEC = KLConfig(
    in_channels=3,
    out_channels=3,
    block_out_channels=(16,),
    layers_per_block=1,
    latent_channels=5,
    norm_groups=4,
    scaling_factor=0.5,
)
CONFIG = TransfusionConfig(
    width=320,
    layers=LAYERS,
    heads=4,
    kv_heads=2,
    head_size=24,
    mlp_width=456,
    vocab_size=608,
    boi_id=606,
    eoi_id=607,
    context=TOKENS,
    image_size=(12, 12),
    latent_channels=5,
    codec=CODEC,
    time_features=104,
    remat="full",
)
BUDGET = Budget({"tokens": TOKENS}, {"12x12": (3, (12, 12, 3))})


def matrices(config: TransfusionConfig, tensor: int = 1) -> tuple[Counter, Counter]:
    """How many matrices there are of each size: of one layer, and outside the stack without the codec's decoder.

    Sizes are those of a device's part along "tensor", which cuts every layer's matrix. Smaller ones are left out.
    """
    layer, other = Counter(), Counter()
    for path, spec in SYSTEM.blueprint(config).parameters.items():
        size = spec.size // (spec.shape[0] if spec.axes[0] == "layers" else 1)
        if size > vector(config) and spec.axes[0] == "layers":
            layer[size // tensor] += 1
        elif size > vector(config) and not path.startswith(("codec.decoder", "codec.post_quant_conv")):
            other[size // tensor if "vocab" in spec.axes else size] += 1
    return layer, other


def vector(config: TransfusionConfig) -> int:
    """Biases, norms and scalars are smaller, and so are the smallest convolutions."""
    return 2 * config.width


def large(found: list[Collective], *kinds: str, config: TransfusionConfig = CONFIG) -> list[Collective]:
    return [x for x in found if x.kind in kinds and x.size > vector(config)]


def check_gathers(found: list[Collective], config: TransfusionConfig, fsdp: int = 8, tensor: int = 1) -> None:
    """Only weights are gathered: one layer's in loops, no stack outside; nothing is exchanged all to all.

    A TPU also passes the parts of a weight, or of its gradient, round a ring while it multiplies with them.
    """
    layer, other = matrices(config, tensor)
    gathers, rings = (large(found, kind, config=config) for kind in ("all-gather", "collective-permute"))
    strange = [str(x) for x in gathers if x.size not in (layer if x.in_loop else other)]
    strange += [str(x) for x in rings if x.in_loop and x.size * fsdp not in layer + other]
    assert not strange, f"gathered, but no weight: {strange}"
    assert not large(found, "all-to-all", config=config)
    assert {x.size for x in gathers if x.in_loop} | {x.size * fsdp for x in rings if x.in_loop} >= layer.keys()


def check_gradients_are_scattered(found: list[Collective], config: TransfusionConfig, fsdp: int, tensor: int) -> None:
    """The devices do not each receive the whole gradient of a layer's matrix, but their own part of it."""
    layer, _ = matrices(config, tensor)
    whole = [str(x) for x in found if x.kind == "all-reduce" and x.in_loop and x.size in layer]
    assert not whole, f"reduced whole: {whole}"
    scattered = {x.size for x in found if x.kind == "reduce-scatter" and x.in_loop}
    backward = [x for x in found if x.kind == "collective-permute" and x.in_loop and "transpose(jvp" in x.source]
    assert scattered | {x.size * fsdp for x in backward} >= layer.keys()
    assert {x.dtype for x in backward if x.size * fsdp in layer} <= {"bf16"}


def check_nothing_counts_rows(found: list[Collective], *kinds: str) -> None:
    assert not [str(x) for x in found if x.kind in kinds and x.size % 11 == 0]


def test_primes_tell_sizes_apart():
    layer, other = matrices(CONFIG)
    assert all(math.gcd(size, 7 * 11 * 17) == 1 for size in (*layer, *other))
    assert sum(layer.values()) == 7 and {320 * 608, 320 * 320, 9 * 16 * 16} <= other.keys()


@functools.cache
def on_cpu(**mesh):
    """Collectives of the program as it was cut for the devices, and as it was compiled."""
    return tuple(map(collectives, partitioned(lower_step(CONFIG, BUDGET, ROWS, make_mesh(**mesh)))))


def test_fsdp_gathers_weights_of_one_layer_in_bfloat16():
    cut, compiled = on_cpu(fsdp=8)
    layer, other = matrices(CONFIG)
    for found in (cut, compiled):
        check_gathers(found, CONFIG)
        check_nothing_counts_rows(found, "all-gather", "all-reduce", "all-to-all", "collective-permute")
        assert {x.devices for x in found} == {8}
    assert {x.dtype for x in large(cut, "all-gather")} == {"bf16"}
    gathered = large(cut, "all-gather")
    assert Counter(x.size for x in gathered if x.in_loop) == Counter({size: 2 * n for size, n in layer.items()})
    # outside the stack once: the backward pass reads again what was gathered
    assert Counter(x.size for x in gathered if not x.in_loop) == other


def test_fsdp_reduces_gradients_of_one_layer_in_bfloat16():
    layer, _ = matrices(CONFIG)
    reduced = [x for x in large(on_cpu(fsdp=8)[0], "all-reduce", "reduce-scatter") if x.in_loop]
    assert Counter(x.size for x in reduced) == layer and {x.dtype for x in reduced} == {"bf16"}


@pytest.mark.slow
def test_tensor_adds_no_gathers():
    cut, _ = on_cpu(fsdp=4, tensor=2)
    check_gathers(cut, CONFIG, fsdp=4, tensor=2)
    check_nothing_counts_rows(cut, "all-gather", "all-to-all")
    assert {x.dtype for x in large(cut, "all-gather")} == {"bf16"}
    assert {x.devices for x in large(cut, "all-gather")} == {4}
    # partial sums of heads and MLP: two in the forward pass, one of them again, then one per matrix that reads the
    # residual stream (query, key, value, gate, up), which the backend adds up first
    sums = [x for x in large(cut, "all-reduce") if x.in_loop and x.size % 11 == 0]
    assert len(sums) == 8 and {(x.devices, x.size) for x in sums} == {(2, ROWS // 4 * TOKENS * CONFIG.width)}


@pytest.mark.slow
@pytest.mark.parametrize("mesh", [dict(fsdp=8), dict(fsdp=4, tensor=2)], ids=str)
def test_tpu_gathers_weights_and_scatters_gradients(mesh):
    lowered = lower_step(CONFIG, BUDGET, ROWS, make_mesh(**mesh, devices=tpu_devices("v5e:2x4")))
    found = collectives(lowered.compile().as_text())
    sizes = mesh["fsdp"], mesh.get("tensor", 1)
    check_gathers(found, CONFIG, *sizes)
    check_nothing_counts_rows(found, "all-gather", "all-to-all", "reduce-scatter", "collective-permute")
    assert {x.dtype for x in large(found, "all-gather")} == {"bf16"}
    assert not [str(x) for x in large(found, "all-gather", "all-reduce", "reduce-scatter") if x.size % LAYERS == 0]
    check_gradients_are_scattered(found, CONFIG, *sizes)


@pytest.mark.slow
def test_tpu_step_of_7b():
    config, rows = PRESETS["7b"], 64
    budget = Budget({"tokens": 4096}, {"256x256": (4, (256, 256, 3))})
    compiled = lower_step(config, budget, rows, make_mesh(devices=tpu_devices("v5e:8x8"))).compile()
    found, memory = collectives(compiled.as_text()), compiled.memory_analysis()
    check_gathers(found, config, fsdp=64)
    reduced = [x for x in large(found, "all-reduce", "reduce-scatter", config=config) if x.in_loop]
    assert {x.dtype for x in [*large(found, "all-gather", config=config), *reduced]} == {"bf16"}
    layer, other = matrices(config)
    assert max(x.size for x in found) <= max(*layer, *other)
    used = memory.argument_size_in_bytes + memory.temp_size_in_bytes  # the results take the place of the arguments
    print(f"7b on 64 v5e: {used / 2**30:.2f} GiB of 16 per chip")
    assert memory.alias_size_in_bytes > 0.99 * memory.output_size_in_bytes and used < 9 * 2**30


@pytest.mark.slow
def test_tpu_scatters_gradients_of_7b_sizes():
    config = dataclasses.replace(PRESETS["7b"], layers=4, codec=None, image_size=(32, 32))
    budget = Budget({"tokens": 4096}, {"32x32": (4, (32, 32, 8))})
    compiled = lower_step(config, budget, 8, make_mesh(devices=tpu_devices("v5e:2x4"))).compile()
    found = collectives(compiled.as_text())
    check_gathers(found, config)
    check_gradients_are_scattered(found, config, 8, 1)
    assert {x.dtype for x in large(found, "all-gather", config=config)} == {"bf16"}
