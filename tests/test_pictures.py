"""Tests of the pictures of recordings."""

import math
from itertools import pairwise

import numpy as np
import pytest
import soundfile

from dsd_modules import pictures


def noise(num_samples, seed=0):
    return 0.1 * np.random.default_rng(seed).standard_normal(num_samples).astype(np.float32)


@pytest.mark.parametrize("max_columns", [1, 3, 1200])
@pytest.mark.parametrize("num_samples", [1, 63, 64, 65, 5000])
def test_an_overview_is_that_of_the_whole_recording(num_samples, max_columns):
    """Against frames cut from the whole, however the pieces are cut."""
    samples = noise(num_samples)
    num_frames = math.ceil(num_samples / 64)
    per_column = math.ceil(num_frames / max_columns)
    padded = np.pad(samples, (96, 256 + 64 * per_column))
    window = np.sin(np.pi * np.arange(256) / 256) ** 2
    for sizes in ([num_samples], [1, 0, 30, 700]):
        pieces = np.split(samples, np.minimum(np.cumsum(sizes), num_samples))
        overview = pictures.summarize(pieces, num_samples, 8000, max_columns)
        assert overview.num_seconds == num_samples / 8000
        num_columns = len(overview.low)
        assert overview.power.shape == (129, num_columns)
        assert num_columns == math.ceil(num_frames / per_column) <= max_columns
        for column in range(num_columns):
            starts = 64 * (per_column * column + np.arange(per_column))
            power = np.mean([np.abs(np.fft.rfft(window * padded[start:][:256])) ** 2 for start in starts], axis=0)
            np.testing.assert_allclose(overview.power[:, column], power, rtol=1e-3, atol=1e-6)
            own = padded[96:][starts[0] : starts[-1] + 64]
            assert (overview.low[column], overview.high[column]) == (own.min(), own.max())


def test_memory_of_an_overview_does_not_grow(monkeypatch):
    longest = 0
    concatenate = np.concatenate

    def measured(parts):
        nonlocal longest
        joined = concatenate(parts)
        longest = max(longest, joined.size)
        return joined

    monkeypatch.setattr(pictures.np, "concatenate", measured)
    overview = pictures.summarize((noise(8000) for _ in range(600)), 600 * 8000, 8000, max_columns=100)
    assert overview.power.shape == (129, 100)
    assert longest < 8000 + 2 * 6 * 8000  # a piece and what waits for the rest of its column


@pytest.mark.parametrize("width", [240, 480, 800, 1200])
@pytest.mark.parametrize("num_samples", [1, 30000, 60 * 8000, 3600 * 8000])
def test_labels_fit_the_picture(num_samples, width):
    zeros = np.zeros(10, np.float32)
    overview = pictures.Overview(zeros - 0.3, zeros + 0.3, np.ones((129, 10)), num_samples / 8000, 8000)
    figure = pictures.draw_overview(overview, 1, 1, width)
    assert figure.bbox.width == 2 * width
    panels = figure.axes[:2]
    assert [axes.get_ylabel() for axes in panels] == ["amplitude", "kHz"]
    assert panels[1].get_xlabel() == ("time" if num_samples > 120 * 8000 else "time (s)")
    drawn = figure.get_tightbbox()  # inches
    assert 0 <= drawn.x0 <= drawn.x1 <= figure.bbox_inches.x1
    assert 0 <= drawn.y0 <= drawn.y1 <= figure.bbox_inches.y1
    labels = [label.get_window_extent() for label in panels[1].get_xticklabels()]
    assert all(left.x1 < right.x0 for left, right in pairwise(labels))


def test_pictures_share_their_scales(tmp_path, monkeypatch):
    monkeypatch.setattr(pictures, "as_html", lambda figure, description: figure)
    samples = noise(4000)
    soundfile.write(tmp_path / "loud.wav", samples, 8000, subtype="FLOAT")
    soundfile.write(tmp_path / "quiet.wav", samples / 10, 8000, subtype="FLOAT")
    paths = {"Mixture": tmp_path / "quiet.wav", "Voice 1": tmp_path / "loud.wav"}
    quiet, loud = pictures.draw_recordings(paths, 4000, 8000, 800)
    assert quiet.axes[0].get_ylim() == loud.axes[0].get_ylim()
    assert loud.axes[0].get_ylim()[1] == pytest.approx(1.05 * np.abs(samples).max())
    levels = [figure.axes[1].images[0].get_array() for figure in (quiet, loud)]
    assert levels[1].max() == pytest.approx(0, abs=1e-3)
    np.testing.assert_allclose(levels[0], levels[1] - 20, atol=0.1)


@pytest.mark.filterwarnings("error")
def test_silence_is_drawn(tmp_path):
    soundfile.write(tmp_path / "silence.wav", np.zeros(16000), 16000)
    (picture,) = pictures.draw_recordings({"Mixture": tmp_path / "silence.wav"}, 8000, 8000, 400)
    assert picture.startswith('<img alt="Mixture: waveform and spectrogram, 1.0 s" src="data:image/png;base64,iVBOR')
