"""Reads the signals of a manifest's rows from audio files: the mixture's own and one for each source."""

import os

import numpy as np
import soundfile


class WavReader:
    """Reads generated mixtures and their sources.

    An ``entry`` is a row of a manifest with the columns ``mix_wav``, ``s1_wav``, ..., as :class:`csv.DictReader`
    gives it. ``start`` and ``num_samples`` are in samples.

    Arguments
    ---------
    root : str
        The folder where relative paths of the manifest start; "" where it has absolute ones.
    num_spks : int
        How many sources a row has.

    Example
    -------
    >>> import tempfile
    >>> folder = tempfile.TemporaryDirectory()
    >>> soundfile.write(f"{folder.name}/a.wav", np.arange(4) / 8, 8000)
    >>> reader = WavReader(folder.name, num_spks=1)
    >>> reader.read({"mix_wav": "a.wav", "s1_wav": "a.wav"}, start=1, num_samples=2)
    array([[0.125, 0.25 ],
           [0.125, 0.25 ]], dtype=float32)
    >>> folder.cleanup()
    """

    def __init__(self, root, num_spks):
        self.root = str(root)
        self.signals = ["mix", *(f"s{spk}" for spk in range(1, num_spks + 1))]

    def read(self, entry, start, num_samples):
        """Read the same stretch of a mixture and of its sources.

        Returns
        -------
        np.ndarray
            ``[1 + N, T]``, float32: the mixture, then the sources.

        Raises
        ------
        ValueError
            If a file cannot be read, is too short, or holds a value that is not finite.
        """
        return np.stack([self._read_file(entry, signal, start, num_samples) for signal in self.signals])

    def read_source(self, entry, index, start, num_samples):
        """Read a stretch of source ``index``, from 0: ``[T]``, float32. Raises as :meth:`read`."""
        return self._read_file(entry, f"s{index + 1}", start, num_samples)

    def read_noise(self, entry, start, num_samples):
        """What a stretch of the mixture holds beyond its sources: ``[T]``, float32. Raises as :meth:`read`."""
        mixture, *sources = self.read(entry, start, num_samples)
        return mixture - np.sum(sources, axis=0)

    def _read_file(self, entry, signal, start, num_samples):
        path = os.path.join(self.root, entry[f"{signal}_wav"])
        samples, num_frames = read_stretch(path, start, num_samples)
        if num_frames < start + num_samples:
            raise ValueError(f"{path} ends {start + num_samples - num_frames} samples before its manifest says.")
        if samples.shape != (num_samples, 1):
            raise ValueError(f"{path} is damaged: {num_samples} samples from {start} on were expected.")
        return samples[:, 0]


def read_stretch(path, start, num_samples):
    """Read a stretch of an audio file, as far as it goes.

    Arguments
    ---------
    path : str
        The file.
    start, num_samples : int
        The stretch, in samples.

    Returns
    -------
    samples : np.ndarray
        ``[T, channels]``, float32; fewer than ``num_samples`` where the file ends before, or is damaged.
    num_frames : int
        Samples of the whole file, as its header tells.

    Raises
    ------
    ValueError
        If the file cannot be read, or holds a value that is not finite.
    """
    try:
        with soundfile.SoundFile(path) as file:
            file.seek(min(start, file.frames))
            samples, num_frames = file.read(num_samples, dtype="float32", always_2d=True), file.frames
    except (soundfile.LibsndfileError, OSError) as error:
        raise ValueError(f"{path} cannot be read: {error}") from None
    if not np.isfinite(samples).all():
        raise ValueError(f"{path} holds values that are not finite.")
    return samples, num_frames
