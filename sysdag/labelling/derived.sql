-- What is derived from events and assignments, in the same transaction as they.

-- The label of a pair that the annotator was shown, as it holds now, and the event that gave it.
ALTER TABLE assignments ADD COLUMN choice TEXT;
ALTER TABLE assignments ADD COLUMN label INTEGER REFERENCES events (id);
CREATE INDEX assignments_labelled ON assignments (annotator, label);
CREATE INDEX assignments_open ON assignments (annotator) WHERE choice IS NULL;
CREATE INDEX assignments_held ON assignments (pair, at) WHERE choice IS NULL;

-- How many labels of a pair hold that are no skips; a pair with none is free.
ALTER TABLE pairs ADD COLUMN votes INTEGER NOT NULL DEFAULT 0;
CREATE INDEX pairs_free ON pairs (id) WHERE votes = 0;

-- Of each annotator, and of all under the name '': `done`, labels that hold, skips too; `settled`, how many of the pairs
-- that go to one annotator alone have votes, of those that this one was shown; `next`, below which nothing is to be
-- handed out but what others held too long.
CREATE TABLE progress (
    annotator TEXT PRIMARY KEY,
    done INTEGER NOT NULL DEFAULT 0,
    settled INTEGER NOT NULL DEFAULT 0,
    next INTEGER NOT NULL DEFAULT 0
) STRICT;
