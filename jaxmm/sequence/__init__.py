"""Documents, their layout as tokens, and batches of packed rows; nothing of any one system.

A Document holds what a person would recognise (text and images); a system's `layout.py` turns it into a Layout (token
ids, image slots, places, intervals, positions, labels); layouts packed into rows make a Batch, the only thing that
networks and trainers see.
"""

from jaxmm.sequence.batch import Batch, Budget, ImageSet, Tokens, build_batch
from jaxmm.sequence.consecutive import find_intervals
from jaxmm.sequence.document import Document, Image, Latents, Text
from jaxmm.sequence.intervals import OPEN, Intervals, causal, together
from jaxmm.sequence.layout import ImageSlot, Layout, StreamLayout, cut

__all__ = [
    "OPEN",
    "Batch",
    "Budget",
    "Document",
    "Image",
    "ImageSet",
    "ImageSlot",
    "Intervals",
    "Latents",
    "Layout",
    "StreamLayout",
    "Text",
    "Tokens",
    "build_batch",
    "causal",
    "cut",
    "find_intervals",
    "together",
]
