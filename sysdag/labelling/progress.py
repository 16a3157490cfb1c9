"""How far annotators are: counts and places that are kept up with each label, so that none looks at all before it.

They are derived from the events of a database (see `schema.sql` and `derived.sql`), and can be derived anew. Whoever
calls these functions holds the transaction.
"""

from __future__ import annotations

import sqlite3

ALL = ""  # the row of `progress` that counts for everybody; no annotator has this name


def derive(database: sqlite3.Connection, overlap: int) -> None:
    """Derives everything anew, from all events; `overlap` is how many pairs go to every annotator."""
    database.execute(
        "UPDATE assignments SET (label, choice) = (SELECT id, choice FROM labels WHERE labels.annotator = "
        "assignments.annotator AND labels.pair = assignments.pair)"
    )
    database.execute("UPDATE pairs SET votes = 0 WHERE votes != 0")
    database.execute(
        "UPDATE pairs SET votes = given.count FROM (SELECT pair, count(*) AS count FROM labels WHERE choice != 'skip' "
        "GROUP BY pair) AS given WHERE given.pair = pairs.id"
    )
    database.execute("DELETE FROM progress")
    database.execute(
        "INSERT INTO progress (annotator, done, settled) SELECT annotator, count(choice), count(*) FILTER (WHERE "
        "assignments.pair >= ? AND votes > 0) FROM assignments JOIN pairs ON pairs.id = pair GROUP BY annotator",
        (overlap,),
    )
    database.execute(
        "INSERT INTO progress (annotator, settled) SELECT ?, count(*) FROM pairs WHERE id >= ? AND votes > 0",
        (ALL, overlap),
    )


def record(
    database: sqlite3.Connection, annotator: str, pair: int, event: int | None, after: str | None, overlap: int
) -> None:
    """Takes in that an annotator's label of a pair has changed.

    Args:
        event: that gave the label which holds now; None where there is none any more.
        after: that label, or None.
    """
    before = database.execute(
        "SELECT choice FROM assignments WHERE annotator = ? AND pair = ?", (annotator, pair)
    ).fetchone()[0]
    database.execute(
        "UPDATE assignments SET label = ?, choice = ? WHERE annotator = ? AND pair = ?", (event, after, annotator, pair)
    )
    database.execute(
        "UPDATE progress SET done = done + ? WHERE annotator = ?",
        ((after is not None) - (before is not None), annotator),
    )
    gained = _counts(after) - _counts(before)
    if gained:
        votes = database.execute(
            "UPDATE pairs SET votes = votes + ? WHERE id = ? RETURNING votes", (gained, pair)
        ).fetchone()[0]
        if pair >= overlap and votes == max(gained, 0):  # the first vote, or none any more
            database.execute(
                "UPDATE progress SET settled = settled + ? WHERE annotator = ? OR annotator IN (SELECT annotator FROM "
                "assignments WHERE pair = ?)",
                (gained, ALL, pair),
            )
    if not _counts(after):  # others may get it
        database.execute("UPDATE progress SET next = ? WHERE annotator != ? AND next > ?", (pair, annotator, pair))


def done(database: sqlite3.Connection, annotator: str) -> int:
    """How many pairs an annotator has labelled or skipped; the annotator's row is there from then on."""
    database.execute("INSERT OR IGNORE INTO progress (annotator) VALUES (?)", (annotator,))
    return database.execute("SELECT done FROM progress WHERE annotator = ?", (annotator,)).fetchone()[0]


def last(database: sqlite3.Connection, annotator: str) -> int | None:
    """The number of the last label of an annotator that holds."""
    return database.execute("SELECT max(label) FROM assignments WHERE annotator = ?", (annotator,)).fetchone()[0]


def others_have(database: sqlite3.Connection, annotator: str, overlap: int, since: str) -> int:
    """How many pairs an annotator is not going to get, because others have labelled them, or hold them.

    Args:
        since: when what others were shown, and have not labelled, is held still.
    """
    settled = database.execute(
        "SELECT everybody.settled - mine.settled FROM progress AS everybody, progress AS mine WHERE "
        "everybody.annotator = ? AND mine.annotator = ?",
        (ALL, annotator),
    ).fetchone()[0]
    held = database.execute(
        f"SELECT count(DISTINCT shown.pair) FROM assignments AS shown JOIN pairs ON pairs.id = shown.pair WHERE "
        f"shown.choice IS NULL AND shown.at > ? AND shown.annotator != ? AND shown.pair >= ? AND votes = 0 AND "
        f"{_NOT_MINE}",
        (since, annotator, overlap, annotator),
    ).fetchone()[0]
    return settled + held


def next_pair(database: sqlite3.Connection, annotator: str, overlap: int, since: str) -> tuple[int, int, int] | None:
    """The first pair that an annotator may be shown, with its rows: one of everybody's, or one that nobody has.

    Args:
        since: see `others_have`.
    """
    begin = database.execute("SELECT next FROM progress WHERE annotator = ?", (annotator,)).fetchone()[0]
    nobody_holds = (
        "NOT EXISTS (SELECT 1 FROM assignments AS held WHERE held.pair = pairs.id AND held.choice IS NULL AND "
        "held.at > ? AND held.annotator != ?)"
    )
    queries = [
        (f"id >= ? AND id < ? AND {_NOT_MINE}", (begin, overlap, annotator)),
        (
            f"id >= ? AND votes = 0 AND {_NOT_MINE} AND {nobody_holds}",
            (max(begin, overlap), annotator, since, annotator),
        ),
        (  # what others held too long
            f"id IN (SELECT pair FROM assignments AS old WHERE old.choice IS NULL AND old.at <= ? AND pair >= ? AND "
            f"old.annotator != ?) AND id < ? AND votes = 0 AND {_NOT_MINE} AND {nobody_holds}",
            (since, overlap, annotator, begin, annotator, since, annotator),
        ),
    ]
    found = []
    for condition, values in queries:
        row = database.execute(
            f"SELECT id, first, second FROM pairs WHERE {condition} ORDER BY id LIMIT 1", values
        ).fetchone()
        if row is not None:
            found.append(row)
    first = min(found, default=None)
    if first is None or first[0] >= begin:
        reached = database.execute("SELECT max(id) + 1 FROM pairs").fetchone()[0] if first is None else first[0] + 1
        database.execute("UPDATE progress SET next = ? WHERE annotator = ?", (reached, annotator))
    return first


def _counts(choice: str | None) -> int:
    return int(choice is not None and choice != "skip")


_NOT_MINE = "NOT EXISTS (SELECT 1 FROM assignments AS mine WHERE mine.annotator = ? AND mine.pair = pairs.id)"
