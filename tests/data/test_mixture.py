"""Several sources in stated shares: exact at any time, by index, endless."""

import collections
import json

import jax
import numpy as np
import pytest

from jaxmm.data.bad_examples import BadExample, BadExamples
from jaxmm.data.mixture import Interleave, check_mixture
from jaxmm.data.pipeline import PackedBatches, document_shares, draw_texts, fitting, mixed_dataset
from jaxmm.errors import InputError
from jaxmm.models.transfusion import SYSTEM
from jaxmm.sequence import Document, Text
from tests import tiny

TO_LAYOUT = fitting(SYSTEM.layouts(tiny.CONFIG, tiny.TOKENIZER).train, tiny.BUDGET)
ROWS = 4


def sentences(count: int, longest: int = 40, name: str = "text") -> list[Document]:
    rng = np.random.default_rng(count)
    words = [" ".join(rng.choice(tiny.WORDS, rng.integers(1, longest + 1))) for _ in range(count)]
    return [Document((Text(text, "text"),), i, f"{name} {i}") for i, text in enumerate(words)]


def mixture(sources, weights, rows=ROWS, seed=1, sample=1000):
    def shares():
        return document_shares(sources, weights, TO_LAYOUT, seed, sample)

    interleave = Interleave(list(sources), shares, rows, [sorted(weights.items())])
    return mixed_dataset(sources, interleave, TO_LAYOUT, seed=seed), interleave


def tokens_by_source(layouts) -> dict[str, int]:
    count = collections.Counter()
    for layout in layouts:
        count[layout.name.split()[0]] += layout.length
    return count


def test_shares_of_tokens_are_the_weights():
    """Over 3000 documents of very different length, within 1 %."""
    sources = {"document": tiny.documents(300), "text": sentences(2000, 60), "other": sentences(40, 5, "other")}
    weights = {"document": 2.0, "text": 1.0, "other": 1.0}
    dataset, _ = mixture(sources, weights)
    count = tokens_by_source(dataset[i] for i in range(3000))
    for name, weight in weights.items():
        assert count[name] / count.total() == pytest.approx(weight / 4, abs=0.01), name


def test_rows_have_the_shares_too():
    """What the packer makes of it; short documents crowd out nobody."""
    sources = {"document": tiny.documents(300), "text": sentences(500, 8)}
    dataset, interleave = mixture(sources, {"document": 1.0, "text": 1.0})
    iterator = iter(PackedBatches(dataset, tiny.BUDGET, ROWS, interleave=interleave))
    images = everything = 0
    for _ in range(250):
        batch = next(iterator)
        tokens = batch.streams["tokens"]
        for b in range(ROWS):
            starts = np.flatnonzero(np.asarray(tokens.ids[b]) == tiny.CONFIG.bos_id)
            ends = [*starts[1:], int((tokens.places[b] >= 0).sum())]
            slots = batch.images["8x8"].slot[b]
            for start, end in zip(starts, ends):
                everything += end - start
                images += (end - start) * bool(np.any((slots >= start) & (slots < end)))
    assert images / everything == pytest.approx(0.5, abs=0.01)


@pytest.mark.parametrize("shares", [[1, 1], [1, 3], [5, 1, 2], [0.001, 1], [1.0]])
def test_every_lane_has_the_shares_at_any_time(shares):
    """The count of each source among the first documents of a lane is off by less than two; none is read twice."""
    names = [f"s{i}" for i in range(len(shares))]
    interleave = Interleave(names, lambda: shares, ROWS)
    read = {name: [] for name in names}
    for lane in range(ROWS):
        count = np.zeros(len(shares))
        for j in range(400):
            which, i = interleave[lane + j * ROWS]
            read[names[which]].append(i)
            assert i == count[which] * ROWS + lane
            count[which] += 1
            assert np.abs(count - (j + 1) * np.array(shares) / sum(shares)).max() < 2
        assert [interleave.seen(name, lane, 400) for name in names] == list(count)
    for numbers in read.values():
        assert len(set(numbers)) == len(numbers)


def test_a_small_source_is_repeated():
    sources = {"document": tiny.documents(200), "text": sentences(3)}
    dataset, _ = mixture(sources, {"document": 1.0, "text": 1.0})
    layouts = [dataset[i] for i in range(400)]
    assert [layout.example for layout in layouts] == list(range(400))
    count = collections.Counter(layout.name for layout in layouts if layout.name.startswith("text"))
    assert len(count) == 3 and min(count.values()) > 20 and max(count.values()) - min(count.values()) <= ROWS
    images = collections.Counter(layout.name for layout in layouts if layout.name.startswith("document"))
    assert max(images.values()) - len(images) / 200 <= 2


def test_the_same_seed_gives_the_same_and_state_resumes_exactly():
    sources = {"document": tiny.documents(50), "text": sentences(80, 150)}

    def batches(seed=1):
        dataset, interleave = mixture(sources, {"document": 1.0, "text": 2.0}, seed=seed)
        return iter(PackedBatches(dataset, tiny.BUDGET, ROWS, interleave=interleave))

    first, again, other = batches(), batches(), batches(2)
    same = []
    for _ in range(7):
        one = next(first)
        jax.tree.map(np.testing.assert_array_equal, one, next(again))
        same.append(np.array_equal(one.streams["tokens"].ids, next(other).streams["tokens"].ids))
    assert not any(same)
    state = json.loads(json.dumps(first.get_state()))
    assert any(lane["piece"] for lane in state["lanes"].values())  # in the midst of a long text
    expected = [next(first) for _ in range(5)]
    resumed = batches()
    resumed.set_state(state)
    for batch in expected:
        jax.tree.map(np.testing.assert_array_equal, next(resumed), batch)


def test_saved_shares_hold_though_the_data_have_changed():
    """Shares are measured once in a run: a record that has become unreadable does not move the others."""
    sources = {"document": tiny.documents(50), "text": sentences(80)}
    _, interleave = mixture(sources, {"document": 1.0, "text": 2.0})
    changed, weights = sources | {"text": sentences(80, 10)}, {"document": 1.0, "text": 2.0}
    resumed = mixture(changed, weights)[1]
    resumed.restore(json.loads(json.dumps(interleave.state())))
    assert resumed.parts == interleave.parts != mixture(changed, weights)[1].parts
    other = mixture(changed, weights | {"text": 1.0})[1]
    other.restore(json.loads(json.dumps(interleave.state())))
    assert other.parts != interleave.parts


def test_processes_make_the_batch_of_one_process():
    sources = {"document": tiny.documents(30), "text": sentences(30)}
    dataset, interleave = mixture(sources, {"document": 1.0, "text": 1.0})
    whole = iter(PackedBatches(dataset, tiny.BUDGET, ROWS, interleave=interleave))
    lanes = (range(0, 2), range(2, 4))
    halves = [iter(PackedBatches(dataset, tiny.BUDGET, ROWS, half, interleave=interleave)) for half in lanes]
    for _ in range(4):
        joined = jax.tree.map(lambda *x: np.concatenate(x), *[next(half) for half in halves])
        jax.tree.map(np.testing.assert_array_equal, joined, next(whole))


def test_bad_records_are_counted_by_source(tmp_path):
    """One source of 20 with 3 bad ones is over a tenth, though of all 220 they are not."""
    text = [Document((Text("a unicorn"),), i, f"text {i}") for i in range(3)] + sentences(20)[3:]
    sources = {"document": tiny.documents(200), "text": text}
    dataset, interleave = mixture(sources, {"document": 1.0, "text": 1.0})
    bad = BadExamples(tmp_path / "bad.jsonl", 0.1, {name: len(source) for name, source in sources.items()})
    iterator = iter(PackedBatches(dataset, tiny.BUDGET, ROWS, bad=bad, interleave=interleave))
    with pytest.raises(InputError, match="3 of 20 records of source 'text' cannot be used"):
        for _ in range(60):
            next(iterator)
    lines = [json.loads(line) for line in (tmp_path / "bad.jsonl").read_text().splitlines()]
    assert {(line["source"], line["record"]) for line in lines} == {("text", 0), ("text", 1), ("text", 2)}
    again = BadExamples(tmp_path / "bad.jsonl", 0.5, {"document": 200, "text": 20})
    again.add(BadExample(1, "x", source="text"), 30)
    assert len(again) == 3
    again.add(BadExample(1, "x", source="document"), 30)
    assert len(again) == 4


def test_a_source_of_bad_records_only():
    sources = {"document": tiny.documents(3), "text": [Document((Text("a unicorn"),), 0, "text 0")]}
    with pytest.raises(InputError, match="none of the first 1 records of source 'text' can be used: .*unicorn"):
        mixture(sources, {"document": 1.0, "text": 1.0})[0][0]


@pytest.mark.parametrize(
    "change, problem",
    [
        (dict(weight=0), "'data.mixture.a.weight' must be a positive number, not 0"),
        (dict(weight=-1.0), "not -1.0"),
        (dict(weight="1"), "not '1'"),
        (dict(weight=float("nan")), "not nan"),
        (dict(wieght=1.0), "'data.mixture.a.wieght' is unknown; did you mean 'weight'"),
    ],
)
def test_wrong_entries(change, problem):
    with pytest.raises(InputError, match=problem):
        check_mixture({"a": dict(source="digits", weight=1.0) | change}, "tokens", 1000)


def test_wrong_units():
    with pytest.raises(InputError, match="'data.mixture_unit' is unknown: 'token'; did you mean 'tokens'"):
        check_mixture({}, "token", 1000)
    with pytest.raises(InputError, match="mixture_sample"):
        check_mixture({}, "tokens", 0)
    with pytest.raises(InputError, match="'data.mixture.a.source' is missing"):
        check_mixture({"a": dict(weight=1.0)}, "tokens", 10)
    with pytest.raises(InputError, match="'data.mixture.a' holds source"):
        check_mixture({"a": 3}, "tokens", 10)


def test_one_of_the_alternatives_is_drawn_each_time():
    document = Document((Text("a", "caption", ("b", "c")), *tiny.documents(1)[0].segments))
    drawn = [draw_texts(document, np.random.default_rng(i)).segments for i in range(300)]
    count = collections.Counter(segments[0] for segments in drawn)
    assert set(count) == {Text("a"), Text("b"), Text("c")} and min(count.values()) > 70
    assert all(segments[1:] == document.segments[1:] for segments in drawn)
