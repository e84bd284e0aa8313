"""Manifests: the csv files that name the mixtures of a set, and the check of the audio behind them.

A manifest has SpeechBrain's columns ``ID, duration, mix_wav, s1_wav, s2_wav, ...`` (seconds, paths), and is
sorted by id, so that a mixture's row is the same on every machine.
"""

import csv
import itertools
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import soundfile
from tqdm import tqdm

from dsd_modules.files import write_whole


def _inspect(mixture, sample_rate, min_samples):
    """What is wrong with a mixture's files, or their common number of samples."""
    mixture_id, *paths = mixture
    num_samples = None
    for path in paths:
        try:
            info = soundfile.info(path)
        except (soundfile.LibsndfileError, OSError):
            reason = "does not exist" if not Path(path).is_file() else "is not a readable audio file"
            return f"{path} (of mixture {mixture_id}) {reason}"
        if info.samplerate != sample_rate:
            return f"{path} has a sample rate of {info.samplerate} Hz, but sample_rate is {sample_rate}"
        if info.channels != 1:
            return f"{path} has {info.channels} channels, but one was expected"
        if info.frames < min_samples:
            return f"{path} has {info.frames} samples, but at least {min_samples} are needed"
        if num_samples not in (None, info.frames):
            return f"{path} has {info.frames} samples, but its mixture {paths[0]} has {num_samples}"
        num_samples = info.frames
        if info.subtype in ("FLOAT", "DOUBLE") and not np.isfinite(soundfile.read(path)[0]).all():
            return f"{path} holds values that are not finite"
    return num_samples


def write_manifest(path, mixtures, sample_rate, min_samples=1, progressbar=True):
    """Check the audio of all mixtures and write their manifest, whole or not at all.

    Arguments
    ---------
    path : str
        The manifest to write.
    mixtures : list of tuple
        ``(id, path of the mixture, path of source 1, ...)``.
    sample_rate : int
        What every file must have, Hz.
    min_samples : int
        How many samples a mixture must have: the encoder's kernel.
    progressbar : bool
        Whether to show the progress of the check.

    Raises
    ------
    ValueError
        If there is no mixture, an id stands twice, or a file is missing, unreadable, too short, not finite, not
        mono, or of another sample rate or length than its mixture: the first such file, and how many there are.
    """
    if not mixtures:
        raise ValueError(f"There are no mixtures for {Path(path).name}.")
    mixtures = sorted(mixtures, key=lambda mixture: mixture[0])
    for (one, *_), (other, *_) in itertools.pairwise(mixtures):
        if one == other:
            raise ValueError(f"Mixture ids must be unique, but {one!r} stands twice in the data of {Path(path).name}.")
    with ThreadPoolExecutor(max_workers=8) as pool:
        found = pool.map(lambda mixture: _inspect(mixture, sample_rate, min_samples), mixtures)
        # Short checks need no bar.
        found = list(
            tqdm(found, f"checking {Path(path).stem}", len(mixtures), disable=not progressbar, delay=2, leave=False)
        )
    faults = [fault for fault in found if isinstance(fault, str)]
    if faults:
        raise ValueError(f"{faults[0]}; {len(faults)} of {len(mixtures)} mixtures have such a fault.")
    num_spks = len(mixtures[0]) - 2
    with write_whole(path, "w") as stream:
        writer = csv.writer(stream, lineterminator="\n")
        writer.writerow(["ID", "duration", "mix_wav", *(f"s{spk}_wav" for spk in range(1, num_spks + 1))])
        for (mixture_id, *paths), num_samples in zip(mixtures, found, strict=True):
            writer.writerow([mixture_id, num_samples / sample_rate, *paths])


def read_mixtures(path, num_spks):
    """The mixtures that a manifest names: one written here, or a user's own.

    Arguments
    ---------
    path : str
        A csv with the columns ``ID`` (or ``id``), ``mix_wav`` (or ``mix_path``), ``s1_wav`` (or ``s1_path``), ...;
        relative paths start at the csv's folder. Other columns are ignored.
    num_spks : int
        How many sources are expected.

    Returns
    -------
    list of tuple
        ``(id, path of the mixture, path of source 1, ...)``.

    Raises
    ------
    ValueError
        If the file is missing, lacks a column, or holds an id that cannot name files.
    """
    path = Path(path)
    signals = ["mix", *(f"s{spk}" for spk in range(1, num_spks + 1))]
    try:
        with open(path, newline="", encoding="utf-8-sig") as stream:  # Excel writes a mark
            rows = list(csv.DictReader(stream))
    except (OSError, UnicodeDecodeError, csv.Error) as error:
        raise ValueError(f"The manifest {path} cannot be read: {getattr(error, 'strerror', None) or error}.") from None
    if not rows:
        raise ValueError(f"The manifest {path} has no rows.")
    columns = {}
    for name, choices in {"ID": ("ID", "id"), **{s: (f"{s}_wav", f"{s}_path") for s in signals}}.items():
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
    for number, row in enumerate(rows, 2):
        if not all(row[column] for column in columns.values()):
            raise ValueError(f"Line {number} of the manifest {path} has an empty cell.")
        sample_id = row[columns["ID"]]
        if sample_id in ("mean", ".", "..") or "/" in sample_id or len(sample_id.encode()) > 200:
            raise ValueError(
                f"Line {number} of the manifest {path}: an id can be a file name of at most 200 bytes other than "
                f"'mean', but got {sample_id!r}."
            )
    return [(row[columns["ID"]], *(str(path.parent / row[columns[signal]]) for signal in signals)) for row in rows]


def refuse_shared_mixtures(sets):
    """Refuse a mixture that is both trained on and scored.

    Arguments
    ---------
    sets : list of list of tuple
        From :func:`read_mixtures`.

    Raises
    ------
    ValueError
        The first mixture that stands in two sets.
    """
    for one, other in itertools.combinations(sets, 2):
        shared = {Path(mixture[1]).resolve() for mixture in one} & {Path(mixture[1]).resolve() for mixture in other}
        if shared:
            raise ValueError(f"{len(shared)} mixtures stand in two of the manifests, the first {min(shared)}.")
