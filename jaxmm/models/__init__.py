"""The systems, one folder each: a folder whose `__init__.py` defines `SYSTEM` is a system, nothing else lists it."""

import importlib
import pkgutil

from jaxmm.errors import InputError, nearest
from jaxmm.models.system import System

__all__ = ["System", "get_system", "system_names"]


def system_names() -> list[str]:
    """The names of the systems that exist."""
    return [module.name for module in pkgutil.iter_modules(__path__) if module.ispkg]


def get_system(name: str) -> System:
    """Return a system by the name of its folder.

    Raises:
      InputError: if there is none.
    """
    if name not in system_names():
        raise InputError(f"unknown system {name!r}{nearest(name, system_names())}")
    return importlib.import_module(f"{__name__}.{name}").SYSTEM
