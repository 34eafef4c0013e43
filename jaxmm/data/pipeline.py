"""From documents to batches, with Grain.

Row b of the global batch packs the documents b, b + B, b + 2B, ... of the shuffled, endless sequence: each row is a
lane of its own. So the batch does not depend on the number of processes: each packs the lanes of its own rows. The
state of a lane is the number of the next document and the numbers of those in its open rows; layouts are made again
from them.
"""

import dataclasses
from collections.abc import Callable, Sequence
from typing import Any

import grain
import jax
import numpy as np

from jaxmm.data.packing import Fill, Packer
from jaxmm.errors import InputError
from jaxmm.sequence import Batch, Budget, Document, Layout, build_batch

ToLayout = Callable[[Document, np.random.Generator], Layout]


def layout_dataset(source: Sequence[Document], to_layout: ToLayout, *, seed: int, shuffle: bool = True):
    """An endless Grain dataset of layouts, shuffled anew in each epoch; element i has the example number i."""
    dataset = grain.MapDataset.source(source).seed(seed)
    if shuffle:
        dataset = dataset.shuffle()
    dataset = dataset.repeat().map_with_index(lambda i, document: dataclasses.replace(document, example=int(i)))
    return dataset.random_map(to_layout)


class PackedBatches(grain.IterDataset):
    """Batches of packed rows.

    Args:
      layouts: an endless MapDataset of layouts.
      budget: of one row.
      rows: B, the number of rows of the global batch.
      lanes: the rows that this process packs; all of them by default.
      open_rows: see `Packer`.
    """

    def __init__(
        self, layouts: grain.MapDataset, budget: Budget, rows: int, lanes: range | None = None, open_rows: int = 4
    ):
        super().__init__()
        self.layouts, self.budget, self.rows, self.open_rows = layouts, budget, rows, open_rows
        self.lanes = range(rows) if lanes is None else lanes

    def __iter__(self) -> "PackedBatchIterator":
        return PackedBatchIterator(self)


class PackedBatchIterator(grain.DatasetIterator):
    """Iterator of `PackedBatches`; its state is a small dict that JSON can hold."""

    def __init__(self, dataset: PackedBatches):
        super().__init__()
        self._dataset = dataset
        self._lanes = [_Lane(dataset, lane) for lane in dataset.lanes]

    def __next__(self) -> Batch:
        return build_batch([lane.next_row() for lane in self._lanes], self._dataset.budget)

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

    def next_row(self) -> list[Layout]:
        row = None
        while row is None:
            row = self.packer.add(self._dataset.layouts[self._next])
            self._next += self._dataset.rows
        return row

    def state(self) -> dict[str, Any]:
        return {"next": self._next, "open": [[layout.example for layout in row] for row in self.packer.rows]}

    def restore(self, state: dict[str, Any]) -> None:
        self._next = state["next"]
        self.packer.rows = [[self._dataset.layouts[i] for i in row] for row in state["open"]]


def process_lanes(rows: int, process: int | None = None, processes: int | None = None) -> range:
    """The rows of the global batch that a process packs; those of this one by default."""
    process = jax.process_index() if process is None else process
    processes = jax.process_count() if processes is None else processes
    if rows % processes:
        raise InputError(f"{rows} rows cannot be shared by {processes} processes")
    share = rows // processes
    return range(process * share, (process + 1) * share)
