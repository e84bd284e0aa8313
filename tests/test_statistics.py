"""Tests of the intervals: against SciPy, against closed forms, and by how often they hold a known truth."""

import math

import numpy as np
import pytest
from scipy import stats

from shared_modules.statistics import Interval, speaker_bootstrap, t_interval


@pytest.mark.parametrize("number", [2, 3, 50])
def test_t_interval_equals_scipy(number):
    values = np.random.default_rng(number).normal(0.3, 0.2, size=number)
    expected = stats.ttest_1samp(values, 0).confidence_interval(0.95)
    interval = t_interval([*values, math.nan])
    assert (interval.low, interval.high) == pytest.approx((expected.low, expected.high))
    assert interval.mean == pytest.approx(values.mean())


@pytest.mark.parametrize("interval", [t_interval([]), speaker_bootstrap([], []), t_interval([math.nan])])
def test_nothing_has_no_mean(interval):
    assert all(map(math.isnan, (interval.mean, interval.low, interval.high)))


@pytest.mark.parametrize("interval", [t_interval([0.5]), speaker_bootstrap([0.5, math.nan], ["ab", "bc"])])
def test_a_single_value_has_no_interval(interval):
    assert interval.mean == 0.5
    assert math.isnan(interval.low)
    assert math.isnan(interval.high)


def test_equal_differences_are_a_point():
    assert speaker_bootstrap([0.25] * 4, ["ab", "bc", "cd", "da"]) == Interval(0.25, 0.25, 0.25)


@pytest.mark.parametrize("num_spks", [1, 2, 3])
def test_mixtures_without_a_common_speaker(num_spks):
    """A product of N counts, each of variance 1 and mean 1, has the variance 2^N - 1; of one, it is the ordinary."""
    differences = np.random.default_rng(0).normal(0.3, 1, size=400)
    speakers = np.arange(400 * num_spks).astype(str).reshape(400, num_spks)
    interval, ordinary = speaker_bootstrap(differences, speakers), t_interval(differences)
    width = math.sqrt(2**num_spks - 1) * (ordinary.high - ordinary.low)
    assert interval.mean == pytest.approx(ordinary.mean)
    assert interval.high - interval.low == pytest.approx(width, rel=0.06)
    assert interval.low + interval.high == pytest.approx(2 * ordinary.mean, abs=0.05)


def test_two_speakers_in_closed_form():
    """Of three pairs of three speakers, a draw leaves one pair (weight 2 x 1), all, or none, and is then repeated."""
    interval = speaker_bootstrap([0.0, 1.0, 5.0], ["ab", "ac", "bc"], num_draws=2000)
    assert (interval.mean, interval.low, interval.high) == (2.0, 0.0, 5.0)


def test_same_seed_same_interval_and_order_of_mixtures_is_free():
    differences, speakers = [0.1, 0.5, -0.2, 0.4, 0.35], ["ab", "bc", "cd", "da", "ac"]
    interval = speaker_bootstrap(differences, speakers, seed=3)
    assert interval == speaker_bootstrap(differences, speakers, seed=3)
    turned = speaker_bootstrap(differences[::-1], speakers[::-1], seed=3)
    assert (turned.low, turned.high) == pytest.approx((interval.low, interval.high))


def test_coverage_where_speakers_matter():
    """20 speakers, 150 mixtures of two, true difference 0.2 dB: the speakers' own effects are far above the noise."""
    rng = np.random.default_rng(0)
    num_trials, hits, naive_hits = 150, 0, 0
    for trial in range(num_trials):
        effects = rng.normal(0.2, 1, size=20)
        pairs = np.array([rng.choice(20, size=2, replace=False) for _ in range(150)])
        differences = effects[pairs].mean(1) + rng.normal(0, 0.3, size=150)
        interval = speaker_bootstrap(differences, pairs.astype(str), num_draws=400, seed=trial)
        naive = t_interval(differences)
        hits += interval.low <= 0.2 <= interval.high
        naive_hits += naive.low <= 0.2 <= naive.high
    assert 0.88 < hits / num_trials < 0.99
    assert naive_hits / num_trials < 0.5


@pytest.mark.parametrize(
    ("differences", "speakers", "message"),
    [
        ([0.1, 0.2], ["ab"], "got 2 and 1"),
        ([0.1, 0.2], ["ab", "abc"], r"got \[2, 3\]"),
        ([0.1], [[]], r"got \[0\]"),
    ],
)
def test_mistakes(differences, speakers, message):
    with pytest.raises(ValueError, match=message):
        speaker_bootstrap(differences, [list(names) for names in speakers])
