"""The interval of places from which a key may be seen: q_start <= place < q_end."""

from typing import Any, NamedTuple

import numpy as np

# the end of a key that stays visible to whatever comes later: cached keys of a document that is still being written
OPEN = np.int32(2**31 - 1)


class Intervals(NamedTuple):
    """Where keys may be seen from: query i sees key j if start[j] <= place[i] < end[j]; int32 [B, L] or [L].

    A key with (0, 0) is seen by nobody: the packer's filler, an empty slot of a cache. A query at place -1 sees
    nothing.
    """

    start: Any
    end: Any


def causal(begin: int, stop: int, end: int) -> Intervals:
    """Text on the places [begin, stop) of a document that ends before `end`: seen by itself and by what follows."""
    return Intervals(np.arange(begin, stop, dtype=np.int32), np.full(stop - begin, end, np.int32))


def together(begin: int, stop: int, end: int) -> Intervals:
    """Tokens on the places [begin, stop) that see each other (an image), seen by what follows up to `end`.

    With end == stop they are hidden from what follows: a noised image, an attention window.
    """
    return Intervals(np.full(stop - begin, begin, np.int32), np.full(stop - begin, end, np.int32))
