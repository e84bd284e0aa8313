"""Files that are either whole or absent, flushes to the disk, and tables of numbers read back from them."""

import contextlib
import csv
import os
from pathlib import Path

from filelock import FileLock, Timeout


@contextlib.contextmanager
def write_whole(path, mode="w"):
    """Open a file that appears at its path only once it is written completely.

    It is written beside, flushed to the disk and renamed: whoever reads the path sees the old content
    or the new one, never a part, also after a kill or on a full disk. If the block raises, the temporary
    file is removed and the old content stays.

    Arguments
    ---------
    path : str or Path
        Where the file shall be; its folder must exist.
    mode : str
        ``w`` for UTF-8 text whose line ends stay as given (as :mod:`csv` asks for), ``wb`` for bytes.

    Yields
    ------
    io.IOBase
        The open temporary file.

    Raises
    ------
    ValueError
        If the mode is neither ``w`` nor ``wb``.

    Example
    -------
    >>> import tempfile
    >>> path = Path(tempfile.mkdtemp()) / "note.txt"
    >>> with write_whole(path) as stream:
    ...     _ = stream.write("whole")
    >>> path.read_text(), os.listdir(path.parent)
    ('whole', ['note.txt'])
    """
    if mode not in ("w", "wb"):
        raise ValueError(f"mode can only be 'w' or 'wb', but got {mode!r}.")
    path = Path(path)
    beside = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    text_options = {"encoding": "utf-8", "newline": ""} if mode == "w" else {}
    try:
        with open(beside, mode, **text_options) as stream:
            yield stream
            stream.flush()
            os.fsync(stream.fileno())
        os.replace(beside, path)
    except BaseException:
        beside.unlink(missing_ok=True)
        raise


def flush_to_disk(path):
    """Bring what was written to a file, or the names in a folder, to the disk: then a power cut keeps it.

    Arguments
    ---------
    path : str or Path
        The file or folder.

    Raises
    ------
    OSError
        If it is missing, or the disk refuses.

    Example
    -------
    >>> import tempfile
    >>> flush_to_disk(tempfile.mkdtemp())
    """
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def lock_folder(folder):
    """Keep other runs out of a folder, for as long as the returned lock lives or the process runs.

    Arguments
    ---------
    folder : str or Path
        Created where it is missing.

    Returns
    -------
    filelock.FileLock or None
        None on other ranks than the first.

    Raises
    ------
    ValueError
        If another run holds it.
    """
    if os.environ.get("RANK", "0") != "0":
        return None
    Path(folder).mkdir(parents=True, exist_ok=True)
    lock = FileLock(Path(folder) / ".lock")
    try:
        lock.acquire(blocking=False)
    except Timeout:
        raise ValueError(f"Another run is at work in {folder}; wait for it, or give another folder.") from None
    return lock


def write_table(path, rows):
    """Write a CSV table, whole or not at all.

    Arguments
    ---------
    path : str or Path
        The file, whose folder must exist.
    rows : list of dict
        Cells by column; the columns are in the order in which they first come up, a cell that is missing is empty.

    Example
    -------
    >>> import tempfile
    >>> path = Path(tempfile.mkdtemp()) / "table.csv"
    >>> write_table(path, [{"id": "mix_1", "si_sdr": 9.5}, {"id": "mix_2", "si_sdr": 8.0, "sdr": 8.5}])
    >>> path.read_text()
    'id,si_sdr,sdr\\nmix_1,9.5,\\nmix_2,8.0,8.5\\n'
    """
    with write_whole(path) as stream:
        writer = csv.DictWriter(stream, dict.fromkeys(column for row in rows for column in row), lineterminator="\n")
        writer.writeheader()
        writer.writerows(rows)


def read_table(path, key):
    """Read a CSV table of numbers, one row per key.

    Arguments
    ---------
    path : str or Path
        The file, whose header starts with the name of the key.
    key : str
        The name of the first column.

    Returns
    -------
    list of (str, dict)
        Of each row the key as it stands, and its numbers by column; an empty cell is NaN.

    Raises
    ------
    ValueError
        If the file is missing or is no such table.

    Example
    -------
    >>> import tempfile
    >>> path = Path(tempfile.mkdtemp()) / "table.csv"
    >>> _ = path.write_text("id,si_sdr,sdr\\nmix_1,9.5,\\n")
    >>> read_table(path, "id")
    [('mix_1', {'si_sdr': 9.5, 'sdr': nan})]
    """
    try:
        with open(path, encoding="utf-8", newline="") as stream:
            lines = [line for line in csv.reader(stream) if line]
    except OSError as error:
        raise ValueError(f"{path} cannot be read: {error.strerror}.") from error
    except (UnicodeDecodeError, csv.Error) as error:
        raise ValueError(f"{path} is no CSV table: {error}.") from error
    if not lines or lines[0][0] != key:
        raise ValueError(f"{path} is no table by {key!r}: its header is {','.join(lines[0]) if lines else ''!r}.")
    header = lines[0]
    rows = []
    for line in lines[1:]:
        if len(line) != len(header):
            raise ValueError(f"{path} has {len(header)} columns, but the row {line[0]!r} has {len(line)}.")
        try:
            cells = [float(cell) if cell else float("nan") for cell in line[1:]]
        except ValueError as error:
            raise ValueError(f"{path} has a cell that is no number in the row {line[0]!r}: {error}.") from None
        rows.append((line[0], dict(zip(header[1:], cells, strict=True))))
    return rows
