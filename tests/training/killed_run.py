"""A tiny run in a process of its own, to be killed: python killed_run.py WORKDIR RECORD [OVERRIDE ...].

For each step that begins it appends a line to RECORD: the number of the step, then, when it ends, its loss, and the
examples and the text of its batch. A step that is done again after a kill has a line again.
"""

import json
import logging
import math
import sys
from pathlib import Path
from unittest import mock

import jax
import numpy as np

from jaxmm.sharding import make_mesh
from jaxmm.training import loop
from jaxmm.training.config import load_config

CONFIG = "experiments/digits/transfusion.py:short"
TINY = ("model.width=32", "model.mlp_width=64", "model.layers=2", "data.rows=8", "sample_every=0", "evaluation.name=")


def make_trainer(workdir, *overrides, **mesh):
    """A trainer of a model that takes some milliseconds a step; on one device, or on the mesh that is given."""
    count = math.prod(mesh.values())
    made = make_mesh(**{"fsdp": 1, **mesh}, devices=jax.devices()[:count])
    with mock.patch.object(loop, "make_mesh", lambda **_: made):
        return loop.Trainer(load_config(CONFIG, [*TINY, *overrides]), Path(workdir))


def record_steps(trainer, write):
    """Call `write` with the facts of each step, {step, loss, examples, ids}, when it is done."""
    step = trainer.step

    def recorded(state, batch, key):
        number = int(state["step"]) + 1
        state, metrics = step(state, batch, key)
        write(
            {
                "step": number,
                "loss": float(metrics["loss"]).hex(),
                "examples": {name: np.asarray(x.example).tolist() for name, x in batch.images.items()},
                "ids": {name: np.asarray(x.ids).tolist() for name, x in batch.streams.items()},
            }
        )
        return state, metrics

    trainer.step = recorded
    return trainer


def main(workdir, record, *overrides):
    logging.getLogger("absl").setLevel(logging.CRITICAL)
    with open(record, "a") as file:

        def write(facts):
            file.write(json.dumps(facts) + "\n")
            file.flush()

        record_steps(make_trainer(workdir, *overrides), write).run()


if __name__ == "__main__":
    main(*sys.argv[1:])
