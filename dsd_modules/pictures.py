"""Pictures of recordings of any length: waveform and spectrogram, for the page."""

import base64
import html
import io
import math
from dataclasses import dataclass
from itertools import chain

import numpy as np
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, MaxNLocator
from scipy.signal.windows import hann

from shared_modules.figures import BLUE
from shared_modules.recordings import Recording

_WINDOW_SECONDS = 0.032
_MAX_COLUMNS = 1200  # of a picture, whatever the recording's length
_DYNAMIC_RANGE_DB = 70
_GREY = "#767b86"  # text that can be read on white and on the dark page


@dataclass
class Overview:
    """A recording of any length in at most some number of columns, from left to right.

    Arguments
    ---------
    low, high : np.ndarray
        The smallest and the largest sample of each column [C].
    power : np.ndarray
        Mean power spectrum of each column [F, C], from 0 Hz to half the sample rate.
    num_seconds : float
        Length of the recording.
    sample_rate : int
        Hz.
    """

    low: np.ndarray
    high: np.ndarray
    power: np.ndarray
    num_seconds: float
    sample_rate: int


def summarize(blocks, num_samples, sample_rate, max_columns=_MAX_COLUMNS):
    """Gather the waveform and the spectrogram of a recording as it is read, in memory that does not grow with it.

    Arguments
    ---------
    blocks : iterable of np.ndarray
        The samples [t] in pieces of any lengths.
    num_samples : int
        Of all pieces together, at least 1.
    sample_rate : int
        Hz.
    max_columns : int
        Neighbouring frames (windows of 32 ms, every 8 ms) are averaged until there are no more than these.

    Returns
    -------
    Overview

    Example
    -------
    >>> tone = np.sin(2 * np.pi * 1000 * np.arange(16000) / 8000)
    >>> overview = summarize(np.array_split(tone, 7), 16000, 8000)
    >>> overview.power.shape, overview.power.argmax(0)[100] * 4000 / 128
    ((129, 250), np.float64(1000.0))
    """
    window = hann(round(_WINDOW_SECONDS * sample_rate), sym=False).astype(np.float32)
    hop = max(1, len(window) // 4)
    overlap = len(window) - hop
    num_frames = math.ceil(num_samples / hop)
    frames_per_column = math.ceil(num_frames / max_columns)
    num_columns = math.ceil(num_frames / frames_per_column)
    span = frames_per_column * hop  # samples of a column
    before = overlap // 2  # zeros, so that each frame's middle lies in the samples it stands for
    columns = []
    waiting = np.zeros(before, np.float32)
    for block in chain(blocks, [np.zeros(num_columns * span + overlap - before - num_samples, np.float32)]):
        waiting = np.concatenate([waiting, block])
        num_whole = (len(waiting) - overlap) // span
        if num_whole <= 0:
            continue
        heard = waiting[: num_whole * span + overlap]
        waveform = heard[before:][: num_whole * span].reshape(num_whole, span)
        frames = np.lib.stride_tricks.sliding_window_view(heard, len(window))[::hop]  # [columns * frames, window]
        power = np.abs(np.fft.rfft(frames * window)) ** 2  # [columns * frames, F]
        power = power.reshape(num_whole, frames_per_column, -1).mean(1)  # [columns, F]
        columns.append((waveform.min(1), waveform.max(1), power))
        waiting = waiting[num_whole * span :]
    low, high, power = (np.concatenate(part) for part in zip(*columns, strict=True))
    return Overview(low, high, power.T, num_samples / sample_rate, sample_rate)


def clock(seconds, _position=None):
    """Seconds as a clock shows them, for the ticks of a long recording.

    Example
    -------
    >>> clock(75), clock(3600)
    ('1:15', '1:00:00')
    """
    minutes, seconds = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02}:{seconds:02}" if hours else f"{minutes}:{seconds:02}"


def draw_overview(overview, peak, loudest, width=800):
    """Draw a waveform and, below it, its spectrogram.

    Arguments
    ---------
    overview : Overview
    peak : float
        Where the axis of amplitudes ends. Pictures to be compared have one ``peak`` and one ``loudest``.
    loudest : float
        The power that counts as 0 dB.
    width : int
        In the page's pixels: what is drawn for a narrow page has labels as large as on a wide one.

    Returns
    -------
    matplotlib.figure.Figure
        Twice as many pixels, for screens that have them.

    Example
    -------
    >>> overview = summarize([np.ones(800, np.float32)], 800, 8000)
    >>> [axes.get_ylabel() for axes in draw_overview(overview, 1, 1).axes][:2]
    ['amplitude', 'kHz']
    """
    has_scale = width >= 480
    height, left, right, top, bottom = 250, 58, 62 if has_scale else 10, 8, 40
    figure = Figure(figsize=(width / 100, height / 100), dpi=200)
    figure.patch.set_alpha(0)
    waveform, spectrogram = figure.subplots(
        2,
        sharex=True,
        height_ratios=(2, 3),
        gridspec_kw={
            "left": left / width,
            "right": 1 - right / width,
            "top": 1 - top / height,
            "bottom": bottom / height,
            "hspace": 0.12,
        },
    )
    num_columns = len(overview.low)
    middles = (np.arange(num_columns) + 0.5) * overview.num_seconds / num_columns
    waveform.fill_between(middles, overview.low, overview.high, color=BLUE, linewidth=0.6)
    waveform.set(ylabel="amplitude", ylim=(-peak, peak), xlim=(0, overview.num_seconds))
    waveform.yaxis.set_major_locator(MaxNLocator(2, steps=[1, 2, 5, 10], symmetric=True))
    level_db = 10 * np.log10(np.maximum(overview.power / loudest, 1e-12))
    image = spectrogram.imshow(
        level_db,
        origin="lower",
        aspect="auto",
        extent=(0, overview.num_seconds, 0, overview.sample_rate / 2000),
        cmap="magma",
        vmin=-_DYNAMIC_RANGE_DB,
        vmax=0,
    )
    is_long = overview.num_seconds >= 120
    spectrogram.set(ylabel="kHz", xlabel="time" if is_long else "time (s)")
    spectrogram.xaxis.set_major_locator(
        MaxNLocator(max(3, width // 90), steps=[1, 3, 6, 10] if is_long else [1, 2, 5, 10])
    )
    if is_long:
        spectrogram.xaxis.set_major_formatter(FuncFormatter(clock))
    if has_scale:
        box = spectrogram.get_position()
        scale = figure.add_axes([1 - (right - 10) / width, box.y0, 10 / width, box.height])
        figure.colorbar(image, cax=scale)
        scale.set_title("dB", color=_GREY, size=8.5)
    for axes in figure.axes:
        axes.set_facecolor("none")
        axes.tick_params(labelsize=8, colors=_GREY, length=3)
        axes.xaxis.label.set(color=_GREY, size=8.5)
        axes.yaxis.label.set(color=_GREY, size=8.5)
        axes.spines[:].set(color=_GREY, linewidth=0.6)
    waveform.spines[["top", "right", "bottom"]].set_visible(False)
    waveform.tick_params(bottom=False)
    figure.align_ylabels([waveform, spectrogram])
    return figure


def as_html(figure, description):
    """A figure as an image that carries its data within it.

    Example
    -------
    >>> as_html(Figure(), "Spectrogram of <voice 1>")[:61]
    '<img alt="Spectrogram of &lt;voice 1&gt;" src="data:image/png'
    """
    stream = io.BytesIO()
    figure.savefig(stream, format="png")
    data = base64.b64encode(stream.getvalue()).decode()
    return f'<img alt="{html.escape(description)}" src="data:image/png;base64,{data}">'


def draw_recordings(recordings, num_samples, sample_rate, width):
    """Draw recordings, all with the same scales, so that their levels can be compared.

    Arguments
    ---------
    recordings : dict
        From what a recording is called to its path.
    num_samples, sample_rate : int
        Their length at the sample rate (Hz) at which they are drawn.
    width : int
        See :func:`draw_overview`.

    Returns
    -------
    list of str
        An HTML image of each.

    Raises
    ------
    ValueError
        If a recording cannot be read.
    """
    overviews = {}
    for name, path in recordings.items():
        with Recording(path) as recording:
            overviews[name] = summarize(recording.blocks(sample_rate), num_samples, sample_rate)
    peak = max(max(overview.high.max(), -overview.low.min()) for overview in overviews.values())
    loudest = max(overview.power.max() for overview in overviews.values())
    return [
        as_html(
            draw_overview(overview, peak * 1.05 or 1.0, max(loudest, 1e-12), width),
            f"{name}: waveform and spectrogram, {overview.num_seconds:.1f} s",
        )
        for name, overview in overviews.items()
    ]
