"""docs/peers.md: its summary is what its tables say, and its tables name tests that there are."""

import re
from collections import Counter
from pathlib import Path

import pytest

TESTS = Path(__file__).parent
PAGE = (TESTS.parent / "docs" / "peers.md").read_text(encoding="utf-8")
SUMMARY, *PARTS = [part for part in re.split(r"^#+ ", PAGE, flags=re.M) if "|---" in part]


def cells(part):
    """The rows of a part's table."""
    rows = [line.strip("| ").split(" | ") for line in part.splitlines() if line.startswith("| ")]
    return [[cell.strip() for cell in row] for row in rows[1:]]


@pytest.mark.parametrize("part", PARTS, ids=lambda part: part.splitlines()[0])
def test_the_numbers_of_a_peer_are_those_of_its_table(part):
    since, first = (Counter(row[place] for row in cells(part)) for place in (2, 3))
    assert since.keys() <= {"before", "new"}
    assert first.keys() <= {"right", "mended", "refused now", "refused"}
    numbers = [
        len(cells(part)), since["before"], since["new"], first["mended"] + first["refused now"], first["mended"],
        first["refused now"], first["refused"],
    ]  # fmt: skip
    found = {row[0]: row[1:] for row in cells(SUMMARY)}
    assert [int(number) for number in found[part.splitlines()[0]]] == numbers


def test_every_case_names_a_test():
    named = {row[1].strip("`") for part in PARTS for row in cells(part)}
    assert len(named) > 50
    for file, name in (each.split("::") for each in named):
        assert f"def {name}(" in (TESTS / file).read_text(encoding="utf-8"), name
