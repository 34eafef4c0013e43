"""Random packed rows for tests of the interval mask.

Intervals come from the constructors that layouts are made with. The mask beside them is written down from what the
tokens are (document, kind, order of reading) and knows no interval. Only the numbers are drawn, never a shape, so that
a test compiles once per shape.
"""

from collections.abc import Sequence
from typing import NamedTuple

import hypothesis.strategies as st
import numpy as np

from jaxmm.sequence import Intervals, causal, together

STYLES = ("mixed", "bidirectional", "windows")
KINDS = ("text", "image", "noised", "prefix", "padding", "unseen")


class Part(NamedTuple):
    """A run of tokens of one document.

    Attributes:
      kind: what they are, which matters in a document of style "mixed":
        "text": causal; "image": its tokens see each other and are seen by what follows; "noised": an image that is
        hidden from what follows; "prefix": seen by every row of the document, also from before; "padding": seen by
        itself alone; "unseen": padding that reads and that nobody sees, itself included.
      size: how many tokens.
      gap: places that are left out before it.
    """

    kind: str
    size: int
    gap: int = 0


class Doc(NamedTuple):
    """A document: "mixed" goes by the kinds of its parts, in "bidirectional" all tokens see each other, and "windows"
    see themselves alone."""

    style: str
    parts: Sequence[Part]


class Token(NamedTuple):
    document: int
    style: str
    part: int
    kind: str
    order: int


class Packed(NamedTuple):
    """Rows of packed documents: int32 [B, L], and the boolean mask [B, L, L] of which query sees which key."""

    places: np.ndarray
    intervals: Intervals
    mask: np.ndarray


def sees(query: Token, key: Token) -> bool:
    """Whether one token sees the other, from what they are."""
    if "filler" in (query.kind, key.kind) or query.document != key.document:
        return False
    same_part = query.part == key.part
    if query.style != "mixed":
        return query.style == "bidirectional" or same_part
    if key.kind in ("prefix", "unseen"):
        return key.kind == "prefix"
    if same_part and key.kind != "text":
        return True
    return key.kind in ("text", "image") and key.order <= query.order


def fit(documents: Sequence[Doc], length: int) -> list[Doc]:
    """Cut off what is more than `length` tokens."""
    fitting = []
    for document in documents:
        parts = []
        for part in document.parts:
            parts.append(part._replace(size=min(part.size, length)))
            length -= parts[-1].size
        fitting.append(Doc(document.style, parts))
    return fitting


def pack_row(documents: Sequence[Doc], length: int) -> tuple[list[Token], np.ndarray, Intervals]:
    """Tokens, places and intervals of one row, in the order of reading, with filler behind."""
    tokens, places, bounds, place = [], [], [], 0
    for d, document in enumerate(fit(documents, length)):
        begin, end = place, place + sum(part.gap + part.size for part in document.parts)
        for p, part in enumerate(document.parts):
            place += part.gap
            stop = place + part.size
            bounds.append(_intervals(document.style, part.kind, place, stop, begin, end))
            places.append(np.arange(place, stop))
            tokens += [Token(d, document.style, p, part.kind, len(tokens) + i) for i in range(part.size)]
            place = stop
    filler = length - len(tokens)
    places.append(np.full(filler, -1))
    bounds.append(Intervals(np.zeros(filler, np.int32), np.zeros(filler, np.int32)))
    tokens += [Token(-1, "", -1, "filler", -1)] * filler
    intervals = Intervals(*(np.concatenate(b) for b in zip(*bounds)))
    return tokens, np.concatenate(places).astype(np.int32), intervals


def pack(rows: Sequence[Sequence[Doc]], length: int, shuffle: int | None = None) -> Packed:
    """Rows of documents; with a seed, the tokens of each row lie in another order in memory."""
    rng = np.random.default_rng(shuffle)
    packed = []
    for documents in rows:
        tokens, places, intervals = pack_row(documents, length)
        memory = np.arange(length) if shuffle is None else rng.permutation(length)
        tokens = [tokens[i] for i in memory]
        mask = np.array([[sees(query, key) for key in tokens] for query in tokens])
        packed.append((places[memory], intervals.start[memory], intervals.end[memory], mask))
    places, start, end, mask = (np.stack(arrays) for arrays in zip(*packed))
    return Packed(places, Intervals(start, end), mask)


def _intervals(style: str, kind: str, place: int, stop: int, begin: int, end: int) -> Intervals:
    """Intervals of the tokens on the places [place, stop) of a document on [begin, end)."""
    if style == "bidirectional" or (style == "mixed" and kind == "prefix"):
        return Intervals(np.full(stop - place, begin, np.int32), np.full(stop - place, end, np.int32))
    if style == "windows" or kind in ("noised", "padding"):
        return together(place, stop, stop)
    if kind == "unseen":
        return Intervals(np.zeros(stop - place, np.int32), np.zeros(stop - place, np.int32))
    return (causal if kind == "text" else together)(place, stop, end)


_parts = st.builds(Part, st.sampled_from(KINDS), st.integers(0, 7), st.sampled_from([0, 0, 0, 2]))
_documents = st.builds(Doc, st.sampled_from(("mixed", "mixed", *STYLES)), st.lists(_parts, min_size=1, max_size=6))


def batches(rows: int, length: int, *, shuffled: bool | None = None) -> st.SearchStrategy[Packed]:
    """Batches [rows, length]; `shuffled`: whether the memory order differs from the reading order, None for either."""
    contents = st.lists(st.lists(_documents, max_size=4), min_size=rows, max_size=rows)
    seeds = st.integers(0, 2**32 - 1)
    shuffle = {True: seeds, False: st.none(), None: st.none() | seeds}[shuffled]
    return st.builds(pack, contents, st.just(length), shuffle)


def one_of_each(length: int, rows: int = 2) -> Packed:
    """A fixed batch with every style and kind: 24 tokens of documents in each row, then filler."""
    mixed = [Part("text", 3), Part("image", 4), Part("text", 2), Part("noised", 3), Part("text", 1), Part("unseen", 2)]
    others = [Doc("windows", [Part("image", 2), Part("image", 3)]), Doc("bidirectional", [Part("text", 4)])]
    contents = [[Doc("mixed", mixed), *others], [*others, Doc("mixed", [Part("prefix", 2), *mixed[:-1]])]]
    return pack([contents[i % 2] for i in range(rows)], length)
