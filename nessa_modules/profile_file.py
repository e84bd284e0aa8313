"""The SQLite file of voice profiles: its form, its transactions, and faults in words that name it."""

import contextlib
import errno
import json
import math
import numbers
import os
import sqlite3
import stat
import threading
import weakref
from collections import namedtuple
from pathlib import Path

_APPLICATION_ID = 0x4E455353  # "NESS", in the file's header: tells a store from other SQLite files
_FORMAT = 1  # in the header as SQLite's user_version
# That another process may write for; removing from a store of a million profiles takes a third of it.
_BUSY_SECONDS = 60
_SCHEMA = (
    "CREATE TABLE store (id INTEGER PRIMARY KEY CHECK (id = 1), enroll_model_id TEXT NOT NULL, "
    "runtime_model_id TEXT NOT NULL, alignment_id TEXT, calibration TEXT NOT NULL, false_accept_rate REAL NOT NULL, "
    "num_changes INTEGER NOT NULL, num_removals INTEGER NOT NULL, has_traces INTEGER NOT NULL)",
    "CREATE TABLE model (id INTEGER PRIMARY KEY, model_id TEXT NOT NULL UNIQUE, embedding_size INTEGER NOT NULL)",
    # AUTOINCREMENT: no number is used twice, so that the rows of the loaded matrix stay sorted by it.
    "CREATE TABLE profile (id INTEGER PRIMARY KEY AUTOINCREMENT, name TEXT NOT NULL UNIQUE, change INTEGER NOT NULL)",
    "CREATE INDEX profile_by_change ON profile (change)",
    "CREATE TABLE recording (id INTEGER PRIMARY KEY, profile INTEGER NOT NULL REFERENCES profile (id), "
    "model INTEGER NOT NULL REFERENCES model (id), embedding BLOB NOT NULL)",
    "CREATE INDEX recording_by_profile ON recording (profile)",
)
_STORE_FIELDS = (
    "enroll_model_id, runtime_model_id, alignment_id, calibration, false_accept_rate, num_changes, num_removals, "
    "has_traces"
)
_MAX_CHANGES = 2**62  # far from what SQLite can count to
_MAX_EMBEDDING_SIZE = 2**20
Store = namedtuple("Store", _STORE_FIELDS)

_files = weakref.WeakSet()
_inherited = []  # connections from before a fork, which the child may not even close
_was_used_in_fork = False


def _after_fork():
    """In a forked child: SQLite's own locks stay as they were, and no thread is there that would let go of them.

    Nor may a connection of the parent be used or closed.
    """
    global _was_used_in_fork
    for file in list(_files):
        is_free = file.lock.acquire(blocking=False)
        is_in_transaction = file._connection is not None and file._connection.in_transaction
        _was_used_in_fork = _was_used_in_fork or not is_free or is_in_transaction
        file.lock = threading.RLock()
        _inherited.append(file._connection)
        file._connection = None


os.register_at_fork(after_in_child=_after_fork)


class ProfileFile:
    """The file of :class:`nessa_modules.profiles.VoiceProfiles`, which asks for its own parts of it in SQL.

    SQLite's rollback journal makes each transaction whole or not there, also after a kill; no journal is left after
    one. What is deleted is overwritten.

    Arguments
    ---------
    path : str or Path
        The file; it need not be there.

    Example
    -------
    >>> import tempfile
    >>> file = ProfileFile(tempfile.mkdtemp() + "/voices.db")
    >>> with file.transaction() as connection:
    ...     file.read_store(connection) is None
    True
    """

    def __init__(self, path):
        self.path = Path(path)
        self._place = self.path.absolute()  # wherever the process goes
        self.lock = threading.RLock()
        self.identity = None  # of the file that was opened: another one may be moved to its path
        self._num_closings = 0  # a part of it: once a file is closed, another one may get its inode
        self._connection = None
        _files.add(self)

    def close(self):
        """Close the connection; the next transaction opens one again."""
        with self.lock:
            if self._connection is not None:
                self._connection.close()
            self._connection = None
            self._num_closings += 1

    @contextlib.contextmanager
    def transaction(self, writes=False):
        """All or nothing: what is read is one state of the file, and what is written is there at the end, or not.

        Arguments
        ---------
        writes : bool
            Whether something is to be written; no other process can then meanwhile.

        Yields
        ------
        sqlite3.Connection or None
            None where there is no file.

        Raises
        ------
        ValueError
            If it is not a store, or damaged.
        OSError
            If it cannot be read or written, the disk is full, or another process keeps it locked.
        """
        with self.lock, self._plain_faults():
            connection = self._connect()
            if connection is None:
                yield None
                return
            connection.execute("BEGIN IMMEDIATE" if writes else "BEGIN")
            try:
                yield connection
                connection.execute("COMMIT")
            except BaseException:
                if connection.in_transaction:
                    connection.execute("ROLLBACK")
                raise

    @contextlib.contextmanager
    def writing(self, new_store=None):
        """A transaction that changes the store, after what a killed process has left to do.

        Arguments
        ---------
        new_store : callable, optional
            Gives the :class:`Store` where there is none yet. None: such a store is refused.

        Yields
        ------
        (sqlite3.Connection, Store)
            The store as it is before.
        """
        with self.transaction() as connection:
            store = self.read_store(connection)
        if store is None and new_store is None:
            raise ValueError(f"There is no store of voice profiles at {self.path}.")
        if store is not None:
            self._keep_no_log()
        if store is not None and store.has_traces:
            self.overwrite_traces()
        if new_store is not None:
            try:
                os.close(os.open(self._place, os.O_CREAT | os.O_EXCL | os.O_WRONLY, 0o600))
            except FileExistsError:
                pass
            except OSError as error:
                raise OSError(error.errno, error.strerror, str(self.path)) from None
        with self.transaction(writes=True) as connection:
            if connection is None:
                reason = "it is a link to a file that is not there, or was removed meanwhile"
                raise FileNotFoundError(errno.ENOENT, reason, str(self.path))
            store = self.read_store(connection)
            if store is None:  # still: another process may have been quicker
                connection.execute(f"PRAGMA application_id = {_APPLICATION_ID}")
                connection.execute(f"PRAGMA user_version = {_FORMAT}")
                for statement in _SCHEMA:
                    connection.execute(statement)
                store = new_store()
                self.write_store(connection, store)
            yield connection, store
            connection.execute("UPDATE store SET num_changes = num_changes + 1")

    def write_store(self, connection, store):
        """Replace the settings of the store, in a transaction that writes."""
        values = (1, *store._replace(calibration=json.dumps(store.calibration)))
        connection.execute(f"REPLACE INTO store VALUES ({', '.join('?' * len(values))})", values)

    def overwrite_traces(self):
        """Write the file anew, so that nothing of what was deleted is left in the gaps of its pages."""
        with self.lock, self._plain_faults():
            connection = self._connect()
            (num_removals,) = connection.execute("SELECT num_removals FROM store").fetchone()
            connection.execute("VACUUM")
            # Not where another process has removed somebody since.
            connection.execute("UPDATE store SET has_traces = 0 WHERE num_removals = ?", (num_removals,))

    def _keep_no_log(self):
        """Leave the journal mode in which what was removed stays in a log beside, if somebody has chosen it."""
        with self.lock, self._plain_faults():
            connection = self._connect()
            if connection.execute("PRAGMA journal_mode").fetchone()[0] == "wal":
                connection.execute("PRAGMA journal_mode = DELETE")

    def _connect(self):
        """The connection of this process; None where there is no file."""
        if _was_used_in_fork:
            reason = "this process was forked while a store was in use: fork at another moment, or spawn the process"
            raise OSError(errno.EBUSY, reason, str(self.path))
        try:
            found = os.stat(self._place)
        except FileNotFoundError:
            self.close()
            return None
        if self._connection is not None:
            if self.identity[:2] == (found.st_dev, found.st_ino):
                return self._connection
            self.close()
        if not stat.S_ISREG(found.st_mode):
            what = "a folder" if stat.S_ISDIR(found.st_mode) else "not a regular file"
            raise ValueError(f"A store of voice profiles is a file, but {self.path} is {what}.")
        connection = sqlite3.connect(
            f"{self._place.as_uri()}?mode=rw",
            uri=True,
            timeout=_BUSY_SECONDS,
            isolation_level=None,  # transactions are begun here
            check_same_thread=False,  # the lock takes care
        )
        try:
            connection.execute("PRAGMA trusted_schema = OFF")
            connection.execute("PRAGMA cell_size_check = ON")
            connection.execute("PRAGMA secure_delete = ON")
            connection.execute("PRAGMA synchronous = EXTRA")
        except BaseException:
            connection.close()
            raise
        self._connection, self.identity = connection, (found.st_dev, found.st_ino, self._num_closings)
        return connection

    def read_store(self, connection):
        """The settings of the store, after a look at whatever can be wrong in the file and does not grow with it.

        Arguments
        ---------
        connection : sqlite3.Connection or None
            In a :meth:`transaction`.

        Returns
        -------
        Store or None
            None where there is no store yet. Its calibration is a list.

        Raises
        ------
        ValueError
            If the file is something else, or damaged.
        """
        if connection is None:
            return None
        (application,) = connection.execute("PRAGMA application_id").fetchone()
        (version,) = connection.execute("PRAGMA user_version").fetchone()
        schema = [row[0] for row in connection.execute("SELECT sql FROM sqlite_schema WHERE sql NOT NULL")]
        if not application and not schema and not os.stat(self._place).st_size:
            return None  # a process was killed right after it had made the file, or is about to fill it
        if application != _APPLICATION_ID:
            raise ValueError(f"{self.path} is no store of voice profiles: it is another SQLite file.")
        if version != _FORMAT:
            raise ValueError(
                f"{self.path} is a store of format {version}, but this version of the program reads format {_FORMAT}."
            )
        if sorted(schema) != sorted((*_SCHEMA, "CREATE TABLE sqlite_sequence(name,seq)")):
            raise self.damaged("its tables are not those of a store")
        row = connection.execute(f"SELECT {_STORE_FIELDS} FROM store").fetchone()
        if row is None:
            raise self.damaged("it lacks its settings")
        store = self._checked_settings(Store(*row))
        models = connection.execute("SELECT model_id, embedding_size FROM model").fetchall()
        for model_id, size in models:
            if not isinstance(model_id, str) or not isinstance(size, int) or not 0 < size <= _MAX_EMBEDDING_SIZE:
                raise self.damaged(f"it has embeddings of size {size!r:.40} of model {model_id!r:.40}")
        if not models and connection.execute("SELECT 1 FROM profile LIMIT 1").fetchone():
            raise self.damaged("it has profiles, but no models")
        # SQLite's order is numbers, texts, bytes, and both columns have an index: the ends tell of all between them.
        for column, is_right in (
            ("name", lambda name: isinstance(name, str)),
            ("change", lambda change: isinstance(change, int) and 0 < change <= store.num_changes),
        ):
            for end in ("ASC", "DESC"):
                row = connection.execute(f"SELECT {column} FROM profile ORDER BY {column} {end} LIMIT 1").fetchone()
                if row is not None and not is_right(row[0]):
                    raise self.damaged(f"the {column} of a profile is {row[0]!r:.40}")
        return store

    def _checked_settings(self, store):
        try:
            calibration = checked_calibration(json.loads(store.calibration), "calibration")
        except (TypeError, ValueError, RecursionError):
            raise self.damaged("its thresholds cannot be read") from None
        is_text = [isinstance(id_, str) for id_ in (store.enroll_model_id, store.runtime_model_id)]
        counts = store.num_changes, store.num_removals
        if not all(is_text) or not isinstance(store.alignment_id, str | None):
            raise self.damaged("its models or alignment are not texts")
        if not isinstance(store.false_accept_rate, float) or not 0 < store.false_accept_rate < 1:
            raise self.damaged(f"its false-accept rate is {store.false_accept_rate!r:.40}")
        if not all(isinstance(n, int) and 0 <= n < _MAX_CHANGES for n in counts) or store.has_traces not in (0, 1):
            raise self.damaged("it does not tell how often it was changed")
        return store._replace(calibration=calibration)

    def damaged(self, reason):
        """The exception that says so."""
        return ValueError(f"{self.path} is damaged: {reason}; take a copy of it from before.")

    @contextlib.contextmanager
    def _plain_faults(self):
        """SQLite's exceptions as ValueError and OSError that name the file."""
        try:
            yield
        except sqlite3.Error as error:
            code = getattr(error, "sqlite_errorcode", 0) & 0xFF
            if code == sqlite3.SQLITE_NOTADB:
                raise ValueError(f"{self.path} is no store of voice profiles: it is no SQLite file.") from None
            is_no_text = not code and type(error) is sqlite3.OperationalError
            if is_no_text or code in (sqlite3.SQLITE_CORRUPT, sqlite3.SQLITE_MISMATCH):
                raise self.damaged(error) from error
            number, reason = {
                sqlite3.SQLITE_FULL: (errno.ENOSPC, os.strerror(errno.ENOSPC)),
                sqlite3.SQLITE_BUSY: (errno.ETIMEDOUT, f"other processes have kept it locked for {_BUSY_SECONDS} s"),
                sqlite3.SQLITE_READONLY: (errno.EACCES, "it cannot be written"),
                sqlite3.SQLITE_CANTOPEN: (errno.EACCES, "it cannot be opened, or no journal be written beside it"),
                sqlite3.SQLITE_PERM: (errno.EACCES, os.strerror(errno.EACCES)),
                sqlite3.SQLITE_IOERR: (errno.EIO, f"{error} (a full or failing disk)"),
            }.get(code, (None, None))
            if number is None:
                raise
            raise OSError(number, reason, str(self.path)) from error


def checked_rate(rate):
    """A false-accept rate as a float.

    Raises
    ------
    ValueError
        If it is none.

    Example
    -------
    >>> checked_rate(0.01)
    0.01
    """
    if not isinstance(rate, numbers.Real) or not 0 < rate < 1:
        raise ValueError(f"false_accept_rate can only be a number above 0 and below 1, but got {rate!r}.")
    return float(rate)


def checked_calibration(entries, what):
    """Thresholds, in order of their rates.

    Arguments
    ---------
    entries : list of dict
        Each with a ``false_accept_rate`` and a ``threshold``; whatever else they hold is left out.
    what : str
        Whose they are, for the sentence.

    Returns
    -------
    list of dict

    Raises
    ------
    ValueError
        If they are none.

    Example
    -------
    >>> checked_calibration([{"false_accept_rate": 0.01, "threshold": 0.5, "false_reject_rate": 0.1}], "mine")
    [{'false_accept_rate': 0.01, 'threshold': 0.5}]
    """
    try:
        if not isinstance(entries, list | tuple):
            raise TypeError
        pairs = sorted((float(entry["false_accept_rate"]), float(entry["threshold"])) for entry in entries)
    except (KeyError, OverflowError, TypeError, ValueError):
        raise ValueError(
            f"{what} can only be a list of entries with a false_accept_rate and a threshold, but got {entries!r}."
        ) from None
    for rate, threshold in pairs:
        if not 0 < rate < 1 or not math.isfinite(threshold):
            raise ValueError(f"{what} has a false-accept rate of {rate!r} at a threshold of {threshold!r}.")
    return [{"false_accept_rate": rate, "threshold": threshold} for rate, threshold in pairs]
