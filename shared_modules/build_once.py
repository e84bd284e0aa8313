"""Generated data: a folder that is built once for its settings, and is whole or not there."""

import hashlib
import shutil
import tempfile
from pathlib import Path

from filelock import FileLock


def build_once(folder, name, text, build):
    """Build the folder ``<folder>/<name>-<hash of text>``, unless it exists.

    It is built beside and renamed, so that it appears whole or not at all. A second process (another rank) waits
    and then finds it; whoever builds removes what killed runs left.

    Arguments
    ---------
    folder : str or Path
        Created where it is missing.
    name : str
        What the folder's name starts with; must be able to name a file.
    text : str
        All that the result depends on, the version of the generator included. It is kept as ``generated.json``.
    build : callable
        Called with the path of an empty folder, which it fills.

    Returns
    -------
    Path
        The folder.

    Example
    -------
    >>> folder = Path(tempfile.mkdtemp())
    >>> built = build_once(folder, "data", '{"seed": 1}', lambda root: (root / "a.txt").write_text("a"))
    >>> built == build_once(folder, "data", '{"seed": 1}', build=None)
    True
    >>> sorted(path.name for path in built.iterdir())
    ['a.txt', 'generated.json']
    """
    folder = Path(folder)
    name = f"{name}-{hashlib.sha256(text.encode()).hexdigest()[:8]}"
    final = folder / name
    if final.is_dir():
        return final
    folder.mkdir(parents=True, exist_ok=True)
    with FileLock(folder / f".{name}.lock"):
        if final.is_dir():
            return final
        for stale in folder.glob(f".{name}.tmp*"):
            shutil.rmtree(stale)
        temporary = Path(tempfile.mkdtemp(prefix=f".{name}.tmp", dir=folder))
        try:
            build(temporary)
            (temporary / "generated.json").write_text(text, encoding="utf-8")
            temporary.chmod(0o755)  # mkdtemp's is for the owner only
            temporary.rename(final)
        finally:
            shutil.rmtree(temporary, ignore_errors=True)
    return final
