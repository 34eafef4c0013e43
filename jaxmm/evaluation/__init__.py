"""Benchmarks: each takes a Pipeline and returns a report, a flat dict of numbers that JSON can hold."""

from collections.abc import Callable

from jaxmm.errors import InputError, nearest


def get_benchmark(name: str) -> Callable[..., dict]:
    """Return a benchmark: (pipeline, seed=..., **options) -> report.

    Raises:
      InputError: if there is none of that name.
    """
    from jaxmm.evaluation.digits import evaluate_digits

    benchmarks = {"digits": evaluate_digits}
    if name not in benchmarks:
        raise InputError(f"unknown benchmark {name!r}{nearest(name, benchmarks)}")
    return benchmarks[name]
