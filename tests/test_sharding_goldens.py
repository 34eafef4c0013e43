"""Every parameter is cut as its golden says: a refactoring that changes a sharding shows itself here."""

import json

import pytest

from tests.write_sharding_goldens import CASES, FOLDER, shardings


@pytest.mark.parametrize("case", CASES)
def test_shardings_are_those_of_the_golden(case):
    golden, ours = json.loads((FOLDER / f"{case}.json").read_text()), shardings(case)
    differences = [
        f"{path}: {ours.get(path, 'gone')}, golden {golden.get(path, 'has none')}"
        for path in sorted(golden.keys() | ours.keys())
        if golden.get(path) != ours.get(path)
    ]
    assert not differences, f"{len(differences)} of {len(golden)} differ:\n" + "\n".join(differences)


def test_every_golden_has_a_case():
    assert {path.stem for path in FOLDER.glob("*.json")} == CASES.keys()
