"""Windows that follow each other: separators of known answer, whose outputs come in another order each time."""

import numpy as np
import pytest
import scipy.signal

from dsd_modules.windows import FollowedVoices, Windows, match_voices

RATE = 1000
BANDS = [(20, 80), (150, 220), (300, 400)]  # Hz: a band per voice
FILTERS = [scipy.signal.firwin(101, band, fs=RATE, pass_zero=False) for band in BANDS]


def conversation(seconds, num_spks, pauses, seed=0):
    """Voices [T, N]: each noise in a band of its own, with pauses (begin, end, speakers)."""
    rng = np.random.default_rng(seed)
    noise = rng.standard_normal((num_spks, seconds * RATE))
    for begin, end, spks in pauses:
        for spk in set(spks).intersection(range(num_spks)):
            noise[spk, begin * RATE : end * RATE] = 0
    return filtered(noise)


def filtered(signals):
    """Each signal through the filter of its own band, [T, N]."""
    voices = [np.convolve(signal, taps, "same") for signal, taps in zip(signals, FILTERS, strict=False)]
    return np.stack(voices, axis=1).astype(np.float32)


class Bands:
    """Separates by bands, without fault, but gives the voices in an order of its own in each call.

    Some of its outputs are turned over: SI-SDR does not see that.
    """

    def __init__(self, num_spks, seed=0):
        self.num_spks, self.rng, self.lengths = num_spks, np.random.default_rng(seed), []
        self.signs = self.rng.choice([-1, 1], num_spks)

    def __call__(self, mixture):
        self.lengths.append(len(mixture))
        return self.signs * filtered([mixture] * self.num_spks)[:, self.rng.permutation(self.num_spks)]


def follow(mixture, separator, windows, chunks=()):
    """The voices [T, N], and how many samples came out after each chunk."""
    followed = FollowedVoices(separator, separator.num_spks, windows)
    pieces, begin, counts = [], 0, []
    for length in [*chunks, len(mixture) - sum(chunks)]:
        pieces += followed.push(mixture[begin : begin + length])
        begin += length
        counts.append(sum(len(voices) for _, voices in pieces))
        assert len(followed.mixture) <= 2 * windows.length + length
    pieces += followed.finish()
    np.testing.assert_array_equal(np.concatenate([heard for heard, _ in pieces]), mixture)
    return np.concatenate([voices for _, voices in pieces]), counts


def assert_one_order(voices, mixture, num_spks):
    """What the separator gives for the whole, but for the order of the voices and the rims of the audio."""
    whole = filtered([mixture] * num_spks)
    perm, signs = match_voices(whole, voices)
    assert sorted(perm) == list(range(num_spks))
    np.testing.assert_allclose(signs * voices[60:-60, perm], whole[60:-60], atol=1e-5)


@pytest.mark.parametrize("num_spks", [2, 3])
@pytest.mark.parametrize("seed", range(5))
def test_windows_give_what_the_whole_gives(num_spks, seed):
    """Equal, not nearly: where one fades into the other, both are further from their rims than the filters reach."""
    mixture = conversation(20, num_spks, pauses=[], seed=seed).sum(1)
    separator = Bands(num_spks, seed)
    voices, _ = follow(mixture, separator, Windows.of_recording(4 * RATE, RATE))
    assert separator.lengths == [4000] * 7  # the last of them hears more than once
    assert_one_order(voices, mixture, num_spks)


PAUSES = {
    "all are silent": [(6, 14, (0, 1, 2)), (22, 26, (0, 1, 2))],
    "turns": [(0, 6, (1, 2)), (6, 12, (0, 2)), (12, 18, (0, 1)), (18, 24, (1, 2)), (24, 30, (0, 2))],
    "one is long silent": [(5, 25, (0,))],
    "two are long silent": [(5, 25, (0, 1))],
    "begins and ends in silence": [(0, 6, (0, 1, 2)), (27, 30, (0, 1, 2))],
}


@pytest.mark.parametrize("num_spks", [2, 3])
@pytest.mark.parametrize("pauses", PAUSES.values(), ids=PAUSES)
@pytest.mark.parametrize("is_stream", [False, True])
def test_silence_does_not_lose_the_order(num_spks, pauses, is_stream):
    sources = conversation(30, num_spks, pauses)
    windows = Windows.of_recording(4 * RATE, RATE, RATE)
    if is_stream:
        windows = Windows.of_stream(4 * RATE, RATE, RATE // 4, RATE)
    for seed in range(4):
        voices, _ = follow(sources.sum(1), Bands(num_spks, seed), windows)
        perm, signs = match_voices(sources, voices)
        residual = np.square(signs * voices[:, perm] - filtered([sources.sum(1)] * num_spks))[100:-100]  # [T, N]
        assert residual.max() < 0.001 * np.square(sources).max()


def test_without_reminders_silence_loses_the_order():
    """Otherwise the test above would show less than it says."""
    sources = conversation(30, 2, PAUSES["all are silent"])
    swapped = 0
    for seed in range(8):
        voices, _ = follow(sources.sum(1), Bands(2, seed), Windows.of_recording(4 * RATE, RATE))
        perms = [tuple(match_voices(sources[part], voices[part])[0]) for part in (slice(0, 5000), slice(15000, 21000))]
        swapped += perms[0] != perms[1]
    assert 0 < swapped < 8


def test_reminders_cost_nothing_where_all_are_heard():
    mixture = conversation(20, 3, pauses=[]).sum(1)
    separator = Bands(3)
    follow(mixture, separator, Windows.of_recording(4 * RATE, 2 * RATE, RATE // 4))
    assert set(separator.lengths) == {4000}


def test_the_size_of_the_chunks_does_not_matter():
    mixture = conversation(12, 2, PAUSES["turns"]).sum(1)
    windows = Windows.of_stream(3 * RATE, RATE // 2, RATE // 10, RATE // 2)
    expected, _ = follow(mixture, Bands(2), windows)
    for chunks in ([1] * 700, [0, 5000, 0, 1], [1234] * 9, [11999]):
        voices, _ = follow(mixture, Bands(2), windows, chunks)
        np.testing.assert_array_equal(voices, expected)


def test_when_the_voices_come():
    windows = Windows.of_stream(3000, 500, 100)
    _, counts = follow(np.ones(4000, np.float32), Bands(2), windows, [499, 1, 499, 1, 2000])
    assert counts == [0, 400, 400, 900, 2900, 3900]
    windows = Windows.of_recording(1000, 400)  # fades from 700 to 900
    _, counts = follow(np.ones(4000, np.float32), Bands(2), windows, [999, 1, 599, 1])
    assert counts == [0, 700, 700, 1300, 3700]


@pytest.mark.parametrize("num_samples", [1, 99, 1000, 1001, 1600, 1601])
def test_any_length(num_samples):
    separator = Bands(2)
    voices, _ = follow(np.ones(num_samples, np.float32), separator, Windows.of_recording(1000, 400))
    assert voices.shape == (num_samples, 2)
    assert len(separator.lengths) == 1 + -(-max(0, num_samples - 1000) // 600)


def test_nothing_comes_of_nothing():
    followed = FollowedVoices(Bands(2), 2, Windows.of_recording(1000, 400))
    assert [len(voices) for _, voices in followed.finish()] == [0]


@pytest.mark.parametrize("options", [(100, 50, 100, 60, 20), (100, 50, 100, 10, 20), (100, 0, 100, 20, 20)])
def test_windows_that_do_not_fit_are_refused(options):
    with pytest.raises(ValueError, match="but got"):
        Windows(*options)


def test_a_faint_voice_is_not_turned_over():
    """40 dB below the other: it does not matter which sign the mixture would give it."""
    sources = conversation(60, 2, pauses=[]) * np.array([1, 0.01], np.float32)
    for seed in range(4):
        voices, _ = follow(sources.sum(1), Bands(2, seed), Windows.of_stream(2 * RATE, RATE // 2, RATE // 10))
        perm, signs = match_voices(sources, voices)
        np.testing.assert_allclose((signs * voices[:, perm])[100:-100, 1], sources[100:-100, 1], atol=0.02)


def test_silence_is_not_run():
    """Not even where there are reminders."""
    sources = conversation(40, 2, [(5, 35, (0, 1))])
    separator = Bands(2)
    voices, _ = follow(sources.sum(1), separator, Windows.of_recording(4 * RATE, RATE, RATE))
    assert separator.lengths == [4000, 4000, 6000, 4000]  # the windows that end at 4, 7, 37 and 40 s
    assert np.abs(voices[6000:34000]).max() < 1e-6


def test_what_is_pushed_is_taken_even_if_nobody_looks():
    followed = FollowedVoices(Bands(2), 2, Windows.of_recording(1000, 400))
    followed.push(np.ones(2500, np.float32))
    assert sum(len(voices) for _, voices in followed.finish()) == 2500
