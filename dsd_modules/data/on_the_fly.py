"""LibriMix's mixtures made at load time from LibriSpeech, WHAM's noise and LibriMix's metadata.

Each signal is identical, sample for sample, to what is read back from the file that LibriMix's generator
(https://github.com/JorisCos/LibriMix, ``create_librimix_from_metadata.py``) writes with the same numpy, scipy and
soundfile. Its arithmetic, whole files at a time:

1. sources: the files as float32; noise: the first channel, cut or extended (:func:`extend_noise`, float64 from there
   on) to the longest source;
2. each times its gain, then ``scipy.signal.resample_poly`` from 16 kHz;
3. all cut to the shortest (``min``) or padded with zeros to the longest (``max``);
4. the mixture is their float32 sum (:func:`mix`), before anything is rounded;
5. each signal, the mixture too, is rounded to 16 bits on its own (:func:`round_to_16_bits`).

:class:`OnTheFlyReader` does the same for a stretch, and reads no more of the files than the stretch needs.
"""

import functools
import hashlib
import math
import os
import re
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import soundfile
from scipy.signal import firwin, resample_poly
from tqdm import tqdm

from dsd_modules.data.cache import SharedCache
from dsd_modules.data.manifest import is_cut_off, read_rows, sort_by_id
from dsd_modules.data.wavs import read_stretch

RATE = 16000  # of LibriSpeech and of WHAM's noise, Hz
TASKS = ("mix_clean", "mix_both", "mix_single")
_UNREADABLE = "is no readable audio file: empty, cut off, or something else"
_FADE = RATE // 2 + 1  # samples over which the end of a noise fades into its next repetition


def extend_noise(noise, num_samples):
    """Repeat a noise until it has a length, each repetition faded into the one before.

    Arguments
    ---------
    noise : np.ndarray
        ``[T]``, with more samples than the fade of half a second and one sample, 8001.
    num_samples : int
        The length that is needed.

    Returns
    -------
    np.ndarray
        ``[num_samples]``; float64 where the noise had to be extended, else as it came.

    Raises
    ------
    ValueError
        If a noise that must be extended is no longer than the fade: it would never get longer.

    Example
    -------
    >>> noise = np.ones(10000, np.float32)
    >>> extend_noise(noise, 9000).dtype, extend_noise(noise, 30000).dtype, extend_noise(noise, 30000).shape
    (dtype('float32'), dtype('float64'), (30000,))
    """
    if len(noise) < num_samples and len(noise) <= _FADE:
        raise ValueError(f"A noise can be extended from {_FADE + 1} samples on, but got {len(noise)}.")
    rising, falling = _fades()
    extended = noise
    while len(extended) < num_samples:
        faded = extended[-_FADE:] * falling + noise[:_FADE] * rising
        extended = np.concatenate([extended[:-_FADE], faded, noise[_FADE:]])
    return extended[:num_samples]


@functools.cache
def _fades():
    window = np.hanning(2 * _FADE - 1)
    return window[:_FADE], window[_FADE - 1 :: -1]


def mixture_length(lengths, sample_rate, mode):
    """How many samples a mixture has.

    Arguments
    ---------
    lengths : sequence of int
        Of all its sources, in samples at 16 kHz. (The noise, which is as long as the longest, never decides.)
    sample_rate : int
        Of the mixture, 8000 or 16000 Hz.
    mode : str
        ``min`` or ``max``.

    Raises
    ------
    ValueError
        If the sample rate or the mode is another.

    Example
    -------
    >>> mixture_length([160001, 200000], 8000, "min"), mixture_length([160001, 200000], 8000, "max")
    (80001, 100000)
    """
    if mode not in ("min", "max"):
        raise ValueError(f"mode can only be 'min' or 'max', but got {mode!r}.")
    return -(-{"min": min, "max": max}[mode](lengths) // _decimation(sample_rate))


def mix(signals):
    """The float32 sum of signals ``[T]`` in their order, each addition rounded to float32.

    Example
    -------
    >>> mix([np.float32([0.5, 0]), np.float64([0.25, 1])])
    array([0.75, 1.  ], dtype=float32)
    """
    mixture = np.zeros_like(signals[0])
    for signal in signals:
        mixture += signal
    return mixture


def round_to_16_bits(signal):
    """What a float signal is after soundfile has written it as 16-bit PCM and read it as float32.

    libsndfile scales to 32 bits, rounds, clips, and keeps the upper 16 bits: so it rounds down.

    Example
    -------
    >>> (round_to_16_bits(np.float32([2, 0.5, 1e-6, -1e-6, -2])) * 2**15).tolist()
    [32767.0, 16384.0, 0.0, -1.0, -32768.0]
    """
    scale = signal.dtype.type
    rounded = np.rint(signal * scale(2**31))
    rounded = np.floor(rounded * scale(2**-16))
    return np.clip(rounded, -(2**15), 2**15 - 1).astype(np.float32) * np.float32(2**-15)


def resample_stretch(signal, first, sample_rate, start, stop):
    """Samples ``start`` to ``stop`` of ``resample_poly(whole, sample_rate, 16000)``, from a part of the whole.

    Arguments
    ---------
    signal : np.ndarray
        The part of the whole signal that :func:`needed_stretch` names, ``[T]``.
    first : int
        Where this part begins in the whole.
    sample_rate : int
        8000 or 16000 Hz.
    start, stop : int
        The stretch of the result, in its samples.

    Example
    -------
    >>> whole = np.random.default_rng(0).standard_normal(1000).astype(np.float32)
    >>> first, last = needed_stretch(100, 200, len(whole), 8000)
    >>> stretch = resample_stretch(whole[first:last], first, 8000, 100, 200)
    >>> np.array_equal(stretch, resample_poly(whole, 8000, 16000)[100:200])
    True
    """
    decimation = _decimation(sample_rate)
    if decimation == 1:
        return signal
    start, stop = start - first // decimation, stop - first // decimation
    return resample_poly(signal, 1, decimation, window=_low_pass(decimation, signal.dtype))[start:stop]


def needed_stretch(start, stop, num_samples, sample_rate):
    """Which samples ``(first, last)`` of a whole signal of ``num_samples`` :func:`resample_stretch` needs.

    Example
    -------
    >>> needed_stretch(100, 200, 1000, 8000), needed_stretch(100, 200, 1000, 16000)
    ((180, 419), (100, 200))
    """
    decimation = _decimation(sample_rate)
    if decimation == 1:
        return start, stop
    margin = 10 * decimation  # half of the filter's length
    return max(0, start * decimation - margin), min(num_samples, (stop - 1) * decimation + margin + 1)


@functools.cache
def _low_pass(decimation, dtype):
    """The filter that ``resample_poly`` designs anew in each call."""
    return firwin(20 * decimation + 1, 1 / decimation, window=("kaiser", 5.0)).astype(dtype)


def _decimation(sample_rate):
    if sample_rate not in (8000, RATE):
        raise ValueError(f"sample_rate can only be 8000 or 16000 Hz, but got {sample_rate}.")
    return RATE // sample_rate


def read_metadata(metadata_folder, subset, num_spks, task="mix_clean"):
    """The mixtures that LibriMix's metadata list for one set.

    Arguments
    ---------
    metadata_folder : str
        The folder with ``libri2mix_train-clean-100.csv`` and the like, or the one above with ``Libri2Mix`` in it.
    subset : str
        ``train-100``, ``train-360``, ``dev`` or ``test``.
    num_spks : int
        2 or 3; for the task ``mix_single`` 1, whatever the number of sources in the metadata.
    task : str
        ``mix_clean``, ``mix_both`` or ``mix_single``.

    Returns
    -------
    list of dict
        ``ID``; ``sources``, a list of ``(path, gain)`` with all sources of the metadata; ``noise``, the same with one
        item, or none for ``mix_clean``. Sorted by ID; the gains as they stand there.

    Raises
    ------
    ValueError
        If there is no such csv, or not just one, or it lacks a column, has no rows, an empty cell, a gain that is no
        finite number, or an id twice.
    """
    if task not in TASKS:
        raise ValueError(f"task can only be one of {', '.join(TASKS)}, but got {task!r}.")
    if task == "mix_single" and num_spks != 1:
        raise ValueError(f"The task mix_single has one speaker, but num_spks is {num_spks}.")
    path, num_sources = _find_csv(Path(metadata_folder), subset, num_spks, task)
    rows = read_rows(path, "metadata file")
    names = [f"source_{spk}" for spk in range(1, num_sources + 1)] + ["noise"] * (task != "mix_clean")
    columns = ["mixture_ID", *(f"{name}_{what}" for name in names for what in ("path", "gain"))]
    for column in columns:
        if column not in rows[0]:
            raise ValueError(f"{path} has no column {column}; its columns are {', '.join(map(str, rows[0]))}.")
    if f"source_{num_sources + 1}_path" in rows[0]:
        raise ValueError(f"{path} has a source_{num_sources + 1}_path, but its name says {num_sources} speakers.")
    mixtures = []
    for number, row in enumerate(rows, 2):
        for column in columns:
            if not (row[column] or "").strip():
                raise ValueError(f"Line {number} of {path} has no {column}.")
            if column.endswith("_gain") and not _is_finite(row[column]):
                raise ValueError(f"Line {number} of {path}: a gain is a finite number, but got {row[column]!r}.")
        signals = [(row[f"{name}_path"], row[f"{name}_gain"]) for name in names]
        sources, noise = signals[:num_sources], signals[num_sources:]
        mixtures.append({"ID": row["mixture_ID"], "sources": sources, "noise": noise})
    return sort_by_id(mixtures, path)


def _is_finite(text):
    try:
        return math.isfinite(float(text))
    except ValueError:
        return False


def _find_csv(folder, subset, num_spks, task):
    """The csv of a set, and the number of speakers that its name tells."""
    if not folder.is_dir():
        raise ValueError(f"metadata_folder {folder} does not exist.")
    found = []  # (path, number of speakers)
    for path in sorted([*folder.glob("*.csv"), *folder.glob("Libri?Mix/*.csv")]):
        match = re.fullmatch(r"libri(\d+)mix_(.*)\.csv", path.name)
        if match and "info" not in path.name and match[2].replace("-clean", "") == subset:
            found.append((path, int(match[1])))
    present = sorted({number for _, number in found})
    fitting = [(path, number) for path, number in found if number == num_spks or task == "mix_single"]
    if not fitting:
        num = "N" if task == "mix_single" else num_spks
        names = f"libri{num}mix_{subset}.csv (or, as LibriMix has it, with -clean after the set's first word)"
        others = f"; it has this set for {' and '.join(map(str, present))} speakers" if present else ""
        raise ValueError(f"metadata_folder {folder} has no {names}{others} (num_spks is {num_spks}).")
    if len(fitting) > 1:
        raise ValueError(
            f"metadata_folder {folder} has more than one csv for {subset}: "
            f"{' and '.join(str(path.relative_to(folder)) for path, _ in fitting)}; give the folder of just one."
        )
    return fitting[0]


def _inspect(path, max_channels):
    """What is wrong with an audio file, or its number of samples."""
    try:
        with soundfile.SoundFile(path) as file:
            if file.samplerate != RATE:
                return f"has a sample rate of {file.samplerate} Hz, but {RATE} Hz are expected"
            if file.channels > max_channels:
                return f"has {file.channels} channels, but at most {max_channels} can be used"
            return _UNREADABLE if file.frames == 0 or is_cut_off(path, file) else file.frames
    except (soundfile.LibsndfileError, OSError):
        if Path(path).is_file():
            return _UNREADABLE
        is_augmented = re.search(r"sp(08|12)\.wav$", path)
        return "does not exist" + " (LibriMix's scripts/augment_train_noise.py makes it)" * bool(is_augmented)


def _check_folder(name, folder, inner):
    if folder is None or not Path(folder).is_dir():
        raise ValueError(f"{name} {folder} does not exist." if folder else f"{name} is needed, but it is not given.")
    if (Path(folder) / inner).is_dir():
        raise ValueError(f"{name} {folder} is the folder above; give --{name} {Path(folder) / inner}.")


def find_mixtures(
    librispeech_folder,
    wham_folder,
    metadata_folder,
    subset,
    num_spks,
    sample_rate,
    mode,
    task,
    min_samples=1,
    progressbar=True,
):
    """The manifest rows of one set, after a look at every file.

    Arguments
    ---------
    librispeech_folder : str
        LibriSpeech: the folder with ``train-clean-100`` and the like.
    wham_folder : str
        WHAM's noise: the folder with ``tr``, ``cv`` and ``tt``. None for ``mix_clean``.
    metadata_folder, subset, num_spks, task
        See :func:`read_metadata`.
    sample_rate : int
        Of the mixtures, 8000 or 16000 Hz.
    mode : str
        ``min`` or ``max``.
    min_samples : int
        How many samples a mixture must have: the encoder's kernel.
    progressbar : bool
        Whether to show the progress of the check.

    Returns
    -------
    list of dict
        Sorted by ``ID``. ``duration`` in seconds; of each signal (``s1``, ..., and ``noise`` where the task has it)
        ``s1_wav`` (the path, relative to its folder), ``s1_gain`` and ``s1_samples`` (of the file, at 16 kHz); with
        noise also ``longest_samples``, the length of the longest source, to which the noise is cut or extended.

    Raises
    ------
    ValueError
        If a folder or the metadata are not right (see :func:`read_metadata`), or a file is missing, unreadable, cut
        off, not of 16 kHz, not mono (noise: of more than two channels), or too short: the first such file, and how many
        mixtures have such a fault.
    """
    mixtures = read_metadata(metadata_folder, subset, num_spks, task)
    _check_folder("librispeech_folder", librispeech_folder, "LibriSpeech")
    if task != "mix_clean":
        _check_folder("wham_folder", wham_folder, "wham_noise")
    channels = {}  # of each distinct file, at most
    for mixture in mixtures:
        mixture["source_files"] = [os.path.join(librispeech_folder, path) for path, _ in mixture["sources"]]
        mixture["noise_files"] = [os.path.join(wham_folder, path) for path, _ in mixture["noise"]]
        channels |= dict.fromkeys(mixture["source_files"], 1) | dict.fromkeys(mixture["noise_files"], 2)
    with ThreadPoolExecutor(max_workers=8) as pool:
        found = pool.map(_inspect, channels, channels.values())
        # Short checks need no bar.
        found = tqdm(found, f"checking {subset}", len(channels), disable=not progressbar, delay=2, leave=False)
        found = dict(zip(channels, found, strict=True))
    rows, faults = [], []
    for mixture in mixtures:
        try:
            rows.append(_manifest_row(mixture, found, num_spks, sample_rate, mode, min_samples))
        except ValueError as fault:
            faults.append(fault)
    if faults:
        raise ValueError(f"{faults[0]}; {len(faults)} of {len(mixtures)} mixtures have such a fault.")
    return rows


def _manifest_row(mixture, found, num_spks, sample_rate, mode, min_samples):
    """The row of a mixture; ``found``: from each file to its number of samples, or to what is wrong with it.

    Raises
    ------
    ValueError
        If something is wrong with one of its files.
    """
    for path in (*mixture["source_files"], *mixture["noise_files"]):
        if isinstance(found[path], str):
            raise ValueError(f"{path} (of mixture {mixture['ID']}) {found[path]}")
    source_samples = [found[path] for path in mixture["source_files"]]
    num_samples = mixture_length(source_samples, sample_rate, mode)
    if num_samples < min_samples:
        shortest = min(mixture["source_files"], key=found.get)
        raise ValueError(
            f"{shortest} (of mixture {mixture['ID']}) has {found[shortest]} samples: the mixture would have "
            f"{num_samples}, but at least {min_samples} are needed"
        )
    longest = max(source_samples)
    for path in mixture["noise_files"]:
        if found[path] <= min(_FADE, longest - 1):
            raise ValueError(
                f"{path} (of mixture {mixture['ID']}) has {found[path]} samples, but a noise must be as long as the "
                f"longest source, {longest}, or longer than {_FADE} to be extended"
            )
    row = {"ID": mixture["ID"], "duration": num_samples / sample_rate}
    signals = [*mixture["sources"][:num_spks], *mixture["noise"]]
    files = [*mixture["source_files"][:num_spks], *mixture["noise_files"]]
    names = [*(f"s{spk}" for spk in range(1, num_spks + 1)), "noise"]
    for name, (path, gain), file in zip(names, signals, files, strict=False):  # no noise for mix_clean
        row |= {f"{name}_wav": path, f"{name}_gain": gain, f"{name}_samples": found[file]}
    return row | {"longest_samples": longest} if mixture["noise"] else row


class OnTheFlyReader:
    """Makes the signals of a manifest's rows from LibriSpeech and WHAM's noise.

    An ``entry`` is a row of a manifest with :func:`find_mixtures`'s columns, as :class:`csv.DictReader` gives it.
    ``start`` and ``num_samples`` are in samples at ``sample_rate``.

    Arguments
    ---------
    librispeech_folder, wham_folder : str
        Where the manifest's paths start. ``wham_folder`` may be None for ``mix_clean``.
    num_spks : int
        How many sources a row has: 1 for ``mix_single``.
    sample_rate : int
        8000 or 16000 Hz.
    task : str
        ``mix_clean``, ``mix_both`` or ``mix_single``.
    quantize : bool
        True: the signals as read back from the generator's 16-bit files; False: before they are rounded.
    cache_bytes : int
        Memory for mixtures that were made once, shared by the workers of this process
        (:class:`dsd_modules.data.cache.SharedCache`). With it, the first visit makes the whole mixture. 0: none.

    Raises
    ------
    ValueError
        If the sample rate or the task is another, or so much memory cannot be had.
    """

    def __init__(
        self, librispeech_folder, wham_folder, num_spks, sample_rate, task="mix_clean", quantize=True, cache_bytes=0
    ):
        if task not in TASKS:
            raise ValueError(f"task can only be one of {', '.join(TASKS)}, but got {task!r}.")
        _decimation(sample_rate)
        self.librispeech_folder = str(librispeech_folder)
        self.wham_folder = None if wham_folder is None else str(wham_folder)
        self.num_spks = num_spks
        self.sample_rate = sample_rate
        self.task = task
        self.quantize = quantize
        self.cache = SharedCache(cache_bytes)

    def read(self, entry, start, num_samples):
        """A stretch of a mixture and of its sources.

        Returns
        -------
        np.ndarray
            ``[1 + N, T]``, float32: the mixture, then the sources.

        Raises
        ------
        ValueError
            If the stretch is not within the mixture, or a file cannot be read, is not as long as the manifest says, or
            holds a value that is not finite.
        """
        self._check_stretch(entry, start, num_samples)
        kept = self._keep_whole(entry)
        if kept is not None:
            return self._unpack(kept[:, start : start + num_samples])
        return self._make(entry, start, num_samples)

    def read_source(self, entry, index, start, num_samples):
        """A stretch of source ``index``, from 0: ``[T]``, float32. Raises as :meth:`read`."""
        self._check_stretch(entry, start, num_samples)
        kept = self._find_whole(entry)  # but makes none: that costs more than the one source
        if kept is not None:
            return self._unpack(kept[1 + index, start : start + num_samples])
        return self._finish(self._make_source(entry, index, start, num_samples))

    def read_noise(self, entry, start, num_samples):
        """A stretch of the noise, zeros for ``mix_clean``: ``[T]``, float32. Raises as :meth:`read`."""
        self._check_stretch(entry, start, num_samples)
        if self.task == "mix_clean":
            return np.zeros(num_samples, np.float32)
        return self._finish(self._make_noise(entry, start, num_samples))

    def _check_stretch(self, entry, start, num_samples):
        if not 0 <= start <= start + num_samples <= self._num_samples(entry):
            raise ValueError(
                f"Mixture {entry['ID']} has {self._num_samples(entry)} samples, but those from {start} to "
                f"{start + num_samples} were asked for."
            )

    def _num_samples(self, entry):
        return round(float(entry["duration"]) * self.sample_rate)

    def _make(self, entry, start, num_samples):
        sources = [self._make_source(entry, index, start, num_samples) for index in range(self.num_spks)]
        noise = [] if self.task == "mix_clean" else [self._make_noise(entry, start, num_samples)]
        return np.stack([self._finish(signal) for signal in (mix(sources + noise), *sources)])  # (1 + N, T)

    def _make_source(self, entry, index, start, num_samples):
        name = f"s{index + 1}"
        return self._make_signal(
            self.librispeech_folder, entry, name, int(entry[f"{name}_samples"]), start, num_samples
        )

    def _make_noise(self, entry, start, num_samples):
        return self._make_signal(self.wham_folder, entry, "noise", int(entry["longest_samples"]), start, num_samples)

    def _make_signal(self, folder, entry, name, whole_samples, start, num_samples):
        """A stretch of a file that was cut or extended to ``whole_samples``, with gain, resampled, then zeros."""
        path = os.path.join(folder, entry[f"{name}_wav"])
        file_samples, gain = int(entry[f"{name}_samples"]), float(entry[f"{name}_gain"])
        stop = min(start + num_samples, mixture_length([whole_samples], self.sample_rate, "max"))
        if stop <= start:
            return np.zeros(num_samples, np.float32)
        first, last = needed_stretch(start, stop, whole_samples, self.sample_rate)
        if whole_samples > file_samples:
            signal = extend_noise(_read_file(path, 0, file_samples, file_samples), whole_samples)[first:last]
        else:
            signal = _read_file(path, first, last, file_samples)
        signal = resample_stretch(signal * gain, first, self.sample_rate, start, stop)
        return signal if len(signal) == num_samples else np.pad(signal, (0, num_samples - len(signal)))

    def _finish(self, signal):
        return round_to_16_bits(signal) if self.quantize else signal.astype(np.float32)

    def _find_whole(self, entry):
        """The whole mixture and its sources as kept in memory, ``[1 + N, T]``; None where they are not."""
        kept = self.cache.get(_key(entry)) if self.cache.num_bytes else None
        return None if kept is None else np.frombuffer(kept, self._kept_dtype).reshape(self._whole_shape(entry))

    def _keep_whole(self, entry):
        """The same, made now where there is room for it."""
        kept, shape = self._find_whole(entry), self._whole_shape(entry)
        if kept is not None or not self.cache.has_room(math.prod(shape) * np.dtype(self._kept_dtype).itemsize):
            return kept
        whole = self._make(entry, 0, shape[1])
        whole = (whole * np.float32(2**15)).astype(self._kept_dtype) if self.quantize else whole
        self.cache.put(_key(entry), whole)
        return whole

    @property
    def _kept_dtype(self):
        return np.int16 if self.quantize else np.float32

    def _whole_shape(self, entry):
        return 1 + self.num_spks, self._num_samples(entry)

    def _unpack(self, kept):
        return kept * np.float32(2**-15) if self.quantize else kept.copy()


def _key(entry):
    return hashlib.blake2b(repr(sorted(entry.items())).encode(), digest_size=16).digest()


def _read_file(path, first, last, num_samples):
    """Samples ``first`` to ``last`` of the first channel of a file that has ``num_samples``, float32."""
    samples, num_frames = read_stretch(path, first, last - first)
    if num_frames != num_samples:
        raise ValueError(f"{path} has {num_frames} samples, but its manifest says {num_samples}.")
    if len(samples) != last - first:
        raise ValueError(f"{path} is damaged: {last - first} samples from {first} on were expected.")
    return samples[:, 0]
