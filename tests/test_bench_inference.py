"""The inference benchmark: its cases compute the same, and its arithmetic."""

import sys

import numpy as np
import pytest
import soundfile
from conftest import REPOSITORY
from test_model_folder import make_export

sys.path.insert(0, str(REPOSITORY / "benchmarks"))

from bench_inference import (
    BF16,
    CASES,
    INT8,
    OURS,
    SPEECHBRAIN,
    STREAMED,
    Cost,
    Point,
    difference,
    foreseen,
    ratio,
    row,
    si_sdr,
    write_audio,
)


@pytest.fixture(scope="module")
def point(tmp_path_factory):
    folder = tmp_path_factory.mktemp("bench")
    write_audio(folder / "mixture.wav", 0.5, 8000, None)
    return Point("tiny", make_export(folder / "exported"), 1, 0.5, folder / "mixture.wav")


@pytest.mark.filterwarnings("ignore:torch.quantize")
def test_cases_separate_alike(point):
    estimates = {case: CASES[case](point)(point.recording) for case in (SPEECHBRAIN, OURS, STREAMED, BF16, INT8)}
    assert difference(estimates[OURS], estimates[SPEECHBRAIN]) < 1e-5
    assert si_sdr(estimates[BF16], estimates[OURS]) > 25
    assert si_sdr(estimates[INT8], estimates[OURS]) > 20
    assert estimates[STREAMED].shape == estimates[OURS].shape


def test_audio_is_repeated(tmp_path):
    write_audio(tmp_path / "short.wav", 0.3, 8000, None)
    write_audio(tmp_path / "long.wav", 0.8, 8000, tmp_path / "short.wav")
    short, long = (soundfile.read(tmp_path / name)[0] for name in ("short.wav", "long.wav"))
    np.testing.assert_allclose(long, np.tile(short, 3)[:6400], atol=1e-4)
    with pytest.raises(ValueError, match="16000 Hz, but got 8000 Hz"):
        write_audio(tmp_path / "other.wav", 1, 16000, tmp_path / "short.wav")


def test_si_sdr_of_known_signals():
    time = np.arange(800)[:, None]
    signal, other = np.sin(0.1 * np.pi * time), np.sin(0.2 * np.pi * time)
    both = np.hstack([3 * signal + 0.3 * other + 7, signal + other])  # 20 and 0 dB
    assert si_sdr(both, np.hstack([signal, signal])) == pytest.approx(10)
    assert si_sdr(signal, signal) > 200


def test_ratio_is_that_of_rounds():
    """A round in which the machine was slow for both does not count more."""
    costs = {SPEECHBRAIN: Cost(4, cpu=[2.0, 20.0, 4.0]), OURS: Cost(4, cpu=[1.0, 12.0, 2.0])}
    assert ratio(costs, OURS, "cpu") == 0.5
    assert ratio(costs, OURS, "wall") is None
    assert ratio({OURS: costs[OURS]}, OURS, "cpu") is None


def test_what_takes_too_long_is_left_out(point):
    cost = Cost(10, wall=[4.0, 2.0, 3.0])
    assert foreseen(cost, 100, limit_seconds=120) == ""
    assert foreseen(cost, 600, limit_seconds=120) == "not tried: 3 min or more"
    fault = Cost(10, fault="more than 8 GiB of memory")
    assert foreseen(fault, 600, limit_seconds=120) == fault.fault
    assert row(point, OURS, {OURS: fault}).startswith("| tiny | 0.5 | 1 | all blocks | more than 8 GiB of memory |")
