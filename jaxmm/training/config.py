"""What an experiment says: an `ml_collections.ConfigDict` whose keys and types are fixed by `base_config`."""

import ast
import dataclasses
import importlib.util
import os
import re
import typing
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from ml_collections import ConfigDict, config_dict

from jaxmm.checkpoints import has_steps, read_description
from jaxmm.data.sources import source_options
from jaxmm.errors import InputError, nearest
from jaxmm.models import get_system

# the options of the only source, and of one of a mixture
_SOURCE_OPTIONS = re.compile(r"data\.(mixture\.[^.]+\.)?options")


def base_config(system: str, model: Any) -> ConfigDict:
    """The defaults of every experiment.

    Args:
      system: name of the system.
      model: its config dataclass.

    Returns:
      A config with all the keys that there are:
        system, model: what is trained; `model` holds the fields of the system's config.
        recipe: keyword arguments of the system's layouts: what training leaves to chance.
        tokenizer: "words" (built from `data.words`), a Hugging Face name, or a folder.
        data: source and its options (`jaxmm.data.sources`: "digits", "folder", "tfds:NAME", "text", "latents", ...),
          rows of the global batch, budgets of a row, `prefetch` batches made and put on the devices ahead, and the
          share of records that may be bad before the run stops. `mixture`, if it is not empty, takes the place of
          source and options: {name: {source, options, weight}}, the weights being shares of "tokens" or of
          "documents" (`mixture_unit`); for tokens the first `mixture_sample` documents of each source are measured.
        optimizer: AdamW, its schedule, and regular expressions over parameter paths.
        steps, seed: length of the run, and the seed of parameters, data and noise.
        policy: number formats, see `Policy.named`.
        mesh: sizes of the mesh axes; one may be -1.
        codec: folder of the frozen autoencoder's weights, in diffusers' layout.
        init: `checkpoint`, a folder whose parameters a fresh run begins with; `load`, regular expressions over the
          paths of those that are taken, the others are drawn; `adopt`, take its sizes (`model`), tokenizer and options
          of drawing (`samples.solver`) as well, instead of those that the experiment gives.
        lora: with a `rank`, nothing is trained but low-rank adapters of the matrices that `targets` match, scaled by
          `alpha` / rank, and the parameters that `train` matches, whole; what `optimizer.frozen` matches stays out.
        ema: decay of the averaged weights; 0 keeps none.
        microbatches: turns in which the rows of a batch are read, to save memory.
        nonfinite: what to do with a step whose numbers are not finite: "stop", or "skip" it, at most
          `nonfinite_in_a_row` times in a row.
        log_every, checkpoint_every, sample_every: in steps; 0 is never.
        keep_last, keep_every: which checkpoints stay.
        profile: "FIRST:LAST", steps whose trace is written to WORKDIR/profile; "" is none.
        samples: prompts of the pictures drawn on the way, columns of their grid (0: about square), solver options.
        evaluation: the benchmark of the final report and its options; "" is none.
    """
    config = ConfigDict()
    config.system, config.model = system, model_dict(model)
    config.recipe = model_dict(get_system(system).recipe())
    config.tokenizer = "words"
    config.data = ConfigDict(
        dict(
            source="digits",
            options=ConfigDict(),
            mixture=ConfigDict(),
            mixture_unit="tokens",
            mixture_sample=1000,
            words=(),
            rows=32,
            tokens=256,
            images=8,
            open_rows=4,
            prefetch=2,
            bad_share=0.05,
        )
    )
    config.optimizer = ConfigDict(
        dict(
            learning_rate=3e-4,
            final_learning_rate=0.0,
            warmup_steps=100,
            schedule="cosine",
            b1=0.9,
            b2=0.95,
            eps=1e-8,
            weight_decay=0.1,
            no_decay=(r".*\.(scale|bias)",),
            clip_norm=1.0,
            frozen=(r"codec\..*",),
            multipliers=(),
        )
    )
    config.steps, config.seed, config.policy = 1000, 0, "auto"
    config.mesh = ConfigDict(dict(data=1, fsdp=-1, tensor=1, context=1))
    config.codec, config.ema = "", 0.0
    config.init = ConfigDict(dict(checkpoint="", load=(".*",), adopt=False))
    config.lora = ConfigDict(dict(rank=0, alpha=16.0, targets=(), train=()))
    config.microbatches, config.nonfinite, config.nonfinite_in_a_row = 1, "stop", 10
    config.log_every, config.checkpoint_every, config.sample_every = 20, 1000, 0
    config.keep_last, config.keep_every, config.profile = 3, 0, ""
    config.samples = ConfigDict(dict(prompts=(), columns=0, solver=model_dict(get_system(system).draw_options())))
    config.evaluation = ConfigDict(dict(name="", options=ConfigDict()))
    return config


def model_dict(model: Any) -> ConfigDict:
    """A config dataclass as a ConfigDict; a number or a string that is None is a placeholder of its type."""
    fields, hints = {}, typing.get_type_hints(type(model))
    for field in dataclasses.fields(model):
        value = getattr(model, field.name)
        if dataclasses.is_dataclass(value):
            fields[field.name] = model_dict(value)
        elif value is not None:
            fields[field.name] = value
        else:
            for kind in {int, float, str} & set(typing.get_args(hints[field.name])):
                fields[field.name] = config_dict.placeholder(kind)
    return ConfigDict(fields)


def model_config(config: ConfigDict) -> Any:
    """The system's config dataclass from `config.model`."""
    return get_system(config.system).config.from_dict(config.model.to_dict())


def load_config(
    spec: str, overrides: Sequence[str] = (), *, init: str = "", workdir: str | os.PathLike | None = None
) -> ConfigDict:
    """Load an experiment and apply overrides.

    Args:
      spec: "path.py" or "path.py:argument"; the file has `get_config(argument="")`.
      overrides: "a.b=value" each, typed by the value they replace.
      init: the checkpoint that a fresh run begins with (`init.checkpoint`).
      workdir: of the run. If it has a saved step, `init.adopt` adopts from it: the run goes on with what it has.

    Raises:
      InputError: for a missing or broken file, a wrong argument, an unknown key or an ill-typed value.
    """
    path, _, argument = spec.partition(":")
    if not Path(path).is_file():
        raise InputError(f"no config file {path}")
    module_spec = importlib.util.spec_from_file_location(Path(path).stem, path)
    if module_spec is None:
        raise InputError(f"{path} is no Python file")
    module = importlib.util.module_from_spec(module_spec)
    try:
        module_spec.loader.exec_module(module)
    except SyntaxError as error:
        raise InputError(f"{path}:{error.lineno}: {error.msg}") from error
    if not hasattr(module, "get_config"):
        raise InputError(f"{path} has no get_config(argument)")
    config = module.get_config(argument)
    if init:
        config.init.checkpoint = str(init)
    first = [override for override in overrides if override.startswith("init.")]
    for override in first:
        apply_override(config, override)
    if config.init.adopt:
        _adopt(config, Path(workdir) if workdir and has_steps(workdir) else None)
    for override in overrides:
        apply_override(config, override)
    return config.lock()


def _adopt(config: ConfigDict, run: Path | None) -> None:
    """Take sizes, tokenizer and options of drawing of a run that goes on, or of the checkpoint it begins with."""
    if run is None and not config.init.checkpoint:
        raise InputError("this experiment goes on from a checkpoint: give --init CHECKPOINT, a workdir of jaxmm train")
    folder = run or Path(config.init.checkpoint)
    description = read_description(folder)
    if description["system"] != config.system:
        raise InputError(f"{folder} is a checkpoint of {description['system']!r}, the config is of {config.system!r}")
    config.model = model_dict(get_system(config.system).config.from_dict(description["model"]))
    config.tokenizer = str(folder / "tokenizer")
    options = get_system(config.system).draw_options(**description.get("draw_options", {}))
    config.samples.solver = model_dict(options)


def apply_override(config: ConfigDict, override: str) -> None:
    """Set one key of a config from "a.b=value".

    Options of a source may be new, the source checks them; another source keeps of the options only those that it has.
    """
    key, equals, text = override.partition("=")
    if not equals:
        raise InputError(f"override {override!r}: write --config.{key}=value")
    known = flat_keys(config)
    parent, _, name = key.rpartition(".")
    if key not in known and _SOURCE_OPTIONS.fullmatch(parent) and _node(config, parent) is not None:
        known[key] = object
    if key not in known:
        raise InputError(f"unknown config key {key!r}{nearest(key, known)}")
    node = _node(config, parent)
    with node.unlocked():
        if name == "source" and _SOURCE_OPTIONS.fullmatch(f"{parent}.options") and text != node.source:
            node.options = ConfigDict({k: v for k, v in node.options.items() if k in source_options(text)})
        node[name] = _parse(key, text, known[key])


def _node(config: ConfigDict, key: str) -> ConfigDict | None:
    """The part of a config that a dotted key names; None if there is none."""
    for part in key.split(".") if key else ():
        config = config.get(part) if isinstance(config, ConfigDict) else None
    return config


def flat_keys(config: ConfigDict, prefix: str = "") -> dict[str, type]:
    """{dotted key: type of its value} of all leaves."""
    flat = {}
    for key, value in config.items():
        if isinstance(value, ConfigDict):
            flat |= flat_keys(value, f"{prefix}{key}.")
        else:
            flat[prefix + key] = config.get_type(key)
    return flat


def _parse(key: str, text: str, kind: type) -> Any:
    if kind is str:
        return text
    try:
        value = ast.literal_eval(text.capitalize() if text in ("true", "false") else text)
    except (ValueError, SyntaxError):
        value = text
    if kind is float and type(value) is int:
        value = float(value)
    if kind is tuple and isinstance(value, list):
        value = tuple(value)
    if kind is object:
        return value
    if type(value) is not kind:
        raise InputError(f"config key {key!r} takes {kind.__name__}, not {text!r}")
    return value
