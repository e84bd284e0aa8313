"""Mixtures and their sources as a SpeechBrain dataset, cut into crops that depend on (seed, epoch, id) alone."""

import csv
import hashlib

import numpy as np
import soundfile
import torch
from speechbrain.dataio.dataset import DynamicItemDataset
from torch.utils.data import Sampler


def crop_start(num_samples, segment_samples, seed, sample_id, epoch=None):
    """Where a crop begins: a pure function, the same for any number of workers and after a resume.

    Arguments
    ---------
    num_samples, segment_samples : int
        Lengths of the mixture and of the crop.
    seed : int
        The run's seed.
    sample_id : str
        The mixture's id.
    epoch : int, optional
        None: the same crop in every epoch.

    Returns
    -------
    int
        0 where the mixture is no longer than the crop.

    Example
    -------
    >>> crop_start(100, 200, seed=1, sample_id="mix")
    0
    >>> crop_start(10**6, 100, 1, "mix", epoch=1) == crop_start(10**6, 100, 1, "mix", epoch=2)
    False
    """
    room = num_samples - segment_samples
    if room <= 0:
        return 0
    key = f"{seed}/{'' if epoch is None else epoch}/{sample_id}".encode()
    return int.from_bytes(hashlib.blake2b(key, digest_size=8).digest(), "little") % (room + 1)


class EpochSampler(Sampler):
    """Yields ``(epoch, row)``, so that the epoch reaches the crops through any number of worker processes.

    Arguments
    ---------
    num_samples : int
        Size of the dataset.
    seed : int
        Of the order.
    shuffle : bool
        Whether each epoch has an order of its own, drawn from (seed, epoch).

    Example
    -------
    >>> sampler = EpochSampler(3, seed=1, shuffle=False)
    >>> sampler.set_epoch(2)
    >>> list(sampler)
    [(2, 0), (2, 1), (2, 2)]
    """

    def __init__(self, num_samples, seed, shuffle=True):
        self.num_samples = num_samples
        self.seed = seed
        self.shuffle = shuffle
        self.epoch = 0

    def set_epoch(self, epoch):
        """Called by Brain at the start of each epoch."""
        self.epoch = epoch

    def __len__(self):
        return self.num_samples

    def __iter__(self):
        rows = np.arange(self.num_samples)
        if self.shuffle:
            np.random.default_rng([self.seed, self.epoch]).shuffle(rows)
        return iter([(self.epoch, int(row)) for row in rows])


class MixtureDataset(DynamicItemDataset):
    """The mixtures of one manifest.

    An item has ``id``, ``row`` (its position in the dataset, for the memory bank), ``num_samples``,
    ``mix_sig [T]`` and ``sources [T, N]``. It is indexed by its row, or by ``(epoch, row)``
    (see :class:`EpochSampler`).

    Arguments
    ---------
    manifest : str
        A csv written by :func:`dsd_modules.data.manifest.write_manifest`.
    sample_rate : int
        Hz.
    segment_seconds : float, optional
        Length of the crops; None: whole mixtures.
    segment : str
        ``random``: another crop in each epoch; ``fixed``: always the same.
    seed : int
        Of the crops.
    rows : sequence of int, optional
        Only these rows of the manifest, numbered anew. None: all.
    """

    def __init__(self, manifest, sample_rate, segment_seconds=None, segment="random", seed=0, rows=None):
        self.sample_rate = sample_rate
        self.segment_samples = None if segment_seconds is None else round(segment_seconds * sample_rate)
        self.segment = segment
        self.seed = seed
        data = {}
        with open(manifest, newline="", encoding="utf-8") as stream:
            for entry in csv.DictReader(stream):
                wavs = [path for column, path in entry.items() if column.endswith("_wav")]
                data[entry["ID"]] = {"duration": float(entry["duration"]), "wavs": wavs}
        if rows is not None:
            ids = list(data)
            data = {ids[row]: data[ids[row]] for row in rows}
        for row, entry in enumerate(data.values()):
            entry.update(row=row, epoch=None)
        super().__init__(data, output_keys=["id", "row", "num_samples", "mix_sig", "sources"])
        takes, provides = ["id", "duration", "wavs", "epoch"], ["num_samples", "mix_sig", "sources"]
        self.add_dynamic_item(self.read_crop, takes, provides)

    def __getitem__(self, index):
        epoch, row = index if isinstance(index, tuple) else (None, index)
        sample_id = self.data_ids[row]
        return self.pipeline.compute_outputs({**self.data[sample_id], "id": sample_id, "epoch": epoch})

    def read_crop(self, sample_id, duration, wavs, epoch):
        """Read the same stretch of the mixture and of its sources.

        Raises
        ------
        ValueError
            If a file cannot be read, or holds a value that is not finite.
        """
        num_samples, start = round(duration * self.sample_rate), 0
        if self.segment_samples is not None:
            epoch = epoch if self.segment == "random" else None
            start = crop_start(num_samples, self.segment_samples, self.seed, sample_id, epoch)
            num_samples = min(num_samples, self.segment_samples)
        signals = []
        for path in wavs:
            try:
                signal, _ = soundfile.read(path, frames=num_samples, start=start, dtype="float32")
            except (soundfile.LibsndfileError, OSError) as error:
                raise ValueError(f"{path} cannot be read: {error}") from None
            if len(signal) != num_samples:
                raise ValueError(f"{path} ends {num_samples - len(signal)} samples before its manifest says.")
            if not np.isfinite(signal).all():
                raise ValueError(f"{path} holds values that are not finite.")
            signals.append(torch.from_numpy(signal))
        yield num_samples
        yield signals[0]
        yield torch.stack(signals[1:], dim=-1)  # (T, N)
