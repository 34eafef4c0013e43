"""Runs that begin with a checkpoint: what they take, what they train, what they save, what they refuse."""

import json
import shutil

import jax
import numpy as np
import orbax.checkpoint as ocp
import pytest

from jaxmm.cli import main
from jaxmm.errors import InputError
from jaxmm.inference import load
from jaxmm.training.loop import Trainer
from tests.training.test_loop import ONE, arrays, lines, tiny_config

BLOCK = "transformer.layers.streams.tokens."
LORA = ["lora.rank=2", "lora.alpha=4.0", "lora.targets=('.*(query|out|down).kernel',)", "lora.train=('.*norm.scale',)"]
TARGETS = [BLOCK + name for name in ("mlp.down.kernel", "out.kernel", "query.kernel")]
NORMS = [BLOCK + name for name in ("attention_norm.scale", "mlp_norm.scale")]


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    """A folder with a finished run, `base`, and two LoRA runs on it, `lora` on 8 devices and `one` on one."""
    folder = tmp_path_factory.mktemp("runs")
    Trainer(tiny_config("steps=4", "data.rows=8"), folder / "base").run()
    for name, mesh in (("lora", []), ("one", ["mesh.fsdp=1"])):
        finetune(folder, name, *LORA, *mesh).run()
    return folder


def finetune(folder, name, *overrides, base="base"):
    """The trainer of a run that begins with another."""
    given = [f"init.checkpoint={folder / base}", "steps=4", "checkpoint_every=2", "optimizer.warmup_steps=0"]
    config = tiny_config(*given, *overrides)
    trainer = Trainer(config, folder / name)
    return trainer


def started(trainer):
    """The state that a fresh run begins with."""
    with jax.set_mesh(trainer.mesh):
        return trainer._start(Nothing(), None)


class Nothing:
    def latest(self):
        return None


def description(folder):
    return json.loads((folder / "model.json").read_text())


def weights(folder):
    return load(folder).params
