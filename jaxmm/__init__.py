"""jaxmm: unified multimodal models in JAX."""

__version__ = "0.1.0"


def load(path, **options):
    """Load a checkpoint folder and return an object with `generate(prompts, ...)` and `describe(images, ...)`.

    See `jaxmm.inference.load` for the arguments.
    """
    from jaxmm.inference import load as load_checkpoint

    return load_checkpoint(path, **options)


__all__ = ["__version__", "load"]
