-- The database of `sysdag label`. Events are what counts; they are only ever appended. What is derived from them, so that
-- a label costs the same however many there are (`assignments.choice`, `pairs.votes`, `progress`), stands in derived.sql.
CREATE TABLE settings (name TEXT PRIMARY KEY, value TEXT NOT NULL) STRICT;  -- values are JSON

-- `first` and `second` are rows of the traces, from 0; the same one where single runs are labelled. Pairs are handed out
-- by number; those below the setting `overlap` go to every annotator, each of the others to one.
CREATE TABLE pairs (id INTEGER PRIMARY KEY, first INTEGER NOT NULL, second INTEGER NOT NULL) STRICT;

-- Which pair was shown to whom, and which row stood on which side.
CREATE TABLE assignments (
    id INTEGER PRIMARY KEY AUTOINCREMENT,
    annotator TEXT NOT NULL,
    pair INTEGER NOT NULL REFERENCES pairs (id),
    left INTEGER NOT NULL,
    right INTEGER NOT NULL,
    at TEXT NOT NULL,  -- ISO 8601, UTC
    UNIQUE (annotator, pair)
) STRICT;
CREATE INDEX assignments_by_pair ON assignments (pair);

-- A label, or the undoing of one. `request` is the page's name for it: the same request is recorded once.
CREATE TABLE events (
    id INTEGER PRIMARY KEY AUTOINCREMENT,
    request TEXT NOT NULL UNIQUE,
    annotator TEXT NOT NULL,
    pair INTEGER NOT NULL REFERENCES pairs (id),
    choice TEXT CHECK (choice IN ('left', 'right', 'tie', 'up', 'down', '1', '2', '3', '4', '5', 'skip')),
    left INTEGER NOT NULL,
    right INTEGER NOT NULL,
    undoes INTEGER UNIQUE REFERENCES events (id),
    at TEXT NOT NULL,
    CHECK ((choice IS NULL) = (undoes IS NOT NULL))
) STRICT;
CREATE INDEX events_by_annotator ON events (annotator, pair);
CREATE TRIGGER events_stay BEFORE UPDATE ON events BEGIN SELECT RAISE(ABORT, 'events are only appended'); END;
CREATE TRIGGER events_last BEFORE DELETE ON events BEGIN SELECT RAISE(ABORT, 'events are only appended'); END;

-- The labels that hold.
CREATE VIEW labels AS
    SELECT id, annotator, pair, choice, left, right, at FROM events AS event
    WHERE choice IS NOT NULL AND NOT EXISTS (SELECT 1 FROM events AS undo WHERE undo.undoes = event.id);
CREATE TRIGGER one_label BEFORE INSERT ON events
    WHEN NEW.choice IS NOT NULL
    AND EXISTS (SELECT 1 FROM labels WHERE annotator = NEW.annotator AND pair = NEW.pair)
    BEGIN SELECT RAISE(ABORT, 'an annotator has one label of a pair'); END;
