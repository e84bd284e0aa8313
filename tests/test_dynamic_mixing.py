"""Dynamic mixing, with a reader whose signals tell which source they are: plus and minus an amplitude of its own."""

import copy
import csv
import itertools
from collections import Counter

import numpy as np
import pytest
import torch
from scipy.stats import chisquare
from torch.utils.data import DataLoader

from dsd_modules.augmentation import Augmentation
from dsd_modules.dataset import MixtureDataset
from dsd_modules.dynamic_mixing import DynamicMixing, source_speakers

SAMPLE_RATE = 8000
STEP = 2**-12  # of the amplitudes, which are its multiples: float32 adds them without rounding
NOISE_STEP = 2**-20


class Reader:
    """Source ``s`` (from 1 on, mixture by mixture) is ``+-s * STEP``, the noise of mixture ``m`` the constant
    ``m * NOISE_STEP``. ``speech_samples`` of a source are followed by silence; ``calls`` are what was read."""

    def __init__(self, entries, num_spks, speech_samples=None, step=STEP):
        self.numbers = {entry["ID"]: number for number, entry in enumerate(entries)}
        self.num_samples = {entry["ID"]: round(float(entry["duration"]) * SAMPLE_RATE) for entry in entries}
        self.num_spks = num_spks
        self.speech_samples = speech_samples
        self.step = step
        self.calls = []

    def _positions(self, kind, entry, start, num_samples):
        assert start >= 0
        assert 0 < num_samples <= self.num_samples[entry["ID"]] - start
        assert isinstance(start, int)
        assert isinstance(num_samples, int)
        self.calls.append((kind, entry["ID"], start, num_samples))
        return np.arange(start, start + num_samples)

    def read_source(self, entry, index, start, num_samples):
        positions = self._positions(index, entry, start, num_samples)
        number = self.numbers[entry["ID"]] * self.num_spks + index + 1
        signal = number * self.step * (-1.0) ** positions
        if self.speech_samples is not None:
            signal[positions >= self.speech_samples] = 0
        return signal.astype(np.float32)

    def read_noise(self, entry, start, num_samples):
        positions = self._positions("noise", entry, start, num_samples)
        return np.full(len(positions), (self.numbers[entry["ID"]] + 1) * NOISE_STEP, dtype=np.float32)


def make_entries(num_mixtures, num_spks=2, num_speakers=10, seconds=(0.1, 0.2)):
    """Ids as LibriMix's: speakers ``0``, ``1``, ... by turns."""
    rng = np.random.default_rng(num_mixtures)
    speakers = itertools.cycle(range(num_speakers))
    return [
        {
            "ID": "_".join(f"{next(speakers)}-13754-{number:04d}" for _ in range(num_spks)),
            "duration": str(rng.uniform(*seconds)),
        }
        for number in range(num_mixtures)
    ]


def make(num_mixtures=20, num_spks=2, seed=1, noise=False, entries=None, speech_samples=None, step=STEP, **options):
    entries = make_entries(num_mixtures, num_spks, **options) if entries is None else entries
    reader = Reader(entries, num_spks, speech_samples, step)
    return DynamicMixing(entries, reader, num_spks, SAMPLE_RATE, seed, noise)


def source_numbers(dynamic_mixing, sources):
    """Which of all sources these are."""
    numbers = np.abs(sources[:, 0]) / dynamic_mixing.reader.step - 1
    np.testing.assert_array_equal(numbers, numbers.round())
    return numbers.astype(int)


def items(dynamic_mixing, num_epochs, num_samples=None):
    for epoch in range(1, num_epochs + 1):
        for entry in dynamic_mixing.entries:
            yield dynamic_mixing(entry["ID"], epoch, num_samples)


# Speakers


@pytest.mark.parametrize(
    ("entry", "speakers"),
    [
        ({"ID": "4077-13754-0001_5142-33396-0065"}, ["4077", "5142"]),
        ({"ID": "4077-13754-0001_5142-33396-0065-2"}, ["4077", "5142"]),
        ({"ID": "1-2-3_4-5-6_7-8-9"}, ["1", "4", "7"]),
        ({"ID": "w01-en003_m02-de011-3"}, ["w01", "m02"]),
        ({"ID": "1-2_3-4", "s1_speaker": "ann", "s2_speaker": "bob"}, ["ann", "bob"]),
        ({"ID": "x", "s1_speaker": "a_b", "s2_speaker": "c", "s3_speaker": "d"}, ["a_b", "c", "d"]),
        ({"ID": "1-2_3-4", "s1_speaker": "", "s2_speaker": None}, ["1", "3"]),
    ],
)
def test_speakers(entry, speakers):
    assert source_speakers(entry, len(speakers)) == speakers


@pytest.mark.parametrize("sample_id", ["mix1", "ann_bob", "ann-1", "ann-1_bob-1_eve-1", "-1_bob-1", "ann-1_bob-"])
def test_unknown_speakers(sample_id):
    entries = [*make_entries(3), {"ID": sample_id, "duration": "1"}]
    with pytest.raises(ValueError, match=rf"^Dynamic mixing needs to know the speakers, .* mixture '{sample_id}'"):
        make(entries=entries)


def test_too_few_speakers():
    entries = [{"ID": f"ann-{number}_bob-{number}", "duration": "1"} for number in range(4)]
    assert make(entries=entries)("ann-1_bob-1", 1, 100).shape == (3, 100)
    entries = [{"ID": f"ann-{number}_bob-{number}_ann-x", "duration": "1"} for number in range(4)]
    with pytest.raises(
        ValueError, match="mixing of 3 speakers needs sources of as many, but the manifest's 4 mixtures"
    ):
        make(entries=entries, num_spks=3)


# What is drawn


@pytest.mark.parametrize("num_spks", [2, 3])
def test_speakers_of_a_mixture_differ(num_spks):
    """Also where a speaker has most of the sources."""
    entries = make_entries(30, num_spks, num_speakers=4)
    for entry in entries[:20]:
        entry.update({f"s{number}_speaker": "0" for number in range(1, num_spks + 1)})
    dynamic_mixing = make(entries=entries, num_spks=num_spks)
    speakers = [speaker for entry in entries for speaker in source_speakers(entry, num_spks)]
    pairs = Counter()
    for signals in items(dynamic_mixing, num_epochs=10, num_samples=10):
        drawn = {speakers[number] for number in source_numbers(dynamic_mixing, signals[1:])}
        assert len(drawn) == num_spks
        pairs[frozenset(drawn)] += 1
    assert len(pairs) == {2: 6, 3: 4}[num_spks]  # all there can be of four speakers


@pytest.mark.parametrize("num_spks", [1, 2, 3])
def test_all_sources_are_drawn_equally_often(num_spks):
    dynamic_mixing = make(num_mixtures=40, num_spks=num_spks, num_speakers=20, noise=True)
    counts = np.zeros(40 * num_spks)
    for signals in items(dynamic_mixing, num_epochs=50, num_samples=10):
        counts[source_numbers(dynamic_mixing, signals[1:])] += 1
    assert counts.sum() == 50 * 40 * num_spks
    assert chisquare(counts).pvalue > 0.01
    noises = Counter(sample_id for kind, sample_id, *_ in dynamic_mixing.reader.calls if kind == "noise")
    assert len(noises) == 40
    assert chisquare(list(noises.values())).pvalue > 0.01


def test_sources_meet_anew():
    """Of 4500 pairs that can be, stored ones come no more often than others."""
    dynamic_mixing = make(num_mixtures=50)
    drawn = items(dynamic_mixing, num_epochs=10, num_samples=10)
    pairs = [tuple(sorted(source_numbers(dynamic_mixing, signals[1:]))) for signals in drawn]
    assert len(set(pairs)) > 450
    assert sum(first % 2 == 0 and second == first + 1 for first, second in pairs) < 15  # 500 / 90 are expected


@pytest.mark.parametrize("noise", [False, True])
def test_stretches_are_drawn_evenly_and_independently(noise):
    entries = [{"ID": f"{number}-1_{number + 1}-1", "duration": str(14 / SAMPLE_RATE)} for number in range(200)]
    dynamic_mixing = make(entries=entries, noise=noise)
    list(items(dynamic_mixing, num_epochs=5, num_samples=10))
    calls = dynamic_mixing.reader.calls
    assert {num_samples for *_, num_samples in calls} == {10}
    starts = np.array([start for *_, start, _ in calls]).reshape(1000, 2 + noise)
    for column in starts.T:
        counts = np.bincount(column, minlength=5)
        assert len(counts) == 5
        assert chisquare(counts).pvalue > 0.01
    assert 0.1 < (starts[:, 0] == starts[:, -1]).mean() < 0.3  # one in five


# The mixture


@pytest.mark.parametrize("num_spks", [1, 2, 3])
@pytest.mark.parametrize("noise", [False, True])
def test_mixture_is_the_sum(num_spks, noise):
    dynamic_mixing = make(num_spks=num_spks, noise=noise)
    noise_rows = set()
    for signals in items(dynamic_mixing, num_epochs=2, num_samples=500):
        assert signals.shape == (1 + num_spks, 500)
        assert signals.dtype == np.float32
        rest = signals[0] - signals[1:].sum(axis=0)
        noise_row = rest[0] / NOISE_STEP - 1
        np.testing.assert_array_equal(rest, rest[0])
        assert noise_row in (range(20) if noise else [-1])
        noise_rows.add(int(noise_row))
    assert len(noise_rows) > 10 or not noise


@pytest.mark.parametrize("noise", [False, True])
def test_only_what_is_needed_is_read(noise):
    dynamic_mixing = make(num_spks=3, noise=noise)
    dynamic_mixing(dynamic_mixing.entries[0]["ID"], 1, 100)
    kinds = [kind for kind, *_ in dynamic_mixing.reader.calls]
    assert len(kinds) == 3 + noise
    assert ("noise" in kinds) == noise


@pytest.mark.parametrize("noise", [False, True])
@pytest.mark.parametrize("num_samples", [None, 1200, 10**6])
def test_length_is_that_of_the_shortest(num_samples, noise):
    dynamic_mixing = make(num_spks=3, noise=noise)
    reader = dynamic_mixing.reader
    for signals in items(dynamic_mixing, num_epochs=2, num_samples=num_samples):
        drawn = [reader.num_samples[sample_id] for _, sample_id, *_ in reader.calls]
        assert signals.shape[1] == min(drawn if num_samples is None else [*drawn, num_samples])
        reader.calls.clear()


@pytest.mark.parametrize("noise", [False, True])
def test_loud_mixtures_are_turned_down_together(noise):
    quiet, loud = make(noise=noise), make(noise=noise, step=STEP * 64)
    peaks = []
    for entry in quiet.entries:
        sources = 64 * quiet(entry["ID"], 1, 100)[1:]
        mixture, *scaled = loud(entry["ID"], 1, 100)
        scale = np.abs(scaled[0][0] / sources[0, 0])
        np.testing.assert_allclose(scaled, scale * sources, rtol=1e-6)
        peaks.append(np.abs(mixture).max())
        assert scale == 1 if peaks[-1] < 0.8999 else scale < 1
        rest = mixture - np.sum(scaled, axis=0)
        np.testing.assert_allclose(rest, rest.mean(), atol=2e-7)
        assert rest.mean() > 5e-7 if noise else abs(rest.mean()) < 1e-7
    assert max(peaks) == pytest.approx(0.9)
    assert min(peaks) < 0.8


# Silence


def test_silent_stretches_are_drawn_again():
    """A third of each recording is speech, and then padding: a stretch of a tenth is never only padding."""
    dynamic_mixing = make(num_mixtures=50, speech_samples=300, seconds=(0.1, 0.12))
    for signals in items(dynamic_mixing, num_epochs=4, num_samples=80):
        assert np.abs(signals[1:]).max(axis=1).min() > 0
    starts = [start for *_, start, _ in dynamic_mixing.reader.calls]
    assert len(starts) > 2 * 50 * 4 * 1.5  # some were drawn again
    assert max(starts) > 300
    assert np.mean(np.array(starts) == 0) < 0.02  # that is the last resort


def test_sources_without_speech_end_the_search():
    dynamic_mixing = make(speech_samples=0)
    assert not dynamic_mixing(dynamic_mixing.entries[0]["ID"], 1, 80).any()
    assert len(dynamic_mixing.reader.calls) <= 2 * 10
    dynamic_mixing.reader.calls.clear()
    assert not dynamic_mixing(dynamic_mixing.entries[0]["ID"], 1).any()  # one of them has no other stretch
    assert len(dynamic_mixing.reader.calls) <= 1 + 10


# In a dataset


class StoredReader(Reader):
    def read(self, entry, start, num_samples):
        sources = [self.read_source(entry, index, start, num_samples) for index in range(self.num_spks)]
        return np.stack([np.sum(sources, axis=0) + self.read_noise(entry, start, num_samples), *sources])


@pytest.fixture
def make_dataset(tmp_path):
    """A training set of 12 noisy mixtures of three, crops of 0.4 s."""
    entries = make_entries(12, num_spks=3, seconds=(0.5, 0.6))
    with open(tmp_path / "train.csv", "w", newline="") as stream:
        writer = csv.DictWriter(stream, ["ID", "duration"])
        writer.writeheader()
        writer.writerows(entries)

    def make(seed=1, is_dynamic=True, is_augmented=True):
        reader = StoredReader(entries, num_spks=3)
        dynamic_mixing = DynamicMixing(entries, reader, 3, SAMPLE_RATE, seed, noise=True) if is_dynamic else None
        augmentation = Augmentation(seed, speeds=[95, 100, 105], wave_drop=True) if is_augmented else None
        options = {"augmentation": augmentation, "dynamic_mixing": dynamic_mixing}
        return MixtureDataset(tmp_path / "train.csv", SAMPLE_RATE, reader, segment_seconds=0.4, seed=seed, **options)

    return make


def load(dataset, epoch, num_workers=0, rows=range(12)):
    """From a row to its mixture and sources, ``[T, 1 + N]``."""
    order = [(epoch, row, 1.0) for row in rows]
    loader = DataLoader(dataset, batch_size=None, sampler=order, num_workers=num_workers)
    return {item["row"]: torch.cat([item["mix_sig"].unsqueeze(-1), item["sources"]], dim=-1) for item in loader}


@pytest.mark.parametrize(("is_dynamic", "is_augmented"), [(True, True), (True, False), (False, True)])
def test_items_follow_from_seed_epoch_and_id_alone(make_dataset, is_dynamic, is_augmented):
    def dataset(seed=1):
        return make_dataset(seed, is_dynamic, is_augmented)

    alone = load(dataset(), epoch=1)
    assert list(alone) == list(range(12))
    assert all(item.shape == (3200, 4) for item in alone.values())
    for other in (
        load(dataset(), 1, num_workers=2),
        load(dataset(), 1, rows=range(11, -1, -1)),
        load(dataset(), 1, rows=range(0, 12, 2)) | load(dataset(), 1, rows=range(1, 12, 2)),  # two ranks
    ):
        assert all(torch.equal(other[row], alone[row]) for row in alone)
    for other in (load(dataset(), epoch=2), load(dataset(seed=2), epoch=1)):
        assert not any(torch.equal(other[row], alone[row]) for row in alone)


def test_only_training_items_change(make_dataset):
    changed, stored = make_dataset(), make_dataset(is_dynamic=False, is_augmented=False)
    for row in range(12):
        for signal in ("mix_sig", "sources"):
            assert torch.equal(changed[row][signal], stored[row][signal])
            assert not torch.equal(changed[1, row, 1.0][signal], stored[1, row, 1.0][signal])


def test_entries_are_not_changed():
    entries = make_entries(20)
    before = copy.deepcopy(entries)
    list(items(make(entries=entries, noise=True), num_epochs=1, num_samples=100))
    assert entries == before
