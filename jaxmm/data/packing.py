"""Layouts into rows of static shape: several budgets at once, deterministic, nothing lost."""

import dataclasses

from jaxmm.errors import InputError
from jaxmm.sequence import Budget, Layout


@dataclasses.dataclass
class Fill:
    """How full the rows are that were closed so far.

    Attributes:
      rows, documents: counts.
      used: per budget ("tokens/<stream>", "images/<bucket>"), summed over rows.
      limits: the same budgets of one row.
    """

    limits: dict[str, int]
    rows: int = 0
    documents: int = 0
    used: dict[str, int] = dataclasses.field(default_factory=dict)

    def add(self, row: list[Layout], budget: Budget) -> None:
        """Count one closed row."""
        self.rows += 1
        self.documents += len(row)
        for layout in row:
            for name, amount in budget.used(layout).items():
                self.used[name] = self.used.get(name, 0) + amount

    def report(self) -> dict[str, float]:
        """The share of each budget that is used, over all rows."""
        return {
            name: self.used.get(name, 0) / (limit * self.rows) if self.rows and limit else 0.0
            for name, limit in self.limits.items()
        }


class Packer:
    """Best fit over a few open rows.

    A document goes into the open row that it leaves the least room in; if it fits into none and all rows are open, the
    fullest is closed. What comes out depends on nothing but the documents and their order.

    Args:
      budget: of one row.
      open_rows: how many rows wait for a document that fits; 1 packs in the order of the documents.
    """

    def __init__(self, budget: Budget, open_rows: int = 4):
        self.budget, self.open_rows = budget, open_rows
        self.limits = budget.limits()
        self.rows: list[list[Layout]] = []
        self.fill = Fill(self.limits)

    def add(self, layout: Layout) -> list[Layout] | None:
        """Place one document; return a row if one had to be closed for it.

        Raises:
          InputError: if the document does not fit into an empty row.
        """
        used = self.budget.used(layout)
        for name, amount in used.items():
            if amount > self.limits.get(name, 0):
                raise InputError(f"{layout.name}: needs {amount} of {name}, a row has {self.limits.get(name, 0)}")
        fitting = [(self._room(row, used), i) for i, row in enumerate(self.rows)]
        fitting = [(room, i) for room, i in fitting if room is not None]
        if fitting:
            self.rows[min(fitting)[1]].append(layout)
            return None
        closed = self._close(self._fullest()) if len(self.rows) >= self.open_rows else None
        self.rows.append([layout])
        return closed

    def flush(self) -> list[list[Layout]]:
        """Close all open rows, oldest first: the end of a finite set of documents."""
        return [self._close(0) for _ in range(len(self.rows))]

    def _close(self, i: int) -> list[Layout]:
        row = self.rows.pop(i)
        self.fill.add(row, self.budget)
        return row

    def _fullest(self) -> int:
        rooms = [self._room(row, {}) for row in self.rows]
        return rooms.index(min(rooms))

    def _room(self, row: list[Layout], used: dict[str, int]) -> float | None:
        """What share of the budgets is left if this is added; None if it does not fit."""
        total = dict(used)
        for layout in row:
            for name, amount in self.budget.used(layout).items():
                total[name] = total.get(name, 0) + amount
        left = [(limit - total.get(name, 0)) / limit for name, limit in self.limits.items() if limit]
        return None if min(left) < 0 else sum(left)
