"""Mixes a corpus of single-speaker recordings as LibriMix does, into a folder shaped like LibriMix's.

The recipe follows Cosentino et al., "LibriMix: an open-source dataset for generalizable speech separation"
(arXiv 2005.11262): each source's loudness is drawn uniformly from -33 to -25 LUFS (noise: -38 to -30), sources
are scaled down together where something would exceed a peak of 0.9, and the mixture is their sum.

What is different: an utterance is used in several mixtures, may be cut to a random segment, and the written
mixture is the exact sum of the written 16-bit sources. Loudness is that of the whole utterance, as there.
"""

import csv
import math
import zlib
from collections import Counter
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import soundfile

from shared_modules.corpus import resample, run_parallel, write_csv

_MAX_AMPLITUDE = 0.9
_SPEECH_LUFS = (-33.0, -25.0)
_NOISE_LUFS = (-38.0, -30.0)
_MIN_SECONDS = 0.4  # the block that loudness is measured in


@dataclass(frozen=True)
class Utterance:
    """One recording of a corpus: its name, who speaks, the path as the csv has it, the file, the words.

    Recordings of one ``voice`` never meet in a mixture; by default a voice is a speaker.
    """

    id: str
    speaker: str
    path: str
    file: Path
    text: str = ""
    voice: str = ""


@dataclass
class MixSettings:
    """How to mix.

    Arguments
    ---------
    num_spks : int
        Speakers per mixture, 2 or more.
    sample_rate : int
        8000 or 16000, in Hz.
    mode : str
        ``min`` cuts all sources to the shortest, ``max`` pads all to the longest with zeros.
    noise : bool
        Whether to add noise.
    max_seconds : float, optional
        Utterances that are longer are cut to a random segment of this length.
    seed : int
        Seed of everything that is drawn.

    Raises
    ------
    ValueError
        If a value is not one of these.

    Example
    -------
    >>> MixSettings(num_spks=3, mode="mid")
    Traceback (most recent call last):
    ...
    ValueError: mode must be 'min' or 'max', but got 'mid'
    """

    num_spks: int = 2
    sample_rate: int = 8000
    mode: str = "min"
    noise: bool = False
    max_seconds: float | None = None
    seed: int = 1234

    def __post_init__(self):
        if not isinstance(self.num_spks, int) or self.num_spks < 2:
            raise ValueError(f"num_spks must be an integer of at least 2, but got {self.num_spks}")
        if self.sample_rate not in (8000, 16000):
            raise ValueError(f"sample_rate must be 8000 or 16000 Hz, but got {self.sample_rate}")
        if self.mode not in ("min", "max"):
            raise ValueError(f"mode must be 'min' or 'max', but got {self.mode!r}")
        if self.max_seconds is not None:
            self.max_seconds = float(self.max_seconds)
            if not self.max_seconds >= _MIN_SECONDS:
                raise ValueError(f"max_seconds must be at least {_MIN_SECONDS}, but got {self.max_seconds}")
        if not isinstance(self.seed, int) or self.seed < 0:
            raise ValueError(f"seed must be an integer of at least 0, but got {self.seed}")


def read_corpus(csv_path):
    """Reads a corpus's csv.

    Arguments
    ---------
    csv_path : str or Path
        A csv with at least the columns ``id``, ``speaker`` and ``path`` (relative to the csv's folder, or
        absolute), and perhaps ``text``, and ``variant``: speakers of one (synthetic) variant sound alike, and
        never meet in a mixture.

    Returns
    -------
    list of Utterance
        Sorted by ``id``.

    Raises
    ------
    ValueError
        If the csv, a column or a recording is missing, or an ``id`` is doubled or no file name.

    Example
    -------
    >>> import tempfile
    >>> folder = tempfile.TemporaryDirectory()
    >>> soundfile.write(f"{folder.name}/a.wav", np.zeros(8000), 8000)
    >>> csv_path = write_csv(Path(folder.name, "all.csv"), ("id", "speaker", "path"), [("a-1", "ann", "a.wav")])
    >>> [utterance.speaker for utterance in read_corpus(csv_path)]
    ['ann']
    >>> folder.cleanup()
    """
    csv_path = Path(csv_path)
    try:
        with open(csv_path, newline="", encoding="utf-8-sig") as file:
            rows = list(csv.DictReader(file))
    except (OSError, UnicodeDecodeError, csv.Error) as error:
        raise ValueError(f"{csv_path} cannot be read as a csv file: {error}") from error
    if not rows:
        raise ValueError(f"{csv_path} lists no recordings")
    missing = [name for name in ("id", "speaker", "path") if name not in rows[0]]
    if missing:
        raise ValueError(f"{csv_path} needs the columns id, speaker and path, but has no {missing[0]}")
    utterances = {}
    for line, row in enumerate(rows, start=2):
        if not (row["id"] and row["speaker"] and row["path"]):
            raise ValueError(f"{csv_path}, row {line}: id, speaker and path must not be empty")
        if Path(row["id"]).name != row["id"]:
            raise ValueError(f"{csv_path}: id {row['id']!r} cannot be (a part of) a file name")
        if row["id"] in utterances:
            raise ValueError(f"{csv_path}: id {row['id']!r} is listed twice")
        file = csv_path.parent / row["path"]
        if not file.is_file():
            raise ValueError(f"{file}, listed in {csv_path}, does not exist")
        utterances[row["id"]] = Utterance(
            row["id"], row["speaker"], row["path"], file, row.get("text") or "", row.get("variant") or row["speaker"]
        )
    return [utterances[name] for name in sorted(utterances)]


def draw_groups(speakers, num_groups, num_spks, rng, may_repeat=False):
    """Draws groups of utterances of different speakers; all are the first of a group equally often.

    Arguments
    ---------
    speakers : list of str
        The speaker of each utterance.
    num_groups : int
        How many groups.
    num_spks : int
        Utterances per group.
    rng : np.random.Generator
        Source of chance.
    may_repeat : bool
        Whether the same utterances may meet again once all combinations are used up.

    Returns
    -------
    list of tuple of int
        Positions in ``speakers``; the order within a group is random.

    Raises
    ------
    ValueError
        If there are too few speakers or combinations.

    Example
    -------
    >>> rng = np.random.default_rng(0)
    >>> groups = draw_groups(["ann", "ann", "bob"], 2, 2, rng)
    >>> sorted(tuple(sorted(group)) for group in groups)
    [(0, 2), (1, 2)]
    """
    positions = {}  # of each speaker's utterances
    for position, speaker in enumerate(speakers):
        positions.setdefault(speaker, []).append(position)
    names = np.array(list(positions))
    sizes = np.array([len(own) for own in positions.values()])
    if len(names) < num_spks:
        raise ValueError(f"mixtures of {num_spks} speakers need as many speakers, but got {len(names)}")
    # The number of ways to pick utterances of different speakers: an elementary symmetric polynomial.
    ways = [1] + [0] * num_spks
    for size in sizes.tolist():
        for k in range(num_spks, 0, -1):
            ways[k] += size * ways[k - 1]
    limit = math.ceil(num_groups / ways[num_spks])
    if limit > 1 and not may_repeat:
        raise ValueError(
            f"{len(speakers)} utterances of {len(names)} speakers allow {ways[num_spks]} different mixtures of "
            f"{num_spks} speakers, but {num_groups} are wanted (max_seconds lets long utterances meet again)"
        )
    used, groups = Counter(), []
    while len(groups) < num_groups:
        for first in rng.permutation(len(speakers)):
            weights = sizes * (names != speakers[first])
            others = rng.choice(names, num_spks - 1, replace=False, p=weights / weights.sum())
            group = rng.permutation([first, *(rng.choice(positions[name]) for name in others)]).tolist()
            key = tuple(sorted(group))
            if used[key] < limit:
                used[key] += 1
                groups.append(tuple(group))
    return groups[:num_groups]


def mix_set(folder, set_name, utterances, num_mixtures, settings, noise_files=(), num_workers=None, progressbar=True):
    """Mixes one set (e.g. ``train-360``) into ``<folder>/Libri{N}Mix``.

    A mixture's ID is its utterances' ids joined by ``_``. With ``max_seconds``, once all combinations of
    utterances are used up, further segments of the same ones get ``-2``, ``-3``, ... behind it.

    Written below ``Libri{N}Mix``, all paths relative to it unless said otherwise:

    - ``wav8k/min/<set>/{mix_clean,s1,s2[,s3...]}/<ID>.wav``, with noise also ``noise``, ``mix_both``
      and ``mix_single`` (the first source and the noise);
    - ``wav8k/min/metadata/mixture_<set>_mix_clean.csv`` (with noise also ``..._mix_both.csv`` and
      ``..._mix_single.csv``): ``mixture_ID, mixture_path, source_1_path, ...[, noise_path], length`` (in samples);
    - ``metadata/libri{N}mix_<set>.csv``: ``mixture_ID, source_1_path, source_1_gain, ...[, noise_path,
      noise_gain]``, the recordings' paths as the corpus's csv has them, the gains linear;
    - ``metadata/libri{N}mix_<set>_info.csv``: ``mixture_ID, speaker_1_ID, source_1_start_s, source_1_text, ...``.

    Arguments
    ---------
    folder : str or Path
        Where ``Libri{N}Mix`` lies or shall lie.
    set_name : str
        The set's name.
    utterances : list of Utterance
        The corpus.
    num_mixtures : int
        How many mixtures.
    settings : MixSettings
        How to mix.
    noise_files : sequence of Path
        Recorded noise to draw from; none: coloured noise is generated.
    num_workers : int, optional
        Threads; default: one per core. The result does not depend on it.
    progressbar : bool
        Whether to show one.

    Raises
    ------
    ValueError
        If there are too few speakers, or a recording is not fit; the message names it.
    """
    n = settings.num_spks
    root = Path(folder) / f"Libri{n}Mix"
    wav = f"wav{settings.sample_rate // 1000}k/{settings.mode}"
    kinds = [f"s{k + 1}" for k in range(n)] + ["mix_clean"] + ["noise", "mix_both", "mix_single"] * settings.noise
    for kind in kinds:
        (root / wav / set_name / kind).mkdir(parents=True, exist_ok=True)
    seeds = [settings.seed, zlib.crc32(set_name.encode())]
    try:
        groups = draw_groups(
            [utterance.voice or utterance.speaker for utterance in utterances],
            num_mixtures,
            n,
            np.random.default_rng(seeds),
            may_repeat=settings.max_seconds is not None,
        )
    except ValueError as error:
        raise ValueError(f"set {set_name}: {error}") from error
    names = _unique_names("_".join(utterances[i].id for i in group) for group in groups)
    longest = max(names, key=len)
    if len(longest.encode()) > 250:
        raise ValueError(f"set {set_name}: the name {longest}.wav is too long; the recordings need shorter ids")

    def mix(index):
        sources = [utterances[i] for i in groups[index]]
        rng = np.random.default_rng([*seeds, index + 1])  # a 0 would leave the seed as it was
        signals, gains, starts, noise_path = _make_sources(sources, settings, noise_files, rng)
        clean = sum(signals[f"s{k + 1}"] for k in range(n))
        outputs = signals | {"mix_clean": clean}
        if settings.noise:
            outputs["mix_both"] = clean + signals["noise"]
            outputs["mix_single"] = signals["s1"] + signals["noise"]
        paths = {kind: f"{wav}/{set_name}/{kind}/{names[index]}.wav" for kind in kinds}
        for kind, path in paths.items():
            soundfile.write(root / path, outputs[kind].astype(np.int16), settings.sample_rate, subtype="PCM_16")
        source_paths = [paths[f"s{k + 1}"] for k in range(n)]
        noise = [paths["noise"]] if settings.noise else []
        made_of = [s.path for s in sources] + [noise_path] * settings.noise
        origin = [value for pair in zip(made_of, gains, strict=True) for value in pair]
        info = [v for s, start in zip(sources, starts, strict=True) for v in (s.speaker, start, s.text)]
        return {
            "mix_clean": [names[index], paths["mix_clean"], *source_paths, len(clean)],
            "mix_both": [names[index], paths.get("mix_both"), *source_paths, *noise, len(clean)],
            "mix_single": [names[index], paths.get("mix_single"), source_paths[0], *noise, len(clean)],
            "origin": [names[index], *origin],
            "info": [names[index], *info],
        }

    rows = run_parallel(mix, range(num_mixtures), num_workers, f"Mixing {set_name}", progressbar)
    rows.sort(key=lambda row: row["info"][0])

    numbers = range(1, n + 1)
    source_columns = [f"source_{k}_path" for k in numbers]
    noise_column = ["noise_path"] * settings.noise
    prefix = root / wav / "metadata" / f"mixture_{set_name}"
    write_csv(
        Path(f"{prefix}_mix_clean.csv"),
        ["mixture_ID", "mixture_path", *source_columns, "length"],
        [row["mix_clean"] for row in rows],
    )
    if settings.noise:
        write_csv(
            Path(f"{prefix}_mix_both.csv"),
            ["mixture_ID", "mixture_path", *source_columns, *noise_column, "length"],
            [row["mix_both"] for row in rows],
        )
        write_csv(
            Path(f"{prefix}_mix_single.csv"),
            ["mixture_ID", "mixture_path", *source_columns[:1], *noise_column, "length"],
            [row["mix_single"] for row in rows],
        )
    origin_columns = [f"source_{k}_{what}" for k in numbers for what in ("path", "gain")]
    info_columns = [name for k in numbers for name in (f"speaker_{k}_ID", f"source_{k}_start_s", f"source_{k}_text")]
    write_csv(
        root / "metadata" / f"libri{n}mix_{set_name}.csv",
        ["mixture_ID", *origin_columns, *["noise_path", "noise_gain"] * settings.noise],
        [row["origin"] for row in rows],
    )
    write_csv(
        root / "metadata" / f"libri{n}mix_{set_name}_info.csv",
        ["mixture_ID", *info_columns],
        [row["info"] for row in rows],
    )


def read_recording(path):
    """Reads one mono recording and refuses what cannot be mixed.

    Arguments
    ---------
    path : str or Path
        An audio file.

    Returns
    -------
    samples : np.ndarray
        1-D, float64.
    sample_rate : int
        In Hz.
    loudness : float
        Integrated loudness of the whole recording, in LUFS.

    Raises
    ------
    ValueError
        If the file is missing, not audio, not mono, shorter than 0.4 s, silent, or holds NaN or infinity.

    Example
    -------
    >>> read_recording("missing.wav")
    Traceback (most recent call last):
    ...
    ValueError: missing.wav cannot be read as audio
    """
    pyloudnorm = import_pyloudnorm()
    try:
        samples, sample_rate = soundfile.read(path)
    except (OSError, soundfile.SoundFileError) as error:
        raise ValueError(f"{path} cannot be read as audio") from error
    if samples.ndim != 1:
        raise ValueError(f"{path} has {samples.shape[1]} channels, but one is expected")
    if len(samples) < _MIN_SECONDS * sample_rate:
        raise ValueError(f"{path} is {len(samples) / sample_rate:.2f} s long, but {_MIN_SECONDS} s are needed")
    if not np.isfinite(samples).all():
        raise ValueError(f"{path} holds NaN or infinite samples")
    loudness = pyloudnorm.Meter(sample_rate).integrated_loudness(samples) if samples.any() else -math.inf
    if not math.isfinite(loudness):
        raise ValueError(f"{path} is silent")
    return samples, sample_rate, loudness


def import_pyloudnorm():
    """The package that measures loudness; ValueError where it is not installed."""
    try:
        import pyloudnorm
    except ImportError as error:
        raise ValueError("Mixing needs the package pyloudnorm: pip install dsd-separation[generate]") from error
    return pyloudnorm


def _unique_names(names):
    """Appends -2, -3, ... to the names that were there before."""
    counts, unique = Counter(), {}
    for name in names:
        counts[name] += 1
        candidate = name if counts[name] == 1 else f"{name}-{counts[name]}"
        while candidate in unique:
            counts[name] += 1
            candidate = f"{name}-{counts[name]}"
        unique[candidate] = None
    return list(unique)


def _make_sources(utterances, settings, noise_files, rng):
    """Draws segments and loudness of one mixture.

    Returns a dict from s1, s2, ... (and noise) to int32 arrays of one length that hold 16-bit values, the linear
    gains in that order, the segments' starts in seconds, and the noise's path.
    """
    signals, gains, starts = [], [], []
    for utterance in utterances:
        samples, sample_rate, loudness = read_recording(utterance.file)
        start, segment = _draw_segment(samples, sample_rate, settings.max_seconds, rng)
        gains.append(10 ** ((rng.uniform(*_SPEECH_LUFS) - loudness) / 20))
        signals.append(resample(segment, sample_rate, settings.sample_rate))
        starts.append(round(start / sample_rate, 4))
    lengths = [len(signal) for signal in signals]
    length = min(lengths) if settings.mode == "min" else max(lengths)
    signals = [np.pad(signal[:length], (0, max(length - len(signal), 0))) for signal in signals]

    noise_path = ""
    if settings.noise:
        if noise_files:
            noise_file = noise_files[rng.integers(len(noise_files))]
            noise, sample_rate, loudness = read_recording(noise_file)
            noise = resample(noise, sample_rate, settings.sample_rate)
            noise = np.roll(noise, -rng.integers(len(noise)))
            noise = np.resize(noise, length)  # repeats it where it is shorter
            noise_path = noise_file.name
        else:
            noise, noise_path = _coloured_noise(length, rng)
            meter = import_pyloudnorm().Meter(settings.sample_rate)
            loudness = meter.integrated_loudness(noise)
        gains.append(10 ** ((rng.uniform(*_NOISE_LUFS) - loudness) / 20))
        signals.append(noise)

    scaled = np.stack([gain * signal for gain, signal in zip(gains, signals, strict=True)])  # (sources, time)
    clean = scaled[: len(utterances)].sum(axis=0)
    sums = [clean, scaled.sum(axis=0), *([scaled[0] + scaled[-1]] if settings.noise else [])]
    peak = max(np.abs(signal).max() for signal in (scaled, *sums))
    shrink = min(1.0, _MAX_AMPLITUDE / peak)
    scaled = np.rint(scaled * (shrink * 2**15)).astype(np.int32)
    gains = [round(float(gain * shrink), 6) for gain in gains]
    kinds = [f"s{k + 1}" for k in range(len(utterances))] + ["noise"] * settings.noise
    return dict(zip(kinds, scaled, strict=True)), gains, starts, noise_path


def _draw_segment(samples, sample_rate, max_seconds, rng):
    """A random segment (start, samples) that is not just a pause: at most 10 dB under the mean power."""
    if max_seconds is None or len(samples) <= max_seconds * sample_rate:
        return 0, samples
    length = round(max_seconds * sample_rate)
    for _ in range(20):
        start = int(rng.integers(len(samples) - length + 1))
        segment = samples[start : start + length]
        if np.square(segment).mean() >= 0.1 * np.square(samples).mean():
            break
    return start, segment


def _coloured_noise(length, rng):
    """Gaussian noise with a power spectrum 1 / f^a, a drawn from 0 (white) to 2 (brown), and its name."""
    exponent = rng.uniform(0, 2)
    spectrum = np.fft.rfft(rng.standard_normal(length))
    spectrum *= np.maximum(np.arange(len(spectrum)), 1.0) ** (-exponent / 2)
    noise = np.fft.irfft(spectrum, length)
    return noise / np.abs(noise).max(), f"1/f^{exponent:.2f}"
