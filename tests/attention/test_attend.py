import functools

import hypothesis
import hypothesis.strategies as st
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxmm.attention import attend, visible
from jaxmm.sequence import OPEN, Intervals
from tests.attention.layouts import Doc, Part, batches, one_of_each, pack

LENGTH = 28
quick = hypothesis.settings(max_examples=30, deadline=None)
seeds = st.integers(0, 2**32 - 1)


def error(found, wanted):
    found, wanted = np.asarray(found, np.float64), np.asarray(wanted, np.float64)
    assert found.shape == wanted.shape and np.isfinite(found).all()
    return np.abs(found - wanted).max() / max(np.abs(wanted).max(), 1e-6)


def draw_inputs(seed, b, lq, lk, h, g, size, bias_rows=0):
    """q, k, v, a bias (or None) and the gradient of the output."""
    rng = np.random.default_rng(seed)
    shapes = [(b, lq, h, size), (b, lk, g, size), (b, lk, g, size), (bias_rows, h, lq, lk), (b, lq, h, size)]
    q, k, v, bias, up = (rng.standard_normal(shape).astype(np.float32) for shape in shapes)
    return q, k, v, bias if bias_rows else None, up


def dense(q, k, v, bias, up, mask, scale):
    """The definition, head by head in float64: output, and gradients of q, k, v and the bias."""
    q, k, v, up = (x.astype(np.float64) for x in (q, k, v, up))
    shape = (q.shape[0], q.shape[2], q.shape[1], k.shape[1])
    added = np.zeros(shape) if bias is None else np.broadcast_to(bias.astype(np.float64), shape)
    out, dq, dk, dv, ds = np.zeros_like(q), np.zeros_like(q), np.zeros_like(k), np.zeros_like(v), np.zeros(shape)
    for b, h in np.ndindex(shape[:2]):
        g = h // (q.shape[2] // k.shape[2])
        scores = np.where(mask[b], scale * q[b, :, h] @ k[b, :, g].T + added[b, h], -1e300)
        p = np.exp(scores - scores.max(axis=1, keepdims=True)) * mask[b]
        p /= np.where(mask[b].any(axis=1, keepdims=True), p.sum(axis=1, keepdims=True), 1)
        dp = up[b, :, h] @ v[b, :, g].T
        ds[b, h] = p * (dp - (p * dp).sum(axis=1, keepdims=True))
        out[b, :, h] = p @ v[b, :, g]
        dv[b, :, g] += p.T @ up[b, :, h]
        dq[b, :, h] = scale * ds[b, h] @ k[b, :, g]
        dk[b, :, g] += scale * ds[b, h].T @ q[b, :, h]
    dbias = None if bias is None else ds if len(bias) == len(ds) else ds.sum(axis=0, keepdims=True)
    return out, dq, dk, dv, dbias


@functools.partial(jax.jit, static_argnames="scale")
def with_gradients(q, k, v, bias, up, places, intervals, scale=None):
    out, pull = jax.vjp(lambda *x: attend(*x[:3], places, intervals, scale=scale, bias=x[3]), q, k, v, bias)
    return out, *pull(up)


def assert_agrees(inputs, places, intervals, mask, scale=None):
    found = with_gradients(*inputs, places, intervals, scale=scale)
    wanted = dense(*inputs, mask, inputs[0].shape[-1] ** -0.5 if scale is None else scale)
    for name, bound, a, b in zip(("out", "dq", "dk", "dv", "dbias"), (1e-5, 1e-4, 1e-4, 1e-4, 1e-4), found, wanted):
        assert (a is None) == (b is None)
        assert a is None or error(a, b) <= bound, name
    blind = ~mask.any(axis=2)
    assert not np.asarray(found[0])[blind].any() and not np.asarray(found[1])[blind].any()
    unseen = ~mask.any(axis=1)
    assert not np.asarray(found[2])[unseen].any() and not np.asarray(found[3])[unseen].any()


@hypothesis.settings(max_examples=100, deadline=None)
@hypothesis.given(batches(2, LENGTH))
def test_visible_is_what_the_kinds_of_tokens_say(packed):
    found = visible(packed.places, packed.intervals)
    assert found.dtype == bool
    np.testing.assert_array_equal(found, packed.mask)


def test_mask_of_one_of_each_by_hand():
    rows = [[Doc("mixed", [Part("text", 2), Part("noised", 2), Part("text", 1)]), Doc("windows", [Part("image", 1)])]]
    packed = pack(rows, 7)
    lines = ["1......", "11.....", "1111...", "1111...", "11..1..", ".....1.", "......."]
    mask = np.array([[c == "1" for c in line] for line in lines])
    np.testing.assert_array_equal(packed.mask[0], mask)
    np.testing.assert_array_equal(visible(packed.places, packed.intervals)[0], mask)


def test_filler_sees_no_key_that_is_open():
    places = np.array([[-1, 0, 5, OPEN - 1]], np.int32)
    seen = visible(places, Intervals(np.array([[0, 0, 4]]), np.array([[OPEN, 0, 5]])))
    np.testing.assert_array_equal(seen[0], [[0, 0, 0], [1, 0, 0], [1, 0, 0], [1, 0, 0]])


# heads, key heads, head size
@pytest.mark.parametrize("h, g, size", [(4, 2, 8), (3, 3, 4), (6, 1, 5), (1, 1, 16)])
@quick
@hypothesis.given(packed=batches(2, LENGTH), seed=seeds)
def test_values_and_gradients(h, g, size, packed, seed):
    assert_agrees(draw_inputs(seed, 2, LENGTH, LENGTH, h, g, size), *packed)


@pytest.mark.parametrize("bias_rows, scale", [(2, 1.0), (1, 0.25), (1, None)])
@quick
@hypothesis.given(packed=batches(2, LENGTH), seed=seeds)
def test_bias_and_own_scale(bias_rows, scale, packed, seed):
    assert_agrees(draw_inputs(seed, 2, LENGTH, LENGTH, 4, 2, 4, bias_rows), *packed, scale)


@pytest.mark.parametrize("lq, bias_rows", [(9, 0), (41, 2)])
@quick
@hypothesis.given(packed=batches(2, LENGTH), seed=seeds)
def test_queries_and_keys_of_different_length(lq, bias_rows, packed, seed):
    chosen = np.random.default_rng(seed).integers(0, LENGTH, (2, lq))
    places = np.take_along_axis(packed.places, chosen, axis=1)
    mask = np.take_along_axis(packed.mask, chosen[:, :, None], axis=1)
    assert_agrees(draw_inputs(seed, 2, lq, LENGTH, 4, 2, 4, bias_rows), places, packed.intervals, mask)


@quick
@hypothesis.given(packed=batches(2, LENGTH), seed=seeds)
def test_memory_order_changes_nothing(packed, seed):
    q, k, v, _, up = draw_inputs(seed, 2, LENGTH, LENGTH, 4, 2, 8)
    plain = with_gradients(q, k, v, None, up, packed.places, packed.intervals)
    rng = np.random.default_rng(seed)
    queries, keys = rng.permutation(LENGTH), rng.permutation(LENGTH)
    moved = Intervals(packed.intervals.start[:, keys], packed.intervals.end[:, keys])
    inputs = (q[:, queries], k[:, keys], v[:, keys], None, up[:, queries])
    found = with_gradients(*inputs, packed.places[:, queries], moved)
    for a, b, order in zip(found, plain, (queries, queries, keys, keys)):
        assert error(a, np.asarray(b)[:, order]) < 2e-6


def test_rows_that_see_nothing_are_zero():
    q, k, v, bias, up = draw_inputs(0, 2, LENGTH, LENGTH, 2, 2, 4, 2)
    nothing = pack([[], []], LENGTH)
    assert not nothing.mask.any()
    found = with_gradients(1e3 * q, k, v, bias, up, nothing.places, nothing.intervals)
    for x in found:
        np.testing.assert_array_equal(x, 0)
    # the same when the keys are there but belong to places that no query has
    found = with_gradients(q, k, v, bias, up, nothing.places, one_of_each(LENGTH).intervals)
    for x in found:
        np.testing.assert_array_equal(x, 0)


def test_large_scores_neither_overflow_nor_hide_what_is_seen():
    packed = one_of_each(LENGTH)
    q, k, v, _, up = draw_inputs(1, 2, LENGTH, LENGTH, 2, 1, 8)
    inputs = (np.float32(300) * q, np.float32(300) * k, v, None, up)
    found = with_gradients(*inputs, packed.places, packed.intervals)
    assert all(np.isfinite(x).all() for x in found if x is not None)
    # so large that every query reads the one key that fits it best
    wanted = dense(*inputs, packed.mask, 8**-0.5)[0]
    assert error(found[0], wanted) < 1e-5
    # a key that nobody sees may fit as well as it likes
    unseen = ~packed.mask.any(axis=1)
    assert unseen.any()
    k = np.where(unseen[:, :, None, None], np.float32(1e6), inputs[1])
    again = with_gradients(inputs[0], k, v, None, up, packed.places, packed.intervals)
    np.testing.assert_array_equal(again[0], found[0])


def test_bfloat16_has_its_softmax_in_float32():
    packed = one_of_each(LENGTH)
    # Scores around 60: rounded to bfloat16 they would be wrong by up to 1/8, and the weights by as many hundredths.
    q, k, v, _, up = draw_inputs(2, 2, LENGTH, LENGTH, 4, 2, 16)
    half = [jnp.asarray(x, jnp.bfloat16) for x in (8 * q + 8, k + 2, v, up)]
    q, k, v, up = (np.asarray(x, np.float32) for x in half)
    found = with_gradients(*half[:3], None, half[3], packed.places, packed.intervals)
    assert {x.dtype for x in found if x is not None} == {jnp.dtype(jnp.bfloat16)}
    out, dq, dk, dv, _ = dense(q, k, v, None, up, packed.mask, 0.25)
    assert error(found[0], out) < 8e-3
    assert max(error(a, b) for a, b in zip(found[1:4], (dq, dk, dv))) < 3e-2


def wrong(**changes):
    """Shapes of a call of which some are wrong."""
    shapes = dict(q=(2, 5, 4, 8), k=(2, 7, 2, 8), v=(2, 7, 2, 8), places=(2, 5), start=(2, 7), end=(2, 7), bias=None)
    x = {name: None if s is None else jnp.zeros(s) for name, s in (shapes | changes).items()}
    return attend(x["q"], x["k"], x["v"], x["places"], Intervals(x["start"], x["end"]), bias=x["bias"])


@pytest.mark.parametrize(
    "changes",
    [
        {"v": (2, 6, 2, 8)},
        {"k": (2, 7, 2, 4), "v": (2, 7, 2, 4)},
        {"k": (2, 7, 3, 8), "v": (2, 7, 3, 8)},
        {"k": (1, 7, 2, 8), "v": (1, 7, 2, 8)},
        {"k": (2, 7, 16), "v": (2, 7, 16)},
        {"q": (5, 4, 8)},
        {"places": (2, 7)},
        {"places": (1, 5)},
        {"places": (5,)},
        {"start": (2, 5)},
        {"end": (1, 7)},
        {"bias": (1, 4, 7, 5)},
        {"bias": (2, 1, 5, 7)},
        {"bias": (3, 4, 5, 7)},
        {"bias": (4, 5, 7)},
    ],
    ids=str,
)
def test_shapes_that_do_not_fit_are_named(changes):
    with pytest.raises(ValueError) as raised:
        wrong(**changes)
    assert all(str(shape) in str(raised.value) for shape in changes.values())


def test_shapes_that_fit():
    assert wrong().shape == wrong(bias=(1, 4, 5, 7)).shape == wrong(bias=(2, 4, 5, 7)).shape == (2, 5, 4, 8)
