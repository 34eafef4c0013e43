"""From documents to batches, with Grain.

Row b of the global batch packs the documents b, b + B, b + 2B, ... of the shuffled, endless sequence: each row is a
lane of its own. So the batch does not depend on the number of processes: each packs the lanes of its own rows. The
state of a lane is the number of the next document and the numbers of those in its open rows; layouts are made again
from them. A text that is longer than a row is cut into pieces that follow each other in their lane.

A record that cannot be used (a corrupt image, a caption that is too long) is an empty document at its index: the
others keep their numbers, their rows and their chances.
"""

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import grain
import jax
import numpy as np

from jaxmm.data.bad_examples import BadExample, BadExamples
from jaxmm.data.mixture import Interleave, mean_tokens, part_seed
from jaxmm.data.packing import Fill, Packer
from jaxmm.errors import InputError
from jaxmm.sequence import Batch, Budget, Document, Layout, Text, build_batch, cut

ToLayout = Callable[[Document, np.random.Generator], Layout]


def layout_dataset(
    source: Sequence[Document], to_layout: ToLayout, *, seed: int, shuffle: bool = True, name: str = ""
) -> grain.MapDataset:
    """An endless Grain dataset of layouts, shuffled anew in each epoch; element i has the example number i.

    A record whose document or layout raises InputError is a `BadExample`; `name` is that of the source, for it.
    """
    return lay_out(records(source, seed, name, shuffle), to_layout)


def mixed_dataset(
    sources: Mapping[str, Sequence[Document]], interleave: Interleave, to_layout: ToLayout, *, seed: int
) -> grain.MapDataset:
    """An endless Grain dataset of layouts of several sources, each shuffled anew in each of its own epochs."""
    parts = [records(sources[name], part_seed(seed, name), name) for name in interleave.names]
    return lay_out(grain.MapDataset.select_from_datasets(parts, interleave), to_layout, seed)


def document_shares(
    sources: Mapping[str, Sequence[Document]], weights: Mapping[str, float], to_layout: ToLayout, seed: int, sample: int
) -> list[float]:
    """The shares of documents, in the order of the sources, whose shares of tokens are the weights.

    The mean tokens of a document are those of the first `sample` of the shuffled source, or of all if it has fewer.
    """
    shares = []
    for name, source in sources.items():
        layouts = layout_dataset(source, to_layout, seed=part_seed(seed, name), name=name)
        shares.append(weights[name] / mean_tokens(layouts[: min(sample, len(source))], name))
    return shares


def records(source: Sequence[Document], seed: int, name: str = "", shuffle: bool = True) -> grain.MapDataset:
    """The records of a source, endlessly, broken ones as well."""
    dataset = grain.MapDataset.source(_Records(source, name)).seed(seed)
    return (dataset.shuffle() if shuffle else dataset).repeat()


def lay_out(dataset: grain.MapDataset, to_layout: ToLayout, seed: int | None = None) -> grain.MapDataset:
    """Number the records and make their layouts; a dataset that has no seed needs one here."""
    dataset = dataset.map_with_index(lambda i, record: record.numbered(int(i)))
    return dataset.random_map(lambda record, rng: record.lay_out(to_layout, rng), seed=seed)


class PackedBatches(grain.IterDataset):
    """Batches of packed rows.

    Args:
      layouts: an endless MapDataset of layouts.
      budget: of one row.
      rows: B, the number of rows of the global batch.
      lanes: the rows that this process packs; all of them by default.
      open_rows: see `Packer`.
      bad: keeps account of the bad examples; by default the first one is an error.
      interleave: of a mixture, whose shares are part of the state.
    """

    def __init__(
        self,
        layouts: grain.MapDataset,
        budget: Budget,
        rows: int,
        lanes: range | None = None,
        open_rows: int = 4,
        bad: BadExamples | None = None,
        interleave: Interleave | None = None,
    ):
        super().__init__()
        self.interleave = interleave
        self.layouts, self.budget, self.rows, self.open_rows = layouts, budget, rows, open_rows
        self.lanes = range(rows) if lanes is None else lanes
        self.bad = BadExamples(None, 0.0, 1) if bad is None else bad

    def __iter__(self) -> "PackedBatchIterator":
        return PackedBatchIterator(self)


class PackedBatchIterator(grain.DatasetIterator):
    """Iterator of `PackedBatches`; its state is a small dict that JSON can hold."""

    def __init__(self, dataset: PackedBatches):
        super().__init__()
        self._dataset = dataset
        self._lanes = [_Lane(dataset, lane) for lane in dataset.lanes]

    def __next__(self) -> Batch:
        rows = []
        for lane in self._lanes:
            row = None
            while row is None:
                row = lane.packer.add(self._next_layout(lane))
            rows.append(row)
        return build_batch(rows, self._dataset.budget)

    def _next_layout(self, lane: "_Lane") -> Layout:
        layout = lane.read()
        while isinstance(layout, BadExample):
            self._dataset.bad.add(layout, sum(lane.seen(layout.source) for lane in self._lanes))
            layout = lane.read()
        return layout

    def get_state(self) -> dict[str, Any]:
        state = {"rows": self._dataset.rows, "lanes": {str(lane.number): lane.state() for lane in self._lanes}}
        mixture = self._dataset.interleave
        return state if mixture is None else state | {"mixture": mixture.state()}

    def set_state(self, state: dict[str, Any]) -> None:
        if state["rows"] != self._dataset.rows:
            raise InputError(
                f"the data was saved with {state['rows']} rows per batch, now there are {self._dataset.rows}"
            )
        if self._dataset.interleave is not None and "mixture" in state:
            self._dataset.interleave.restore(state["mixture"])
        for lane in self._lanes:
            lane.restore(state["lanes"][str(lane.number)])

    def fill(self) -> dict[str, float]:
        """How full the rows of this process are, since it started."""
        total = Fill(self._dataset.budget.limits())
        for lane in self._lanes:
            total.rows += lane.packer.fill.rows
            for name, amount in lane.packer.fill.used.items():
                total.used[name] = total.used.get(name, 0) + amount
        return total.report()


class _Lane:
    """One row of the batch: its documents, packed."""

    def __init__(self, dataset: PackedBatches, number: int):
        self._dataset, self.number = dataset, number
        self._next, self._piece = number, 0  # the document that is read, and which of its pieces is next
        self._pieces: list[Layout | BadExample] = []  # of that document, if it is begun
        self.packer = Packer(dataset.budget, dataset.open_rows)

    def seen(self, source: str) -> int:
        """How many documents of a source it has read to their end."""
        count = (self._next - self.number) // self._dataset.rows
        mixture = self._dataset.interleave
        return count if mixture is None else mixture.seen(source, self.number, count)

    def read(self) -> Layout | BadExample:
        if not self._pieces:
            self._pieces = self._read(self._next)
        layout = self._pieces[self._piece]
        self._piece += 1
        if self._piece == len(self._pieces):
            self._next, self._piece, self._pieces = self._next + self._dataset.rows, 0, []
        return layout

    def state(self) -> dict[str, Any]:
        rows = self.packer.rows
        return {
            "next": self._next,
            "piece": self._piece,
            "open": [[layout.example for layout in row] for row in rows],
            "pieces": [[layout.piece for layout in row] for row in rows],
        }

    def restore(self, state: dict[str, Any]) -> None:
        self._next, self._piece = state["next"], state["piece"]
        self._pieces = self._read(self._next)
        if self._piece >= len(self._pieces):  # the document has become unreadable
            self._next, self._piece, self._pieces = self._next + self._dataset.rows, 0, []
        rows = [[self._read(i)[n:][:1] for i, n in zip(*row)] for row in zip(state["open"], state["pieces"])]
        # what has become unreadable since it was saved is left out now
        self.packer.restore([[one for found in row for one in found if isinstance(one, Layout)] for row in rows])

    def _read(self, number: int) -> list[Layout | BadExample]:
        layout = self._dataset.layouts[number]
        return [layout] if isinstance(layout, BadExample) else to_rows(layout, self._dataset.budget)


@dataclasses.dataclass(frozen=True)
class _Record:
    """A record on its way to a layout: its document, or what is wrong with it."""

    number: int
    document: Document | None
    error: str = ""
    example: int = 0
    source: str = ""

    def numbered(self, example: int) -> "_Record":
        document = self.document and dataclasses.replace(self.document, example=example)
        return dataclasses.replace(self, example=example, document=document)

    def lay_out(self, to_layout: ToLayout, rng: np.random.Generator) -> Layout | BadExample:
        if self.document is None:
            return BadExample(self.number, self.error, self.example, self.source)
        try:
            return to_layout(draw_texts(self.document, rng), rng)
        except InputError as error:
            return BadExample(self.number, _named(self.document, error), self.example, self.source)


class _Records:
    """A source whose broken records do not raise."""

    def __init__(self, source: Sequence[Document], name: str):
        self._source, self._name = source, name

    def __len__(self) -> int:
        return len(self._source)

    def __getitem__(self, i: int) -> _Record:
        try:
            return _Record(int(i), self._source[i], source=self._name)
        except InputError as error:
            return _Record(int(i), None, str(error), source=self._name)


def draw_texts(document: Document, rng: np.random.Generator) -> Document:
    """The document with one of the alternatives of each text."""

    def draw(segment):
        if not isinstance(segment, Text) or not segment.alternatives:
            return segment
        texts = (segment.text, *segment.alternatives)
        return Text(texts[rng.integers(len(texts))], segment.role)

    return dataclasses.replace(document, segments=tuple(draw(segment) for segment in document.segments))


def to_rows(layout: Layout, budget: Budget) -> list[Layout]:
    """The layout, or its pieces if it is a text that is longer than a row."""
    return cut(layout, budget.tokens[next(iter(layout.streams))]) if len(layout.streams) == 1 else [layout]


def _named(document: Document, error: InputError) -> str:
    """The error, with the name of the document if it does not say it."""
    return str(error) if document.name in str(error) else f"{document.name}: {error}"


def fitting(to_layout: ToLayout, budget: Budget) -> ToLayout:
    """The same, which raises InputError for a document that no row can hold and that cannot be cut."""

    def checked(document: Document, rng: np.random.Generator) -> Layout:
        layout = to_layout(document, rng)
        for piece in to_rows(layout, budget):
            budget.check(piece)
        return layout

    return checked


def process_lanes(rows: int, process: int | None = None, processes: int | None = None) -> range:
    """The rows of the global batch that a process packs; those of this one by default."""
    process = jax.process_index() if process is None else process
    processes = jax.process_count() if processes is None else processes
    if rows % processes:
        raise InputError(f"{rows} rows cannot be shared by {processes} processes")
    share = rows // processes
    return range(process * share, (process + 1) * share)
