"""Records that cannot be used: left out, named in a file, and too many of them end the run."""

import dataclasses
import json
from collections.abc import Mapping
from pathlib import Path

from jaxmm.errors import InputError


@dataclasses.dataclass(frozen=True)
class BadExample:
    """What stands where a record that cannot be used would have its layout: an empty document.

    Attributes:
      record: its number in the source.
      error: what is wrong with it, and where.
      example: its number in the endless sequence of documents.
      source: the name of its source in a mixture; "" for the only one.
    """

    record: int
    error: str
    example: int = 0
    source: str = ""


class BadExamples:
    """Each bad record once, however many epochs read it.

    Args:
      file: JSON lines {"record", "error", "example", "source"}; what it holds already counts. None writes nothing.
      share: of the records of a source read so far that may be bad; before the hundredth record (or the last one, of a
        smaller source) the share is that of so many.
      records: the size of the source; or {name: size} of several.
    """

    def __init__(self, file: Path | None, share: float, records: int | Mapping[str, int]):
        if not 0 <= share <= 1:
            raise InputError(f"config key 'data.bad_share' is a share from 0 to 1, not {share}")
        self._file, self._share = file, share
        self._records = {"": records} if isinstance(records, int) else dict(records)
        self._known = _read(file) if file is not None else set()

    def __len__(self) -> int:
        return len(self._known)

    def add(self, bad: BadExample, seen: int) -> None:
        """Count and name one.

        Args:
          bad: the record.
          seen: how many documents were read so far of its source, this one included.

        Raises:
          InputError: if there are too many.
        """
        if (bad.source, bad.record) not in self._known:
            self._known.add((bad.source, bad.record))
            if self._file is not None:
                with self._file.open("a") as file:
                    file.write(json.dumps(dataclasses.asdict(bad)) + "\n")
        count = sum(source == bad.source for source, _ in self._known)
        records = self._records[bad.source]
        read = max(min(seen, records), min(100, records))
        if count > self._share * read:
            of = f" of source {bad.source!r}" if bad.source else ""
            raise InputError(
                f"{count} of {read} records{of} cannot be used, more than the share {self._share:g} of config key"
                f" 'data.bad_share'; the latest: {bad.error}" + (f" (all: {self._file})" if self._file else "")
            )


def _read(file: Path) -> set[tuple[str, int]]:
    """(source, record) of the records that a file names; a line that a kill cut short is no line."""
    known = set()
    for line in file.read_text().splitlines() if file.exists() else ():
        try:
            content = json.loads(line)
            known.add((str(content.get("source", "")), int(content["record"])))
        except (ValueError, KeyError, TypeError, AttributeError):
            continue
    return known
