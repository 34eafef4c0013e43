import dataclasses

import jax
import numpy as np
import pytest

from jaxmm.attention import visible
from jaxmm.sequence import OPEN, Budget, ImageSlot, Intervals, Layout, StreamLayout, build_batch, causal, together

BUDGET = Budget({"tokens": 12}, {"2x2": (3, (2, 2, 1))})


def stream(start, end, first_id=10, places=None):
    n = len(start)
    places = np.arange(n, dtype=np.int32) if places is None else places
    ids = np.arange(first_id, first_id + n, dtype=np.int32)
    weights = np.linspace(0.5, 1, n, dtype=np.float32)
    return StreamLayout(ids, places, Intervals(start, end), places + 100, ids + 1, weights)


def document(*kinds, name="document", example=0, first_id=10, end=None, shape=(2, 2, 1)):
    """A layout of text ("t") and images of two tokens ("i", noised and hidden: "n")."""
    sizes = [1 if kind == "t" else 2 for kind in kinds]
    length = sum(sizes)
    end = length if end is None else end
    bounds, images, place = [], [], 0
    for kind, size in zip(kinds, sizes):
        stop = place + size
        bounds.append(causal(place, stop, end) if kind == "t" else together(place, stop, end if kind == "i" else stop))
        if kind != "t":
            values = np.full(shape, example + 0.25 * len(images), np.float32)
            images.append(ImageSlot(values, "2x2", place, noise_limit=0.5, weight=2.0, order=len(images)))
        place = stop
    start, ends = (np.concatenate(b) for b in zip(*bounds))
    return Layout({"tokens": stream(start, ends, first_id)}, tuple(images), length, example, name)


def test_documents_follow_each_other_by_their_places():
    first, second = document("t", "i", "t", first_id=10), document("t", "n", "t", first_id=20)
    tokens = build_batch([[first, second], [second]], BUDGET).streams["tokens"]
    np.testing.assert_array_equal(tokens.ids, [[10, 11, 12, 13, 20, 21, 22, 23] + [0] * 4, [20, 21, 22, 23] + [0] * 8])
    np.testing.assert_array_equal(tokens.places, [[*range(8), *[-1] * 4], [*range(4), *[-1] * 8]])
    np.testing.assert_array_equal(tokens.intervals.start, [[0, 1, 1, 3, 4, 5, 5, 7] + [0] * 4, [0, 1, 1, 3] + [0] * 8])
    np.testing.assert_array_equal(tokens.intervals.end, [[4, 4, 4, 4, 8, 7, 7, 8] + [0] * 4, [4, 3, 3, 4] + [0] * 8])
    np.testing.assert_array_equal(tokens.positions[0], [100, 101, 102, 103, 100, 101, 102, 103] + [0] * 4)
    np.testing.assert_array_equal(tokens.labels[0], [11, 12, 13, 14, 21, 22, 23, 24] + [0] * 4)
    np.testing.assert_array_equal(tokens.weights[1], np.float32([0.5, 2 / 3, 5 / 6, 1] + [0] * 8))
    formats = {f.name: getattr(tokens, f.name) for f in dataclasses.fields(tokens)}
    assert formats.pop("weights").dtype == np.float32
    assert {x.dtype for x in jax.tree.leaves(formats)} == {np.dtype(np.int32)}
    assert tokens.length == 12 and build_batch([[first], [second]], BUDGET).rows == 2


def test_filler_sees_nothing_and_nobody_sees_it():
    tokens = build_batch([[document("t", "i")], []], BUDGET).streams["tokens"]
    assert (tokens.places[0, 3:] == -1).all() and (tokens.places[1] == -1).all()
    filler = tokens.places < 0
    for bounds in tokens.intervals:
        assert not bounds[filler].any()
    assert not tokens.weights[filler].any()
    mask = np.asarray(visible(tokens.places, tokens.intervals))
    assert mask[0, :3, :3].sum() == 1 + 3 + 3 and mask.sum() == 7


def test_documents_of_a_row_do_not_see_each_other():
    kinds = [("t", "i", "n"), ("n", "t"), ("t", "i")]
    tokens = build_batch([[document(*k) for k in kinds[:2]], [document(*k) for k in kinds[1:]]], BUDGET)
    mask = np.asarray(visible(tokens.streams["tokens"].places, tokens.streams["tokens"].intervals))
    for row, pair in zip(mask, (kinds[:2], kinds[1:])):
        begin = 0
        for kind in pair:
            alone = build_batch([[document(*kind)]], BUDGET).streams["tokens"]
            n = document(*kind).length
            np.testing.assert_array_equal(
                row[begin : begin + n, begin : begin + n], visible(alone.places, alone.intervals)[0, :n, :n]
            )
            row[begin : begin + n, begin : begin + n] = False
            begin += n
        assert not row.any()


def test_open_keys_stay_open():
    prompt = document("t", "i", end=OPEN)
    tokens = build_batch([[document("t", "t"), prompt]], BUDGET).streams["tokens"]
    np.testing.assert_array_equal(tokens.intervals.start[0, 2:5], [2, 3, 3])
    np.testing.assert_array_equal(tokens.intervals.end[0, :5], [2, 2, OPEN, OPEN, OPEN])


def test_a_query_that_sees_nothing_does_not_come_to_see_the_document_before():
    places = np.array([0, -1, 2], np.int32)
    start, end = np.array([0, 0, 2], np.int32), np.array([3, 0, 3], np.int32)
    padded = Layout({"tokens": stream(start, end, places=places)}, length=3)
    tokens = build_batch([[document("t", "t"), padded]], BUDGET).streams["tokens"]
    np.testing.assert_array_equal(tokens.places[0, :5], [0, 1, 2, -1, 4])
    mask = np.asarray(visible(tokens.places, tokens.intervals))[0]
    assert not mask[3].any() and not mask[:, 3].any()


def test_keys_that_reach_into_the_next_document_are_refused():
    prompt = document("t", "i", end=OPEN, name="prompt 7")
    with pytest.raises(ValueError, match="^prompt 7: .*3 places"):
        build_batch([[prompt, document("t")]], BUDGET)
    with pytest.raises(ValueError, match="^prompt 7: "):
        build_batch([[prompt, prompt]], BUDGET)
    longer = dataclasses.replace(document("t", "t", name="too long"), length=1)
    with pytest.raises(ValueError, match="^too long: .*1 places"):
        build_batch([[longer, document("t")]], BUDGET)
    hidden = dataclasses.replace(document("n", "n", name="queries"), length=3)
    hidden.streams["tokens"].intervals.end[:] = 2
    with pytest.raises(ValueError, match="^queries: "):
        build_batch([[hidden, document("t")]], BUDGET)


def test_images_know_their_slot_and_their_number():
    rows = [
        [document("t", "i", example=3), document("i", "t", "i", example=5)],
        [document("t", "t")],
        [document("n", example=7)],
    ]
    images = build_batch(rows, BUDGET).images["2x2"]
    np.testing.assert_array_equal(images.slot, [[1, 3, 6], [-1, -1, -1], [0, -1, -1]])
    np.testing.assert_array_equal(images.example, [[3 * 1024, 5 * 1024, 5 * 1024 + 1], [0, 0, 0], [7 * 1024, 0, 0]])
    np.testing.assert_array_equal(images.values[:, :, 0, 1, 0], [[3, 5, 5.25], [0, 0, 0], [7, 0, 0]])
    np.testing.assert_array_equal(images.noise_limit, [[0.5] * 3, [0] * 3, [0.5, 0, 0]])
    np.testing.assert_array_equal(images.weight, [[2] * 3, [0] * 3, [2, 0, 0]])
    assert images.values.shape == (3, 3, 2, 2, 1)
    assert {x.dtype for x in (images.slot, images.example)} == {np.dtype(np.int32)}
    assert {x.dtype for x in (images.values, images.noise_limit, images.weight)} == {np.dtype(np.float32)}


@pytest.mark.parametrize("example", [2**21 + 5, np.int32(2**21 + 5), 2**40 + 2**21 + 5])
def test_numbers_of_large_examples_stay_within_int32(example):
    numbers = build_batch([[document("i", "i", example=example)]], BUDGET).images["2x2"].example
    np.testing.assert_array_equal(numbers, [[5 * 1024, 5 * 1024 + 1, 0]])


def test_streams_are_filled_apart():
    budget = Budget({"text": 6, "pixels": 5}, {"2x2": (2, (2, 2, 1))})

    def mixed(first_id, text, pixels):
        """A document whose image stands before its text in the order of reading."""
        n = pixels + text
        streams = {
            "text": stream(*causal(pixels, n, n), first_id, np.arange(pixels, n, dtype=np.int32)),
            "pixels": stream(*together(0, pixels, n), first_id + 50, np.arange(pixels, dtype=np.int32)),
        }
        return Layout(streams, (ImageSlot(np.ones((2, 2, 1)), "2x2", 0, stream="pixels"),), n, name=f"{first_id}")

    batch = build_batch([[mixed(10, 2, 2), mixed(20, 3, 2)]], budget)
    np.testing.assert_array_equal(batch.streams["text"].places, [[2, 3, 6, 7, 8, -1]])
    np.testing.assert_array_equal(batch.streams["pixels"].places, [[0, 1, 4, 5, -1]])
    np.testing.assert_array_equal(batch.streams["text"].ids, [[10, 11, 20, 21, 22, 0]])
    np.testing.assert_array_equal(batch.streams["pixels"].ids, [[60, 61, 70, 71, 0]])
    np.testing.assert_array_equal(batch.streams["pixels"].intervals.end, [[4, 4, 9, 9, 0]])
    np.testing.assert_array_equal(batch.images["2x2"].slot, [[0, 2]])
    assert budget.used(mixed(10, 2, 2)) == {"tokens/text": 2, "tokens/pixels": 2, "images/2x2": 1}
    assert budget.limits() == {"tokens/text": 6, "tokens/pixels": 5, "images/2x2": 2}
    with pytest.raises(ValueError, match="^30: 6 tokens in stream 'pixels', the row has 5"):
        build_batch([[mixed(10, 1, 3), mixed(30, 1, 3)]], budget)


def test_what_exceeds_the_budget_names_its_document():
    fine, long = document("t", "i", name="fine"), document(*"t" * 10, name="shard 3, line 8")
    with pytest.raises(ValueError, match="^shard 3, line 8: 13 tokens in stream 'tokens', the row has 12"):
        build_batch([[fine], [fine, long]], BUDGET)
    with pytest.raises(ValueError, match="^fourth: more than 3 images of bucket '2x2'"):
        build_batch([[document("i", "i", "i"), document("i", name="fourth")]], BUDGET)
    with pytest.raises(ValueError, match=r"^wide: image \(2, 3, 1\) in a bucket of \(2, 2, 1\)"):
        build_batch([[document("i", name="wide", shape=(2, 3, 1))]], BUDGET)
    with pytest.raises(ValueError, match=r"^big: .*'2x2'.*\['4x4'\]"):
        build_batch([[document("i", name="big")]], Budget({"tokens": 12}, {"4x4": (1, (4, 4, 1))}))
    with pytest.raises(ValueError, match=r"^odd: .*'tokens'.*\['text'\]"):
        build_batch([[document("t", name="odd")]], Budget({"text": 12}, {}))
