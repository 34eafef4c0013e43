"""Runs that begin with a checkpoint: what they take, what they train, what they save, what they refuse."""

import json
import shutil

import jax
import numpy as np
import optax
import pytest
from PIL import Image

from jaxmm.cli import main
from jaxmm.errors import InputError
from jaxmm.inference import load
from jaxmm.layers.lora import AdaptedBlueprint, LoRA
from jaxmm.layers.parameters import Policy
from jaxmm.models.transfusion import SYSTEM
from jaxmm.paths import stack_layers
from jaxmm.sharding import make_mesh, rows_sharding
from jaxmm.training.config import load_config
from jaxmm.training.loop import Trainer
from jaxmm.training.state import StateMaker
from jaxmm.training.step import make_gradient, make_step
from tests import tiny
from tests.training.test_loop import arrays, lines, tiny_config

FINETUNE = "experiments/transfusion/finetune.py"
BLOCK = "transformer.layers.streams.tokens."
LORA = ["lora.rank=2", "lora.alpha=4.0", "lora.targets=('.*(query|out|down).kernel',)", "lora.train=('.*norm.scale',)"]
TARGETS = [BLOCK + name for name in ("mlp.down.kernel", "out.kernel", "query.kernel")]
NORMS = [BLOCK + name for name in ("attention_norm.scale", "mlp_norm.scale")]
TRAINED = sorted([f"{path}.lora_{x}" for path in TARGETS for x in "ab"] + NORMS)


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    """A folder with a finished run, `base`, and a LoRA run on it."""
    folder = tmp_path_factory.mktemp("runs")
    Trainer(tiny_config("steps=4"), folder / "base").run()
    finetune(folder, "lora", *LORA).run()
    return folder


def finetune(folder, name, *overrides, base="base"):
    """The trainer of a run that begins with another."""
    given = [f"init.checkpoint={folder / base}", "steps=4", "checkpoint_every=2", "optimizer.warmup_steps=0"]
    return Trainer(tiny_config(*given, *overrides), folder / name)


def started(trainer):
    """The parameters that a fresh run begins with."""

    class Nothing:
        latest = staticmethod(lambda: None)

    with jax.set_mesh(trainer.mesh):
        state = trainer._start(Nothing(), None)
    return state["trainable"] | state["frozen"]


def description(folder):
    return json.loads((folder / "model.json").read_text())


def test_a_lora_run_saves_what_it_trains_alone(runs):
    for item in ("trainable", "ema"):
        assert sorted(stack_layers(arrays(runs / "lora", 4, item))) == TRAINED
    moments = {path for path in arrays(runs / "lora", 4, "optimizer") if path.endswith((".lora_a", ".kernel"))}
    assert moments and all(path.endswith(".lora_a") for path in moments)
    assert not (runs / "lora" / "frozen").exists()
    said = description(runs / "lora")
    assert said["lora"] == {"rank": 2, "alpha": 4.0, "targets": TARGETS, "train": NORMS}
    assert said["base"] == {"checkpoint": "../base", "step": 4} and said["frozen"] == []
    assert said["init"] == {"checkpoint": "../base", "step": 4, "load": [".*"]}
    assert "init" not in description(runs / "base")


def test_a_lora_run_moves_what_it_trains_alone(runs):
    before, after = load(runs / "base").params, load(runs / "lora").params
    moved = {path for path in before if not np.array_equal(before[path], after[path])}
    assert moved == {*TARGETS, *NORMS}
    own = stack_layers(arrays(runs / "lora", 4, "ema"))
    query = BLOCK + "query.kernel"
    product = np.einsum("ldr,lrhk->ldhk", own[query + ".lora_a"], own[query + ".lora_b"])
    np.testing.assert_allclose(after[query], before[query] + 2 * product, atol=1e-6)
    assert np.array_equal(after[NORMS[0]], own[NORMS[0]])


def test_a_lora_run_resumes_with_the_same_numbers(runs, tmp_path):
    """Both folders have moved, and what the run began with is not looked at again."""
    for name in ("base", "lora"):
        shutil.copytree(runs / name, tmp_path / name)
    shutil.rmtree(tmp_path / "lora" / "checkpoints" / "4")
    finetune(tmp_path, "lora", *LORA, base="nowhere").run()
    assert [line["loss"] for line in lines(tmp_path / "lora")] == [line["loss"] for line in lines(runs / "lora")]
    for item in ("trainable", "ema", "optimizer"):
        first, second = arrays(runs / "lora", 4, item), arrays(tmp_path / "lora", 4, item)
        assert first.keys() == second.keys() and all(np.array_equal(first[path], second[path]) for path in first)
    for name in ("init", "base", "lora"):
        assert description(tmp_path / "lora")[name] == description(runs / "lora")[name]
    with pytest.raises(InputError, match="other adapters"):
        finetune(tmp_path, "lora", *LORA, "lora.alpha=5.0").run()
    shutil.rmtree(tmp_path / "base")
    shutil.rmtree(tmp_path / "lora" / "checkpoints" / "4")
    with pytest.raises(InputError, match="adapters of step 4 of .*base, which is gone"):
        finetune(tmp_path, "lora", *LORA).run()


def step_of_adapters(devices, microbatches, remat):
    """(loss, gradient, state before, state after) of a step that trains adapters."""
    config, mesh = tiny.config(remat=remat), make_mesh(devices=jax.devices()[:devices])
    blueprint = AdaptedBlueprint(SYSTEM.blueprint(config), LoRA(2, 4.0, (r"transformer\..*\.kernel",)))
    optimizer, terms = optax.adamw(1e-2), SYSTEM.term_weights(config)
    maker = StateMaker(blueprint, optimizer, tuple(blueprint.base.parameters), mesh, Policy())
    rng = np.random.default_rng(0)
    given = {path: 0.1 * rng.normal(size=blueprint.parameters[path].shape) for path in blueprint.adapters}
    with jax.set_mesh(mesh):
        state = maker.init(jax.random.key(0), given)
        batch, key = jax.device_put(tiny.batch(rows=16), rows_sharding(mesh, 16)), jax.random.key(1)
        gradient = jax.jit(make_gradient(blueprint, terms, Policy(), microbatches))
        (loss, _), grads = gradient(state["trainable"], state["frozen"], batch, key)
        after, _ = jax.jit(make_step(blueprint, optimizer, terms, Policy(), microbatches=microbatches))(
            state, batch, key
        )
    assert set(state["trainable"]) == set(blueprint.adapters)
    return loss, grads, state, after


def test_a_step_of_adapters_is_the_same_on_eight_devices_and_in_turns():
    expected_loss, expected, _, _ = step_of_adapters(1, 1, "full")
    loss, gradient, before, after = step_of_adapters(8, 2, "none")
    np.testing.assert_allclose(loss, expected_loss, rtol=1e-5)
    for path, x in expected.items():
        x = np.asarray(x)
        error = np.max(np.abs(np.asarray(gradient[path]) - x)) / max(np.max(np.abs(x)), 1e-6)
        assert error <= 1e-4, f"{path}: gradient differs by {error:.1e}"
    assert all(np.array_equal(after["frozen"][path], x) for path, x in before["frozen"].items())
    assert not any(np.array_equal(after["trainable"][path], x) for path, x in before["trainable"].items())


def test_patterns_decide_what_is_taken(runs, tmp_path):
    shutil.copytree(runs / "base", tmp_path / "base")
    load_only = "init.load=('transformer.*', 'embed.table')"
    trainer = finetune(tmp_path, "part", load_only)
    begun, saved = started(trainer), load(runs / "base").params
    with jax.set_mesh(trainer.mesh):
        drawn = trainer.maker.init(jax.random.fold_in(jax.random.key(0), 0))["trainable"]
    taken = {path for path in saved if path.startswith("transformer.") or path == "embed.table"}
    assert 0 < len(taken) < len(begun)
    for path, value in begun.items():
        assert np.array_equal(value, saved[path] if path in taken else drawn[path]), path
        assert value.sharding == drawn[path].sharding
        assert np.array_equal(drawn[path], saved[path]) is False or "scale" in path or "bias" in path


def test_frozen_parameters_that_are_not_from_the_base_are_saved(runs, tmp_path):
    """A run of adapters that takes a part of its base draws the rest, which nothing else holds."""
    shutil.copytree(runs / "base", tmp_path / "base")
    options = [*LORA, "init.load=('transformer.*', 'embed.table')", "policy=mixed", "seed=5"]
    finetune(tmp_path, "part", *options, "steps=2").run()
    said, saved, params = description(tmp_path / "part"), load(runs / "base").params, load(tmp_path / "part").params
    drawn = {path for path in saved if not path.startswith("transformer.") and path != "embed.table"}
    assert set(said["frozen"]) == drawn
    frozen = arrays_of(tmp_path / "part" / "frozen")
    assert set(frozen) == drawn and str(frozen["head.kernel"].dtype) == "bfloat16"
    assert np.array_equal(params["head.kernel"], frozen["head.kernel"].astype(np.float32))
    assert not np.array_equal(params["head.kernel"], saved["head.kernel"])
    assert np.array_equal(params["embed.table"], saved["embed.table"])  # of the base, not rounded
    finetune(tmp_path, "part", *options).run()
    assert [line["step"] for line in lines(tmp_path / "part")] == [2, 4]


def arrays_of(folder):
    import orbax.checkpoint as ocp

    with ocp.StandardCheckpointer() as checkpointer:
        return {path: np.asarray(x) for path, x in checkpointer.restore(folder).items()}


def test_a_run_may_begin_with_a_lora_run(runs, tmp_path):
    merged = load(runs / "lora").params
    trainer = Trainer(tiny_config(f"init.checkpoint={runs / 'lora'}", "mesh.fsdp=4", "mesh.tensor=2"), tmp_path / "w")
    begun = started(trainer)
    assert begun.keys() == merged.keys()
    for path, value in begun.items():
        np.testing.assert_allclose(value, merged[path], atol=1e-6)


def test_every_mismatch_is_listed(runs, tmp_path):
    with pytest.raises(InputError) as error:
        finetune(runs, "new", "model.mlp_width=96", "model.tie_embeddings=true")
    text = str(error.value)
    assert f"{BLOCK}mlp.up.kernel: [2, 32, 64] in the checkpoint, [2, 32, 96] here" in text
    assert f"{BLOCK}mlp.gate.kernel: [2" in text and f"{BLOCK}mlp.down.kernel: [2, 64, 32] in" in text
    assert "head.kernel: not in this model" in text and "restrict config key 'init.load'" in text
    assert text.count("; ") == 4 and not (runs / "new").exists()
    finetune(runs, "new", "model.mlp_width=96", "model.tie_embeddings=true", r"init.load=('(?!.*mlp\.|head).*',)")


@pytest.mark.parametrize(
    "overrides, message",
    [
        (["init.load=('.*', 'tansformer.*')"], "'init.load': 'tansformer.*' matches nothing; the nearest path is"),
        (["init.load=('*',)"], "is no regular expression"),
        ([*LORA, "lora.targets=()"], "'lora.targets' names no matrix"),
        ([*LORA, "lora.targets=('.*quer.kernel',)"], f"matches nothing; the nearest path is '{BLOCK}query.kernel'"),
        ([*LORA, "lora.train=('.*query.kernel',)"], f"both match {BLOCK}query.kernel"),
        ([*LORA, "lora.train=('.*nrm.scale',)"], "lora.train '.*nrm.scale' matches nothing"),
        ([*LORA, "init.checkpoint="], "'lora.rank' adapts a trained model: give --init"),
        ([*LORA, "lora.rank=-1"], "rank of LoRA must be at least 1"),
        (["init.checkpoint=nowhere"], "nowhere is no checkpoint"),
    ],
)
def test_mistakes_are_named(runs, overrides, message):
    with pytest.raises(InputError) as error:
        finetune(runs, "new", *overrides)
    assert message in str(error.value) and not (runs / "new").exists()


def test_what_the_optimizer_freezes_is_not_adapted(runs):
    frozen = r"optimizer.frozen=('time\..*', '.*attention_norm.scale')"
    trainer = finetune(runs, "new", *LORA, frozen, "lora.targets=('.*kernel',)")
    assert trainer.finetuning.describe()["lora"]["train"] == [NORMS[1]]
    assert not any(path.startswith("time.") for path in trainer.finetuning.trainable)


def test_sizes_and_tokenizer_are_adopted_before_overrides(runs, tmp_path):
    config = load_config(FINETUNE + ":lora", ["model.remat=full", "samples.solver.steps=9"], init=str(runs / "base"))
    assert (config.model.width, config.model.remat, config.model.objective) == (32, "full", "flow")
    assert (config.samples.solver.steps, config.samples.solver.guidance) == (9, 1.75)
    assert config.tokenizer == str(runs / "base" / "tokenizer") and config.init.checkpoint == str(runs / "base")
    config = load_config(FINETUNE, [f"init.checkpoint={runs / 'base'}"], workdir=runs / "lora")
    assert config.tokenizer == str(runs / "lora" / "tokenizer")  # that run goes on
    with pytest.raises(InputError, match="give --init CHECKPOINT"):
        load_config(FINETUNE, workdir=tmp_path)


def test_the_command_line_finetunes_on_a_folder_of_pictures(runs, tmp_path, capsys):
    """Pictures of any size and colour, in those of the checkpoint."""
    folder = tmp_path / "mine"
    folder.mkdir()
    rng = np.random.default_rng(0)
    with (folder / "captions.jsonl").open("w") as file:
        for i, name in enumerate(("one", "two", "three")):
            Image.fromarray(rng.integers(0, 256, (20 + i, 30, 3), np.uint8)).save(folder / f"{name}.png")
            file.write(json.dumps({"image": f"{name}.png", "caption": f"a {name}"}) + "\n")
    train = ["train", "--config", f"{FINETUNE}:lora", "--workdir", str(tmp_path / "run"), "--config.steps=2"]
    train += [f"--config.data.options.path={folder}", "--config.data.tokens=88", "--config.log_every=1"]
    train += ["--config.data.rows=8", "--config.lora.rank=4"]
    assert main([*train, "--init", str(runs / "base")]) == 0
    assert [line["step"] for line in lines(tmp_path / "run")] == [1, 2]
    assert description(tmp_path / "run")["base"] == {"checkpoint": str(runs / "base"), "step": 4}
    assert main(["export", "--checkpoint", str(tmp_path / "run"), "--output", str(tmp_path / "out")]) == 0
    assert capsys.readouterr().out.splitlines()[-1] == str(tmp_path / "out")
    assert (tmp_path / "out" / "model.safetensors").is_file()
    assert main(["export", "--checkpoint", str(tmp_path / "run"), "--output", str(tmp_path / "out")]) == 2
    assert "not empty" in capsys.readouterr().err
    assert main(train) == 0  # it has all its steps: --init is not needed
