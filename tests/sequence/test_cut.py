"""A text that is longer than a row becomes pieces, and nothing is lost."""

import dataclasses

import numpy as np
import pytest

from jaxmm.models.transfusion import SYSTEM
from jaxmm.sequence import Document, Intervals, Text, build_batch, cut
from tests import tiny

LAYOUTS = SYSTEM.layouts(tiny.CONFIG, tiny.TOKENIZER)


def text(words: int, seed: int = 0):
    chosen = np.random.default_rng(seed).choice(tiny.WORDS, words)
    return LAYOUTS.train(Document((Text(" ".join(chosen)),), 7, "long"), np.random.default_rng(0))


@pytest.mark.parametrize("words, sizes", [(38, [20, 20]), (39, [20, 20, 1]), (18, [20]), (100, [20] * 5 + [2])])
def test_pieces_hold_every_token_with_its_label(words, sizes):
    whole = text(words)
    pieces = cut(whole, 20)
    assert [piece.length for piece in pieces] == sizes and [piece.piece for piece in pieces] == list(range(len(sizes)))
    assert {(piece.example, piece.name) for piece in pieces} == {(7, "long")}
    for field in ("ids", "labels", "weights"):
        joined = np.concatenate([getattr(piece.streams["tokens"], field) for piece in pieces])
        np.testing.assert_array_equal(joined, getattr(whole.streams["tokens"], field))


def test_a_piece_is_a_document_of_its_own():
    """It sees itself causally; its last token learns the first of the next piece."""
    pieces = cut(text(50), 20)
    stream = pieces[1].streams["tokens"]
    np.testing.assert_array_equal(stream.positions, range(20))
    query, key = np.arange(20)[:, None], np.arange(20)
    seen = (stream.intervals.start <= stream.places[:, None]) & (stream.places[:, None] < stream.intervals.end)
    np.testing.assert_array_equal(seen, key <= query)
    assert stream.labels[-1] == pieces[2].streams["tokens"].ids[0] and stream.weights[-1] == 1
    batch = build_batch([[pieces[2], pieces[0], pieces[1]]], tiny.BUDGET)  # refuses what is not closed
    assert int((batch.streams["tokens"].places >= 0).sum()) == 52


def test_what_is_not_text_alone_stays_whole():
    with_image = LAYOUTS.train(tiny.documents(1)[0], np.random.default_rng(0))
    assert cut(with_image, 5) == [with_image]
    whole = text(30)
    stream = whole.streams["tokens"]
    window = Intervals(stream.intervals.start, np.minimum(stream.places + 4, 32).astype(np.int32))
    other = dataclasses.replace(whole, streams={"tokens": dataclasses.replace(stream, intervals=window)})
    assert cut(other, 5) == [other]
