"""Speed perturbation against sines of known frequency, and wave drop against SpeechBrain's own modules."""

import pickle
from collections import Counter

import numpy as np
import pytest
import torch
from scipy.signal import resample_poly
from scipy.stats import chisquare
from speechbrain.augment.time_domain import DropChunk, DropFreq

from dsd_modules.augmentation import Augmentation, drop_waves, perturb_speed

SAMPLE_RATE = 8000
SPEEDS = [95, 100, 105]
EDGE = 30  # samples at either end where a resampled signal feels that it was cut


def sine(frequency_hz, positions):
    return np.sin(2 * np.pi * frequency_hz * positions / SAMPLE_RATE)


def noise_crop(num_spks=2, num_samples=8000, seed=0):
    """Sources and a noise of the same level, all white."""
    signals = 0.1 * np.random.default_rng(seed).standard_normal((1 + num_spks, num_samples))
    noise, sources = signals[0], signals[1:]
    return np.concatenate([[noise + sources.sum(axis=0)], sources]).astype(np.float32), noise


# Speed


@pytest.mark.parametrize("speeds", [(95, 105), (105, 95), (100, 80), (95, 100, 105), (110, 97, 103)])
def test_sines_are_played_at_their_speed(speeds):
    frequencies = (300, 1000, 2500)[: len(speeds)]
    time = np.arange(6000)
    sources = np.stack([sine(frequency, time) for frequency in frequencies])
    signals = np.concatenate([sources.sum(axis=0, keepdims=True), sources]).astype(np.float32)
    mixture, *perturbed = perturb_speed(signals, speeds)
    assert mixture.dtype == np.float32
    assert len(mixture) == min(6000, -(-6000 * 100 // max(speeds)))
    inside = slice(EDGE, -EDGE)
    for source, frequency, speed in zip(perturbed, frequencies, speeds, strict=True):
        # The frequency times the factor, from the same beginning on.
        expected = sine(frequency * speed / 100, np.arange(len(mixture)))
        np.testing.assert_allclose(source[inside], expected[inside], atol=4e-3)
    np.testing.assert_allclose(mixture, np.sum(perturbed, axis=0), atol=1e-5)


@pytest.mark.parametrize(("speed", "position"), [(95, 4000 / 0.95), (105, 4000 / 1.05)])
def test_tempo_changes_with_pitch(speed, position):
    time = np.arange(8000)
    burst = np.exp(-0.5 * ((time - 4000) / 200) ** 2)
    _, source = perturb_speed(np.stack([burst, burst]).astype(np.float32), [speed])
    centre = np.average(np.arange(len(source)), weights=np.abs(source))
    assert centre == pytest.approx(position, abs=1)


def test_noise_stays_as_it_was():
    signals, noise = noise_crop(num_spks=3)
    mixture, *sources = perturb_speed(signals, (105, 95, 100))
    np.testing.assert_allclose(mixture - np.sum(sources, axis=0), noise[: len(mixture)], atol=1e-6)
    np.testing.assert_array_equal(sources[2], signals[3, : len(mixture)])


def test_a_speed_of_100_changes_no_bit():
    signals, _ = noise_crop()
    np.testing.assert_array_equal(Augmentation(seed=1, speeds=[100])(signals, "mix", epoch=1), signals)


@pytest.mark.parametrize("speeds", [SPEEDS, [90, 100, 110], [97, 101], [95], [200, 50]])
def test_crops_keep_their_length(speeds):
    augmentation = Augmentation(seed=1, speeds=speeds)
    for num_samples in (*range(1, 60), 1234, 8000):
        needed = augmentation.num_samples_needed(num_samples)
        assert needed >= num_samples
        signals, _ = noise_crop(num_samples=needed)
        for epoch in range(4):
            assert augmentation(signals, "mix", epoch, num_samples).shape == (3, num_samples)


def test_as_little_as_possible_is_read():
    assert Augmentation(seed=1, speeds=SPEEDS).num_samples_needed(8000) == 8400
    assert Augmentation(seed=1, speeds=[95]).num_samples_needed(8000) == 8000
    assert Augmentation(seed=1, wave_drop=True).num_samples_needed(8000) == 8000


def test_short_and_whole_mixtures_are_cut_to_the_common_length():
    signals, _ = noise_crop(num_samples=2100)
    fast, slow = Augmentation(seed=1, speeds=[105]), Augmentation(seed=1, speeds=[95])
    assert fast(signals, "mix", epoch=1).shape == (3, 2000)
    assert fast(signals, "mix", epoch=1, num_samples=8000).shape == (3, 2000)
    assert slow(signals, "mix", epoch=1).shape == (3, 2100)


def test_each_source_draws_its_own_speed():
    """All nine pairs of speeds come equally often, over ids as well as over epochs."""
    augmentation = Augmentation(seed=1, speeds=SPEEDS)
    source = np.random.default_rng(1).standard_normal(64, dtype=np.float32)
    signals = np.stack([2 * source, source, source])
    played = {resample_poly(source, 100, speed)[:60].tobytes(): speed for speed in SPEEDS}

    def drawn_speeds(sample_id, epoch):
        return tuple(played[signal.tobytes()] for signal in augmentation(signals, sample_id, epoch, 60)[1:])

    for counts in (
        Counter(drawn_speeds(f"mix{number}", 1) for number in range(900)),
        Counter(drawn_speeds("mix", epoch) for epoch in range(900)),
    ):
        assert len(counts) == 9
        assert chisquare(list(counts.values())).pvalue > 0.01


@pytest.mark.parametrize("speeds", [[], [0.95, 1.05], [95, 0], [-100], ["95"], [1], [1000], 95])
def test_speeds_that_cannot_be_are_named(speeds):
    with pytest.raises(ValueError, match=r"^speeds can only be a list of whole percentages from 50 to 200, but got"):
        Augmentation(seed=1, speeds=speeds)


# Wave drop


def test_only_the_mixture_is_dropped():
    signals, _ = noise_crop(num_spks=3)
    before = signals.copy()
    num_changed = 0
    for epoch in range(20):
        augmented = Augmentation(seed=1, wave_drop=True)(signals, "mix", epoch)
        np.testing.assert_array_equal(augmented[1:], before[1:])
        num_changed += not np.array_equal(augmented[0], before[0])
        assert augmented.dtype == np.float32
    np.testing.assert_array_equal(signals, before)
    assert num_changed > 15  # one in 24 has neither stretches nor bands dropped


def test_against_speechbrain():
    mixture = torch.from_numpy(noise_crop()[0][0])
    for seed in range(10):
        torch.manual_seed(seed)
        expected = DropChunk(1000, 2000, 0, 5)(mixture.unsqueeze(0), torch.ones(1))
        expected = DropFreq(drop_freq_count_low=0, drop_freq_count_high=3)(expected)[0]
        np.testing.assert_array_equal(drop_waves(mixture.numpy(), seed), expected)


def test_stretches_and_bands_are_dropped():
    rng = np.random.default_rng(1)
    mixture = rng.standard_normal(40000).astype(np.float32)
    spectrum = np.abs(np.fft.rfft(mixture))[:20000]
    num_silent, num_bands = [], []
    for _ in range(150):
        dropped = drop_waves(mixture, int(rng.integers(2**63)))
        num_silent.append(int((dropped == 0).sum()))
        if num_silent[-1] == 0:  # then the spectra can be compared
            gain = np.median((np.abs(np.fft.rfft(dropped))[:20000] / spectrum).reshape(200, 100), axis=1)
            num_bands.append(int((gain < 0.5).sum()))
    # The bands' filter, of 101 taps, rings into both ends of a silent stretch.
    assert min(num_silent) == 0
    assert 1000 - 100 <= min(count for count in num_silent if count) <= 2000
    assert 4000 < max(num_silent) <= 10000
    # Of 200 bands a notch of 5 % takes away ten, and some on its slopes.
    assert min(num_bands) == 0
    assert 10 <= min(count for count in num_bands if count) <= 20
    assert 20 < max(num_bands) <= 60


@pytest.mark.parametrize("num_samples", [1, 50, 500, 1500, 2500])
def test_something_of_a_short_crop_is_left(num_samples):
    mixture = np.full(num_samples, 0.5, dtype=np.float32)
    for seed in range(30):
        dropped = drop_waves(mixture, seed)
        assert dropped.shape == (num_samples,)
        assert np.isfinite(dropped).all()
        assert dropped.any()


def test_global_generators_are_left_alone(monkeypatch):
    def refuse(*_):
        raise AssertionError("seeds all devices")

    signals, _ = noise_crop()
    state, numpy_state = torch.get_rng_state(), np.random.get_state()[1].copy()  # noqa: NPY002
    monkeypatch.setattr(torch, "manual_seed", refuse)
    monkeypatch.setattr(torch.cuda, "manual_seed_all", refuse)
    Augmentation(seed=1, speeds=SPEEDS, wave_drop=True)(signals, "mix", epoch=1)
    assert torch.equal(torch.get_rng_state(), state)
    np.testing.assert_array_equal(np.random.get_state()[1], numpy_state)  # noqa: NPY002


# Both


def test_result_follows_from_seed_epoch_and_id_alone():
    signals, _ = noise_crop()

    def augment(seed, epoch, sample_id):
        augmentation = pickle.loads(pickle.dumps(Augmentation(seed, SPEEDS, wave_drop=True)))
        torch.rand(3)
        return augmentation(signals, sample_id, epoch, num_samples=7000).tobytes()

    keys = [(1, 1, "a"), (2, 1, "a"), (1, 2, "a"), (1, 1, "b"), (11, 1, "a"), (1, 11, "a")]
    results = [augment(*key) for key in keys]
    assert results == [augment(*key) for key in keys]
    assert len(set(results)) == len(keys)
