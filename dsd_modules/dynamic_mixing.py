"""Dynamic mixing: training mixtures made anew in each epoch, of any sources of different speakers."""

import numpy as np
import torch

from dsd_modules.augmentation import seeded_generator
from dsd_modules.losses import is_silent

_MAX_PEAK = 0.9  # LibriMix's
_NUM_TRIES = 8  # to find a stretch of a source that is not silent


def source_speakers(entry, num_spks):
    """Whose voice each source of a mixture is.

    Arguments
    ---------
    entry : dict
        A manifest's row. The columns ``s1_speaker``, ``s2_speaker``, ... name the speakers; where there are none, the
        id does as LibriMix's: utterances' ids, each beginning with the speaker and ``-``, joined by ``_``.
    num_spks : int
        How many sources it has.

    Returns
    -------
    list of str

    Raises
    ------
    ValueError
        If neither names the speakers.

    Example
    -------
    >>> source_speakers({"ID": "4077-13754-0001_5142-33396-0065"}, num_spks=2)
    ['4077', '5142']
    >>> source_speakers({"ID": "meeting7", "s1_speaker": "ann", "s2_speaker": "bob"}, num_spks=2)
    ['ann', 'bob']
    """
    columns = [entry.get(f"s{number}_speaker") for number in range(1, num_spks + 1)]
    if all(columns):
        return columns
    speakers = [utterance.partition("-") for utterance in entry["ID"].split("_")]
    if len(speakers) != num_spks or not all(speaker and rest for speaker, _, rest in speakers):
        raise ValueError(
            f"Dynamic mixing needs to know the speakers, but the manifest has no s1_speaker, s2_speaker, ... for the "
            f"mixture {entry['ID']!r}, whose id does not name {num_spks} either, as in 'ann-001_bob-002'."
        )
    return [speaker for speaker, *_ in speakers]


class DynamicMixing:
    """Makes a new mixture for each item of each epoch.

    The sources, the stretch of each, and the noise follow from (seed, epoch, id) alone, so they are the same for any
    number of workers and ranks and after a resume. All sources of the manifest are drawn equally often, as far as
    the speakers of a mixture can differ. The shortest of what was drawn bounds the mixture's length, so nothing is
    padded.

    Sources and noise keep the level they have in the data. LibriMix drew it uniformly in loudness, -33 to -25 LUFS
    for speech, 5 LU below for noise. SpeechBrain's dynamic mixing normalises each crop to a new draw from that range,
    which leads to much the same levels, but needs the loudness of crops, which short or quiet ones do not have. As
    there, a mixture whose peak is above 0.9 is turned down to it, sources and all.

    Called as ``dynamic_mixing(sample_id, epoch, num_samples)``.

    Arguments
    ---------
    entries : iterable of dict
        The manifest's rows, with ``ID`` and ``duration`` and what the reader needs.
    reader : object
        Its ``read_source(entry, index, start, num_samples)`` and ``read_noise(entry, start, num_samples)`` give
        float32 arrays ``[T]``.
    num_spks : int
        Sources of a mixture.
    sample_rate : int
        Hz.
    seed : int
        The run's seed.
    noise : bool
        Whether the noise of another mixture is added, as in LibriMix's ``mix_both`` and ``mix_single``.

    Raises
    ------
    ValueError
        If the manifest does not tell the sources' speakers (see :func:`source_speakers`) or has too few.

    Example
    -------
    >>> class Sines:
    ...     def read_source(self, entry, index, start, num_samples):
    ...         return np.sin(np.arange(start, start + num_samples) * (index + 1)).astype("float32")
    >>> entries = [{"ID": "ann-1_bob-1", "duration": "2.0"}, {"ID": "bob-2_eve-1", "duration": "1.5"}]
    >>> dynamic_mixing = DynamicMixing(entries, Sines(), num_spks=2, sample_rate=8000, seed=1)
    >>> dynamic_mixing("ann-1_bob-1", epoch=1, num_samples=4000).shape
    (3, 4000)
    """

    def __init__(self, entries, reader, num_spks, sample_rate, seed, noise=False):
        self.entries = entries = list(entries)
        self.reader = reader
        self.num_spks = num_spks
        self.seed = seed
        self.noise = noise
        self.num_samples = np.array([round(float(entry["duration"]) * sample_rate) for entry in entries])
        if num_spks > 1:
            names = [speaker for entry in entries for speaker in source_speakers(entry, num_spks)]
        else:
            names = [entry["ID"] for entry in entries]  # a lone speaker need not differ from anybody
        names, self.speakers = np.unique(names, return_inverse=True)  # speakers: of all sources, mixture by mixture
        if len(names) < num_spks:
            raise ValueError(
                f"Dynamic mixing of {num_spks} speakers needs sources of as many, but the manifest's {len(entries)} "
                f"mixtures have {len(names)} between them."
            )

    def __call__(self, sample_id, epoch, num_samples=None):
        """Make the mixture that takes the place of ``sample_id`` in ``epoch``.

        Arguments
        ---------
        sample_id : str
            The stored mixture's id.
        epoch : int
            The epoch.
        num_samples : int, optional
            The most that it may have. None: as many as the shortest of its sources.

        Returns
        -------
        np.ndarray
            ``[1 + N, T]``, float32: the mixture, then the sources.
        """
        rng = seeded_generator("dynamic mixing", self.seed, epoch, sample_id)
        drawn = self._draw_sources(rng)
        noise_row = rng.integers(len(self.entries)) if self.noise else None
        rows = [row for row, _ in drawn] + [noise_row] * self.noise
        length = min(self.num_samples[rows])
        if num_samples is not None:
            length = min(length, num_samples)

        signals = [self._read_source(row, index, int(length), rng) for row, index in drawn]
        if self.noise:
            start = int(rng.integers(self.num_samples[noise_row] - length + 1))
            signals.append(self.reader.read_noise(self.entries[noise_row], start, int(length)))
        signals = np.stack(signals)  # (N, T), with the noise (N + 1, T)
        peak = np.abs(signals.sum(axis=0)).max()
        if peak > _MAX_PEAK:
            signals *= _MAX_PEAK / peak
        return np.concatenate([signals.sum(axis=0, keepdims=True), signals[: self.num_spks]])

    def _draw_sources(self, rng):
        """``(row, index)`` of sources of different speakers."""
        drawn, speakers = [], set()
        while len(drawn) < self.num_spks:
            source = int(rng.integers(len(self.speakers)))
            if self.speakers[source] not in speakers:
                speakers.add(self.speakers[source])
                drawn.append(divmod(source, self.num_spks))
        return drawn

    def _read_source(self, row, index, num_samples, rng):
        """A random stretch of a source: not one of the silent ones that mode ``max`` pads with, if it can be helped."""
        room = int(self.num_samples[row]) - num_samples
        for _ in range(_NUM_TRIES):
            start = int(rng.integers(room + 1))
            source = self.reader.read_source(self.entries[row], index, start, num_samples)
            if room == 0 or not is_silent(torch.from_numpy(source[None, None])).item():
                return source
        return self.reader.read_source(self.entries[row], index, 0, num_samples)  # padding comes last in LibriMix
