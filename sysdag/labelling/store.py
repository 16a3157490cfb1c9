"""Labels on the disk: an SQLite database in which every label is one transaction, written through before it counts.

The tables are in `schema.sql`. Labels and undos are events that are only ever appended, so the history stays.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import sqlite3
import threading
from collections.abc import Iterator, Sequence
from dataclasses import asdict
from datetime import UTC, datetime, timedelta
from importlib import resources
from pathlib import Path

from sysdag.errors import LabelError
from sysdag.files.atomic import free_beside
from sysdag.labelling import progress
from sysdag.labelling.records import CHOICES, Assignment, Choice, Label, Queue, Settings, checked_name

FORMAT_VERSION = 3
_READ = (1, 2, 3)  # of version 1 are pairs; before 3 nothing is derived
_APPLICATION = 0x73797364  # "sysd": marks the file as a database of this command
_HELD = timedelta(hours=1)  # an unlabelled pair is kept so long for the annotator who was shown it


class LabelStore:
    """An open database of labels; threads and processes may share one.

    Raises:
        LabelError: if the file is no such database, of a newer version, or cannot be written to.
    """

    def __init__(self, path: str | Path) -> None:
        self.path = Path(path)
        self._lock = threading.Lock()
        if not self.path.is_file():
            raise LabelError(f"There is no database {self.path}.")
        self._database = sqlite3.connect(self.path, isolation_level=None, check_same_thread=False, timeout=10)
        try:
            self._prepare()
            self.settings = self._settings()
            self._derive_once()
            self._pairs = self._one("SELECT count(*) FROM pairs")  # which stay as they are
        except (sqlite3.Error, LabelError) as error:
            self._database.close()
            if isinstance(error, LabelError):
                raise
            raise LabelError(f"{self.path} cannot be used for labels ({_told(self.path, error)}).") from error

    @classmethod
    def create(cls, path: str | Path, settings: Settings, pairs: Sequence[tuple[int, int]]) -> LabelStore:
        """Begins a database, whole or not at all.

        Raises:
            LabelError: if there is one already.
        """
        schema = _script("schema.sql") + _script("derived.sql")
        if cls.is_begun(path):
            raise LabelError(f"{path} exists.")
        try:
            with contextlib.closing(sqlite3.connect(path, isolation_level=None, timeout=10)) as database:
                database.executescript(f"BEGIN IMMEDIATE;\n{schema}")
                numbered = ((number, *pair) for number, pair in enumerate(pairs))
                database.executemany("INSERT INTO pairs (id, first, second) VALUES (?, ?, ?)", numbered)
                rows = [(name, json.dumps(value)) for name, value in asdict(settings).items()]
                database.executemany("INSERT INTO settings VALUES (?, ?)", rows)
                progress.derive(database, settings.overlap)
                database.execute(f"PRAGMA application_id = {_APPLICATION}")
                database.execute(f"PRAGMA user_version = {FORMAT_VERSION}")
                database.execute("COMMIT")
        except sqlite3.Error as error:
            raise LabelError(f"{path} cannot be made a database of labels ({_told(path, error)}).") from error
        return cls(path)

    @staticmethod
    def is_begun(path: str | Path) -> bool:
        """Whether there is something at the path: a process that was killed may leave a database without tables.

        Raises:
            LabelError: if the file cannot be read as a database.
        """
        if not Path(path).exists():
            return False
        try:
            with contextlib.closing(sqlite3.connect(path, timeout=10)) as database:
                return database.execute("SELECT count(*) FROM sqlite_master").fetchone()[0] > 0
        except sqlite3.Error as error:
            raise LabelError(f"{path} cannot be read as a database of labels ({_told(path, error)}).") from error

    def __enter__(self) -> LabelStore:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """Closes the file; everything in it is on the disk already."""
        with self._lock:
            self._database.close()

    def queue(self, annotator: str) -> Queue:
        """Where an annotator stands; hands out the next pair if the last one has its label."""
        annotator = checked_name(annotator)
        with self._transaction():
            return self._queue(annotator)

    def label(self, annotator: str, pair: int, choice: Choice, request: str) -> Queue:
        """Records a label and tells what comes next; once for the same request, however often it arrives.

        Args:
            request: the caller's name for this label, new for each.

        Raises:
            LabelError: if the annotator has labelled the pair otherwise (in another tab, say) or was not shown it; or
                for a choice that is not asked for.
        """
        annotator = checked_name(annotator)
        choices = (*CHOICES[self.settings.collect], "skip")
        if choice not in choices:
            raise LabelError(f"{choice!r} is no label here; these are {', '.join(choices)}.")
        with self._transaction() as database:
            if not self._is_recorded(request, (annotator, pair, choice, None)):
                shown = database.execute(
                    "SELECT left, right, choice FROM assignments WHERE annotator = ? AND pair = ?", (annotator, pair)
                ).fetchone()
                if shown is None:
                    raise LabelError(f"Pair {pair} was not shown to {annotator}.")
                left, right, known = shown
                if known is not None:
                    raise LabelError("This pair has its label already, from another tab or window.")
                event = self._append(request, annotator, pair, choice, (left, right), None)
                progress.record(database, annotator, pair, event, choice, self._overlap())
            return self._queue(annotator)

    def undo(self, annotator: str, label: int, request: str) -> Queue:
        """Takes an annotator's last label back, which stays in the history; once for the same request.

        Args:
            label: its number, `Queue.last`.

        Raises:
            LabelError: if that is not the annotator's last label that holds.
        """
        annotator = checked_name(annotator)
        with self._transaction() as database:
            undone = database.execute("SELECT pair, left, right FROM events WHERE id = ?", (label,)).fetchone()
            if undone is None or not self._is_recorded(request, (annotator, undone[0], None, label)):
                if undone is None or progress.last(self._database, annotator) != label:
                    raise LabelError("That label is not your last one; it may have been undone in another tab.")
                pair, *sides = undone
                self._append(request, annotator, pair, None, sides, label)
                progress.record(database, annotator, pair, None, None, self._overlap())
            return self._queue(annotator)

    def labels(self) -> list[Label]:
        """All labels that hold, in the order in which they were given."""
        with self._lock:
            rows = self._database.execute("SELECT annotator, pair, choice, left, right FROM labels ORDER BY id")
            return [Label(*row) for row in rows]

    def pairs(self) -> list[tuple[int, int]]:
        """The rows that are compared, by the pair's number."""
        with self._lock:
            return list(self._database.execute("SELECT first, second FROM pairs ORDER BY id"))

    def undone(self) -> dict[str, int]:
        """How many labels each annotator has taken back, where any."""
        with self._lock:
            return dict(
                self._database.execute("SELECT annotator, count(undoes) FROM events GROUP BY 1 HAVING count(undoes)")
            )

    def annotators(self) -> list[str]:
        """Whoever was shown a pair."""
        with self._lock:
            rows = self._database.execute("SELECT annotator FROM assignments GROUP BY 1 ORDER BY min(id)")
            return [name for (name,) in rows]

    def set_overlap(self, overlap: int) -> None:
        """Changes how many pairs every annotator gets."""
        with self._transaction() as database:
            database.execute("UPDATE settings SET value = ? WHERE name = 'overlap'", (json.dumps(overlap),))
            progress.derive(database, overlap)
        self.settings = self._settings()

    def _prepare(self) -> None:
        database = self._database
        if database.execute("PRAGMA application_id").fetchone()[0] != _APPLICATION:
            raise LabelError(f"{self.path} is no database of labels; give another --database.")
        version = database.execute("PRAGMA user_version").fetchone()[0]
        if version not in _READ:
            raise LabelError(
                f"{self.path} has format version {version}, and this sysdag reads {FORMAT_VERSION}; install the "
                "version that wrote it."
            )
        mode = database.execute("PRAGMA journal_mode = WAL").fetchone()[0]
        if mode != "wal":
            raise LabelError(
                f"{self.path} lies where SQLite cannot keep a write-ahead log (mode {mode!r}); put --database on a "
                "local disk."
            )
        database.execute("PRAGMA synchronous = FULL")
        database.execute("PRAGMA foreign_keys = ON")

    def _derive_once(self) -> None:
        """Brings a database of before up to date: what is derived from its events is kept from now on."""
        with self._transaction() as database:
            if database.execute("PRAGMA user_version").fetchone()[0] == FORMAT_VERSION:
                return
            for statement in _statements(_script("derived.sql")):
                database.execute(statement)
            progress.derive(database, self.settings.overlap)
            database.execute(f"PRAGMA user_version = {FORMAT_VERSION}")

    def _settings(self) -> Settings:
        with self._lock:
            stored = dict(self._database.execute("SELECT name, value FROM settings"))
        values = {name: json.loads(value) for name, value in stored.items()}
        return Settings(**{**values, "outputs": tuple(values["outputs"])})

    @contextlib.contextmanager
    def _transaction(self) -> Iterator[sqlite3.Connection]:
        """One transaction; after it what was written is on the disk, or after an error nothing is."""
        with self._lock:
            self._database.execute("BEGIN IMMEDIATE")
            try:
                yield self._database
                self._database.execute("COMMIT")
            except BaseException:
                if self._database.in_transaction:
                    self._database.execute("ROLLBACK")
                raise

    def _queue(self, annotator: str) -> Queue:
        done = progress.done(self._database, annotator)
        task = self._open(annotator) or self._assigned(annotator)
        total = self._pairs - progress.others_have(self._database, annotator, self._overlap(), _held_since())
        return Queue(task, done, total, progress.last(self._database, annotator))

    def _open(self, annotator: str) -> Assignment | None:
        """The first pair that the annotator was shown and has not labelled."""
        row = self._database.execute(
            "SELECT pair, left, right FROM assignments WHERE annotator = ? AND choice IS NULL ORDER BY id LIMIT 1",
            (annotator,),
        ).fetchone()
        return None if row is None else Assignment(*row)

    def _assigned(self, annotator: str) -> Assignment | None:
        """Hands out the first pair that nobody has, with sides drawn by seed, pair and annotator."""
        row = progress.next_pair(self._database, annotator, self._overlap(), _held_since())
        if row is None:
            return None
        pair, left, right = row
        drawn = hashlib.sha256(json.dumps([self.settings.seed, pair, annotator]).encode()).digest()
        if drawn[0] & 1:
            left, right = right, left
        self._database.execute(
            "INSERT INTO assignments (annotator, pair, left, right, at) VALUES (?, ?, ?, ?, ?)",
            (annotator, pair, left, right, _now()),
        )
        return Assignment(pair, left, right)

    def _overlap(self) -> int:
        """As it is now; another process may have changed it."""
        return json.loads(self._database.execute("SELECT value FROM settings WHERE name = 'overlap'").fetchone()[0])

    def _one(self, query: str, *values: object) -> int:
        return self._database.execute(query, values).fetchone()[0]

    def _is_recorded(self, request: str, content: tuple[str, int, str | None, int | None]) -> bool:
        found = self._database.execute(
            "SELECT annotator, pair, choice, undoes FROM events WHERE request = ?", (request,)
        ).fetchone()
        if found is not None and found != content:
            raise LabelError(f"Request {request!r} was recorded with another content.")
        return found is not None

    def _append(
        self, request: str, annotator: str, pair: int, choice: str | None, sides: Sequence[int], undoes: int | None
    ) -> int:
        """The number of the event."""
        appended = self._database.execute(
            "INSERT INTO events (request, annotator, pair, choice, left, right, undoes, at) "
            "VALUES (?, ?, ?, ?, ?, ?, ?, ?)",
            (request, annotator, pair, choice, *sides, undoes, _now()),
        )
        assert appended.lastrowid is not None
        return appended.lastrowid


def _told(path: str | Path, error: sqlite3.Error) -> str:
    """What went wrong, and what to do."""
    name = getattr(error, "sqlite_errorname", "")
    if name == "SQLITE_FULL" or name.startswith("SQLITE_IOERR"):
        return f"{error}; {free_beside(Path(path))}: free some space, and run it again"
    return f"{error}; give another --database"


def _script(name: str) -> str:
    return (resources.files("sysdag.labelling") / name).read_text(encoding="utf-8")


def _statements(script: str) -> Iterator[str]:
    """The statements of a script one by one: `executescript` would end the transaction."""
    statement = ""
    for line in script.splitlines(keepends=True):
        statement += line
        if sqlite3.complete_statement(statement):
            yield statement
            statement = ""


def _held_since() -> str:
    """From when on a pair that was shown, and has no label, is held for whoever was shown it."""
    return (datetime.now(UTC) - _HELD).isoformat()


def _now() -> str:
    return datetime.now(UTC).isoformat()
