"""Records that cannot be used are left out, and nothing else changes."""

import dataclasses
import json

import numpy as np
import pytest

from jaxmm.data.bad_examples import BadExample, BadExamples
from jaxmm.data.pipeline import PackedBatches, fitting, layout_dataset
from jaxmm.errors import InputError
from jaxmm.models.transfusion import SYSTEM
from jaxmm.sequence import Text
from tests import tiny

LAYOUTS = SYSTEM.layouts(tiny.CONFIG, tiny.TOKENIZER)


class Source:
    """The tiny documents, of which some cannot be read."""

    def __init__(self, count, broken=(), **changed):
        self.documents, self.broken, self.reads = tiny.documents(count), broken, []
        for i, segments in changed.items():
            i = int(i[1:])
            self.documents[i] = dataclasses.replace(self.documents[i], segments=segments)

    def __len__(self):
        return len(self.documents)

    def __getitem__(self, i):
        self.reads.append(i)
        if i in self.broken:
            raise InputError(f"pictures/{i}.png cannot be read")
        return self.documents[i]


def batches(source, file, share=0.5, rows=2, shuffle=True):
    bad = BadExamples(file, share, len(source))
    documents = layout_dataset(source, fitting(LAYOUTS.train, tiny.BUDGET), seed=3, shuffle=shuffle)
    return iter(PackedBatches(documents, tiny.BUDGET, rows, bad=bad)), bad


def read(file):
    return [json.loads(line) for line in file.read_text().splitlines()]


def test_a_bad_record_is_an_empty_document_at_its_index(tmp_path):
    """All other documents have the numbers, the layouts and so the noise that they would have without it."""
    whole = layout_dataset(Source(10), LAYOUTS.train, seed=3)
    holed = layout_dataset(Source(10, broken={4}), LAYOUTS.train, seed=3)
    bad = [i for i in range(30) if isinstance(holed[i], BadExample)]
    assert len(bad) == 3 and {holed[i].record for i in bad} == {4} and [holed[i].example for i in bad] == bad
    for i in set(range(30)) - set(bad):
        assert holed[i].example == whole[i].example == i
        np.testing.assert_array_equal(holed[i].streams["tokens"].ids, whole[i].streams["tokens"].ids)


def test_each_is_named_once_however_many_epochs_there_are(tmp_path):
    file = tmp_path / "bad_examples.jsonl"
    long = (Text(" ".join(["a"] * 80)), tiny.documents(1)[0].segments[1])
    source = Source(12, broken={1, 7}, _4=(Text("a unicorn"),), _9=long)
    iterator, bad = batches(source, file)
    for _ in range(20):
        next(iterator)
    assert len(source.reads) > 40 and len(bad) == 4
    lines = {line["record"]: line["error"] for line in read(file)}
    assert len(read(file)) == 4 and lines.keys() == {1, 4, 7, 9}
    assert lines[1] == "pictures/1.png cannot be read" and "unicorn" in lines[4] and lines[4].startswith("document 4")
    assert lines[9] == "document 9: needs 100 of tokens/tokens, a row has 64"


def test_what_the_file_names_stays_counted(tmp_path):
    file = tmp_path / "bad_examples.jsonl"
    file.write_text('{"record": 1, "example": 0, "error": "x"}\n{"record": 5, "exam')
    bad = BadExamples(file, 0.5, 10)
    assert len(bad) == 1
    bad.add(BadExample(1, "again"), 3)
    assert len(bad) == 1


def test_too_many_end_the_run_and_the_message_has_the_numbers_and_a_culprit(tmp_path):
    file = tmp_path / "bad_examples.jsonl"
    iterator, bad = batches(Source(20, broken={2, 3, 11}), file, share=0.1)
    with pytest.raises(InputError, match=r"3 of 20 records .* share 0.1 .*bad_share.*pictures/\d+.png") as error:
        for _ in range(30):
            next(iterator)
    assert str(file) in str(error.value) and len(read(file)) == 3
    iterator, bad = batches(Source(20, broken={2, 3}), tmp_path / "other.jsonl", share=0.1)
    for _ in range(30):
        next(iterator)  # two of twenty are not more than a tenth
    assert len(bad) == 2


def test_the_share_of_a_large_source_is_that_of_what_was_read():
    bad = BadExamples(None, 0.01, 10**6)
    bad.add(BadExample(0, "x"), 1)  # 1 of the first 100
    with pytest.raises(InputError, match="2 of 100 records"):
        bad.add(BadExample(1, "y"), 60)
    bad = BadExamples(None, 0.01, 10**6)
    for i in range(5):
        bad.add(BadExample(i, "x"), 100 * (i + 1))
    with pytest.raises(InputError, match="6 of 510 records"):
        bad.add(BadExample(5, "z"), 510)
    with pytest.raises(InputError, match="bad_share"):
        BadExamples(None, 1.5, 10)


def test_without_an_account_the_first_is_an_error():
    documents = layout_dataset(Source(5, broken={0, 1, 2, 3, 4}), LAYOUTS.train, seed=0)
    with pytest.raises(InputError, match=r"pictures/\d.png cannot be read"):
        next(iter(PackedBatches(documents, tiny.BUDGET, 2)))


def test_saved_state_gives_the_same_batches_also_if_an_open_document_is_broken_by_then(tmp_path):
    source = Source(12, broken={1})
    iterator, _ = batches(source, None)
    for _ in range(5):
        next(iterator)
    state = iterator.get_state()
    expected = [next(iterator) for _ in range(4)]
    again, _ = batches(source, None)
    again.set_state(state)
    for batch in expected:
        np.testing.assert_array_equal(next(again).images["8x8"].example, batch.images["8x8"].example)
    waiting = state["lanes"]["0"]["open"][0][0]
    record = layout_dataset(Source(12, broken=range(12)), LAYOUTS.train, seed=3)[waiting].record
    source.broken = {1, record}
    again, _ = batches(source, None)
    again.set_state(state)
    seen = np.concatenate([next(again).images["8x8"].example.ravel() // 1024 for _ in range(4)])
    assert waiting not in seen
