"""Recordings of speakers: read from a folder or a csv, shared out by speaker, and listed in manifests.

Three forms are read: VoxCeleb's folders (``id10270/5r0dWxy17C8/00001.wav``), LibriSpeech's
(``103/1240/103-1240-0000.flac``), and a csv with the columns ``id``, ``speaker`` and ``path``.
"""

import csv
import hashlib
import logging
import math
import os
import re
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, fields, replace
from pathlib import Path

import numpy as np
import soundfile
import soxr
from tqdm import tqdm

from shared_modules.files import write_whole

logger = logging.getLogger(__name__)

_SUFFIXES = (".wav", ".flac")
_SELECTION = re.compile(r"(.+\.csv):(-?\d*):(-?\d*)", re.DOTALL)
_SLACK_SECONDS = 0.01  # what a manifest's rounding, or a header's estimate, may be off
_NUM_FOLDERS_ABOVE = 3  # where LibriSpeech's and VoxCeleb's lists of speakers are looked for


@dataclass(frozen=True)
class Utterance:
    """One speaker talks: a recording, or a segment of one.

    Arguments
    ---------
    id : str
        Its name, unique in a corpus.
    speaker : str
        Who talks.
    path : str
        The audio file.
    duration_s : float
        Length of the utterance, in seconds.
    start_s : float
        Where it starts in the file, in seconds.
    sex : str
        ``f``, ``m`` or, where nothing is known, "".
    session : str
        The occasion that it was recorded at; utterances of one share room, microphone and day.

    Example
    -------
    >>> Utterance("103-1240-0000", "103", "103-1240-0000.flac", duration_s=14.085, sex="f", session="1240").start_s
    0.0
    """

    id: str
    speaker: str
    path: str
    duration_s: float
    start_s: float = 0.0
    sex: str = ""
    session: str = ""


def read_corpus(source, min_seconds=0.5, segment_seconds=None, split=None, progressbar=True):
    """List the utterances of a folder or a csv.

    Arguments
    ---------
    source : str or Path
        A folder in VoxCeleb's layout (``speaker/video/utterance.wav``) or LibriSpeech's
        (``speaker/chapter/speaker-chapter-number.flac``), at any depth, or a csv with the columns ``id``, ``speaker``
        and ``path`` (absolute, or relative to the csv's folder) and perhaps ``duration_s``, ``start_s``, ``sex``,
        ``session`` and ``split``. ``<csv>:<start>:<stop>`` takes some of its speakers only: a Python slice of their
        sorted names, e.g. ``test.csv:0:20``.
    min_seconds : float
        Shorter utterances are left out.
    segment_seconds : float, optional
        Recordings of at least twice this length are cut into as many segments of equal length as fit, each at least
        so long; nothing is dropped.
    split : str, optional
        Only the rows of a csv whose column ``split`` is this.
    progressbar : bool
        Whether to show the progress of reading the files' headers, where that takes a while.

    Returns
    -------
    list of Utterance
        Sorted by id. The session is LibriSpeech's chapter, VoxCeleb's video or the csv's column, and else the file.
        The sex is the csv's, or that of ``SPEAKERS.TXT`` or ``vox1_meta.csv``/``vox2_meta.csv`` beside or above.

    Raises
    ------
    ValueError
        If the source is missing, empty, or of no such form; if a file is missing, unreadable or has no samples; if an
        id stands twice, or a cell makes no sense. It names the file and what is wrong.

    Example
    -------
    >>> import tempfile
    >>> folder = Path(tempfile.mkdtemp())
    >>> soundfile.write(folder / "ann.wav", np.zeros(8 * 8000), 8000)
    >>> _ = (folder / "all.csv").write_text("id,speaker,path\\nann-1,ann,ann.wav\\n")
    >>> [(u.id, u.start_s, u.duration_s) for u in read_corpus(folder / "all.csv", segment_seconds=3)]
    [('ann-1-seg00', 0.0, 4.0), ('ann-1-seg01', 4.0, 4.0)]
    """
    for name, value in (("min_seconds", min_seconds), ("segment_seconds", segment_seconds)):
        if value is not None and not (isinstance(value, int | float) and 0 < value < math.inf):
            raise ValueError(f"{name} can only be a positive number of seconds, but got {value!r}.")
    selection = _SELECTION.fullmatch(str(source))
    path = Path(selection[1] if selection and not Path(source).exists() else source)
    if path.is_dir():
        if split is not None:
            raise ValueError(f"split can only be given for a csv, but {path} is a folder.")
        utterances = _list_folder(path)
    elif path.exists():
        utterances = _list_csv(path, split)
    else:
        raise ValueError(f"{path} does not exist: expected a folder of recordings or a csv.")
    if selection and path != Path(source):
        utterances = _select_speakers(utterances, source, selection[2], selection[3])
    utterances = _measure(utterances, progressbar)
    if segment_seconds is not None:
        utterances = [part for utterance in utterances for part in cut(utterance, segment_seconds)]
    _refuse_repeated(utterances, source)
    kept = [utterance for utterance in utterances if utterance.duration_s >= min_seconds]
    if not kept:
        raise ValueError(f"{source}: none of its {len(utterances)} utterances is {min_seconds} s long or longer.")
    if len(kept) < len(utterances):
        logger.info(
            "%s: %d utterances shorter than %g s are left out.", source, len(utterances) - len(kept), min_seconds
        )
    return sorted(kept, key=lambda utterance: utterance.id)


def cut(utterance, segment_seconds):
    """Cut an utterance into as many segments of equal length as fit.

    Arguments
    ---------
    utterance : Utterance
        What to cut.
    segment_seconds : float
        The least length of a segment.

    Returns
    -------
    list of Utterance
        The utterance itself where it is shorter than two segments.

    Example
    -------
    >>> [part.start_s for part in cut(Utterance("a", "ann", "a.wav", duration_s=10.0), 3)]
    [0.0, 3.3333, 6.6667]
    """
    num_segments = int(utterance.duration_s / segment_seconds + 1e-9)
    if num_segments < 2:
        return [utterance]
    edges = [round(utterance.duration_s * k / num_segments, 4) for k in range(num_segments + 1)]
    return [
        replace(
            utterance,
            id=f"{utterance.id}-seg{k:02d}",
            start_s=round(utterance.start_s + edges[k], 4),
            duration_s=round(edges[k + 1] - edges[k], 4),
            session=utterance.session or utterance.path,
        )
        for k in range(num_segments)
    ]


def split_speakers(utterances, shares, seed=0):
    """Share utterances out so that no two parts have a speaker in common.

    Who goes where follows from the seed and the speakers' names alone, not from their order.

    Arguments
    ---------
    utterances : list of Utterance
        What to share out.
    shares : list of float
        The share of the speakers that each part gets; they sum up to 1.
    seed : int
        Of the draw.

    Returns
    -------
    list of list of Utterance
        In the order of ``shares``; the utterances keep their order.

    Raises
    ------
    ValueError
        If the shares are not positive or do not sum up to 1, or there are too few speakers for each part to get one.

    Example
    -------
    >>> utterances = [Utterance(f"u{k}", f"spk{k}", "a.wav", 1.0) for k in range(10)]
    >>> [len(part) for part in split_speakers(utterances, [0.7, 0.3], seed=1)]
    [7, 3]
    """
    shares = list(shares)
    if not shares or min(shares) <= 0 or abs(sum(shares) - 1) > 1e-6:
        raise ValueError(f"shares can only be positive numbers that sum up to 1, but got {shares}.")
    speakers = sorted(
        {utterance.speaker for utterance in utterances},
        key=lambda speaker: (hashlib.blake2b(f"{seed}/{speaker}".encode(), digest_size=8).digest(), speaker),
    )
    if len(speakers) < len(shares):
        raise ValueError(f"{len(shares)} parts need a speaker each, but there are {len(speakers)} speakers.")
    edges = [round(len(speakers) * share) for share in np.cumsum([0.0, *shares])]
    for k in range(1, len(shares)):  # each part gets a speaker at least, also where a share is small
        edges[k] = min(max(edges[k], edges[k - 1] + 1), len(speakers) - len(shares) + k)
    part_of = {speaker: int(np.searchsorted(edges, rank, "right")) - 1 for rank, speaker in enumerate(speakers)}
    return [[u for u in utterances if part_of[u.speaker] == part] for part in range(len(shares))]


def read_voxceleb_trials(path):
    """Read a list of trials in the form of VoxCeleb's ``veri_test.txt``.

    Arguments
    ---------
    path : str or Path
        A line for each trial: ``1`` (same speaker) or ``0``, and the paths of two recordings.

    Returns
    -------
    list of (int, str, str)
        Label, and the ids of the enrolled and the tested utterance, as :func:`read_corpus` names those of VoxCeleb's
        folders: the path without its ending.

    Raises
    ------
    ValueError
        If the file cannot be read, has no trials, or a line is no trial.

    Example
    -------
    >>> import tempfile
    >>> path = Path(tempfile.mkdtemp()) / "veri_test.txt"
    >>> _ = path.write_text("1 id10270/x6uYqmx31kE/00001.wav id10270/8jEAjG6SegY/00008.wav\\n")
    >>> read_voxceleb_trials(path)
    [(1, 'id10270/x6uYqmx31kE/00001', 'id10270/8jEAjG6SegY/00008')]
    """
    try:
        lines = Path(path).read_text(encoding="utf-8-sig").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise ValueError(f"The list of trials {path} cannot be read: {_reason(error)}.") from None
    trials = []
    for number, line in enumerate(lines, start=1):
        cells = line.split()
        if not cells:
            continue
        if len(cells) != 3 or cells[0] not in ("0", "1"):
            raise ValueError(f"{path}, line {number}: expected 0 or 1 and two recordings, but got {line!r}.")
        trials.append((int(cells[0]), *(re.sub(r"\.(wav|flac|m4a)$", "", name) for name in cells[1:])))
    if not trials:
        raise ValueError(f"{path} lists no trials.")
    return trials


def write_corpus(path, utterances):
    """Write utterances as a csv that :func:`read_corpus` reads back, whole or not at all.

    Arguments
    ---------
    path : str or Path
        The csv; its folder must exist. Paths of the recordings are written as absolute ones.
    utterances : list of Utterance
        What to write.

    Example
    -------
    >>> import tempfile
    >>> path = Path(tempfile.mkdtemp()) / "all.csv"
    >>> write_corpus(path, [Utterance("a-1", "ann", "/a.wav", 2.0)])
    >>> path.read_text().splitlines()
    ['id,speaker,path,duration_s,start_s,sex,session', 'a-1,ann,/a.wav,2.0,0.0,,']
    """
    names = [field.name for field in fields(Utterance)]
    with write_whole(path) as stream:
        writer = csv.writer(stream, lineterminator="\n")
        writer.writerow(names)
        for utterance in utterances:
            absolute = replace(utterance, path=os.path.abspath(utterance.path))
            writer.writerow([getattr(absolute, name) for name in names])


def read_utterance(utterance, sample_rate, offset_s=0.0, num_seconds=None):
    """Read an utterance, or a stretch of it, as one channel at a sample rate. Only that stretch is read from the disk.

    Arguments
    ---------
    utterance : Utterance
        What to read; several channels are averaged.
    sample_rate : int
        Hz; a recording at another rate is resampled.
    offset_s : float
        Where the stretch starts in the utterance, in seconds.
    num_seconds : float, optional
        Its length; None, or more than there is: up to the utterance's end.

    Returns
    -------
    numpy.ndarray
        [T], float32.

    Raises
    ------
    ValueError
        If the file is missing, no readable audio, empty, shorter than the utterance, or holds values that are not
        finite.

    Example
    -------
    >>> import tempfile
    >>> path = f"{tempfile.mkdtemp()}/a.wav"
    >>> soundfile.write(path, np.zeros((16000, 2)), 16000)
    >>> read_utterance(Utterance("a", "ann", path, 1.0), 8000, num_seconds=0.25).shape
    (2000,)
    """
    path = utterance.path
    wanted_s = utterance.duration_s - offset_s
    if num_seconds is not None:
        wanted_s = min(wanted_s, num_seconds)
    try:
        with soundfile.SoundFile(path) as file:
            rate = file.samplerate
            start, num_frames = round((utterance.start_s + offset_s) * rate), round(wanted_s * rate)
            file.seek(min(start, file.frames))
            samples = file.read(num_frames, dtype="float32", always_2d=True)  # (T, channels)
    except (soundfile.LibsndfileError, OSError) as error:
        raise ValueError(f"{path} cannot be read: {_audio_fault(path, error)}.") from None
    if len(samples) < max(num_frames - math.ceil(_SLACK_SECONDS * rate), 1):
        raise ValueError(
            f"{path} ends before utterance {utterance.id} does, or is damaged: {num_frames} samples from "
            f"{start} on were expected, but got {len(samples)}."
        )
    if not np.isfinite(samples).all():
        raise ValueError(f"{path} holds values that are not finite (in utterance {utterance.id}).")
    samples = samples[:, 0] if samples.shape[1] == 1 else samples.mean(axis=1, dtype=np.float32)  # (T,)
    if rate != sample_rate:
        samples = soxr.resample(samples, rate, sample_rate)
    return np.ascontiguousarray(samples)


def _reason(error):
    return (getattr(error, "strerror", None) or str(error)).rstrip(".")


def _audio_fault(path, error):
    """In words what keeps soundfile from reading a file."""
    if not os.path.exists(path):
        return "it does not exist"
    if os.path.isfile(path) and os.path.getsize(path) == 0:
        return "it is empty"
    return str(getattr(error, "error_string", "") or _reason(error)).strip().rstrip(".")


def _list_folder(folder):
    """The recordings of a folder, their durations not yet known (NaN)."""
    found, num_m4a = [], 0
    for where, folders, names in os.walk(folder, followlinks=True):
        folders.sort()
        num_m4a += sum(name.endswith(".m4a") for name in names)
        found += [Path(where, name) for name in sorted(names) if name.lower().endswith(_SUFFIXES)]
    if not found and num_m4a:
        raise ValueError(f"{folder} holds {num_m4a} m4a files, which cannot be read: convert them to wav or flac.")
    if not found:
        raise ValueError(f"{folder} holds no wav or flac files.")
    sexes = _read_sexes(folder)
    utterances = []
    for path in found:
        parts = path.relative_to(folder).parts
        if len(parts) < 3:
            raise ValueError(
                f"{path} stands in no folder speaker/session of {folder}, as in VoxCeleb or LibriSpeech; "
                "list such recordings in a csv (id,speaker,path)."
            )
        speaker, session = parts[-3:-1]
        is_librispeech = re.fullmatch(rf"{re.escape(speaker)}-{re.escape(session)}-\d+", path.stem) is not None
        utterance_id = path.stem if is_librispeech else f"{speaker}/{session}/{path.stem}"
        utterances.append(Utterance(utterance_id, speaker, str(path), math.nan, 0.0, sexes.get(speaker, ""), session))
    return utterances


def _list_csv(path, split):
    """The rows of a csv; a duration that it does not tell is NaN."""
    try:
        with open(path, newline="", encoding="utf-8-sig") as stream:  # Excel writes a mark
            reader = csv.DictReader(stream)
            rows = list(reader)
            columns = reader.fieldnames or []
    except (OSError, UnicodeDecodeError, csv.Error) as error:
        raise ValueError(f"{path} cannot be read as a csv: {_reason(error)}.") from None
    needed = ("id", "speaker", "path") if split is None else ("id", "speaker", "path", "split")
    missing = [name for name in needed if name not in columns]
    if columns and missing:
        raise ValueError(f"{path} has no column {missing[0]!r}; its columns are {', '.join(columns)}.")
    if not rows:
        raise ValueError(f"{path} has no rows.")
    sexes = _read_sexes(path.parent) if "sex" not in columns else {}
    utterances = []
    for number, row in enumerate(rows, start=2):
        if split is not None and row["split"] != split:
            continue
        if not (row["id"] and row["speaker"] and row["path"]):
            raise ValueError(f"{path}, row {number}: id, speaker and path must not be empty.")
        file = path.parent / row["path"]
        if not file.is_file():
            raise ValueError(f"{file}, which {path} lists (row {number}), does not exist.")
        times = [_read_seconds(path, number, row, name) for name in ("duration_s", "start_s")]
        sex = (row.get("sex") or sexes.get(row["speaker"], "")).strip().lower()[:1]
        if sex not in ("", "f", "m"):
            raise ValueError(f"{path}, row {number}: sex can only be f, m or empty, but got {row['sex']!r}.")
        if not math.isnan(times[1]) and math.isnan(times[0]):
            raise ValueError(f"{path}, row {number}: it has a start_s, but no duration_s.")
        start_s = 0.0 if math.isnan(times[1]) else times[1]
        session = row.get("session") or str(file)
        utterances.append(Utterance(row["id"], row["speaker"], str(file), times[0], start_s, sex, session))
    if not utterances:
        raise ValueError(f"{path} has no rows whose split is {split!r}.")
    return utterances


def _read_seconds(path, number, row, name):
    """A cell that holds seconds; NaN where it is empty or missing."""
    text = row.get(name) or ""
    try:
        seconds = float(text) if text else math.nan
    except ValueError:
        seconds = -1.0
    if (text and not 0 <= seconds < math.inf) or (name == "duration_s" and seconds == 0):
        raise ValueError(f"{path}, row {number}: {name} can only be a number of seconds, but got {text!r}.")
    return seconds


def _read_sexes(folder):
    """From a speaker to ``f`` or ``m``, from LibriSpeech's and VoxCeleb's own lists beside or above a folder."""
    folder = Path(folder).absolute()
    sexes = {}
    for above in (folder, *folder.parents[:_NUM_FOLDERS_ABOVE]):
        for name, separator, sex_column in (
            ("SPEAKERS.TXT", "|", 1),
            ("vox1_meta.csv", "\t", 2),
            ("vox2_meta.csv", ",", 2),
        ):
            if not (above / name).is_file():
                continue
            for line in (above / name).read_text(encoding="utf-8", errors="replace").splitlines():
                cells = [cell.strip() for cell in line.split(separator)]
                if len(cells) > sex_column and cells[sex_column].lower() in ("f", "m"):
                    sexes.setdefault(cells[0], cells[sex_column].lower())
    return sexes


def _select_speakers(utterances, source, start, stop):
    speakers = sorted({utterance.speaker for utterance in utterances})
    chosen = set(speakers[slice(*(int(edge) if edge else None for edge in (start, stop)))])
    if not chosen:
        raise ValueError(f"{source} selects none of the {len(speakers)} speakers.")
    return [utterance for utterance in utterances if utterance.speaker in chosen]


def _measure(utterances, progressbar):
    """Find out the durations that are not known, from the files' headers."""

    def measure(utterance):
        if not math.isnan(utterance.duration_s):
            return utterance
        path = utterance.path
        try:
            info = soundfile.info(path)
        except (soundfile.LibsndfileError, OSError) as error:
            raise ValueError(f"{path} cannot be read as audio: {_audio_fault(path, error)}.") from None
        if info.frames == 0:
            raise ValueError(f"{path} is empty: it has no samples.")
        return replace(utterance, duration_s=round(info.frames / info.samplerate, 6))

    if not any(math.isnan(utterance.duration_s) for utterance in utterances):
        return utterances
    with ThreadPoolExecutor(max_workers=8) as pool:
        measured = pool.map(measure, utterances)
        # Short work needs no bar.
        return list(tqdm(measured, "Reading headers", len(utterances), disable=not progressbar, delay=2, leave=False))


def _refuse_repeated(utterances, source):
    counts = Counter(utterance.id for utterance in utterances)
    repeated = sorted(name for name, count in counts.items() if count > 1)
    if repeated:
        raise ValueError(f"{source}: ids must be unique, but {repeated[0]!r} stands {counts[repeated[0]]} times.")
