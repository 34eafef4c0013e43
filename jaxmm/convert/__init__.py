"""From checkpoint folders to parameters, and to weights under the official keys.

saved.py     the parameters of a checkpoint folder, the adapters of a LoRA run merged into those of its base
exporter.py  writes them as one folder of their own
"""

from jaxmm.convert.exporter import FORMATS, export
from jaxmm.convert.saved import Saved

__all__ = ["FORMATS", "Saved", "export"]
