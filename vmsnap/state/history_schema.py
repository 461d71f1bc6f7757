"""The tables of ``history.sqlite``, version by version. ``docs/formats.md`` describes them."""

from __future__ import annotations

APPLICATION_ID = 0x766D736E
"""The letters "vmsn": SQLite's mark of whose file it is."""

MIGRATIONS: tuple[tuple[str, ...], ...] = (
    (
        """CREATE TABLE runs (
            number INTEGER PRIMARY KEY AUTOINCREMENT,
            run TEXT NOT NULL UNIQUE,
            kind TEXT NOT NULL,
            guest TEXT NOT NULL,
            started TEXT NOT NULL,
            started_by TEXT NOT NULL,
            user TEXT NOT NULL,
            starter TEXT NOT NULL,
            process TEXT NOT NULL,
            ended TEXT,
            seconds REAL,
            outcome TEXT,
            exit_code INTEGER,
            error TEXT,
            remedy TEXT,
            snapshot TEXT,
            environment TEXT,
            pause_ms REAL,
            new_bytes INTEGER,
            logical_bytes INTEGER,
            warnings TEXT NOT NULL DEFAULT '[]'
        ) STRICT""",
        "CREATE INDEX runs_by_guest ON runs (guest, kind, number)",
        "CREATE INDEX runs_unended ON runs (number) WHERE ended IS NULL",
        """CREATE TABLE steps (
            run_number INTEGER NOT NULL REFERENCES runs (number) ON DELETE CASCADE,
            position INTEGER NOT NULL,
            name TEXT NOT NULL,
            began_after REAL NOT NULL,
            PRIMARY KEY (run_number, position)
        ) STRICT, WITHOUT ROWID""",
        # The newest ended, and the newest good run of each guest, so that asking for them does not read all runs.
        """CREATE TABLE newest (
            kind TEXT NOT NULL,
            guest TEXT NOT NULL,
            ended INTEGER NOT NULL,
            done INTEGER,
            PRIMARY KEY (kind, guest)
        ) STRICT, WITHOUT ROWID""",
        """CREATE TABLE audit (
            number INTEGER PRIMARY KEY AUTOINCREMENT,
            at TEXT NOT NULL,
            action TEXT NOT NULL,
            started_by TEXT NOT NULL,
            user TEXT NOT NULL,
            starter TEXT NOT NULL,
            guest TEXT NOT NULL,
            subject TEXT NOT NULL,
            detail TEXT NOT NULL,
            failure TEXT
        ) STRICT""",
        "CREATE INDEX audit_by_guest ON audit (guest, number)",
    ),
)
