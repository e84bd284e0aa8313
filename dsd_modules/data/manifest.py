"""Manifests: the csv files that name the mixtures of a set, and the check of the audio behind them.

A manifest is sorted by id, so that a mixture's row is the same on every machine. Its columns are ``ID``, ``duration``
(in seconds) and what the reader of its signals needs: for audio files ``mix_wav, s1_wav, s2_wav, ...`` (paths).
"""

import csv
import os
import re
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import soundfile
from tqdm import tqdm

from shared_modules.files import write_table

# libsndfile shortens the data of a wav to what the file holds, and tells only in its log. Lengths near 2 GiB and
# above stand for "unknown" in wavs that were written to a pipe.
_CUT_OFF = re.compile(r"^data : (\d+) \(should be (\d+)\)", re.MULTILINE)
_UNKNOWN_BYTES = 2**31 - 2**16


def is_cut_off(path, info):
    """Whether a file ends before its header says; ``info`` is soundfile's (``soundfile.info(path, verbose=True)``)."""
    if info.format in ("WAV", "WAVEX"):
        promised, present = map(int, match.groups()) if (match := _CUT_OFF.search(info.extra_info)) else (0, 0)
        return present < promised < _UNKNOWN_BYTES
    try:  # compressed: the header tells nothing
        return info.frames > 0 and len(soundfile.read(path, start=info.frames - 1)[0]) != 1
    except soundfile.LibsndfileError:
        return True


def _inspect(mixture, root, sample_rate, min_samples):
    """What is wrong with a mixture's files, or their common number of samples."""
    length, num_samples = mixture.get("length"), None
    for name, path in mixture.items():
        if not name.endswith("_wav"):
            continue
        path = os.path.join(root, path)
        try:
            info = soundfile.info(path, verbose=True)
        except (soundfile.LibsndfileError, OSError):
            is_refused = Path(path).is_file() and not os.access(path, os.R_OK)
            reason = "is not a readable audio file" if Path(path).is_file() else "does not exist"
            reason = "may not be read (permission denied)" if is_refused else reason
            return f"{path} (of mixture {mixture['ID']}) {reason}"
        if info.samplerate != sample_rate:
            return f"{path} has a sample rate of {info.samplerate} Hz, but sample_rate is {sample_rate}"
        if info.channels != 1:
            return f"{path} has {info.channels} channels, but one was expected"
        if is_cut_off(path, info):
            return f"{path} is cut off: it ends before its header says"
        if info.frames < min_samples:
            return f"{path} has {info.frames} samples, but at least {min_samples} are needed"
        if length not in (None, info.frames):
            return f"{path} has {info.frames} samples, but its metadata say {length}"
        if num_samples not in (None, info.frames):
            return f"{path} has {info.frames} samples, but its mixture {mixture['mix_wav']} has {num_samples}"
        num_samples = info.frames
        if info.subtype in ("FLOAT", "DOUBLE") and not np.isfinite(soundfile.read(path)[0]).all():
            return f"{path} holds values that are not finite"
    return num_samples


def check_audio(mixtures, root, sample_rate, min_samples=1, progressbar=True):
    """Check the audio files of mixtures, and find their durations.

    Arguments
    ---------
    mixtures : list of dict
        ``ID``, ``mix_wav``, ``s1_wav``, ..., and perhaps ``length``: the number of samples that each must have.
    root : str or Path
        The folder where relative paths start.
    sample_rate : int
        What every file must have, Hz.
    min_samples : int
        How many samples a mixture must have: the encoder's kernel.
    progressbar : bool
        Whether to show the progress of the check.

    Returns
    -------
    list of dict
        The rows of a manifest, in the order of the mixtures.

    Raises
    ------
    ValueError
        If a file is missing, unreadable, cut off, too short, not finite, not mono, or of another sample rate or
        length than its mixture: the first such file, and how many mixtures have such a fault.
    """
    with ThreadPoolExecutor(max_workers=8) as pool:
        found = pool.map(lambda mixture: _inspect(mixture, root, sample_rate, min_samples), mixtures)
        # Short checks need no bar.
        found = list(tqdm(found, "checking", len(mixtures), disable=not progressbar, delay=2, leave=False))
    faults = [fault for fault in found if isinstance(fault, str)]
    if faults:
        raise ValueError(f"{faults[0]}; {len(faults)} of {len(mixtures)} mixtures have such a fault.")
    return [
        {
            "ID": mixture["ID"],
            "duration": num_samples / sample_rate,
            **{name: value for name, value in mixture.items() if name.endswith(("_wav", "_speaker"))},
        }
        for mixture, num_samples in zip(mixtures, found, strict=True)
    ]


def sort_by_id(mixtures, where):
    """The mixtures sorted by their ids, which must be unique and can name files.

    Arguments
    ---------
    mixtures : list of dict
        Each has an ``ID``.
    where : str
        Where they come from, for the error.

    Returns
    -------
    list of dict

    Raises
    ------
    ValueError
        If there is none, an id stands twice (the first such id, and how many there are), or one cannot name a file.

    Example
    -------
    >>> sort_by_id([{"ID": "b"}, {"ID": "a"}], "an example")
    [{'ID': 'a'}, {'ID': 'b'}]
    >>> sort_by_id([{"ID": "b"}, {"ID": "b"}], "an example")
    Traceback (most recent call last):
    ValueError: Mixture ids must be unique, but 'b' stands 2 times in an example; 1 ids are not unique.
    """
    if not mixtures:
        raise ValueError(f"There are no mixtures in {where}.")
    counts = Counter(mixture["ID"] for mixture in mixtures)
    repeated = sorted(sample_id for sample_id, count in counts.items() if count > 1)
    if repeated:
        raise ValueError(
            f"Mixture ids must be unique, but {repeated[0]!r} stands {counts[repeated[0]]} times in {where}; "
            f"{len(repeated)} ids are not unique."
        )
    for sample_id in counts:
        if sample_id in ("mean", ".", "..") or "/" in sample_id or len(sample_id.encode()) > 200:
            raise ValueError(
                f"An id can be a file name of at most 200 bytes other than 'mean', but got {sample_id!r} in {where}."
            )
    return sorted(mixtures, key=lambda mixture: mixture["ID"])


def write_manifest(path, rows):
    """Write a manifest, whole or not at all.

    Arguments
    ---------
    path : str or Path
        The csv to write; its folder must exist.
    rows : list of dict
        At least one, sorted by id; all have the same keys, ``ID`` and ``duration`` among them.
    """
    write_table(path, rows)


def read_rows(path, kind):
    """The rows of a csv with a header.

    Arguments
    ---------
    path : str or Path
        The csv.
    kind : str
        What it is, for the error.

    Returns
    -------
    list of dict
        At least one.

    Raises
    ------
    ValueError
        If it cannot be read, or has no rows.

    Example
    -------
    >>> read_rows("missing.csv", "manifest")
    Traceback (most recent call last):
    ValueError: The manifest missing.csv cannot be read: No such file or directory.
    """
    try:
        with open(path, newline="", encoding="utf-8-sig") as stream:  # Excel writes a mark
            rows = list(csv.DictReader(stream))
    except (OSError, UnicodeDecodeError, csv.Error) as error:
        raise ValueError(f"The {kind} {path} cannot be read: {getattr(error, 'strerror', None) or error}.") from None
    if not rows:
        raise ValueError(f"The {kind} {path} has no rows.")
    return rows


def read_mixtures(path, num_spks):
    """The mixtures that a user's own manifest names.

    Arguments
    ---------
    path : str
        A csv with the columns ``ID`` (or ``id``), ``mix_wav`` (or ``mix_path``), ``s1_wav`` (or ``s1_path``), ...;
        relative paths start at the csv's folder. ``s1_speaker``, ... are kept, other columns are ignored.
    num_spks : int
        How many sources are expected.

    Returns
    -------
    list of dict
        ``ID``, ``mix_wav``, ``s1_wav``, ... (absolute paths) and perhaps ``s1_speaker``, ..., sorted by id.

    Raises
    ------
    ValueError
        If the file is missing, lacks a column, or holds an id twice, or one that cannot name files.
    """
    path = Path(path).absolute()
    rows = read_rows(path, "manifest")
    signals = ["mix", *(f"s{spk}" for spk in range(1, num_spks + 1))]
    columns = {}
    for name, choices in {"ID": ("ID", "id"), **{f"{s}_wav": (f"{s}_wav", f"{s}_path") for s in signals}}.items():
        present = [choice for choice in choices if choice in rows[0]]
        if not present:
            raise ValueError(
                f"The manifest {path} has no column {' or '.join(choices)} (num_spks is {num_spks}); "
                f"its columns are {', '.join(map(str, rows[0]))}."
            )
        columns[name] = present[0]
    extra = f"s{num_spks + 1}"
    if any(f"{extra}_{suffix}" in rows[0] for suffix in ("wav", "path")):
        raise ValueError(f"The manifest {path} has a source {extra}, but num_spks is {num_spks}.")
    speakers = [f"{signal}_speaker" for signal in signals[1:] if f"{signal}_speaker" in rows[0]]
    mixtures = []
    for number, row in enumerate(rows, 2):
        mixture = {name: row[column] for name, column in columns.items()}
        if not all(mixture.values()):
            raise ValueError(f"Line {number} of the manifest {path} has an empty cell.")
        sample_id = mixture.pop("ID")
        paths = {name: str(path.parent / wav) for name, wav in mixture.items()}
        mixtures.append({"ID": sample_id, **paths, **{name: row[name] for name in speakers}})
    return sort_by_id(mixtures, f"the manifest {path}")


def refuse_shared_mixtures(sets, column):
    """Refuse a mixture that is both trained on and scored.

    Arguments
    ---------
    sets : list of list of dict
        The mixtures of the sets.
    column : str
        What tells a mixture: ``ID``, or ``mix_wav``, the path of its file.

    Raises
    ------
    ValueError
        The first mixture that stands in two sets.

    Example
    -------
    >>> refuse_shared_mixtures([[{"ID": "a"}, {"ID": "b"}], [{"ID": "b"}]], "ID")
    Traceback (most recent call last):
    ValueError: 1 mixtures stand in two of the training, validation and test sets, the first b.
    """
    names = [
        {os.path.realpath(mixture[column]) if column == "mix_wav" else mixture[column] for mixture in mixtures}
        for mixtures in sets
    ]
    shared = {name for number, one in enumerate(names) for other in names[:number] for name in one & other}
    if shared:
        raise ValueError(
            f"{len(shared)} mixtures stand in two of the training, validation and test sets, the first {min(shared)}."
        )
