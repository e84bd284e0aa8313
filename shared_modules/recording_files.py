"""Which recordings a command line means."""

import os
import re
from pathlib import Path

import soundfile

from shared_modules.errors import RunError

VOICE = re.compile(r"(.+)_spk\d+\.wav")  # a file of a separated voice
# In a folder, a recording is what has one of these endings: soundfile's formats and their other usual names.
_ENDINGS = {f".{name.lower()}" for name in soundfile.available_formats()} - {".raw", ".sd2", ".mat4", ".mat5"}
_ENDINGS |= {".wave", ".aif", ".aifc", ".snd", ".oga", ".opus", ".sph", ".mp2"}
_OTHER_AUDIO = {".m4a", ".aac", ".wma", ".amr", ".ac3", ".mp4", ".mkv", ".mov", ".webm"}  # soundfile reads none
_NUM_NAMED = 3


def find_recordings(sources, output):
    """The recordings that are meant by files and folders.

    Arguments
    ---------
    sources : list of str
        Files, taken as they are; folders, searched with all that is in them, but for hidden files, for what has
        the ending of a format that soundfile reads; ``-`` for standard input.
    output : Path
        The folder of the voices: those that lie there from earlier are no recordings.

    Returns
    -------
    found : list of (Path or None, Path)
        Each recording (None: standard input) and its folder, relative to the one given; folders in sorted order.
    notes : list of str
        A sentence each on what was left out.

    Example
    -------
    >>> find_recordings(["meeting.wav"], Path("out"))
    ([(PosixPath('meeting.wav'), PosixPath('.'))], [])
    """
    found, voices, others = [], [], []
    output = output.resolve()
    for source in sources:
        path = Path(source)
        if source == "-":
            found.append((None, Path()))
        elif not source:
            raise RunError("The name of a recording can only be a path, but got an empty one.")
        elif not os.path.isdir(path):  # a Path raises where it may not look
            found.append((path, Path()))
        else:
            for file in _walk(path):
                if file.suffix.lower() in _OTHER_AUDIO:
                    others.append(file)
                elif file.suffix.lower() in _ENDINGS:
                    is_voice = VOICE.fullmatch(file.name) and file.parent.resolve().is_relative_to(output)
                    voices.append(file) if is_voice else found.append((file, file.parent.relative_to(path)))
    notes = []
    if voices:
        notes.append(f"left out {_named(voices)}: voices of earlier runs")
    if others:
        notes.append(f"left out {_named(others)}: no format that soundfile reads; ffmpeg makes wav files of them")
    return found, notes


def _walk(folder):
    """The files of a folder and of all in it, links followed but none twice, sorted; nothing hidden."""
    seen = set()
    for place, subfolders, names in os.walk(folder, onerror=_cannot_look, followlinks=True):
        real = os.path.realpath(place)
        subfolders[:] = [] if real in seen else sorted(name for name in subfolders if not name.startswith("."))
        if real not in seen:
            yield from (Path(place) / name for name in sorted(names) if not name.startswith("."))
        seen.add(real)


def _cannot_look(error):
    raise RunError(f"{error.filename} cannot be searched: {error.strerror}.")


def _named(paths):
    """A few of many paths, and how many more there are."""
    rest = len(paths) - _NUM_NAMED
    return ", ".join(map(str, paths[:_NUM_NAMED])) + (f" and {rest} more" if rest > 0 else "")
