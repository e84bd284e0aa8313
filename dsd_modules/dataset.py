"""Mixtures and their sources as a SpeechBrain dataset, cut into crops that depend on (seed, epoch, id) alone."""

import torch
from speechbrain.dataio.dataset import DynamicItemDataset

from dsd_modules.data.manifest import read_rows
from shared_modules.crops import crop_start
from shared_modules.errors import DataError


def read_entries(manifest):
    """The rows of a manifest, in its order.

    Arguments
    ---------
    manifest : str
        A csv written by :func:`dsd_modules.data.manifest.write_manifest`.

    Returns
    -------
    dict
        From an id to its row, a dict of strings by column.

    Raises
    ------
    ValueError
        If it cannot be read, or has no rows.
    """
    return {entry["ID"]: entry for entry in read_rows(manifest, "manifest")}


class MixtureDataset(DynamicItemDataset):
    """The mixtures of one manifest.

    An item has ``id``, ``row`` (its position in the dataset, for the memory bank), ``weight`` (its weight in the loss),
    ``num_samples``, ``mix_sig [T]`` and ``sources [T, N]``. It is indexed by its row, or by ``(epoch, row, weight)``
    (see :class:`dsd_modules.sampling.TrainingBatches`).

    Arguments
    ---------
    manifest : str
        A csv written by :func:`dsd_modules.data.manifest.write_manifest`.
    sample_rate : int
        Hz.
    reader : WavReader or OnTheFlyReader
        What gives the signals of a row: see :mod:`dsd_modules.data.wavs`.
    segment_seconds : float, optional
        Length of the crops; None: whole mixtures.
    segment : str
        ``random``: another crop in each epoch; ``fixed``: always the same.
    seed : int
        Of the crops.
    rows : sequence of int, optional
        Only these rows of the manifest, numbered anew. None: all.
    augmentation : Augmentation, optional
        Changes the training items: see :mod:`dsd_modules.augmentation`.
    dynamic_mixing : DynamicMixing, optional
        Gives the training items in place of the stored mixtures: see :mod:`dsd_modules.dynamic_mixing`.
    """

    def __init__(
        self,
        manifest,
        sample_rate,
        reader,
        segment_seconds=None,
        segment="random",
        seed=0,
        rows=None,
        augmentation=None,
        dynamic_mixing=None,
    ):
        self.sample_rate = sample_rate
        self.reader = reader
        self.segment_samples = None if segment_seconds is None else round(segment_seconds * sample_rate)
        self.segment = segment
        self.seed = seed
        self.augmentation = augmentation
        self.dynamic_mixing = dynamic_mixing
        entries = read_entries(manifest)
        ids = list(entries)
        ids = ids if rows is None else [ids[row] for row in rows]
        data = {
            sample_id: {"entry": entries[sample_id], "row": row, "epoch": None, "weight": 0.0}
            for row, sample_id in enumerate(ids)
        }
        super().__init__(data, output_keys=["id", "row", "weight", "num_samples", "mix_sig", "sources"])
        self.add_dynamic_item(self.make_item, ["id", "entry", "epoch"], ["num_samples", "mix_sig", "sources"])

    def __getitem__(self, index):
        epoch, row, weight = index if isinstance(index, tuple) else (None, index, 0.0)
        sample_id = self.data_ids[row]
        drawn = {"id": sample_id, "epoch": epoch, "weight": weight}
        return self.pipeline.compute_outputs({**self.data[sample_id], **drawn})

    def make_item(self, sample_id, entry, epoch):
        """The signals of an item: as they are stored, or in training (with an epoch) augmented or mixed anew.

        Raises
        ------
        DataError
            If a file cannot be read, or holds a value that is not finite.
        """
        augmentation, dynamic_mixing = (self.augmentation, self.dynamic_mixing) if epoch is not None else (None, None)
        wanted = self.segment_samples
        needed = wanted if wanted is None or augmentation is None else augmentation.num_samples_needed(wanted)
        try:
            if dynamic_mixing is not None:
                signals = dynamic_mixing(sample_id, epoch, needed)
            else:
                signals = self.read_crop(sample_id, entry, epoch, needed)
        except ValueError as error:
            raise DataError(str(error)) from None
        if augmentation is not None:
            signals = augmentation(signals, sample_id, epoch, wanted)
        signals = torch.from_numpy(signals)  # (1 + N, T)
        yield signals.shape[1]
        yield signals[0]
        yield signals[1:].T.contiguous()  # (T, N)

    def read_crop(self, sample_id, entry, epoch, segment_samples):
        """The same stretch of the mixture and of its sources, ``[1 + N, T]``."""
        num_samples, start = round(float(entry["duration"]) * self.sample_rate), 0
        if segment_samples is not None:
            epoch = epoch if self.segment == "random" else None
            start = crop_start(num_samples, segment_samples, self.seed, sample_id, epoch)
            num_samples = min(num_samples, segment_samples)
        return self.reader.read(entry, start, num_samples)
