import dataclasses
import functools

import hypothesis
import hypothesis.strategies as st
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxmm.attention import KVCache, visible
from jaxmm.attention.cache import write
from jaxmm.layers.parameters import Blueprint
from jaxmm.sequence import OPEN, Intervals, Tokens, causal, together
from jaxmm.transformer import Transformer, TransformerConfig

# init_std is large, so that attention is far from uniform and every key matters
CONFIG = TransformerConfig(32, layers=2, heads=4, kv_heads=2, head_size=8, mlp_width=48, init_std=0.3)
LENGTH, SLOTS = 14, 24


NETWORK = Blueprint(lambda rngs: Transformer(CONFIG, rngs=rngs))


@functools.cache
def parameters():
    return jax.jit(NETWORK.init)(jax.random.key(1))


def tokens(places, start, end):
    places, start, end = (np.asarray(x, np.int32) for x in (places, start, end))
    return {"tokens": Tokens(None, places, Intervals(start, end), np.maximum(places, 0), None, None)}


def run(hidden, fields, cache=None):
    return _run(parameters(), hidden, fields, cache)


@jax.jit
def _run(params, hidden, fields, cache):
    hidden, cache, _ = NETWORK.bind(params)({"tokens": hidden}, fields, cache)
    return hidden["tokens"], cache


def draw_hidden(seed, rows=1, length=LENGTH):
    return np.random.default_rng(seed).standard_normal((rows, length, CONFIG.width)).astype(np.float32)


def empty(rows=1, slots=SLOTS, dtype=jnp.float32):
    return NETWORK.bind(parameters()).empty_cache(rows, slots, dtype)


def decode(hidden, places, start, end, chunks, cache=None):
    """Write chunks of tokens one after the other and keep each."""
    cache = empty(len(hidden)) if cache is None else cache
    outputs, begin = [], 0
    for size in chunks:
        cut = slice(begin, begin + size)
        fields = tokens(places[:, cut], start[:, cut], end[:, cut])
        out, cache = run(hidden[:, cut], fields, cache)
        cache, begin = cache.keep(size), begin + size
        outputs.append(np.asarray(out))
    return np.concatenate(outputs, axis=1), cache


def document(*parts, end=None):
    """Places and intervals [1, L] of runs of ("text" | "image" | "noised", size); keys end at `end` or are closed."""
    length, bounds, place = sum(size for _, size in parts), [], 0
    end = length if end is None else end
    for kind, size in parts:
        stop = place + size
        bounds.append(causal(place, stop, end) if kind == "text" else together(place, stop, stop))
        if kind == "image":
            bounds[-1].end[:] = end
        place = stop
    start, ends = (np.concatenate(b)[None] for b in zip(*bounds))
    return np.arange(length, dtype=np.int32)[None], start, ends


def assert_close(found, wanted, bound=1e-5):
    found, wanted = np.asarray(found), np.asarray(wanted)
    assert found.shape == wanted.shape
    assert np.abs(found - wanted).max() <= bound * np.abs(wanted).max()


@pytest.mark.parametrize("chunks", [[1] * LENGTH, [5, 1, 1, 4, 3], [LENGTH], [13, 1]], ids=str)
def test_text_in_chunks_equals_text_at_once(chunks):
    hidden, parts = draw_hidden(0), [("text", LENGTH)]
    wanted, none = run(hidden, tokens(*document(*parts)))
    assert none is None
    found, cache = decode(hidden, *document(*parts, end=OPEN), chunks)
    assert_close(found, wanted)
    assert cache.used == LENGTH and cache.keys.shape == (2, 1, SLOTS, 2, 8)
    assert not np.asarray(cache.keys[:, :, LENGTH:]).any()


def test_images_in_the_cache_are_seen_or_hidden_as_without_it():
    # what a noised image hides from what follows stays hidden, though its keys are kept
    hidden, parts = draw_hidden(1), [("text", 2), ("image", 3), ("text", 2), ("noised", 4), ("text", 3)]
    wanted, _ = run(hidden, tokens(*document(*parts)))
    found, _ = decode(hidden, *document(*parts, end=OPEN), [2, 3, 1, 1, 4, 1, 1, 1])
    assert_close(found, wanted)
    seen = [(kind.replace("noised", "image"), size) for kind, size in parts]
    shown, _ = decode(hidden, *document(*seen, end=OPEN), [2, 3, 1, 1, 4, 1, 1, 1])
    assert_close(shown[:, :11], wanted[:, :11])
    assert np.abs(shown[:, 11:] - wanted[:, 11:]).max() > 0.1


@hypothesis.settings(max_examples=15, deadline=None)
@hypothesis.given(
    lengths=st.lists(st.integers(1, 7), min_size=3, max_size=3),
    idle=st.lists(st.lists(st.booleans(), min_size=3, max_size=3), min_size=6, max_size=6),
)
def test_rows_with_filler_equal_each_row_alone(lengths, idle):
    """Prompts of different lengths are read together; then each step writes a token behind rows that are not idle."""
    hidden = draw_hidden(2, 3, 7 + len(idle))
    active = [[i < n for n in lengths] for i in range(7)] + [[not x for x in step] for step in idle]
    active = np.array(active).T
    places = np.where(active, np.cumsum(active, axis=1) - 1, -1)
    start, end = np.where(active, places, 0), np.where(active, OPEN, 0)
    found, _ = decode(hidden, places, start, end, [7] + [1] * len(idle))
    for row in range(3):
        alone = np.zeros_like(hidden[:1])  # as long as all, so that one shape is compiled
        n = active[row].sum()
        alone[:, :n] = hidden[row, active[row]]
        order = np.where(np.arange(alone.shape[1]) < n, np.arange(alone.shape[1]), -1)[None]
        wanted, _ = run(alone, tokens(order, np.maximum(order, 0), np.where(order < 0, 0, n)))
        assert_close(found[row, active[row]], wanted[0, :n])


def test_a_denoising_loop_overwrites_until_it_keeps():
    hidden, (places, start, end) = draw_hidden(3), document(("text", 5), ("image", 4), ("text", 3), end=OPEN)
    _, prompt = decode(hidden[:, :5], places, start, end, [5])
    image, after = slice(5, 9), slice(9, 12)
    looped, kept = prompt, None
    for step in range(3):
        noisy = draw_hidden(10 + step, length=4)
        fields = tokens(places[:, image], start[:, image], end[:, image])
        out, looped = run(noisy, fields, looped)
        fresh, kept = run(noisy, fields, prompt)
        np.testing.assert_array_equal(out, fresh)
        assert looped.used == 5
        np.testing.assert_array_equal(looped.keys[:, :, :5], prompt.keys[:, :, :5])
        np.testing.assert_array_equal(looped.values[:, :, :5], prompt.values[:, :, :5])
        for a, b in zip(jax.tree.leaves(looped), jax.tree.leaves(kept)):
            np.testing.assert_array_equal(a, b)
    # the last one is kept: what follows equals the sequence with only that image
    fields = tokens(places[:, after], start[:, after], end[:, after])
    out, _ = run(hidden[:, after], fields, looped.keep(4))
    joined = np.concatenate([hidden[:, :5], noisy, hidden[:, after]], axis=1)
    wanted, _ = run(joined, tokens(*document(("text", 5), ("image", 4), ("text", 3))))
    assert_close(out, wanted[:, 9:])


def test_what_was_not_kept_is_not_seen():
    # a shorter write over a longer one: the rest of the longer one lies in memory, and its places would be visible
    hidden, (places, start, end) = draw_hidden(4), document(("text", 12), end=OPEN)
    _, prompt = decode(hidden[:, :5], places, start, end, [5])
    stale = tokens(places[:, 5:11], start[:, 5:11] * 0, end[:, 5:11])
    _, dirty = run(draw_hidden(5, length=6), stale, prompt)
    assert np.abs(dirty.keys[:, :, 7:11]).max() > 0.1
    found, after = run(hidden[:, 5:7], tokens(places[:, 5:7], start[:, 5:7], end[:, 5:7]), dirty)
    wanted, _ = run(hidden[:, 5:7], tokens(places[:, 5:7], start[:, 5:7], end[:, 5:7]), prompt)
    np.testing.assert_array_equal(found, wanted)
    np.testing.assert_array_equal(after.intervals.end[0], [OPEN] * 7 + [0] * (SLOTS - 7))


def test_streams_take_turns_in_one_cache():
    """Text and image have weights of their own; the cache holds the keys of both in the order of writing."""
    config = dataclasses.replace(CONFIG, streams=("understanding", "generation"))
    network = Blueprint(lambda rngs: Transformer(config, rngs=rngs))
    params = jax.jit(network.init)(jax.random.key(2))
    run = jax.jit(lambda *given: network.bind(params)(*given))
    hidden, parts = draw_hidden(8), (("text", 5), ("image", 4), ("text", 5))
    turns = {"understanding": np.r_[0:5, 9:14], "generation": np.r_[5:9]}
    closed = document(*parts)
    fields = {name: tokens(*(x[:, i] for x in closed))["tokens"] for name, i in turns.items()}
    wanted, _, _ = run({name: hidden[:, i] for name, i in turns.items()}, fields)
    cache, layout = empty(), document(*parts, end=OPEN)
    for name, cut in (("understanding", slice(0, 5)), ("generation", slice(5, 9)), ("understanding", slice(9, 14))):
        fields = {name: tokens(*(x[:, cut] for x in layout))["tokens"]}
        found, cache, _ = run({name: hidden[:, cut]}, fields, cache)
        cache = cache.keep(cut.stop - cut.start)
        here = np.isin(turns[name], np.r_[cut])
        assert_close(found[name], wanted[name][:, here])


@pytest.mark.parametrize("jit", [False, True])
def test_write_intervals_hides_what_lies_behind(jit):
    old = Intervals(jnp.arange(12, dtype=jnp.int32).reshape(2, 6), jnp.full((2, 6), 50, jnp.int32))
    cache = KVCache(jnp.zeros((1, 2, 6, 1, 2)), jnp.zeros((1, 2, 6, 1, 2)), old, jnp.int32(2))
    new = Intervals(np.array([[90, 91], [92, 0]]), np.array([[OPEN, 95], [96, 0]]))
    put = KVCache.write_intervals
    found = (jax.jit(put) if jit else put)(cache, new)
    np.testing.assert_array_equal(found.intervals.start, [[0, 1, 90, 91, 0, 0], [6, 7, 92, 0, 0, 0]])
    np.testing.assert_array_equal(found.intervals.end, [[50, 50, OPEN, 95, 0, 0], [50, 50, 96, 0, 0, 0]])
    assert found.used == 2 and found.keep(2).used == 4
    assert {x.dtype for x in found.intervals} == {jnp.dtype(jnp.int32)}
    seen = visible(np.array([[94, 93], [96, -1]], np.int32), found.intervals)
    np.testing.assert_array_equal(seen[0], [[0, 0, 1, 1, 0, 0], [0, 0, 1, 1, 0, 0]])
    assert not seen[1].any()


def test_open_keys_are_seen_from_every_later_place_and_by_no_filler():
    cache = empty(slots=3).write_intervals(Intervals(np.array([[0, 7]]), np.array([[OPEN, OPEN]])))
    seen = visible(np.array([[-1, 0, 6, 7, 10**6, OPEN - 1]]), cache.intervals)[0]
    np.testing.assert_array_equal(seen[:, 0], [0, 1, 1, 1, 1, 1])
    np.testing.assert_array_equal(seen[:, 1], [0, 0, 0, 1, 1, 1])
    assert not seen[:, 2].any()


def test_write_goes_behind_what_is_used():
    cached = np.arange(2 * 5 * 1 * 3, dtype=np.float32).reshape(2, 5, 1, 3)
    new = -np.ones((2, 2, 1, 3), np.float32)
    found = jax.jit(write)(cached, new, jnp.int32(1))
    np.testing.assert_array_equal(found[:, 1:3], new)
    np.testing.assert_array_equal(found[:, [0, 3, 4]], cached[:, [0, 3, 4]])


def test_the_cache_has_a_format_of_its_own():
    hidden, layout = draw_hidden(6), document(("text", LENGTH), end=OPEN)
    wanted, full = decode(hidden, *layout, [6] + [1] * 8)
    found, half = decode(hidden, *layout, [6] + [1] * 8, empty(dtype=jnp.bfloat16))
    assert half.keys.dtype == half.values.dtype == jnp.bfloat16 and found.dtype == np.float32
    assert 1e-5 < np.abs(found - wanted).max() / np.abs(wanted).max() < 0.05


def test_a_full_cache_refuses_and_keeps_what_it_has():
    hidden, (places, start, end) = draw_hidden(7), document(("text", LENGTH), end=OPEN)
    with pytest.raises(ValueError, match="14 tokens .* 12"):
        run(hidden, tokens(places, start, end), empty(slots=12))
    _, cache = decode(hidden[:, :10], places, start, end, [10], empty(slots=12))
    behind = slice(10, 13)
    with pytest.raises(ValueError, match="3 tokens .* 10 .* 12"):
        cache.write_intervals(Intervals(start[:, behind], end[:, behind]))
    with pytest.raises(ValueError, match=r"\(1, 3\) starts and \(1, 2\) ends"):
        cache.write_intervals(Intervals(start[:, behind], end[:, :2]))
