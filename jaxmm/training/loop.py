"""The training loop: steps, checkpoints, samples, the final report. The workdir alone decides whether a run resumes."""

import contextlib
import dataclasses
import time
from pathlib import Path
from typing import Any

import jax
from ml_collections import ConfigDict

import jaxmm
from jaxmm.checkpoints import Checkpoints, read_description, remove_unfinished, write_description, write_json
from jaxmm.data.images import grid, write_image
from jaxmm.errors import InputError, Stopped
from jaxmm.evaluation import get_benchmark
from jaxmm.inference import Pipeline
from jaxmm.layers.parameters import Policy
from jaxmm.models import get_system
from jaxmm.sequence import Batch
from jaxmm.sharding import check_unsharded, describe_unsharded, make_mesh, rows_sharding, unsharded
from jaxmm.training.config import model_config
from jaxmm.training.disk import disk_errors, only_run
from jaxmm.training.finetune import Finetuning
from jaxmm.training.flops import Work, matmul_seconds
from jaxmm.training.inputs import check_rows, check_vocabulary, codec_weights, make_batches, make_tokenizer
from jaxmm.training.metrics import Meter, MetricWriter, Progress, memory_use
from jaxmm.training.numerics import Guard
from jaxmm.training.optimizer import make_optimizer, make_schedule
from jaxmm.training.profiler import ProfileWindow
from jaxmm.training.record import Origin, record_start
from jaxmm.training.signals import StopRequests
from jaxmm.training.state import State, StateMaker, weights_of
from jaxmm.training.step import make_loss, make_step


class Trainer:
    """All that a run needs, made from its config.

    Args:
      config: see `base_config`.
      workdir: of the run; it is made if it is not there.
      origin: where the config comes from, for the record.

    Raises:
      InputError: for what is wrong in the config, its data, or a workdir of another run.
    """

    def __init__(self, config: ConfigDict, workdir: Path, origin: Origin = Origin()):
        self.config, self.workdir, self.origin = config, workdir, origin
        self.system, self.model = get_system(config.system), model_config(config)
        self.policy, self.mesh = Policy.named(config.policy), make_mesh(**config.mesh)
        check_rows(config.data.rows, self.mesh, config.microbatches)
        self.finetuning = Finetuning(config, self.system.blueprint(self.model), workdir)
        self.blueprint = self.finetuning.blueprint
        check_unsharded(self.blueprint.parameters, self.mesh)
        self.tokenizer = make_tokenizer(config)
        check_vocabulary(self.tokenizer, self.model)
        layouts = self.system.layouts(self.model, self.tokenizer, **config.recipe)
        self.batches, self.bad = make_batches(config, self.model, layouts, self._place, workdir / "bad_examples.jsonl")
        optimizer = make_optimizer(config.optimizer, config.steps, self.finetuning.trainable)
        frozen, borrowed = self.finetuning.frozen, self.finetuning.borrowed
        self.maker = StateMaker(self.blueprint, optimizer, frozen, self.mesh, self.policy, config.ema, borrowed)
        weights = self.system.term_weights(self.model)
        self.loss = make_loss(self.blueprint, weights, self.policy)
        step = make_step(
            self.blueprint, optimizer, weights, self.policy, ema=config.ema, microbatches=config.microbatches
        )
        self.step = jax.jit(step, donate_argnums=0)
        self.schedule = make_schedule(config.optimizer, config.steps)
        self.guard = Guard(config.nonfinite, config.nonfinite_in_a_row)

    def run(self) -> dict[str, Any]:
        """Train to the last step, then evaluate; return the report ({} without an evaluation)."""
        begin, config = time.perf_counter(), self.config
        with contextlib.ExitStack() as stack:
            stack.enter_context(only_run(self.workdir))
            self._describe_run()
            checkpoints = Checkpoints(self.workdir, keep_last=config.keep_last, keep_every=config.keep_every or None)
            stack.callback(checkpoints.close)
            stack.enter_context(jax.set_mesh(self.mesh))
            iterator = iter(self.batches)
            stack.callback(iterator.close)
            state = self._start(checkpoints, iterator)
            with disk_errors(self.workdir):
                self._record(int(state["step"]))
                state = self.train_steps(state, iterator, checkpoints)
                checkpoints.wait()
        with disk_errors(self.workdir):
            return self._report(state, time.perf_counter() - begin)

    def _describe_run(self) -> None:
        """Write what the checkpoint is; refuse a workdir that holds another model."""
        description = {
            "system": self.config.system,
            "model": dataclasses.asdict(self.model),
            "draw_options": self.config.samples.solver.to_dict(),
            "made_by": f"jaxmm {jaxmm.__version__} train",
        } | self.finetuning.describe()
        if (self.workdir / "model.json").exists():
            old = read_description(self.workdir)
            if (old["system"], old["model"]) != (description["system"], _as_json(description["model"])):
                raise InputError(f"{self.workdir} holds a run of another model; take another --workdir")
            if self.finetuning.resumes and old.get("lora") != _as_json(description.get("lora")):
                raise InputError(f"{self.workdir} holds a run with other adapters; take another --workdir")
        try:
            remove_unfinished(self.workdir)
            write_description(self.workdir, description, self.tokenizer)
            write_json(self.workdir / "config.json", self.config.to_dict())
        except OSError as error:
            raise InputError(f"cannot write to {self.workdir}: {error.strerror or error}") from error

    def _record(self, step: int) -> None:
        """Write what this start is made of."""
        whole = unsharded(self.blueprint.parameters, self.mesh)
        record_start(self.workdir, self.config, self.origin, self.mesh, step, whole)

    def _start(self, checkpoints: Checkpoints, iterator: Any) -> State:
        latest = checkpoints.latest()
        if latest is not None:
            return self.maker.restore(checkpoints, latest, iterator, self.finetuning.load_borrowed)
        given = self.finetuning.load(self.maker.targets(self.blueprint.parameters))
        given |= codec_weights(self.config.codec, self.model)
        return self.maker.init(jax.random.fold_in(jax.random.key(self.config.seed), 0), given)

    def train_steps(self, state: State, iterator: Any, checkpoints: Checkpoints) -> State:
        """Train from the state's step to the last one."""
        c, start = self.config, int(state["step"])
        if start >= c.steps:
            return state
        key = jax.random.fold_in(jax.random.key(c.seed), 1)
        batch = next(iterator)  # what is wrong with the data shows before the progress line does
        with contextlib.ExitStack() as stack:
            writer = stack.enter_context(contextlib.closing(MetricWriter(self.workdir, start)))
            progress = stack.enter_context(contextlib.closing(Progress(c.steps, start)))
            profile = stack.enter_context(contextlib.closing(ProfileWindow(c.profile, self.workdir / "profile")))
            stop = stack.enter_context(StopRequests())
            if self.mesh.size > 1:
                progress.say(describe_unsharded(self.blueprint.parameters, self.mesh))
            work = Work.of_step(self.loss, state, batch, key, self.mesh)
            meter, unchecked = Meter("data_wait", "samples", "save"), None
            for step in range(start + 1, c.steps + 1):
                profile.before(step)
                state, metrics = self.step(state, batch, key)
                profile.after(step, metrics)
                progress.advance()
                meter.step()
                if unchecked is not None:  # one step late, so that the device never waits for the host
                    self.guard.check(step - 1, unchecked)
                unchecked, stopping = metrics, stop.requested
                if _due(c.log_every, step, c.steps):
                    values = self._values(metrics, step, meter, work)
                    writer.write(step, values)
                    progress.show(values)
                    checkpoints.check()
                    meter.restart()
                if _due(c.sample_every, step, c.steps) and c.samples.prompts:
                    with meter.timed("samples"):
                        progress.say(f"step {step}: {self._samples(state, step, writer)}")
                if step == c.steps or stopping or _due(c.checkpoint_every, step, c.steps):
                    self.guard.check(step, metrics)
                    unchecked = None
                if stopping or _due(c.checkpoint_every, step, c.steps):
                    with meter.timed("save"):
                        self.maker.save(checkpoints, state, iterator)
                if stopping and step < c.steps:
                    checkpoints.wait()
                    raise Stopped(f"{stopping}: step {step} is saved; the same command goes on from there")
                if step < c.steps:
                    with meter.timed("data_wait"):
                        batch = next(iterator)
        return state

    def _values(self, metrics: dict[str, jax.Array], step: int, meter: Meter, work: Work) -> dict[str, float]:
        """The numbers of a step on the host; waits for it."""
        values = {name: float(x) for name, x in metrics.items() if name != "finite"} | meter.read()
        training = values["seconds_per_step"] - values["samples_seconds"] - values["save_seconds"]
        return values | {
            "learning_rate": float(self.schedule(step - 1)),
            "tokens_per_second": values["tokens"] / training,
            **work.metrics(values["tokens"], training),
            "skipped_steps": self.guard.skipped,
            "bad_examples": len(self.bad),
            **memory_use(),
        }

    def _place(self, batch: Batch) -> Batch:
        """This process's rows of the global batch, on its devices."""
        sharding = rows_sharding(self.mesh, self.config.data.rows)
        return jax.tree.map(lambda x: jax.make_array_from_process_local_data(sharding, x), batch)

    def _samples(self, state: State, step: int, writer: MetricWriter) -> Path:
        samples = self.config.samples
        drawn = self.pipeline(state).generate(list(samples.prompts), seed=self.config.seed)
        pixels = grid(drawn, columns=samples.columns or None)
        path = self.workdir / "samples" / f"{step:08d}.png"
        path.parent.mkdir(exist_ok=True)
        write_image(path, pixels)
        writer.write_image(step, "samples", pixels)
        return path

    def pipeline(self, state: State) -> Pipeline:
        """The model as it stands, ready to generate and describe."""
        if not hasattr(self, "_pipeline"):
            self._pipeline = Pipeline(
                self.system,
                self.model,
                {},
                self.tokenizer,
                draw_options=self.config.samples.solver.to_dict(),
                dtype=self.policy.compute,
                mesh=self.mesh if self.mesh.size > 1 else None,
                blueprint=self.blueprint,
            )
        self._pipeline.params = weights_of(state)
        return self._pipeline

    def _report(self, state: State, seconds: float) -> dict[str, Any]:
        c = self.config
        if not c.evaluation.name:
            return {}
        begin = time.perf_counter()
        report = get_benchmark(c.evaluation.name)(self.pipeline(state), seed=c.seed, **c.evaluation.options)
        seconds += time.perf_counter() - begin
        report |= {"seed": c.seed, "steps": c.steps, "wall_seconds": seconds, "matmul_seconds": matmul_seconds()}
        write_json(self.workdir / "report.json", report)
        return report


def _due(every: int, step: int, last: int) -> bool:
    return bool(every) and (step % every == 0 or step == last)


def _as_json(fields: Any) -> Any:
    """Tuples become lists, as in a file."""
    if isinstance(fields, dict):
        return {key: _as_json(value) for key, value in fields.items()}
    return [_as_json(x) for x in fields] if isinstance(fields, (list, tuple)) else fields
