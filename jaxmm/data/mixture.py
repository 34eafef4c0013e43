"""Several sources in stated shares, by index.

Which source a document is of is a function of its number alone, so that a run can go on anywhere. Each row of the batch
(a lane) has the shares to within one document at any time; a source that comes to its end begins anew.
"""

import json
import math
import sys
import zlib
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import grain

from jaxmm.data.bad_examples import BadExample
from jaxmm.errors import InputError, nearest

UNITS = ("tokens", "documents")
_WHOLE = 10**9  # shares are so many parts


class Interleave(grain.transforms.DatasetSelectionMap):
    """Document k = b + B j, the j-th of lane b: its source, and its number in the endless sequence of that source.

    Each lane has the documents b, b + B, ... of each source's sequence. Lanes begin at different points of the pattern.

    Args:
      names: of the sources.
      shares: gives the shares of documents, once, when they are first needed.
      lanes: B, the rows of the global batch.
      key: what the shares follow from; saved shares are taken up only under the same key.
    """

    def __init__(self, names: Sequence[str], shares: Callable[[], Sequence[float]], lanes: int, key: Any = None):
        self.names, self.lanes, self._measure = list(names), lanes, shares
        self._key = json.loads(json.dumps(key))  # as it is saved
        self._parts: list[int] | None = None

    def __len__(self) -> int:
        return sys.maxsize

    def __getitem__(self, k: int) -> tuple[int, int]:
        j, lane = divmod(int(k), self.lanes)
        before, after = self._counts(lane + j), self._counts(lane + j + 1)
        which = next(s for s, (a, b) in enumerate(zip(before, after)) if b > a)
        return which, (before[which] - self._counts(lane)[which]) * self.lanes + lane

    @property
    def parts(self) -> list[int]:
        """The share of each source, in billionths."""
        if self._parts is None:
            shares = self._measure()
            self._parts = [max(1, round(share / sum(shares) * _WHOLE)) for share in shares]
        return self._parts

    def seen(self, name: str, lane: int, documents: int) -> int:
        """How many of the first documents of a lane are of a source."""
        which = self.names.index(name)
        return self._counts(lane + documents)[which] - self._counts(lane)[which]

    def state(self) -> dict[str, Any]:
        return {"key": self._key, "parts": self.parts}

    def restore(self, state: dict[str, Any]) -> None:
        """Go on with saved shares, unless the mixture has been changed."""
        if state["key"] == self._key:
            self._parts = list(state["parts"])

    def _counts(self, k: int) -> list[int]:
        """How many of the first k elements of the pattern are of each source; they differ from exact by at most one."""
        counts, rest = [], sum(self.parts)
        for part in self.parts[:-1]:
            counts.append(k * part // rest)
            k, rest = k - counts[-1], rest - part
        return [*counts, k]


def check_mixture(mixture: Mapping[str, Mapping[str, Any]], unit: str, sample: int) -> None:
    """Raise InputError for a wrong entry of the config keys 'data.mixture...'."""
    if unit not in UNITS:
        raise InputError(f"config key 'data.mixture_unit' is unknown: {unit!r}{nearest(unit, UNITS)}")
    if sample < 1:
        raise InputError(f"config key 'data.mixture_sample' must be at least 1, not {sample}")
    fields = {"source", "options", "weight"}
    for name, entry in mixture.items():
        where = f"config key 'data.mixture.{name}"
        if not isinstance(entry, Mapping):
            raise InputError(f"{where}' holds source, options and weight, not {entry!r}")
        for key in sorted(set(entry) - fields):
            raise InputError(f"{where}.{key}' is unknown{nearest(key, fields)}")
        for key in sorted({"source", "weight"} - set(entry)):
            raise InputError(f"{where}.{key}' is missing")
        weight = entry["weight"]
        if isinstance(weight, bool) or not isinstance(weight, (int, float)) or not 0 < weight < math.inf:
            raise InputError(f"{where}.weight' must be a positive number, not {weight!r}; leave out what is not wanted")


def part_seed(seed: int, name: str) -> int:
    """The seed of one source of a mixture: two with the same documents are shuffled differently."""
    return (seed + zlib.crc32(name.encode())) % 2**31


def mean_tokens(layouts: grain.MapDataset, name: str) -> float:
    """The mean tokens of a document, bad records left out; `name` is that of the source, for messages."""
    tokens, error = [], ""
    for layout in layouts.to_iter_dataset():
        if isinstance(layout, BadExample):
            error = layout.error
        else:
            tokens.append(sum(len(stream) for stream in layout.streams.values()))
    if not tokens:
        raise InputError(f"none of the first {len(layouts)} records of source {name!r} can be used: {error}")
    return sum(tokens) / len(tokens)
