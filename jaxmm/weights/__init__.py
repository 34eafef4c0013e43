"""What a weights table is: rows that pair an official key with one of our paths, and invertible transforms.

Each network owns its table (`models/<system>/weights.py`, `autoencoders/kl.py`, ...), written once per layer, and a
system composes its own from those of its parts by prefix. The same table reads official weights and writes them.
"""

from jaxmm.weights.table import Mismatch, Row, Table
from jaxmm.weights.transforms import CONV, HEADS_IN, HEADS_OUT, LINEAR, SAME, Transform

__all__ = [
    "CONV",
    "HEADS_IN",
    "HEADS_OUT",
    "LINEAR",
    "SAME",
    "Mismatch",
    "Row",
    "Table",
    "Transform",
]
