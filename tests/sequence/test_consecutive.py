import itertools

import hypothesis
import hypothesis.strategies as st
import numpy as np
import pytest
from hypothesis.extra import numpy as hnp

from jaxmm.sequence.consecutive import find_intervals


def rebuild(places, start, end):
    return (start <= places[:, None]) & (places[:, None] < end)


def check(mask):
    """The mask has intervals: int32, and they give it back."""
    found = find_intervals(mask)
    assert found is not None
    assert [x.dtype for x in found] == [np.int32] * 3
    assert [x.shape for x in found] == [mask.shape[:1], mask.shape[1:], mask.shape[1:]]
    np.testing.assert_array_equal(rebuild(*found), mask)
    np.testing.assert_array_equal(found[0] == -1, ~mask.any(axis=1))
    unseen = ~mask.any(axis=0)
    assert not found[1][unseen].any() and not found[2][unseen].any()
    return found


def from_sets(count, sets):
    """A mask of `count` queries with one key for each set of queries."""
    return np.array([[i in members for members in sets] for i in range(count)])


@st.composite
def interval_masks(draw):
    queries, keys = draw(st.integers(1, 24)), draw(st.integers(1, 24))
    places = draw(hnp.arrays(np.int32, queries, elements=st.integers(-1, 14)))
    ends = np.sort(draw(hnp.arrays(np.int32, (2, keys), elements=st.integers(0, 15))), axis=0)
    return rebuild(places, ends[0], ends[1])


@hypothesis.settings(max_examples=200, deadline=None)
@hypothesis.given(interval_masks())
def test_interval_masks_are_found_whatever_the_order_of_their_rows(mask):
    check(mask)


@pytest.mark.parametrize("queries", [3, 4, 5, 6])
def test_verdict_agrees_with_all_orders_of_the_rows(queries):
    rng = np.random.default_rng(queries)
    orders = np.array(list(itertools.permutations(range(queries))))
    verdicts = set()
    for keys, density in itertools.product(range(2, 7), np.linspace(0.2, 0.8, 20)):
        mask = rng.random((queries, keys)) < density
        mask[mask.sum(axis=1) == 0] = mask[0]
        padded = np.pad(mask[orders], ((0, 0), (1, 1), (0, 0))).astype(np.int8)
        runs = (np.diff(padded, axis=1) == 1).sum(axis=1)
        possible = bool((runs <= 1).all(axis=1).any())
        verdicts.add(possible)
        if possible:
            check(mask)
        else:
            assert find_intervals(mask) is None
    assert verdicts == {True, False}


def path(k):
    return [{i, i + 1} for i in range(k + 1)]


# The minimal matrices without the consecutive-ones property: A. Tucker, "A structure theorem for the consecutive 1's
# property", 1972. Each is (number of rows, columns as sets of rows).
TUCKER = {
    **{f"I({k})": (k + 2, [*path(k), {0, k + 1}]) for k in (1, 2, 5)},
    **{f"II({k})": (k + 3, [*path(k), {*range(k + 1), k + 2}, {*range(1, k + 3)}]) for k in (1, 2, 5)},
    **{f"III({k})": (k + 3, [*path(k), {*range(1, k + 1), k + 2}]) for k in (1, 2, 5)},
    "IV": (6, [{0, 1}, {2, 3}, {4, 5}, {0, 2, 4}]),
    "V": (5, [{0, 1}, {2, 3}, {0, 1, 2, 3}, {0, 3, 4}]),
}


@pytest.mark.parametrize("name", TUCKER)
def test_tucker_matrices_have_no_intervals_and_lose_that_with_any_row_or_column(name):
    mask = from_sets(*TUCKER[name])
    assert find_intervals(mask) is None
    for i in range(mask.shape[0]):
        check(np.delete(mask, i, axis=0))
    for j in range(mask.shape[1]):
        check(np.delete(mask, j, axis=1))


def test_one_bad_corner_spoils_a_large_mask():
    mask = np.zeros((66, 64), bool)
    mask[:60, :60] = np.tril(np.ones((60, 60), bool))
    mask[60:, 60:] = from_sets(*TUCKER["IV"])
    mask = mask[np.random.default_rng(0).permutation(66)]
    assert find_intervals(mask) is None
    check(mask[:, :63])


def test_text_and_images_are_in_reading_order():
    # two text tokens, an image of three, one text token, an image of two
    mask = np.tril(np.ones((8, 8), bool))
    mask[2:5, 2:5] = mask[6:8, 6:8] = True
    places, start, end = check(mask)
    assert places.tolist() == list(range(8))
    assert start.tolist() == [0, 1, 2, 2, 2, 5, 6, 6]
    assert end.tolist() == [8] * 8


def test_a_noised_image_hidden_from_what_follows_is_in_reading_order():
    # document 0: text, noised image of two, clean image of two, text; document 1: text, text; two fillers
    mask = np.zeros((10, 10), bool)
    mask[:6, :6] = np.tril(np.ones((6, 6), bool))
    mask[1:3, 1:3] = mask[3:5, 3:5] = True
    mask[3:, 1:3] = False
    mask[6:8, 6:8] = np.tril(np.ones((2, 2), bool))
    places, start, end = check(mask)
    assert places.tolist() == [0, 1, 2, 3, 4, 5, 6, 7, -1, -1]
    assert start.tolist() == [0, 1, 1, 3, 3, 5, 6, 7, 0, 0]
    assert end.tolist() == [6, 3, 3, 6, 6, 6, 8, 8, 0, 0]


def test_sliding_windows_of_packed_rows_are_in_reading_order():
    position = np.arange(12)
    document = position // 6
    mask = (np.abs(position[:, None] - position) <= 2) & (document[:, None] == document)
    places, start, end = check(mask)
    assert places.tolist() == list(range(12))
    assert start.tolist() == [0, 0, 0, 1, 2, 3, 6, 6, 6, 7, 8, 9]
    assert end.tolist() == [3, 4, 5, 6, 6, 6, 9, 10, 11, 12, 12, 12]


def test_windows_of_an_image_in_raster_order_need_another_order():
    window = np.add.outer(2 * (np.arange(4) // 2), np.arange(4) // 2).ravel()
    mask = window[:, None] == window
    places, start, end = check(mask)
    assert sorted(set(places.tolist())) == [0, 1, 2, 3]
    np.testing.assert_array_equal(end - start, 1)
    assert (places[:, None] == places).tolist() == mask.tolist()


def test_rows_that_see_nothing_stand_in_no_ones_way():
    mask = np.array([[True, False], [False, False], [True, True]])
    places, start, end = check(mask)
    assert (places.tolist(), start.tolist(), end.tolist()) == ([0, -1, 2], [0, 2], [3, 3])


@pytest.mark.parametrize("shape", [(0, 0), (0, 3), (3, 0), (3, 2)])
def test_masks_in_which_nothing_is_visible(shape):
    check(np.zeros(shape, bool))


@pytest.mark.parametrize("kind", ["causal", "random"])
def test_large_masks_in_shuffled_order(kind):
    rng = np.random.default_rng(0)
    mask = np.tril(np.ones((1000, 1000), bool))
    if kind == "random":
        start, end = np.sort(rng.integers(0, 1001, (2, 1000)), axis=0)
        mask = rebuild(np.arange(1000), start, end)
    check(mask[rng.permutation(1000)][:, rng.permutation(1000)])


@pytest.mark.parametrize(
    ("mask", "named"),
    [
        (np.zeros((2, 2), np.uint8), r"uint8 \(2, 2\)"),
        (np.zeros((1, 2, 2), bool), r"bool \(1, 2, 2\)"),
        ([[1]], "list"),
    ],
)
def test_what_is_no_boolean_matrix_is_refused(mask, named):
    with pytest.raises(ValueError, match=rf"boolean array \[Lq, Lk\], not {named}"):
        find_intervals(mask)
