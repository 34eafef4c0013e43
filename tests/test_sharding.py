import functools
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType, NamedSharding, PartitionSpec

from jaxmm.errors import InputError
from jaxmm.models.transfusion import PRESETS, SYSTEM
from jaxmm.sharding import (
    MESH_AXES,
    RULES,
    Parameter,
    abstract_mesh,
    check_unsharded,
    constrain,
    describe_unsharded,
    gather,
    make_mesh,
    mesh_axes,
    parameter_shardings,
    partition,
    replicated,
    rows_sharding,
    unsharded,
)

P = PartitionSpec


@pytest.mark.parametrize(
    "given, sizes",
    [
        ({}, (1, 8, 1, 1)),
        ({"tensor": 2}, (1, 4, 2, 1)),
        ({"data": -1, "fsdp": 2, "context": 2}, (2, 2, 1, 2)),
        ({"data": 2, "fsdp": 2, "tensor": 2}, (2, 2, 2, 1)),
        ({"tensor": 8}, (1, 1, 8, 1)),
    ],
    ids=str,
)
def test_mesh_has_four_axes_of_the_asked_sizes(given, sizes):
    mesh = make_mesh(**given)
    assert mesh.axis_names == MESH_AXES == ("data", "fsdp", "tensor", "context")
    assert mesh.devices.shape == sizes and mesh.axis_types == (AxisType.Auto,) * 4
    assert len(set(mesh.devices.flat)) == 8


def test_mesh_of_some_of_the_devices():
    mesh = make_mesh(tensor=2, devices=jax.devices()[2:6])
    assert mesh.devices.shape == (1, 2, 2, 1) and set(mesh.devices.flat) == set(jax.devices()[2:6])


@pytest.mark.parametrize(
    "given, message",
    [
        ({"tensor": 3}, "'tensor': 3, 'context': 1} does not fit 8 devices"),
        ({"fsdp": 4}, "{'data': 1, 'fsdp': 4, 'tensor': 1, 'context': 1} does not fit 8 devices"),
        ({"fsdp": 16}, "'fsdp': 16, .* does not fit 8 devices"),
        ({"tensor": 16}, "'tensor': 16, .* does not fit 8 devices"),
        ({"data": -1}, "at most one of them is -1"),
        ({"tensor": 0}, "sizes are positive"),
        ({"context": -2}, "sizes are positive"),
    ],
    ids=str,
)
def test_meshes_that_do_not_fit_are_refused(given, message):
    with pytest.raises(InputError, match=message):
        make_mesh(**given)


def test_rules_lead_to_axes_of_the_mesh():
    assert {axis for axes in RULES.values() for axis in axes} == set(MESH_AXES)
    assert mesh_axes("rows") == ("data", "fsdp") and mesh_axes("layers") == ()


def test_unknown_axis_names_the_nearest():
    with pytest.raises(ValueError, match="no sharding rule for the axis 'embedd'; did you mean 'embed'?"):
        mesh_axes("embedd")
    with pytest.raises(ValueError, match="'kv_head'; did you mean 'kv_heads'"):
        partition((8, 8), ("embed", "kv_head"), make_mesh())
    with pytest.raises(ValueError, match=re.escape("2 axis names ('embed', 'mlp') for shape (8,)")):
        Parameter((8,), np.float32, ("embed", "mlp"))


MIXED = {"data": 2, "fsdp": 2, "tensor": 2}


@pytest.mark.parametrize(
    "mesh, shape, axes, wanted",
    [
        (MIXED, (16, 32), ("embed", "mlp"), P("fsdp", "tensor")),
        (MIXED, (16, 4, 8), ("embed", "heads", "head"), P("fsdp", "tensor", None)),
        (MIXED, (8, 128, 16), ("rows", "length", "width"), P(("data", "fsdp"), None, None)),
        ({"context": 2}, (8, 128, 16), ("rows", "length", "width"), P("fsdp", "context", None)),
        ({"context": 2}, (8, 128, 4, 8), ("rows", "keys", "kv_heads", "head"), P("fsdp", None, None, None)),
        ({}, (16, 32), ("embed", "mlp"), P("fsdp", None)),  # an axis of one device cuts nothing
        ({}, (16, 32), (None, "embed"), P(None, "fsdp")),
        # what the mesh does not divide is not cut
        (MIXED, (15, 32), ("embed", "mlp"), P(None, "tensor")),
        (MIXED, (2, 128), ("rows", "length"), P(None, None)),
        ({}, (4,), ("rows",), P(None)),
    ],
    ids=str,
)
def test_partition_by_the_rules(mesh, shape, axes, wanted):
    assert partition(shape, axes, make_mesh(**mesh)) == wanted


@pytest.mark.parametrize(
    "mesh, shape, axes, wanted",
    [
        # the heads cannot be cut in 4: the axis goes to the head size, the largest that it divides
        ({"tensor": 4}, (16, 3, 64), ("embed", "heads", "head"), P("fsdp", None, "tensor")),
        # not to what is cut already, nor to the layers, however many
        ({"tensor": 4}, (64, 16, 3, 8), ("layers", "embed", "heads", "head"), P(None, "fsdp", None, "tensor")),
        ({}, (64, 5, 16), ("layers", "embed", "mlp"), P(None, None, "fsdp")),
        ({}, (64, 5, 7), ("layers", "embed", "mlp"), P(None, None, None)),
        ({}, (32, 5, 16), ("vocab", "embed", "head"), P("fsdp", None, None)),
        # both axes are homeless
        ({"fsdp": 2, "tensor": 4}, (5, 6, 8, 16), ("embed", "mlp", "head", "patch"), P(None, None, "tensor", "fsdp")),
        # divisible: nothing moves
        ({"tensor": 4}, (16, 4, 64), ("embed", "heads", "head"), P("fsdp", "tensor", None)),
    ],
    ids=str,
)
def test_indivisible_dimensions_of_parameters_hand_their_axis_on(mesh, shape, axes, wanted):
    mesh = make_mesh(**mesh)
    assert partition(shape, axes, mesh, move=True) == wanted
    plain = partition(shape, axes, mesh)
    assert all(cut in (None, kept) for cut, kept in zip(plain, wanted))


def test_an_axis_cuts_an_array_once():
    mesh = make_mesh(**MIXED)
    assert partition((16, 16), ("embed", "embed"), mesh, move=True) == P("fsdp", None)
    assert partition((8, 16, 16), ("rows", None, "embed"), mesh) == P(("data", "fsdp"), None, None)
    # the first is indivisible and the second has taken the axis: there is none left to move to the third
    assert partition((5, 16, 16), ("embed", "time", "head"), mesh, move=True) == P(None, "fsdp", None)


def test_shardings_of_parameters_and_rows():
    mesh = make_mesh(**MIXED)
    parameters = {
        "a.kernel": Parameter((16, 32), np.float32, ("embed", "mlp")),
        "a.scale": Parameter((5,), np.float32, ("norm",)),
    }
    shardings = parameter_shardings(parameters, mesh)
    assert {path: s.spec for path, s in shardings.items()} == {"a.kernel": P("fsdp", "tensor"), "a.scale": P(None)}
    kernel = jax.device_put(np.arange(512.0).reshape(16, 32), shardings["a.kernel"])
    assert {shard.data.shape for shard in kernel.addressable_shards} == {(8, 16)}
    assert rows_sharding(mesh, 8).spec == P(("data", "fsdp")) and rows_sharding(mesh, 6).spec == P(None)
    assert replicated(mesh).is_fully_replicated and not rows_sharding(mesh, 8).is_fully_replicated


def test_constrain_without_a_mesh_returns_its_argument():
    x = jnp.zeros((8, 4, 16))
    assert constrain(x, "rows", "length", "width") is x
    with jax.set_mesh(make_mesh(devices=jax.devices()[:1])):
        assert constrain(x, "rows", "length", "width") is x
    jaxpr = jax.make_jaxpr(lambda x: constrain(x, "rows", "length", "width"))(x)
    assert not jaxpr.eqns


def test_constrain_pins_an_activation():
    x = np.arange(8 * 4 * 16, dtype=np.float32).reshape(8, 4, 16)
    with jax.set_mesh(make_mesh(fsdp=4, context=2)) as _:
        y = jax.jit(lambda x: constrain(2 * x, "rows", "length", "width"))(x)
    assert y.sharding.shard_shape(y.shape) == (2, 2, 16)
    np.testing.assert_array_equal(y, 2 * x)


@functools.cache
def parameters_of(preset):
    return SYSTEM.blueprint(PRESETS[preset]).parameters


MESHES = [dict(fsdp=8), dict(fsdp=64), dict(fsdp=64, tensor=4), dict(fsdp=16, tensor=4), dict(data=4, fsdp=64)]


@pytest.mark.parametrize("sizes", MESHES, ids=str)
@pytest.mark.parametrize("preset", PRESETS)
def test_presets_have_hardly_anything_unsharded(preset, sizes):
    parameters, mesh = parameters_of(preset), abstract_mesh(**sizes)
    whole = unsharded(parameters, mesh)
    assert 0 < sum(whole.values()) <= 0.02 * sum(spec.size for spec in parameters.values())
    check_unsharded(parameters, mesh)


def test_256_shards_are_too_many_for_the_channels_of_a_small_u_net_only():
    """Its levels have 64 to 960 channels; the widths of the transformers are multiples of 256."""
    for preset in PRESETS:
        if preset in ("0.16b-unet", "0.37b-unet", "0.76b-unet-patch4"):
            with pytest.raises(
                InputError, match=r"'fsdp': 256.* of .* parameters .*patch_decoder.*take a smaller fsdp"
            ):
                check_unsharded(parameters_of(preset), abstract_mesh(fsdp=256))
        else:
            check_unsharded(parameters_of(preset), abstract_mesh(fsdp=256))


def test_what_is_unsharded_is_told_by_name():
    parameters = {
        "kernel": Parameter((64, 96), np.float32, ("embed", "mlp")),
        "odd": Parameter((5, 7), np.float32, ("embed", "mlp")),
        "scale": Parameter((65,), np.float32, ("norm",)),
        "tensor_only": Parameter((5, 8), np.float32, ("embed", "mlp")),
    }
    mesh = abstract_mesh(fsdp=4, tensor=8)
    assert list(unsharded(parameters, mesh).items()) == [("scale", 65), ("odd", 35)]
    assert describe_unsharded(parameters, mesh) == "1.59% of 6,284 parameters are on every device: scale, odd"
    assert describe_unsharded(parameters, mesh, 1).endswith(": scale and 1 more")
    check_unsharded(parameters, mesh)
    with pytest.raises(InputError, match=r"mesh \{'fsdp': 4, 'tensor': 8\} .*1.59% of .*: scale, odd; at most 1% may"):
        check_unsharded(parameters, mesh, 0.01, 99)
    check_unsharded(parameters, mesh, 0.01, 100)  # so few may be whole in any case
    for mesh in (abstract_mesh(data=8), abstract_mesh(context=2), abstract_mesh()):
        assert unsharded(parameters, mesh) == {}
        check_unsharded(parameters, mesh, 0.0, 99)
    assert describe_unsharded(parameters, abstract_mesh()) == "0.00% of 6,284 parameters are on every device"


def test_gather_keeps_the_cuts_of_other_axes_and_scatters_the_gradient():
    mesh = make_mesh(fsdp=4, tensor=2)
    w = jax.device_put(np.arange(256.0, dtype=np.float32).reshape(16, 16), NamedSharding(mesh, P("fsdp", "tensor")))
    with jax.set_mesh(mesh):
        whole = jax.jit(lambda w: gather(w, "embed", "mlp"))(w)
        gradient = jax.jit(jax.grad(lambda w: jnp.sum(gather(w, "embed", "mlp") ** 2)))(w)
    assert whole.sharding.shard_shape(w.shape) == (16, 8) and gradient.sharding.shard_shape(w.shape) == (4, 8)
    np.testing.assert_array_equal(whole, w)
    np.testing.assert_array_equal(gradient, 2 * w)
    assert gather(w, "embed", "mlp") is w  # without a mesh
