"""Batches of P speakers with M utterances, and the crops behind them."""

import traceback
from collections import Counter

import numpy as np
import pytest
import soundfile
import torch
from torch.utils.data import DataLoader

from nessa_modules.corpora import Utterance
from nessa_modules.sampling import CropDataset, SpeakerBatchSampler
from shared_modules.errors import DataError

RATE = 8000


@pytest.fixture
def corpus(tmp_path):
    """Three speakers, three utterances each of 2 s; a sample's value tells its place: 0 at 0 s, 0.5 at 2 s."""
    utterances = []
    for speaker in ("ann", "bob", "carl"):
        for k in range(3):
            path = tmp_path / f"{speaker}{k}.wav"
            soundfile.write(path, np.linspace(0, 0.5, 2 * RATE, endpoint=False), RATE, subtype="FLOAT")
            utterances.append(Utterance(f"{speaker}-{k}", speaker, str(path), 2.0))
    return utterances


def place_s(item):
    """Where in its file a crop begins, in seconds, by the value of its first sample."""
    return float(item["sig"][0]) * 4


def test_crops_lie_where_they_should(corpus):
    dataset = CropDataset(corpus, RATE, 0.5, seed=7)
    starts = []
    for epoch in range(200):
        item = dataset[4, epoch, 0]
        assert item["id"] == "bob-1"
        assert item["speaker_index"] == 1
        assert item["sig"].dtype == torch.float32
        assert item["sig"].shape == (4000,)
        np.testing.assert_allclose(np.diff(item["sig"]), 0.25 / RATE, rtol=0.02)  # one stretch of the ramp
        starts.append(place_s(item))
    assert min(starts) >= 0
    assert max(starts) <= 1.5
    # Uniform over [0, 1.5]: mean 0.75, standard error 1.5 / sqrt(12 x 200) = 0.03.
    assert np.mean(starts) == pytest.approx(0.75, abs=0.15)


def test_crops_follow_from_seed_epoch_and_draw_alone(corpus):
    dataset, again, other = (CropDataset(corpus, RATE, 0.5, seed=seed) for seed in (7, 7, 8))
    assert torch.equal(dataset[0, 1, 0]["sig"], again[0, 1, 0]["sig"])
    assert torch.equal(dataset[0]["sig"], again[0]["sig"])
    places = {place_s(item) for item in (dataset[0, 1, 0], dataset[0, 2, 0], dataset[0, 1, 1], other[0, 1, 0])}
    assert len(places) == 4


def test_a_segment_is_never_left(tmp_path):
    path = tmp_path / "a.wav"
    soundfile.write(path, np.linspace(0, 0.5, 2 * RATE, endpoint=False), RATE, subtype="FLOAT")
    dataset = CropDataset([Utterance("a-1", "ann", str(path), 0.75, start_s=1.0)], RATE, 0.5)
    for epoch in range(50):
        sig = dataset[0, epoch, 0]["sig"]
        assert sig.min() > 0.25 - 1e-6
        assert sig.max() < 0.4375 + 1e-6


def test_short_utterances_are_repeated_and_others_resampled(tmp_path):
    path = tmp_path / "short.wav"
    samples = np.random.default_rng(0).uniform(-0.5, 0.5, 3000).astype(np.float32)
    soundfile.write(path, np.stack([samples, samples], 1), RATE, subtype="FLOAT")
    utterance = Utterance("s", "ann", str(path), 3000 / RATE)
    sig = CropDataset([utterance], RATE, 1.0)[0]["sig"].numpy()
    np.testing.assert_array_equal(sig, np.concatenate([samples, samples, samples[:2000]]))
    assert CropDataset([utterance], 16000, 0.2)[0, 3, 0]["sig"].shape == (3200,)
    assert CropDataset([utterance], 11025, 0.3331)[0]["sig"].shape == (3672,)


def test_speakers_may_be_given(corpus):
    dataset = CropDataset(corpus, RATE, 0.5, speakers=["carl", "zoe", "ann", "bob"])
    assert dataset.speaker_indices == [2, 2, 2, 3, 3, 3, 0, 0, 0]
    with pytest.raises(ValueError, match="Speaker 'bob' is none of the 2 speakers"):
        CropDataset(corpus, RATE, 0.5, speakers=["carl", "ann"])
    with pytest.raises(ValueError, match="list is empty"):
        CropDataset([], RATE, 0.5)
    with pytest.raises(ValueError, match="crop_seconds can only be a positive number of seconds, but got 0"):
        CropDataset(corpus, RATE, 0)


@pytest.mark.parametrize("num_workers", [0, 2])
def test_a_damaged_file_ends_in_one_sentence(corpus, num_workers):
    samples = np.full(2 * RATE, np.nan)
    soundfile.write(corpus[4].path, samples, RATE, subtype="FLOAT")
    loader = DataLoader(CropDataset(corpus, RATE, 0.5), batch_size=3, num_workers=num_workers)
    with pytest.raises(DataError) as caught:
        list(loader)
    traceback.clear_frames(caught.tb)  # or the workers are ended by the garbage collection, which takes 10 s
    assert str(caught.value) == f"{corpus[4].path} holds values that are not finite (in utterance bob-1)."


@pytest.mark.parametrize("num_workers", [0, 2])
def test_a_loader_gives_batches_by_speaker(corpus, num_workers):
    dataset = CropDataset(corpus, RATE, 0.25, seed=1)
    sampler = SpeakerBatchSampler(dataset.speaker_indices, 2, 3, seed=1)
    loader = DataLoader(dataset, batch_sampler=sampler, num_workers=num_workers, persistent_workers=num_workers > 0)
    epochs = []
    for epoch in (1, 2):
        sampler.set_epoch(epoch)
        batches = list(loader)
        assert len(batches) == len(sampler) == 2
        for batch in batches:
            assert batch["sig"].shape == (6, 2000)
            by_speaker = batch["speaker_index"].view(2, 3)
            assert (by_speaker == by_speaker[:, :1]).all()
            assert by_speaker[0, 0] != by_speaker[1, 0]
            assert len(set(batch["id"])) == 6
        epochs.append(torch.cat([batch["sig"] for batch in batches]))
    # The workers live on, and yet the second epoch has crops of its own.
    assert not set(epochs[0][:, 0].tolist()) & set(epochs[1][:, 0].tolist())


def count(sampler):
    batches = list(sampler)
    return batches, Counter(row for batch in batches for row, _, _ in batch)


def test_everyone_is_drawn_equally_often():
    rng = np.random.default_rng(0)
    speakers = rng.permutation(np.repeat(np.arange(23), 6)).tolist()
    sampler = SpeakerBatchSampler(speakers, 5, 4, seed=3, num_batches=23 * 3)
    batches, rows = count(sampler)
    drawn = Counter()
    for batch in batches:
        groups = [{speakers[row] for row, _, _ in batch[start : start + 4]} for start in range(0, 20, 4)]
        assert all(len(group) == 1 for group in groups)
        assert len(set.union(*groups)) == 5
        assert len({row for row, _, _ in batch}) == 20
        drawn.update(next(iter(group)) for group in groups)
    assert set(drawn.values()) == {15}  # 69 x 5 / 23
    assert set(rows.values()) == {10}  # 15 x 4 / 6


def test_batches_follow_from_seed_and_epoch_alone():
    speakers = [row % 8 for row in range(64)]
    one, two = (SpeakerBatchSampler(speakers, 4, 2, seed=3) for _ in range(2))
    for epoch in (1, 2, 3):
        one.set_epoch(epoch)
        first = list(one)
    two.set_epoch(3)
    assert list(two) == first == list(one)
    assert len(first) == len(two) == 8
    assert {epoch for batch in first for _, epoch, _ in batch} == {3}
    two.set_epoch(4)
    assert [[row for row, _, _ in batch] for batch in two] != [[row for row, _, _ in batch] for batch in first]
    other = SpeakerBatchSampler(speakers, 4, 2, seed=4)
    other.set_epoch(3)
    assert list(other) != first


def test_speakers_of_few_utterances_get_other_crops():
    sampler = SpeakerBatchSampler([0, 1, 1, 2, 2, 2, 2], 3, 4, seed=0, num_batches=5)
    batches, _ = count(sampler)
    for batch in batches:
        of_one = [(row, draw) for row, _, draw in batch if row == 0]
        assert len(of_one) == 4
        assert Counter(row for row, _, _ in batch if row in (1, 2)) == {1: 2, 2: 2}
        assert len({row for row, _, _ in batch if row > 2}) == 4
    items = [item for batch in batches for item in batch]
    assert len(items) == len(set(items)) == 60


def test_numbers_that_make_no_sense_are_named():
    with pytest.raises(ValueError, match="speakers_per_batch can only be 2 to 3, the number of speakers, but got 4"):
        SpeakerBatchSampler([0, 1, 2], 4, 2)
    with pytest.raises(ValueError, match="speakers_per_batch can only be a whole number of at least 2, but got 1"):
        SpeakerBatchSampler([0, 1, 2], 1, 2)
    with pytest.raises(ValueError, match=r"utterances_per_speaker can only be .* but got 0"):
        SpeakerBatchSampler([0, 1, 2], 2, 0)
    with pytest.raises(ValueError, match=r"num_batches can only be .* but got 0"):
        SpeakerBatchSampler([0, 1, 2], 2, 2, num_batches=0)
