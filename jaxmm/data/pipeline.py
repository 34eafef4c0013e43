"""From documents to batches, with Grain.

Row b of the global batch packs the documents b, b + B, b + 2B, ... of the shuffled, endless sequence: each row is a
lane of its own. So the batch does not depend on the number of processes: each packs the lanes of its own rows. The
state of a lane is the number of the next document and the numbers of those in its open rows; layouts are made again
from them.

A record that cannot be used (a corrupt image, a caption that is too long) is an empty document at its index: the
others keep their numbers, their rows and their chances.
"""

import dataclasses
from collections.abc import Callable, Sequence
from typing import Any

import grain
import jax
import numpy as np

from jaxmm.data.bad_examples import BadExample, BadExamples
from jaxmm.data.packing import Fill, Packer
from jaxmm.errors import InputError
from jaxmm.sequence import Batch, Budget, Document, Layout, build_batch

ToLayout = Callable[[Document, np.random.Generator], Layout]


def layout_dataset(source: Sequence[Document], to_layout: ToLayout, *, seed: int, shuffle: bool = True):
    """An endless Grain dataset of layouts, shuffled anew in each epoch; element i has the example number i.

    A record whose document or layout raises InputError is a `BadExample`.
    """
    dataset = grain.MapDataset.source(_Records(source)).seed(seed)
    if shuffle:
        dataset = dataset.shuffle()
    dataset = dataset.repeat().map_with_index(lambda i, record: record.numbered(int(i)))
    return dataset.random_map(lambda record, rng: record.lay_out(to_layout, rng))


class PackedBatches(grain.IterDataset):
    """Batches of packed rows.

    Args:
      layouts: an endless MapDataset of layouts.
      budget: of one row.
      rows: B, the number of rows of the global batch.
      lanes: the rows that this process packs; all of them by default.
      open_rows: see `Packer`.
      bad: keeps account of the bad examples; by default the first one is an error.
    """

    def __init__(
        self,
        layouts: grain.MapDataset,
        budget: Budget,
        rows: int,
        lanes: range | None = None,
        open_rows: int = 4,
        bad: BadExamples | None = None,
    ):
        super().__init__()
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
            self._dataset.bad.add(layout, sum(lane.seen for lane in self._lanes))
            layout = lane.read()
        return layout

    def get_state(self) -> dict[str, Any]:
        return {"rows": self._dataset.rows, "lanes": {str(lane.number): lane.state() for lane in self._lanes}}

    def set_state(self, state: dict[str, Any]) -> None:
        if state["rows"] != self._dataset.rows:
            raise InputError(
                f"the data was saved with {state['rows']} rows per batch, now there are {self._dataset.rows}"
            )
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
        self._dataset, self.number, self._next = dataset, number, number
        self.packer = Packer(dataset.budget, dataset.open_rows)

    @property
    def seen(self) -> int:
        """How many documents it has read."""
        return (self._next - self.number) // self._dataset.rows

    def read(self) -> Layout | BadExample:
        layout = self._dataset.layouts[self._next]
        self._next += self._dataset.rows
        return layout

    def state(self) -> dict[str, Any]:
        return {"next": self._next, "open": [[layout.example for layout in row] for row in self.packer.rows]}

    def restore(self, state: dict[str, Any]) -> None:
        self._next = state["next"]
        rows = [[self._dataset.layouts[i] for i in row] for row in state["open"]]
        # what has become unreadable since it was saved is left out now
        self.packer.restore([[layout for layout in row if isinstance(layout, Layout)] for row in rows])


@dataclasses.dataclass(frozen=True)
class _Record:
    """A record on its way to a layout: its document, or what is wrong with it."""

    number: int
    document: Document | None
    error: str = ""
    example: int = 0

    def numbered(self, example: int) -> "_Record":
        document = self.document and dataclasses.replace(self.document, example=example)
        return dataclasses.replace(self, example=example, document=document)

    def lay_out(self, to_layout: ToLayout, rng: np.random.Generator) -> Layout | BadExample:
        if self.document is None:
            return BadExample(self.number, self.error, self.example)
        try:
            return to_layout(self.document, rng)
        except InputError as error:
            return BadExample(self.number, _named(self.document, error), self.example)


class _Records:
    """A source whose broken records do not raise."""

    def __init__(self, source: Sequence[Document]):
        self._source = source

    def __len__(self) -> int:
        return len(self._source)

    def __getitem__(self, i: int) -> _Record:
        try:
            return _Record(int(i), self._source[i])
        except InputError as error:
            return _Record(int(i), None, str(error))


def _named(document: Document, error: InputError) -> str:
    """The error, with the name of the document if it does not say it."""
    return str(error) if document.name in str(error) else f"{document.name}: {error}"


def fitting(to_layout: ToLayout, budget: Budget) -> ToLayout:
    """The same, which raises InputError for a document that no row can hold."""

    def checked(document: Document, rng: np.random.Generator) -> Layout:
        layout = to_layout(document, rng)
        budget.check(layout)
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
