"""Checkpoints: which steps stay, what is saved while training goes on, what is refused."""

import shutil
import threading
import time
from unittest import mock

import grain
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxmm import checkpoints as module
from jaxmm.checkpoints import (
    Checkpoints,
    latest_step,
    read_description,
    remove_unfinished,
    restore_arrays,
    save_arrays,
    saved_steps,
    write_text,
)
from jaxmm.errors import InputError

SHARDING = jax.sharding.SingleDeviceSharding(jax.devices()[0])


def state(step, dtype=jnp.float32):
    """Two items; the numbers tell the step."""
    weights = {
        "head.kernel": jnp.arange(600, dtype=dtype).reshape(20, 30) + step,
        "stack.layers.scale": jnp.ones((2, 3)),
    }
    return {"trainable": weights, "optimizer": {"0.count": jnp.int32(step), "1.mu.head.kernel": jnp.full((4,), step)}}


def targets(items):
    return jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=SHARDING), items)


def numbers():
    """An endless iterator that can be saved."""
    return iter(grain.MapDataset.source(list(range(50))).seed(0).shuffle().repeat().to_iter_dataset())


def saved(folder, *steps, **options):
    """A folder with these steps; the iterator stands at as many elements."""
    checkpoints, iterator = Checkpoints(folder, **options), numbers()
    done = 0
    for step in steps:
        for _ in range(step - done):
            next(iterator)
        done = step
        checkpoints.save(step, state(step), iterator)
        checkpoints.wait()
    checkpoints.close()
    return folder


def equal(restored, step):
    expected = state(step)
    assert restored.keys() == expected.keys()
    for item, arrays in expected.items():
        assert restored[item].keys() == arrays.keys()
        for path, x in arrays.items():
            assert restored[item][path].dtype == x.dtype and np.array_equal(restored[item][path], x), path


@pytest.mark.parametrize(
    "options, left",
    [
        ({"keep_last": 1}, [9]),
        ({"keep_last": 3}, [7, 8, 9]),
        ({"keep_last": 2, "keep_every": 4}, [4, 8, 9]),
        ({"keep_last": 1, "keep_every": 3}, [3, 6, 9]),
    ],
)
def test_which_steps_stay(tmp_path, options, left):
    saved(tmp_path, *range(1, 10), **options)
    assert saved_steps(tmp_path) == left
    assert latest_step(tmp_path) == tmp_path / "checkpoints" / "9"
    again = Checkpoints(tmp_path, **options)
    assert again.latest() == 9
    again.save(12, state(12))
    again.close()
    kept = [step for step in left if step % options.get("keep_every", 100) == 0]
    assert saved_steps(tmp_path) == sorted({*kept, *[*left, 12][-options["keep_last"] :]})


def test_a_save_goes_on_while_the_state_is_trained_on(tmp_path):
    """The write is held up; the state is donated to the next steps and the iterator is read on meanwhile."""
    gate, train = threading.Event(), jax.jit(lambda x: jax.tree.map(lambda y: y * 0 - 1, x), donate_argnums=0)
    checkpoints, iterator = Checkpoints(tmp_path), numbers()
    seen = [next(iterator) for _ in range(5)]
    now = jax.tree.map(jnp.copy, state(5))
    from orbax.checkpoint._src.path import atomicity

    commit = atomicity.AtomicRenameTemporaryPath.finalize

    async def held(self):
        gate.wait()
        await commit(self)

    with mock.patch.object(atomicity.AtomicRenameTemporaryPath, "finalize", held):
        checkpoints.save(5, now, iterator)
        for _ in range(3):
            now = train(now)
            seen.append(next(iterator))
        jax.block_until_ready(now)
        time.sleep(0.2)
        assert saved_steps(tmp_path) == []
        gate.set()
        checkpoints.wait()
    assert saved_steps(tmp_path) == [5]
    again = numbers()
    equal(checkpoints.restore(5, targets(state(5)), again), 5)
    assert [next(again) for _ in range(3)] == seen[5:]
    checkpoints.close()


def test_arrays_are_those_of_the_time_of_the_save(tmp_path):
    """Donation at once, without a held-up commit: many times, since it would be a race."""
    train = jax.jit(lambda x: jax.tree.map(lambda y: y * 0 - 1, x), donate_argnums=0)
    checkpoints = Checkpoints(tmp_path, keep_last=10)
    for step in range(1, 6):
        now = jax.tree.map(jnp.copy, state(step))
        checkpoints.save(step, now)
        for _ in range(20):
            now = train(now)
    checkpoints.wait()
    for step in range(1, 6):
        equal(checkpoints.restore(step, targets(state(step))), step)
    checkpoints.close()


def test_every_mismatch_is_listed(tmp_path):
    saved(tmp_path, 2, 4)
    wanted = targets(state(0))
    head = jax.ShapeDtypeStruct((20, 31), jnp.float32, sharding=SHARDING)
    wanted["trainable"] = {"head.kernel": head, "stack.layers.scale": wanted["trainable"]["stack.layers.scale"]}
    wanted["trainable"]["tail.bias"] = head
    wanted["optimizer"] = {"0.count": jax.ShapeDtypeStruct((), jnp.float32, sharding=SHARDING)}
    wanted["ema"] = {"head.kernel": head}
    with pytest.raises(InputError) as error:
        Checkpoints(tmp_path).restore(4, wanted)
    folder, problems = str(error.value).split(" does not fit: ")
    assert folder == str(tmp_path / "checkpoints" / "4")
    assert sorted(problems.split("; ")) == [
        "ema: not in the checkpoint",
        "optimizer: 0.count: int32[] in the checkpoint, float32[] here",
        "optimizer: 1.mu.head.kernel: not in this model",
        "trainable: head.kernel: float32[20, 30] in the checkpoint, float32[20, 31] here",
        "trainable: tail.bias: not in the checkpoint",
    ]


def test_another_dtype_is_refused(tmp_path):
    checkpoints = Checkpoints(tmp_path)
    checkpoints.save(1, state(1, jnp.bfloat16))
    checkpoints.wait()
    with pytest.raises(InputError, match=r"head.kernel: bfloat16\[20, 30\] in the checkpoint, float32\[20, 30\] here"):
        checkpoints.restore(1, targets(state(1)))
    checkpoints.close()


def cut(path):
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])


DAMAGES = {"cut in half": cut, "empty": lambda path: path.write_bytes(b""), "missing": lambda path: path.unlink()}


@pytest.mark.parametrize("damage", DAMAGES)
@pytest.mark.parametrize("name", ["data/process_0-of-1.json", "trainable/_METADATA", "optimizer/manifest.ocdbt"])
def test_a_damaged_step_is_named(tmp_path, name, damage):
    saved(tmp_path, 2, 4)
    DAMAGES[damage](tmp_path / "checkpoints" / "4" / name)
    with pytest.raises(InputError) as error:
        Checkpoints(tmp_path).restore(4, targets(state(4)), numbers())
    told = f"{tmp_path}/checkpoints/4 cannot be read, remove that folder to go on from step 2: "
    assert str(error.value).startswith(told) and "\n" not in str(error.value)


@pytest.mark.slow
@pytest.mark.parametrize("damage", DAMAGES)
def test_each_damaged_file_is_told_or_restores_exactly(tmp_path, damage):
    """Each file of the latest step in turn; some are of no use to us, and none gives other numbers."""
    good, bad = saved(tmp_path / "good", 2, 4), tmp_path / "bad"
    step = good / "checkpoints" / "4"
    named = set()
    for path in sorted(p.relative_to(good) for p in step.rglob("*") if p.is_file()):
        shutil.rmtree(bad, ignore_errors=True)
        shutil.copytree(good, bad)
        DAMAGES[damage](bad / path)
        checkpoints, iterator = Checkpoints(bad), numbers()
        assert checkpoints.latest() == 4
        try:
            equal(checkpoints.restore(4, targets(state(4)), iterator), 4)
            reference = numbers()
            assert [next(reference) for _ in range(6)][4:] == [next(iterator) for _ in range(2)]
        except InputError as error:
            message = str(error)
            assert "\n" not in message and str(bad / "checkpoints" / "4") in message
            assert "remove that folder to go on from step 2" in message
            named.add("/".join(path.parts[2:4]))
        shutil.rmtree(bad / "checkpoints" / "4")
        equal(Checkpoints(bad).restore(2, targets(state(2)), numbers()), 2)
    assert {"data/process_0-of-1.json", "trainable/_METADATA", "trainable/manifest.ocdbt", "trainable/d"} <= named


def test_a_damaged_only_step_says_to_start_anew(tmp_path):
    saved(tmp_path, 3)
    cut(tmp_path / "checkpoints" / "3" / "data" / "process_0-of-1.json")
    with pytest.raises(InputError, match="checkpoints/3 cannot be read, remove that folder to start anew: "):
        Checkpoints(tmp_path).restore(3, targets(state(3)), numbers())


def test_damaged_frozen_parameters_are_named(tmp_path):
    save_arrays(tmp_path / "frozen", state(1)["trainable"])
    cut(tmp_path / "frozen" / "_METADATA")
    with pytest.raises(InputError, match="frozen cannot be read, take the folder from a copy") as error:
        restore_arrays(tmp_path / "frozen", targets(state(1)["trainable"]))
    assert "\n" not in str(error.value)
    with pytest.raises(InputError, match="ema holds no saved arrays"):
        restore_arrays(tmp_path / "ema", targets(state(1)["trainable"]))


def test_a_file_is_replaced_whole_or_not_at_all(tmp_path):
    path = tmp_path / "model.json"
    write_text(path, "old")
    with mock.patch.object(module.os, "fsync", side_effect=OSError(28, "No space left on device")):
        with pytest.raises(OSError, match="No space"):
            write_text(path, "new and longer")
    assert path.read_text() == "old" and list(tmp_path.iterdir()) == [path]
    write_text(path, "new")
    assert path.read_text() == "new" and list(tmp_path.iterdir()) == [path]


@pytest.mark.parametrize(
    "text, told",
    [
        ('{"format": 1, "sys', "cannot be read: Unterminated"),
        ("", "cannot be read: Expecting value"),
        ('{"format": 1, "system": "transfusion"}', "cannot be read: it does not say model"),
        ('{"format": 9}', "has format 9"),
    ],
)
def test_a_damaged_description_is_named(tmp_path, text, told):
    (tmp_path / "model.json").write_text(text)
    with pytest.raises(InputError, match=f"{tmp_path}/model.json {told}"):
        read_description(tmp_path)


def test_only_what_is_unfinished_is_removed(tmp_path):
    saved(tmp_path, 2, 4)
    before = sorted(tmp_path.rglob("*"))
    shutil.copytree(tmp_path / "checkpoints" / "4", tmp_path / "checkpoints" / "6.orbax-checkpoint-tmp")
    assert saved_steps(tmp_path) == [2, 4] and Checkpoints(tmp_path).latest() == 4
    (tmp_path / ".metrics.jsonl.4711").write_text("{")
    remove_unfinished(tmp_path)
    assert sorted(tmp_path.rglob("*")) == before
