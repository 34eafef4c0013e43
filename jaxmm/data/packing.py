"""Layouts into rows of static shape: several budgets at once, deterministic, nothing lost."""

import dataclasses

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

    def add(self, row: list[Layout], used: dict[str, int]) -> None:
        """Count one closed row and what it uses."""
        self.rows += 1
        self.documents += len(row)
        for name, amount in used.items():
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
        self._open: list[_OpenRow] = []
        self.fill = Fill(self.limits)

    @property
    def rows(self) -> list[list[Layout]]:
        """The documents of the open rows, oldest row first."""
        return [row.layouts for row in self._open]

    def restore(self, rows: list[list[Layout]]) -> None:
        """Go on from open rows that were saved."""
        self._open = []
        for layouts in rows:
            row = _OpenRow(dict.fromkeys(self.limits, 0))
            for layout in layouts:
                row.add(layout, self.budget.used(layout))
            self._open.append(row)

    def add(self, layout: Layout) -> list[Layout] | None:
        """Place one document; return a row if one had to be closed for it.

        Raises:
          InputError: if the document does not fit into an empty row.
        """
        used = self.budget.check(layout)
        fitting = [(room, i) for i, row in enumerate(self._open) if (room := row.room(self.limits, used)) is not None]
        if fitting:
            self._open[min(fitting)[1]].add(layout, used)
            return None
        closed = self._close(self._fullest()) if len(self._open) >= self.open_rows else None
        row = _OpenRow(dict.fromkeys(self.limits, 0))
        row.add(layout, used)
        self._open.append(row)
        return closed

    def flush(self) -> list[list[Layout]]:
        """Close all open rows, oldest first: the end of a finite set of documents."""
        return [self._close(0) for _ in range(len(self._open))]

    def _close(self, i: int) -> list[Layout]:
        row = self._open.pop(i)
        self.fill.add(row.layouts, row.used)
        return row.layouts

    def _fullest(self) -> int:
        rooms = [row.room(self.limits, {}) for row in self._open]
        return rooms.index(min(rooms))


@dataclasses.dataclass
class _OpenRow:
    """A row that waits for more documents, and what they use of each budget."""

    used: dict[str, int]
    layouts: list[Layout] = dataclasses.field(default_factory=list)

    def add(self, layout: Layout, used: dict[str, int]) -> None:
        self.layouts.append(layout)
        for name, amount in used.items():
            self.used[name] += amount

    def room(self, limits: dict[str, int], more: dict[str, int]) -> float | None:
        """What is left of the budgets, as shares, if this is added; None if it does not fit."""
        total = 0.0
        for name, limit in limits.items():
            if limit:
                left = limit - self.used[name] - more.get(name, 0)
                if left < 0:
                    return None
                total += left / limit
        return total
