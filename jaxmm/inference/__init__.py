"""A checkpoint, ready to generate and describe."""

from jaxmm.inference.pipeline import Pipeline, load

__all__ = ["Pipeline", "load"]
