import dataclasses
import functools

import hypothesis
import hypothesis.strategies as st
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from jaxmm.errors import InputError
from jaxmm.layers.parameters import Blueprint
from jaxmm.layers.rotary import rotary_tables
from jaxmm.sequence import Intervals, Tokens
from jaxmm.transformer import REMAT_POLICIES, Transformer, TransformerConfig
from tests.attention.layouts import Packed, batches, one_of_each

# init_std is large, so that attention is far from uniform and every weight matters
CONFIG = TransformerConfig(32, layers=3, heads=4, kv_heads=2, head_size=8, mlp_width=48, init_std=0.3)
LENGTH, ROWS = 28, 2
SPLIT = {"understanding": 10, "generation": 18}  # not in the order of the alphabet


def network(config):
    return Blueprint(lambda rngs: Transformer(config, rngs=rngs))


@functools.cache
def parameters():
    params = jax.jit(network(CONFIG).init)(jax.random.key(0))
    rng = np.random.default_rng(0)
    noise = {path: rng.uniform(0.5, 1.5, x.shape).astype(np.float32) for path, x in params.items() if "norm" in path}
    return params | noise


def renamed(params, names):
    """The same weights for each of the streams."""
    return {path.replace(".tokens.", f".{name}."): x for path, x in params.items() for name in names}


def tokens(places, intervals, positions=None):
    positions = np.maximum(places, 0) if positions is None else positions
    return Tokens(None, places, Intervals(*intervals), positions, None, None)


def random_hidden(seed, length=LENGTH, rows=ROWS, width=CONFIG.width):
    return np.random.default_rng(seed).standard_normal((rows, length, width)).astype(np.float32)


@functools.cache
def runner(config):
    """Compiled (params, hidden, tokens, upstream gradient) -> output, gradients of params and of hidden."""
    bind = network(config).bind

    @jax.jit
    def run(params, hidden, tokens, up):
        out, pull = jax.vjp(lambda params, hidden: bind(params)(hidden, tokens)[0], params, hidden)
        return out, *pull(up)

    return run


def forward(hidden, packed, positions=None):
    """Output and intermediates of one stream."""
    return _forward(parameters(), hidden, tokens(packed.places, packed.intervals, positions))


@jax.jit
def _forward(params, hidden, given):
    out, cache, names = network(CONFIG).bind(params)({"tokens": hidden}, {"tokens": given})
    assert cache is None
    return out["tokens"], names


def run_single(packed, hidden, up):
    given = {"tokens": tokens(packed.places, packed.intervals)}
    out, dparams, dhidden = runner(CONFIG)(parameters(), {"tokens": hidden}, given, {"tokens": up})
    return np.asarray(out["tokens"]), dparams, np.asarray(dhidden["tokens"])


def take(x, order):
    """x [B, L, ...] with each row in an order of its own."""
    return np.stack([row[i] for row, i in zip(np.asarray(x), order)])


def assert_close(found, wanted, bound):
    found, wanted = np.asarray(found), np.asarray(wanted)
    assert found.shape == wanted.shape
    assert np.abs(found - wanted).max() <= bound * max(np.abs(wanted).max(), 1e-6)


def reorder(packed, order):
    mask = np.stack([m[np.ix_(i, i)] for m, i in zip(packed.mask, order)])
    return Packed(take(packed.places, order), Intervals(*(take(x, order) for x in packed.intervals)), mask)


def orders(seed):
    rng = np.random.default_rng(seed)
    return np.stack([rng.permutation(LENGTH) for _ in range(ROWS)])


@hypothesis.settings(max_examples=20, deadline=None)
@hypothesis.given(packed=batches(ROWS, LENGTH, shuffled=False), seed=st.integers(0, 2**32 - 1))
def test_memory_order_of_tokens_changes_nothing(packed, seed):
    hidden, up, order = random_hidden(seed), random_hidden(seed + 1), orders(seed)
    wanted = run_single(packed, hidden, up)
    found = run_single(reorder(packed, order), take(hidden, order), take(up, order))
    assert_close(found[0], take(wanted[0], order), 1e-5)
    assert_close(found[2], take(wanted[2], order), 1e-4)
    for path, gradient in wanted[1].items():
        assert_close(found[1][path], gradient, 1e-4)


@hypothesis.settings(max_examples=20, deadline=None)
@hypothesis.given(packed=batches(ROWS, LENGTH, shuffled=False), seed=st.integers(0, 2**32 - 1))
def test_streams_of_equal_weights_are_one_sequence(packed, seed):
    hidden, up, order = random_hidden(seed), random_hidden(seed + 1), orders(seed)
    wanted = run_single(packed, hidden, up)
    # a random part of each row goes to either stream, in any order: only the places tell the order
    parts = dict(zip(SPLIT, np.split(order, [SPLIT["understanding"]], axis=1)))
    split = lambda x: {name: take(x, index) for name, index in parts.items()}  # noqa: E731
    given = {
        name: tokens(take(packed.places, index), [take(x, index) for x in packed.intervals])
        for name, index in parts.items()
    }
    config = dataclasses.replace(CONFIG, streams=tuple(SPLIT))
    params = renamed(parameters(), SPLIT)
    out, dparams, dhidden = runner(config)(params, split(hidden), given, split(up))
    for name, index in parts.items():
        assert_close(out[name], take(wanted[0], index), 1e-5)
        assert_close(dhidden[name], take(wanted[2], index), 1e-4)
    for path, gradient in wanted[1].items():
        both = sum(dparams[path.replace(".tokens.", f".{name}.")] for name in SPLIT)
        assert_close(both, gradient, 1e-4)


def test_streams_are_known_by_name_and_not_by_order():
    packed, hidden = one_of_each(LENGTH), random_hidden(3)
    ends = {"understanding": (0, 10), "generation": (10, LENGTH)}
    cut = lambda x, name: x[:, slice(*ends[name])]  # noqa: E731
    params = {k: x * (0.7 if "generation" in k else 1) for k, x in renamed(parameters(), SPLIT).items()}

    @functools.partial(jax.jit, static_argnums=(0, 1))
    def run(streams, given):
        """The dicts are made inside: jit would sort them."""
        bound = network(dataclasses.replace(CONFIG, streams=streams)).bind(params)
        fields = {n: tokens(cut(packed.places, n), [cut(x, n) for x in packed.intervals]) for n in given}
        return bound({n: cut(hidden, n) for n in reversed(given)}, fields)

    wanted, _, _ = run(("generation", "understanding"), ("generation", "understanding"))
    for streams, given in ((tuple(SPLIT), tuple(SPLIT)), (tuple(SPLIT), ("generation", "understanding"))):
        found, _, names = run(streams, given)
        for name in SPLIT:
            assert_close(found[name], wanted[name], 1e-5)
        assert_close(last_norm(params, streams[0], names["hidden"][-1]), found[streams[0]], 1e-5)


def last_norm(params, stream, x):
    x = np.asarray(x, np.float64)
    scale = np.asarray(params[f"norms.{stream}.scale"])
    return x / np.sqrt((x**2).mean(axis=-1, keepdims=True) + CONFIG.norm_eps) * scale


def test_a_stream_may_be_empty_of_tokens():
    packed, hidden = one_of_each(LENGTH), random_hidden(4)
    alone = run_single(packed, hidden, hidden)[0]
    bind = network(dataclasses.replace(CONFIG, streams=tuple(SPLIT))).bind
    given = {"generation": tokens(packed.places, packed.intervals)}
    out = jax.jit(lambda params: bind(params)({"generation": hidden}, given)[0])(renamed(parameters(), SPLIT))
    assert out.keys() == {"generation"}
    assert_close(out["generation"], alone, 1e-5)


def test_streams_that_do_not_fit_are_named():
    packed, hidden = one_of_each(LENGTH), random_hidden(4)
    bound = network(CONFIG).bind(parameters())
    given = tokens(packed.places, packed.intervals)
    with pytest.raises(ValueError, match="'text'.*'tokens'"):
        bound({"text": hidden}, {"text": given})
    with pytest.raises(ValueError, match="'tokens'"):
        bound({"tokens": hidden}, {})


def test_what_a_token_may_not_see_does_not_reach_it():
    packed, hidden = one_of_each(LENGTH), random_hidden(5)
    base = run_single(packed, hidden, hidden)[0]
    reach = np.stack([np.linalg.matrix_power(m | np.eye(LENGTH, dtype=bool), CONFIG.layers) > 0 for m in packed.mask])
    for j in range(LENGTH):
        changed = hidden.copy()
        changed[:, j] += 1
        moved = np.abs(run_single(packed, changed, hidden)[0] - base).max(axis=-1)
        np.testing.assert_array_equal(moved[~reach[:, :, j]], 0)
        assert (moved[packed.mask[:, :, j]] > 1e-4).all()


def test_the_scanned_stack_is_a_loop_over_layers():
    packed, hidden = one_of_each(LENGTH), random_hidden(6)
    out, names = forward(hidden, packed)
    bound = network(CONFIG).bind(parameters())
    graph, state = nnx.split(bound.layers)
    rope = {"tokens": rotary_tables(np.maximum(packed.places, 0), CONFIG.head_size, CONFIG.rope_theta)}

    @jax.jit
    def step(layer_state, x):
        return nnx.merge(graph, layer_state)({"tokens": x}, rope, packed.places, packed.intervals, None)[0]["tokens"]

    x = hidden
    for i in range(CONFIG.layers):
        x = step(jax.tree.map(lambda leaf: leaf[i], state), x)  # noqa: B023
        assert_close(names["hidden"][i], x, 1e-5)
    assert_close(out, bound.norms["tokens"](x), 1e-5)


def test_one_block_by_hand():
    packed, hidden = one_of_each(LENGTH), random_hidden(7)
    p = {k.removeprefix("layers.streams.tokens."): np.asarray(x[0], np.float64) for k, x in parameters().items()}
    found = forward(hidden, packed)[1]["hidden"][0]
    norm = lambda x, scale: x / np.sqrt((x**2).mean(-1, keepdims=True) + CONFIG.norm_eps) * scale  # noqa: E731
    y = norm(hidden.astype(np.float64), p["attention_norm.scale"])
    q, k, v = (np.einsum("bld,dhk->bhlk", y, p[f"{name}.kernel"]) for name in ("query", "key", "value"))
    turns = np.exp(1j * np.maximum(packed.places, 0)[:, None, :, None] * 10000.0 ** (-np.arange(4) / 4))
    q, k = ((x[..., :4] + 1j * x[..., 4:]) * turns for x in (q, k))
    scores = np.einsum("bhqk,bhsk->bhqs", q, np.repeat(k, 2, axis=1).conj()).real / np.sqrt(8)
    seen = packed.mask[:, None]
    weights = np.exp(np.where(seen, scores, -np.inf) - scores.max(axis=-1, keepdims=True))
    weights /= np.where(seen.any(-1, keepdims=True), weights.sum(-1, keepdims=True), 1)
    mixed = np.einsum("bhqs,bhsk->bqhk", weights, np.repeat(v, 2, axis=1))
    x = hidden + np.einsum("bqhk,hkd->bqd", mixed, p["out.kernel"])
    y = norm(x, p["mlp_norm.scale"])
    gate = y @ p["mlp.gate.kernel"]
    x = x + (gate / (1 + np.exp(-gate)) * (y @ p["mlp.up.kernel"])) @ p["mlp.down.kernel"]
    assert_close(found, x, 1e-5)


def test_intermediates_have_their_names():
    packed, hidden = one_of_each(LENGTH), random_hidden(8)
    _, names = forward(hidden, packed)
    shapes = {name: x.shape for name, x in names.items()}
    rope = (ROWS, LENGTH, CONFIG.head_size)
    assert shapes == {"hidden": (CONFIG.layers, ROWS, LENGTH, CONFIG.width), "rope_cos": rope, "rope_sin": rope}


def test_positions_are_apart_from_places():
    packed, hidden = one_of_each(LENGTH), random_hidden(9)
    base, _ = forward(hidden, packed, packed.places)
    assert_close(forward(hidden, packed, packed.places + 1000)[0], base, 1e-4)  # only differences of positions count
    assert np.abs(forward(hidden, packed, np.zeros_like(packed.places))[0] - base).max() > 0.1


def lowered_gradient(config, rows=1, length=128):
    """The gradient of a sum over a network of this config, lowered for shapes alone."""
    blueprint = network(config)
    params = {path: jax.ShapeDtypeStruct(p.shape, p.dtype) for path, p in blueprint.parameters.items()}
    hidden = jax.ShapeDtypeStruct((rows, length, config.width), jnp.float32)
    places = np.broadcast_to(np.arange(length, dtype=np.int32), (rows, length))
    given = {"tokens": tokens(places, (places, np.full_like(places, length)))}

    def loss(params, hidden):
        return jnp.sum(jnp.square(blueprint.bind(params)({"tokens": hidden}, given)[0]["tokens"]))

    return jax.jit(jax.grad(loss, argnums=(0, 1))).lower(params, hidden)


def test_depth_is_not_unrolled():
    sizes = {n: lowered_gradient(dataclasses.replace(CONFIG, layers=n)).as_text().count("dot_general") for n in (2, 9)}
    assert sizes[2] == sizes[9] > 10


@pytest.mark.parametrize("policy", [name for name in REMAT_POLICIES if name != "none"])
def test_remat_changes_no_number(policy):
    packed, hidden, up = one_of_each(LENGTH), random_hidden(10), random_hidden(11)
    given = {"tokens": tokens(packed.places, packed.intervals)}
    wanted = run_single(packed, hidden, up)
    config = dataclasses.replace(CONFIG, remat=policy)
    out, dparams, dhidden = runner(config)(parameters(), {"tokens": hidden}, given, {"tokens": up})
    assert_close(out["tokens"], wanted[0], 1e-6)
    assert_close(dhidden["tokens"], wanted[2], 1e-5)
    for path, gradient in wanted[1].items():
        assert_close(dparams[path], gradient, 1e-5)


def peak_memory(policy, layers, length=128):
    """Bytes of what the compiled gradient holds at once, besides arguments and results."""
    config = dataclasses.replace(CONFIG, layers=layers, remat=policy)
    return lowered_gradient(config, length=length).compile().memory_analysis().temp_size_in_bytes


def test_each_remat_policy_needs_less_memory_than_the_one_before():
    assert list(REMAT_POLICIES) == ["none", "dots", "projections", "full"]
    none, dots, projections, full = (peak_memory(policy, layers=8) for policy in REMAT_POLICIES)
    # each lets go of something of every layer, so it is by a good deal and no accident of buffers
    assert none > 1.3 * dots and dots > 1.3 * projections and projections > 1.3 * full
    # "full" holds the input of each layer and nothing else: 128 tokens of 32 float32
    assert full - peak_memory("full", layers=2) == pytest.approx(6 * 128 * 32 * 4, rel=0.2)


def test_wrong_choices_are_named():
    with pytest.raises(InputError, match="unknown remat policy 'projection'; did you mean 'projections'"):
        dataclasses.replace(CONFIG, remat="projection")
    with pytest.raises(InputError, match="4 heads cannot share 3 key heads"):
        dataclasses.replace(CONFIG, kv_heads=3)
