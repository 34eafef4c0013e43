"""A run that goes on on other devices: 8, then 2 x 4, then 1."""

import time

import numpy as np
import pytest

from jaxmm.checkpoints import saved_steps
from tests.training.killed_run import make_trainer, record_steps


class Gone(Exception):
    """The machine of this leg of the run."""


def leg(workdir, until=9, **mesh):
    """The facts of the steps of one leg: it ends without notice when step `until` is saved and the next one begins."""
    facts = []
    trainer = record_steps(make_trainer(workdir, "steps=9", "checkpoint_every=3", "log_every=0", **mesh), facts.append)
    step = trainer.step

    def ended(state, batch, key):
        if int(state["step"]) == until:
            while until not in saved_steps(workdir):
                time.sleep(0.01)
            raise Gone
        return step(state, batch, key)

    trainer.step = ended
    try:
        trainer.run()
    except Gone:
        assert until < 9
    return facts


@pytest.mark.slow
def test_a_run_goes_on_on_other_meshes(tmp_path):
    one = leg(tmp_path / "one")
    many = tmp_path / "many"
    moved = leg(many, 3, fsdp=8) + leg(many, 6, fsdp=2, tensor=4) + leg(many)
    assert [facts["step"] for facts in moved] == [facts["step"] for facts in one] == list(range(1, 10))
    losses = [[float.fromhex(facts["loss"]) for facts in run] for run in (moved, one)]
    np.testing.assert_allclose(*losses, rtol=1e-5)
    assert len(set(losses[1])) == 9
    for ours, theirs in zip(moved, one):
        assert ours["examples"] == theirs["examples"] and ours["ids"] == theirs["ids"]
