"""What the training loop costs over the bare compiled step, and how long a save blocks it.

    python benchmarks/trainer_overhead.py

Trains the digits model. Rounds of the loop (packing, prefetch, checks, metrics, asynchronous saves) alternate with
rounds of the compiled step alone, on one batch, in one process. Prints the ratio of the medians of their wall times,
and the time that a save holds up the loop beside the time until it is on disk.
"""

import argparse
import contextlib
import statistics
import tempfile
import time
from pathlib import Path

import jax

from jaxmm.checkpoints import Checkpoints
from jaxmm.cli import keep_freed_memory
from jaxmm.training.config import load_config
from jaxmm.training.loop import Trainer


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--config", default="experiments/digits/transfusion.py")
    parser.add_argument("--steps", type=int, default=100, help="of a round")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--log-every", type=int, default=10)
    parser.add_argument("--checkpoint-every", type=int, default=50)
    options = parser.parse_args()
    keep_freed_memory()
    with tempfile.TemporaryDirectory() as folder:
        measure(options, Path(folder))


def measure(options: argparse.Namespace, workdir: Path) -> None:
    """Alternate the two and print their times."""
    overrides = [f"log_every={options.log_every}", f"checkpoint_every={options.checkpoint_every}"]
    config = load_config(options.config, [*overrides, "sample_every=0", "evaluation.name=", "policy=auto"])
    trainer = Trainer(config, workdir)
    loops, bares = [], []
    with contextlib.ExitStack() as stack:
        checkpoints = Checkpoints(workdir, keep_last=2)
        stack.callback(checkpoints.close)
        stack.enter_context(jax.set_mesh(trainer.mesh))
        iterator = iter(trainer.batches)
        stack.callback(iterator.close)
        state = trainer.maker.init(jax.random.key(0))
        batch, key = next(iterator), jax.random.key(1)
        state, _ = trainer.step(state, batch, key)
        state, _ = bare_steps(trainer, state, batch, key, options.steps)
        for _ in range(options.rounds):
            state, seconds = loop_steps(trainer, state, iterator, checkpoints, options.steps)
            loops.append(seconds)
            state, seconds = bare_steps(trainer, state, batch, key, options.steps)
            bares.append(seconds)
        blocked, written = save_times(trainer, state, iterator, checkpoints)
    loop, bare = statistics.median(loops), statistics.median(bares)
    print(
        f"{options.rounds} rounds of {options.steps} steps, {options.steps // options.checkpoint_every} saves a round"
    )
    both = f"loop {spread(loops, options.steps)}, bare {spread(bares, options.steps)} ms per step"
    print(f"loop / bare step: {loop / bare:.3f}  ({both})")
    step = bare / options.steps
    print(f"a save blocks {blocked * 1e3:.0f} ms ({blocked / step:.2f} steps); it is on disk after {written:.2f} s")


def loop_steps(trainer: Trainer, state, iterator, checkpoints: Checkpoints, steps: int):
    """A round of the loop."""
    with trainer.config.unlocked():
        trainer.config.steps = int(state["step"]) + steps
    begin = time.perf_counter()
    state = trainer.train_steps(state, iterator, checkpoints)
    jax.block_until_ready(state)
    seconds = time.perf_counter() - begin
    checkpoints.wait()
    return state, seconds


def bare_steps(trainer: Trainer, state, batch, key, steps: int):
    """As many steps of the compiled program, one after the other."""
    begin = time.perf_counter()
    for _ in range(steps):
        state, _ = trainer.step(state, batch, key)
    jax.block_until_ready(state)
    return state, time.perf_counter() - begin


def save_times(trainer: Trainer, state, iterator, checkpoints: Checkpoints, repeats: int = 5) -> tuple[float, float]:
    """Median seconds that a save holds up its caller, and until it is on disk."""
    blocked, written = [], []
    for _ in range(repeats):
        state = {**state, "step": state["step"] + 1}
        begin = time.perf_counter()
        trainer.maker.save(checkpoints, state, iterator)
        blocked.append(time.perf_counter() - begin)
        checkpoints.wait()
        written.append(time.perf_counter() - begin)
    return statistics.median(blocked), statistics.median(written)


def spread(seconds: list[float], steps: int) -> str:
    """Median, least and most, in milliseconds per step."""
    per_step = [1e3 * x / steps for x in seconds]
    return f"{statistics.median(per_step):.1f} [{min(per_step):.1f}, {max(per_step):.1f}]"


if __name__ == "__main__":
    main()
