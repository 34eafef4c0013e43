"""The packer: nothing lost, nothing over budget, the same rows each time; and the Grain pipeline around it."""

import json

import grain
import jax
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from jaxmm.data.packing import Packer
from jaxmm.data.pipeline import PackedBatches, layout_dataset, process_lanes
from jaxmm.errors import InputError
from jaxmm.models.transfusion import SYSTEM
from jaxmm.sequence import Budget, ImageSlot, Layout, StreamLayout, causal
from tests import tiny

BUDGET = Budget({"tokens": 20, "other": 10}, {"8x8": (2, (8, 8, 1))})
PIXELS = np.zeros((8, 8, 1), np.float32)


def layout(tokens: int, other: int, images: int, example: int) -> Layout:
    def stream(n):
        zeros = np.zeros(n, np.int32)
        return StreamLayout(zeros, zeros, causal(0, n, n), zeros, zeros, np.zeros(n, np.float32))

    slots = tuple(ImageSlot(PIXELS, "8x8", i, order=i) for i in range(images))
    return Layout({"tokens": stream(tokens), "other": stream(other)}, slots, tokens + other, example, f"doc {example}")


def pack(sizes, open_rows):
    packer = Packer(BUDGET, open_rows)
    rows = [row for i, size in enumerate(sizes) if (row := packer.add(layout(*size, i))) is not None]
    return rows + packer.flush(), packer


sizes = st.lists(st.tuples(st.integers(0, 20), st.integers(0, 10), st.integers(0, 2)), max_size=60)


@settings(max_examples=60, deadline=None)
@given(sizes, st.integers(1, 5))
def test_nothing_is_lost_and_no_budget_exceeded(sizes, open_rows):
    rows, packer = pack(sizes, open_rows)
    assert sorted(one.example for row in rows for one in row) == list(range(len(sizes)))
    for row in rows:
        totals = np.sum([sizes[one.example] for one in row], axis=0)
        assert np.all(totals <= [20, 10, 2])
    again, _ = pack(sizes, open_rows)
    assert [[one.example for one in row] for row in rows] == [[one.example for one in row] for row in again]
    totals = np.sum([*sizes, (0, 0, 0)], axis=0)
    expected = totals / (np.array([20, 10, 2]) * max(len(rows), 1))
    np.testing.assert_allclose(list(packer.fill.report().values()), expected)


def test_best_fit_fills_what_first_come_leaves():
    sizes = [(12, 0, 0), (11, 0, 0), (8, 0, 0), (9, 0, 0)]
    assert [[one.example for one in row] for row in pack(sizes, 2)[0]] == [[0, 2], [1, 3]]
    assert [[one.example for one in row] for row in pack(sizes, 1)[0]] == [[0], [1, 2], [3]]


def test_a_document_larger_than_a_row_is_refused_by_name():
    with pytest.raises(InputError, match="doc 7: needs 21 of tokens/tokens, a row has 20"):
        Packer(BUDGET).add(layout(21, 0, 0, 7))
    with pytest.raises(InputError, match="doc 8: needs 3 of images/8x8, a row has 2"):
        Packer(BUDGET).add(layout(1, 0, 3, 8))


def batches(rows=4, lanes=None, count=37):
    layouts = SYSTEM.layouts(tiny.CONFIG, tiny.TOKENIZER)
    dataset = layout_dataset(tiny.documents(count), layouts.train, seed=5)
    return PackedBatches(dataset, tiny.BUDGET, rows, lanes)


def test_every_epoch_has_every_document_once_in_a_new_order():
    dataset = layout_dataset(tiny.documents(37), SYSTEM.layouts(tiny.CONFIG, tiny.TOKENIZER).train, seed=5)
    epochs = [[dataset[i].name for i in range(37 * e, 37 * (e + 1))] for e in range(2)]
    assert sorted(epochs[0]) == sorted(epochs[1]) and len(set(epochs[0])) == 37
    assert epochs[0] != epochs[1]
    assert [dataset[i].example for i in (0, 36, 37)] == [0, 36, 37]


def test_lanes_share_out_the_documents():
    """Row b holds the documents b, b + B, ...: none twice, none left out but those in open rows."""
    iterator = iter(batches())
    seen = {b: [] for b in range(4)}
    for _ in range(30):
        examples = next(iterator).images["8x8"].example
        slots = np.asarray(examples)
        for b in range(4):
            seen[b] += [int(x) // 1024 for x in slots[b][slots[b] >= 0]]
    state = iterator.get_state()["lanes"]
    for b, examples in seen.items():
        waiting = [i for row in state[str(b)]["open"] for i in row]
        done = {x for x in examples if x % 4 == b}
        assert done | set(waiting) >= set(range(b, state[str(b)]["next"], 4))


def test_processes_make_the_batch_of_one_process():
    whole = iter(batches())
    halves = [iter(batches(lanes=process_lanes(4, p, 2))) for p in range(2)]
    for _ in range(5):
        parts = [next(half) for half in halves]
        joined = jax.tree.map(lambda *x: np.concatenate(x), *parts)
        jax.tree.map(np.testing.assert_array_equal, joined, next(whole))
    with pytest.raises(InputError, match="5 rows cannot be shared by 2 processes"):
        process_lanes(5, 0, 2)


@pytest.mark.parametrize("prefetch", [0, 2])
def test_state_resumes_exactly(prefetch):
    dataset = batches()
    if prefetch:
        dataset = grain.experimental.ThreadPrefetchIterDataset(dataset, prefetch_buffer_size=prefetch)
    iterator = iter(dataset)
    for _ in range(7):
        next(iterator)
    state = json.loads(json.dumps(iterator.get_state()))
    expected = [next(iterator) for _ in range(4)]
    again = iter(dataset)
    again.set_state(state)
    for batch in expected:
        jax.tree.map(np.testing.assert_array_equal, next(again), batch)


def test_another_batch_size_cannot_take_up_the_state():
    state = iter(batches(rows=4)).get_state()
    with pytest.raises(InputError, match="saved with 4 rows per batch, now there are 8"):
        iter(batches(rows=8)).set_state(state)
