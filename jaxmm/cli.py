"""The command line: jaxmm VERB ...; each verb is one function."""

import argparse
import contextlib
import ctypes
import json
import logging
import sys
from collections.abc import Sequence
from pathlib import Path

from jaxmm.errors import InputError, RunError, Stopped


def main(arguments: Sequence[str] | None = None) -> int:
    """Run one verb and return the exit code.

    0: done. 2: the user has something to mend. 3: the run cannot go on. 75: it was asked to stop and can be resumed.
    """
    arguments = list(sys.argv[1:] if arguments is None else arguments)
    overrides = [a.removeprefix("--config.") for a in arguments if a.startswith("--config.")]
    parser = make_parser()
    options = parser.parse_args([a for a in arguments if not a.startswith("--config.")])
    if overrides and not hasattr(options, "config"):
        parser.error(f"--config.{overrides[0].split('=')[0]}: {options.verb} has no config to override")
    options.overrides = overrides
    keep_freed_memory()
    quiet_writers()
    try:
        options.run(options)
    except (InputError, RunError, Stopped) as error:
        print(f"jaxmm {options.verb}: {error}", file=sys.stderr)
        return error.exit_code
    except KeyboardInterrupt:
        return 130
    return 0


def keep_freed_memory() -> None:
    """Ask glibc not to give large buffers back to the kernel between two steps.

    XLA frees its buffers after each step; on a CPU, faulting them in again page by page costs a quarter of a step.
    Where the C library is another one, nothing happens.
    """
    arenas, mmap_threshold, trim_threshold = -8, -3, -1
    with contextlib.suppress(OSError, AttributeError):
        mallopt = ctypes.CDLL("libc.so.6").mallopt
        for parameter, value in ((arenas, 1), (mmap_threshold, 2**30), (trim_threshold, 2**31 - 1)):
            mallopt(parameter, value)


def quiet_writers() -> None:
    """Let the threads that write checkpoints keep their errors to themselves.

    Orbax and TensorStore raise them again at the next save or wait, and there they are told in one line; what the
    threads print besides are warnings of files that our checkpoints do without, and tracebacks.
    """
    for name in ("absl", "asyncio"):
        logging.getLogger(name).setLevel(logging.CRITICAL)
    report = sys.unraisablehook

    def filtered(unraisable) -> None:
        if str(unraisable.exc_value) != "Event loop is closed":  # writes that ended after another one had failed
            report(unraisable)

    sys.unraisablehook = filtered


def make_parser() -> argparse.ArgumentParser:
    """The verbs and their options."""
    parser = argparse.ArgumentParser(prog="jaxmm", description="Unified multimodal models in JAX.")
    verbs = parser.add_subparsers(dest="verb", required=True, metavar="VERB")
    _add_train(verbs)
    _add_encode(verbs)
    _add_generate(verbs)
    _add_describe(verbs)
    _add_report(verbs)
    _add_export(verbs)
    return parser


def train(options: argparse.Namespace) -> None:
    """Train the experiment and print its report."""
    from jaxmm.training.config import load_config
    from jaxmm.training.loop import Trainer
    from jaxmm.training.record import Origin

    config = load_config(options.config, options.overrides, init=options.init, workdir=options.workdir)
    report = Trainer(config, Path(options.workdir), Origin(options.config, options.overrides)).run()
    if report:
        print(json.dumps(report, indent=2))


def encode(options: argparse.Namespace) -> None:
    """Write the latents of an experiment's images."""
    from jaxmm.training.config import load_config
    from jaxmm.training.encode import EncodeOptions, encode_source

    config = load_config(options.config, options.overrides)
    how = EncodeOptions(options.source, options.dtype, options.shard_size, options.batch_size)
    manifest = encode_source(config, Path(options.output), how)
    print(f"{options.output}: {manifest.records} documents in {manifest.shards} shards")


def generate(options: argparse.Namespace) -> None:
    """Draw images and write them."""
    from jaxmm.data.images import grid, write_image
    from jaxmm.inference import load

    pipeline = load(options.checkpoint, mesh=_mesh())
    solver = {name: getattr(options, name) for name in ("steps", "guidance", "solver")}
    images = pipeline.generate(
        options.prompt, count=options.count, seed=options.seed, batch_size=options.batch_size, **solver
    )
    output = Path(options.output)
    if output.suffix:
        write_image(output, grid(images, scale=options.scale) if len(images) > 1 or options.scale else images[0])
        return
    output.mkdir(parents=True, exist_ok=True)
    for i, image in enumerate(images):
        write_image(output / f"{i:05d}.png", image)


def describe(options: argparse.Namespace) -> None:
    """Print one line per image."""
    from jaxmm.inference import load

    pipeline = load(options.checkpoint, mesh=_mesh())
    texts = pipeline.describe(
        options.image,
        limit=options.limit,
        temperature=options.temperature,
        top_p=options.top_p,
        seed=options.seed,
        batch_size=options.batch_size,
    )
    for text in texts:
        print(text)


def report(options: argparse.Namespace) -> None:
    """Draw the curves of runs, and print a table of their numbers."""
    from jaxmm.data.images import write_image
    from jaxmm.training.curves import draw_curves, render
    from jaxmm.training.report import choose_metrics, read_runs, table

    if options.smooth < 1:
        raise InputError(f"--smooth must be at least 1, not {options.smooth}")
    runs = read_runs(options.workdirs)
    metrics = choose_metrics(runs, options.metric)
    write_image(options.output, render(draw_curves(runs, metrics, options.smooth)))
    print(table(runs))


def export(options: argparse.Namespace) -> None:
    """Write a checkpoint as a folder of its own and print where it is."""
    from jaxmm.convert import export

    print(export(options.checkpoint, options.output, options.format))


def _mesh():
    """All devices, where there are several."""
    import jax

    from jaxmm.sharding import make_mesh

    return make_mesh() if jax.device_count() > 1 else None


def _add_train(verbs) -> None:
    verb = verbs.add_parser(
        "train",
        help="train an experiment, or resume it",
        description="Train an experiment. The same workdir, run again, resumes from its latest checkpoint.",
        epilog="Any key of the config is overridden by --config.KEY=VALUE, for example --config.seed=3 or "
        "--config.optimizer.learning_rate=1e-3.",
    )
    verb.add_argument("--config", required=True, metavar="FILE[:ARG]", help="experiments/<system>/<stage>.py[:size]")
    verb.add_argument("--workdir", required=True, help="folder for checkpoints, metrics, samples and the report")
    verb.add_argument("--init", default="", metavar="CHECKPOINT", help="a workdir whose parameters a fresh run takes")
    verb.set_defaults(run=train)


def _add_encode(verbs) -> None:
    verb = verbs.add_parser(
        "encode",
        help="write the latents of an experiment's images, to train from",
        description="Run the frozen codec of an experiment over its images once, on all devices. The same command goes "
        "on where it was stopped. Train from the result with --config.data.source=latents "
        "--config.data.options.path=FOLDER.",
    )
    verb.add_argument("--config", required=True, metavar="FILE[:ARG]", help="the experiment, with its codec and source")
    verb.add_argument("--output", required=True, help="folder for the shards and their manifest")
    verb.add_argument("--source", default="", help="of a mixture: which source to encode")
    verb.add_argument("--dtype", default="float16", help="float16 (default), bfloat16 or float32")
    verb.add_argument("--shard-size", type=int, default=4096, help="documents of a shard (default 4096)")
    verb.add_argument("--batch-size", type=int, default=16, help="images that each device encodes at once (default 16)")
    verb.set_defaults(run=encode)


def _add_generate(verbs) -> None:
    verb = verbs.add_parser("generate", help="draw images from prompts", description="Draw images from prompts.")
    verb.add_argument("--checkpoint", required=True, help="a workdir of `jaxmm train`")
    verb.add_argument("--prompt", required=True, action="append", help="what to draw; repeat it for several prompts")
    verb.add_argument("--count", type=int, default=1, help="images per prompt (default 1)")
    verb.add_argument("--seed", type=int, default=0, help="the same seed draws the same images (default 0)")
    verb.add_argument("--steps", type=int, help="evaluations of the network (default: the checkpoint's)")
    verb.add_argument("--guidance", type=float, help="scale of classifier-free guidance (default: the checkpoint's)")
    verb.add_argument("--solver", help="ancestral, ddim or euler (default: the checkpoint's)")
    verb.add_argument("--scale", type=int, help="enlarge each pixel (default: grids of small images are enlarged)")
    verb.add_argument("--batch-size", type=int, default=64, help="images that are drawn together (default 64)")
    verb.add_argument(
        "--output", required=True, help="a picture (several images make a grid), or a folder for one file per image"
    )
    verb.set_defaults(run=generate)


def _add_describe(verbs) -> None:
    verb = verbs.add_parser("describe", help="describe images in text", description="Print one line per image.")
    verb.add_argument("--checkpoint", required=True, help="a workdir of `jaxmm train`")
    verb.add_argument("--image", required=True, action="append", help="a picture; repeat it for several")
    verb.add_argument("--limit", type=int, default=64, help="the most tokens of a description (default 64)")
    verb.add_argument("--temperature", type=float, default=0.0, help="of sampling; 0 is greedy (default)")
    verb.add_argument("--top-p", type=float, default=1.0, help="nucleus of sampling (default 1)")
    verb.add_argument("--seed", type=int, default=0, help="of sampling (default 0)")
    verb.add_argument("--batch-size", type=int, default=64, help="images that are read together (default 64)")
    verb.set_defaults(run=describe)


def _add_report(verbs) -> None:
    verb = verbs.add_parser(
        "report",
        help="compare runs: their curves and a table",
        description="Draw the curves of one or several runs, and print a table of their numbers and of the config keys "
        "in which they differ.",
    )
    verb.add_argument("workdirs", nargs="+", metavar="WORKDIR", help="of `jaxmm train`; runs may still be going on")
    verb.add_argument("--output", default="report.png", help="the picture (default report.png)")
    verb.add_argument(
        "--metric",
        action="append",
        default=[],
        metavar="PATTERN",
        help="a regular expression for whole names of metrics.jsonl, for example 'loss/.*'; repeat it for several "
        "(default: losses, learning rate, gradient norm, tokens per second, utilisation)",
    )
    verb.add_argument("--smooth", type=int, default=1, metavar="N", help="draw means over N log points (default 1)")
    verb.set_defaults(run=report)


def _add_export(verbs) -> None:
    verb = verbs.add_parser(
        "export",
        help="write the weights of a checkpoint",
        description="Write the weights of a checkpoint into a new folder: averaged where the run keeps averages, "
        "adapters merged.",
    )
    verb.add_argument("--checkpoint", required=True, help="a workdir of `jaxmm train`; its latest step is taken")
    verb.add_argument("--output", required=True, help="a folder that is not there yet, or empty")
    verb.add_argument(
        "--format",
        default="official",
        choices=("official", "jaxmm"),
        help="safetensors under the official keys, or a checkpoint of jaxmm (default official)",
    )
    verb.set_defaults(run=export)


if __name__ == "__main__":
    sys.exit(main())
