"""Crops of utterances, and batches of P speakers with M utterances each. Both follow from (seed, epoch) alone."""

import numpy as np
import torch
from torch.utils.data import Dataset, Sampler

from nessa_modules.corpora import read_utterance
from shared_modules.crops import crop_start
from shared_modules.errors import DataError


class CropDataset(Dataset):
    """Crops of equal length from utterances of any length.

    An item is a dict of ``id`` (str), ``sig`` ([T], float32) and ``speaker_index`` (int). It is indexed by the
    utterance's row, which always gives the same crop, or by ``(row, epoch, draw)``, as :class:`SpeakerBatchSampler`
    gives it. Only the crop is read from the disk. An utterance that is too short is repeated.

    Arguments
    ---------
    utterances : list of Utterance
        What to cut, at least one.
    sample_rate : int
        Of the crops, Hz; recordings at another rate are resampled.
    crop_seconds : float
        Length of the crops.
    seed : int
        Of where the crops lie.
    speakers : list of str, optional
        The names that ``speaker_index`` counts; None: the utterances' speakers, sorted.

    Attributes
    ----------
    speakers : list of str
    speaker_indices : list of int
        Of each row.

    Raises
    ------
    ValueError
        If there are no utterances, a speaker is not in ``speakers``, or a number makes no sense. While reading,
        :class:`shared_modules.errors.DataError`: a file is missing, damaged, or holds values that are not finite.

    Example
    -------
    >>> import soundfile, tempfile
    >>> from nessa_modules.corpora import Utterance
    >>> path = f"{tempfile.mkdtemp()}/a.wav"
    >>> soundfile.write(path, np.zeros(16000), 16000)
    >>> dataset = CropDataset([Utterance("a-1", "ann", path, 1.0)], sample_rate=8000, crop_seconds=0.5)
    >>> dataset[0]["sig"].shape, dataset[0, 1, 0]["speaker_index"]
    (torch.Size([4000]), 0)
    """

    def __init__(self, utterances, sample_rate, crop_seconds, seed=0, speakers=None):
        if not utterances:
            raise ValueError("There are no utterances to cut: the list is empty.")
        if not crop_seconds * sample_rate >= 1:
            raise ValueError(f"crop_seconds can only be a positive number of seconds, but got {crop_seconds!r}.")
        self.utterances = list(utterances)
        self.sample_rate = sample_rate
        self.crop_seconds = crop_seconds
        self.num_samples = round(crop_seconds * sample_rate)
        self.seed = seed
        self.speakers = sorted({u.speaker for u in self.utterances}) if speakers is None else list(speakers)
        index_of = {speaker: index for index, speaker in enumerate(self.speakers)}
        unknown = sorted({u.speaker for u in self.utterances} - index_of.keys())
        if unknown:
            raise ValueError(f"Speaker {unknown[0]!r} is none of the {len(index_of)} speakers that were given.")
        self.speaker_indices = [index_of[utterance.speaker] for utterance in self.utterances]

    def __len__(self):
        return len(self.utterances)

    def __getitem__(self, index):
        row, epoch, draw = index if isinstance(index, tuple) else (index, None, 0)
        utterance = self.utterances[row]
        available = int(utterance.duration_s * self.sample_rate)
        start = crop_start(available, self.num_samples, self.seed, f"{utterance.id}/{draw}", epoch)
        try:
            samples = read_utterance(utterance, self.sample_rate, start / self.sample_rate, self.crop_seconds)
        except ValueError as error:
            raise DataError(str(error)) from None
        # Repeats what is too short, and the odd sample that rounding costs.
        samples = np.resize(samples, self.num_samples)  # (T,)
        return {
            "id": utterance.id,
            "sig": torch.from_numpy(samples),
            "speaker_index": self.speaker_indices[row],
        }


class SpeakerBatchSampler(Sampler):
    """Batches of P different speakers with M utterances each, as lists of ``(row, epoch, draw)``.

    The rows of a speaker stand side by side: utterance m of the batch's speaker p is at ``p * M + m``. Speakers are
    drawn in shuffled rounds, and so are the utterances of a speaker: none comes again before all have come. Only a
    speaker of fewer than M utterances has one twice in a batch; ``draw`` counts how often the epoch has had a row
    before, so that :class:`CropDataset` gives another crop of it.

    Arguments
    ---------
    speaker_indices : list of int
        The speaker of each row.
    speakers_per_batch : int
        P, 2 or more and at most as many as there are speakers.
    utterances_per_speaker : int
        M.
    seed : int
        Of the draw.
    num_batches : int, optional
        Batches of an epoch; None: as many as it takes to draw about as many utterances as there are.

    Raises
    ------
    ValueError
        If a number makes no sense, or there are fewer speakers than P.

    Example
    -------
    >>> sampler = SpeakerBatchSampler([0, 0, 1, 1, 2, 2], speakers_per_batch=3, utterances_per_speaker=2, seed=1)
    >>> sampler.set_epoch(1)
    >>> [sorted(row for row, epoch, draw in batch) for batch in sampler]
    [[0, 1, 2, 3, 4, 5]]
    """

    def __init__(self, speaker_indices, speakers_per_batch, utterances_per_speaker, seed=0, num_batches=None):
        self.rows_of = {}
        for row, speaker in enumerate(speaker_indices):
            self.rows_of.setdefault(int(speaker), []).append(row)
        for name, value, least in (
            ("speakers_per_batch", speakers_per_batch, 2),
            ("utterances_per_speaker", utterances_per_speaker, 1),
            ("num_batches", 1 if num_batches is None else num_batches, 1),
        ):
            if not isinstance(value, int) or value < least:
                raise ValueError(f"{name} can only be a whole number of at least {least}, but got {value!r}.")
        if len(self.rows_of) < speakers_per_batch:
            raise ValueError(
                f"speakers_per_batch can only be 2 to {len(self.rows_of)}, the number of speakers, but got "
                f"{speakers_per_batch}."
            )
        self.speakers_per_batch = speakers_per_batch
        self.utterances_per_speaker = utterances_per_speaker
        self.seed = seed
        self.num_batches = num_batches or -(-len(speaker_indices) // (speakers_per_batch * utterances_per_speaker))
        self.epoch = 0

    def set_epoch(self, epoch):
        """Called at the start of each epoch; an epoch's batches are the same whatever came before."""
        self.epoch = epoch

    def __len__(self):
        return self.num_batches

    def __iter__(self):
        rng = np.random.default_rng([self.seed, self.epoch])
        speakers = _Deck(sorted(self.rows_of), rng)
        rows_of = {speaker: _Deck(rows, rng) for speaker, rows in sorted(self.rows_of.items())}
        num_draws = {}
        for _ in range(self.num_batches):
            batch = []
            for speaker in speakers.deal(self.speakers_per_batch):
                for row in rows_of[speaker].deal(self.utterances_per_speaker):
                    batch.append((row, self.epoch, num_draws.get(row, 0)))
                    num_draws[row] = num_draws.get(row, 0) + 1
            yield batch


class _Deck:
    """Deals items in shuffled rounds; a hand holds none of them twice, unless it is larger than the deck."""

    def __init__(self, items, rng):
        self.items, self.rng, self.left = items, rng, []

    def deal(self, num_items):
        hand = []
        while len(hand) < num_items:
            if not self.left:
                order = self.rng.permutation(self.items).tolist()
                held = set(hand)
                self.left = [item for item in order if item not in held] + [item for item in order if item in held]
            hand.append(self.left.pop(0))
        return hand
