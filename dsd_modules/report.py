"""The picture of a training run: its curves by epoch, and one separated test mixture."""

import math

import matplotlib
import numpy as np
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator
from scipy.signal import ShortTimeFFT
from scipy.signal.windows import hann

from shared_modules.figures import BLUE, GREY, ORANGE, STYLE, save_figure
from shared_modules.files import read_table

_DPI = 100
_WIDTH_INCHES = 16
_SPECTROGRAMS_INCHES = 3.4
_DYNAMIC_RANGE_DB = 70


def read_history(path):
    """Read ``history.csv``, the numbers of each epoch.

    Arguments
    ---------
    path : str or Path
        The CSV file, whose first column is ``epoch``.

    Returns
    -------
    list of dict
        One for each epoch, its number (int) under ``epoch``; an empty cell is NaN.

    Raises
    ------
    ValueError
        If the file is missing or is no such table.

    Example
    -------
    >>> import tempfile
    >>> from pathlib import Path
    >>> path = Path(tempfile.mkdtemp()) / "history.csv"
    >>> _ = path.write_text("epoch,train_si_sdri,valid_si_sdri\\n1,2.5,\\n")
    >>> read_history(path)
    [{'epoch': 1, 'train_si_sdri': 2.5, 'valid_si_sdri': nan}]
    """
    rows = read_table(path, "epoch")
    try:
        return [{"epoch": int(epoch), **row} for epoch, row in rows]
    except ValueError as error:
        raise ValueError(f"{path} has an epoch that is no whole number: {error}.") from None


def epoch_series(history, column):
    """One column of the history, without the epochs that lack it.

    Arguments
    ---------
    history : list of dict
        See :func:`read_history`.
    column : str
        Its name.

    Returns
    -------
    epochs, values : list
        Both empty where no epoch has a finite value.

    Example
    -------
    >>> epoch_series([{"epoch": 1, "lr": 0.1}, {"epoch": 2}, {"epoch": 3, "lr": 0.2}], "lr")
    ([1, 3], [0.1, 0.2])
    """
    points = [(row["epoch"], row[column]) for row in history if math.isfinite(row.get(column, math.nan))]
    return [epoch for epoch, _ in points], [value for _, value in points]


def count_blocks(rows, prefix):
    """How many blocks have columns.

    Arguments
    ---------
    rows : list of dict
        Of the history or of results.
    prefix : str
        The columns' name up to the block's number, which counts from 1.

    Returns
    -------
    int

    Example
    -------
    >>> count_blocks([{"si_sdri_block1": 1.0, "si_sdri_block2": 2.0}], "si_sdri_block")
    2
    """
    num_blocks = 0
    while any(math.isfinite(row.get(f"{prefix}{num_blocks + 1}", math.nan)) for row in rows):
        num_blocks += 1
    return num_blocks


def block_colors(num_blocks):
    """One colour for each block, from light (the first) to dark (the final one).

    Arguments
    ---------
    num_blocks : int

    Returns
    -------
    list

    Example
    -------
    >>> len(block_colors(3))
    3
    """
    return list(matplotlib.colormaps["viridis"](np.linspace(0.8, 0.1, num_blocks) if num_blocks > 1 else [0.1]))


def plot_by_epoch(axes, history, column, label, scale=1, **line):
    """Draw one column of the history as a line, with points where epochs are few.

    Arguments
    ---------
    axes : matplotlib.axes.Axes
    history : list of dict
        See :func:`read_history`.
    column, label : str
        What is drawn, and what the legend calls it. A column without values leaves no trace.
    scale : float
        Factor on the values: 100 turns shares into per cent.
    **line
        Options of ``Axes.plot``.

    Example
    -------
    >>> axes = Figure().subplots()
    >>> plot_by_epoch(axes, [{"epoch": 1, "valid_si_sdri": 2.5}], "valid_si_sdri", "validation")
    >>> len(axes.lines)
    1
    """
    epochs, values = epoch_series(history, column)
    if epochs:
        marker = "o" if len(epochs) <= 40 else None
        axes.plot(epochs, [scale * value for value in values], label=label, marker=marker, ms=4, **line)


def finish_epoch_axes(axes, title, ylabel, from_zero=False):
    """Give a panel over epochs its title, labels, whole-numbered ticks and legend.

    Arguments
    ---------
    axes : matplotlib.axes.Axes
        With everything drawn.
    title, ylabel : str
    from_zero : bool
        Whether the axis of values starts at 0, for what cannot be negative.

    Example
    -------
    >>> axes = Figure().subplots()
    >>> finish_epoch_axes(axes, "Label switches", "share of samples (%)", from_zero=True)
    >>> axes.get_xlabel(), axes.get_ylabel()
    ('epoch', 'share of samples (%)')
    """
    axes.set(title=title, xlabel="epoch", ylabel=ylabel)
    axes.xaxis.set_major_locator(MaxNLocator(integer=True, min_n_ticks=1))
    last = math.floor(axes.dataLim.x1) if axes.has_data() else 1
    axes.set_xlim(0.5, last + 0.5)
    if from_zero:
        top = axes.dataLim.y1 if axes.has_data() else 0
        axes.set_ylim(0, 1.25 * top if top > 0 else 1)
    if labels := axes.get_legend_handles_labels()[1]:
        axes.legend(ncols=1 if len(labels) <= 6 else 2)


def draw_report(history, path, results=None, example=None, title=None):
    """Draw the report of a run into a file, 1600 pixels wide.

    Arguments
    ---------
    history : list of dict
        One for each epoch, see :func:`read_history`. Panels whose columns are all missing are left out.
    path : str or Path
        The picture; its suffix tells the format (``.png``, ``.pdf``, ``.svg``).
    results : dict, optional
        Mean test scores, as ``write_results`` and ``read_results`` return them.
    example : dict, optional
        One separated test mixture, see :func:`draw_separation`.
    title : str, optional
        Above the panels.

    Raises
    ------
    ValueError
        If there is nothing to draw.

    Example
    -------
    >>> import tempfile
    >>> from pathlib import Path
    >>> path = Path(tempfile.mkdtemp()) / "report.png"
    >>> draw_report([{"epoch": 1, "train_si_sdri": 2.5, "valid_si_sdri": 2.0}], path)
    >>> path.stat().st_size > 1000
    True
    """
    save_figure(report_figure(history, results, example, title), path)


def report_figure(history, results=None, example=None, title=None):
    """The figure of :func:`draw_report`.

    Arguments
    ---------
    history, results, example, title
        See :func:`draw_report`.

    Returns
    -------
    matplotlib.figure.Figure
        Made without pyplot: nothing needs to be closed.

    Raises
    ------
    ValueError
        If there is nothing to draw.

    Example
    -------
    >>> figure = report_figure([{"epoch": 1, "train_si_sdri": 2.5}])
    >>> [axes.get_title(loc="left") for axes in figure.axes]
    ['SI-SDRi']
    """
    panels = [panel for panel, is_drawn in _PANELS if is_drawn(history, results or {})]
    if not panels and example is None:
        raise ValueError(f"There is nothing to draw in a history of {len(history)} epochs.")
    num_columns = 2 if len(panels) == 4 else min(3, len(panels))
    num_rows = math.ceil(len(panels) / 3)
    heights = [3.6 * num_rows] * bool(panels) + [_SPECTROGRAMS_INCHES] * (example is not None)
    with matplotlib.rc_context(STYLE):
        figure = _new_figure(sum(heights) + 0.5 * bool(title))
        figure.suptitle(title, fontweight="bold") if title else None
        parts = figure.subfigures(len(heights), height_ratios=heights, squeeze=False)[:, 0]
        if panels:
            grid = parts[0].add_gridspec(num_rows, num_columns)
            for index, panel in enumerate(panels):
                panel(parts[0].add_subplot(grid[divmod(index, num_columns)]), history, results)
        if example is not None:
            _draw_spectrograms(parts[-1], example)
    return figure


def draw_separation(example):
    """Draw the spectrograms of one separated mixture: the mixture, its references and its estimates.

    All share one range of levels. A separator is free in its scale, so each estimate is drawn at the level
    (RMS) of its reference.

    Arguments
    ---------
    example : dict
        ``id``; ``sample_rate`` in Hz; ``mixture [T]``; ``references [N, T]``; ``estimates [N, T]``, of which
        estimate i belongs to reference i. Arrays or tensors on the CPU.

    Returns
    -------
    matplotlib.figure.Figure
        1600 pixels wide, for ``savefig`` or TensorBoard's ``add_figure``.

    Raises
    ------
    ValueError
        If the signals do not fit.

    Example
    -------
    >>> sources = np.random.default_rng(0).normal(size=(2, 8000))
    >>> figure = draw_separation(
    ...     {
    ...         "id": "mix_1",
    ...         "sample_rate": 8000,
    ...         "mixture": sources.sum(0),
    ...         "references": sources,
    ...         "estimates": sources,
    ...     }
    ... )
    >>> [axes.get_title(loc="left") for axes in figure.axes][:3]
    ['mixture', 'reference 1', 'reference 2']
    """
    with matplotlib.rc_context(STYLE):
        figure = _new_figure(_SPECTROGRAMS_INCHES)
        _draw_spectrograms(figure, example)
    return figure


def draw_separations(examples):
    """Draw what several models make of one mixture, a row of spectrograms for each.

    Arguments
    ---------
    examples : dict
        From a model's name to its example, see :func:`draw_separation`.

    Returns
    -------
    matplotlib.figure.Figure
        1600 pixels wide.

    Raises
    ------
    ValueError
        If the signals do not fit.

    Example
    -------
    >>> sources = np.random.default_rng(0).normal(size=(2, 8000))
    >>> example = {"id": "mix_1", "sample_rate": 8000, "mixture": sources.sum(0)}
    >>> example |= {"references": sources, "estimates": sources}
    >>> len(draw_separations({"plain PIT": example, "DSD + LO": example}).subfigs)
    2
    """
    with matplotlib.rc_context(STYLE):
        figure = _new_figure(_SPECTROGRAMS_INCHES * len(examples))
        rows = figure.subfigures(len(examples), 1, squeeze=False)[:, 0]
        for row, (name, example) in zip(rows, examples.items(), strict=True):
            _draw_spectrograms(row, example)
            row.suptitle(f"{name}: mixture {example['id']}", fontweight="bold", fontsize=13, x=0.01, ha="left")
    return figure


def _new_figure(height_inches):
    figure = Figure(figsize=(_WIDTH_INCHES, height_inches), dpi=_DPI, layout="constrained")
    figure.get_layout_engine().set(w_pad=0.12, h_pad=0.1)
    return figure


def _draw_spectrograms(figure, example):
    mixture, references, estimates = (
        np.asarray(example[key], dtype=float) for key in ("mixture", "references", "estimates")
    )
    if mixture.ndim != 1 or references.ndim != 2 or references.shape != estimates.shape:
        raise ValueError(
            "mixture must be [T], references and estimates [N, T], but got the shapes "
            f"{mixture.shape}, {references.shape} and {estimates.shape}."
        )
    signals = {"mixture": mixture}
    signals |= {f"reference {i + 1}": reference for i, reference in enumerate(references)}
    for i, (estimate, reference) in enumerate(zip(estimates, references, strict=True)):
        gain = math.sqrt(np.square(reference).sum() / (np.square(estimate).sum() or 1))
        signals[f"estimate {i + 1}"] = estimate * (gain or 1)  # a silent reference tells no level

    sample_rate = example["sample_rate"]
    window = hann(round(0.032 * sample_rate), sym=False)
    transform = ShortTimeFFT(window, hop=max(1, len(window) // 4), fs=sample_rate, scale_to="magnitude")
    powers = {name: transform.spectrogram(_at_least(signal, len(window))) for name, signal in signals.items()}
    loudest = max(powers["mixture"].max(), 1e-12)

    figure.suptitle(f"Mixture {example['id']}", fontweight="bold", fontsize=13, x=0.01, ha="left")
    all_axes = figure.subplots(1, len(signals), sharex=True, sharey=True, squeeze=False)[0]
    for axes, (name, power) in zip(all_axes, powers.items(), strict=True):
        image = axes.imshow(
            10 * np.log10(np.maximum(power / loudest, 1e-12)),
            origin="lower",
            aspect="auto",
            extent=(0, len(mixture) / sample_rate, 0, sample_rate / 2000),
            cmap="magma",
            vmin=-_DYNAMIC_RANGE_DB,
            vmax=0,
            interpolation="nearest",
        )
        axes.set_title(name, fontsize=11, fontweight="normal")
        axes.set_xlabel("time (s)")
        axes.grid(False)
    all_axes[0].set_ylabel("frequency (kHz)")
    figure.colorbar(image, ax=list(all_axes), label="level re mixture's peak (dB)", pad=0.01, aspect=30)


def _at_least(signal, num_samples):
    return np.pad(signal, (0, max(0, num_samples - len(signal))))


def _has(*columns):
    return lambda history, results: any(epoch_series(history, column)[0] for column in columns)


def _learning_curves(axes, history, results):
    plot_by_epoch(axes, history, "train_si_sdri", "training", color=BLUE)
    plot_by_epoch(axes, history, "valid_si_sdri", "validation", color=ORANGE)
    finish_epoch_axes(axes, "SI-SDRi", "SI-SDRi (dB)")


def _label_switches(axes, history, results):
    plot_by_epoch(axes, history, "label_switch_rate", "in training", scale=100, color=BLUE)
    plot_by_epoch(axes, history, "probe_label_switch_rate", "fixed probe set", scale=100, color=ORANGE)
    finish_epoch_axes(axes, "Label switches", "share of samples (%)", from_zero=True)


def _exclusions(axes, history, results):
    bottom = dict.fromkeys((row["epoch"] for row in history), 0)
    width = 0.8 if len(bottom) <= 60 else 1  # narrow gaps would make a moiré
    for column, label, color in (
        ("dropped_samples", "dropped", BLUE),
        ("reordered_samples", "reordered", ORANGE),
    ):
        epochs, values = epoch_series(history, column)
        if any(values):
            axes.bar(epochs, values, bottom=[bottom[epoch] for epoch in epochs], label=label, color=color, width=width)
        bottom.update({epoch: bottom[epoch] + value for epoch, value in zip(epochs, values, strict=True)})
    if not any(bottom.values()):
        axes.plot(list(bottom), [0] * len(bottom), alpha=0)
        axes.text(0.5, 0.5, "none", transform=axes.transAxes, ha="center", va="center", color=GREY)
    finish_epoch_axes(axes, "Excluded samples", "samples", from_zero=True)
    axes.yaxis.set_major_locator(MaxNLocator(integer=True))


def _blocks(axes, history, results):
    stage, prefix = "validation", "valid_si_sdri_block"
    num_blocks = count_blocks(history, prefix)
    if not num_blocks:
        stage, prefix = "training", "train_si_sdri_block"
        num_blocks = count_blocks(history, prefix)
    for block, color in enumerate(block_colors(num_blocks), start=1):
        plot_by_epoch(axes, history, f"{prefix}{block}", f"block {block}", color=color)
    finish_epoch_axes(axes, f"SI-SDRi of each block, {stage}", "SI-SDRi (dB)")


def _decoupling(axes, history, results):
    num_blocks = count_blocks(history, "valid_layer_decoupling_block")
    for block, color in enumerate(block_colors(num_blocks + 1)[:-1], start=1):
        column = f"valid_layer_decoupling_block{block}"
        plot_by_epoch(axes, history, column, f"block {block}", scale=100, color=color)
    finish_epoch_axes(axes, "Layer-decoupling", "assigned unlike final block (%)", from_zero=True)


def _test_means(axes, history, results):
    num_blocks = count_blocks([results], "si_sdri_block")
    bars = [
        (f"block\n{block}", results[f"si_sdri_block{block}"], color)
        for block, color in enumerate(block_colors(num_blocks), start=1)
    ]
    if math.isfinite(results.get("sdri", math.nan)):
        bars.append(("SDRi", results["sdri"], GREY))
    names, values, colors = zip(*bars, strict=True)
    axes.bar_label(axes.bar(names, values, color=colors, width=0.6), fmt="%.1f", padding=2)
    axes.set(title="Test means: SI-SDRi by block, SDRi", ylabel="improvement (dB)")
    axes.margins(x=0.1, y=0.15)
    axes.axhline(0, color="black", lw=0.8)
    axes.grid(False, axis="x")


# Each panel and when it is drawn.
_PANELS = (
    (_learning_curves, _has("train_si_sdri", "valid_si_sdri")),
    (_label_switches, _has("label_switch_rate", "probe_label_switch_rate")),
    (_exclusions, _has("dropped_samples", "reordered_samples")),
    (_blocks, _has("valid_si_sdri_block1", "train_si_sdri_block1")),
    (_decoupling, _has("valid_layer_decoupling_block1")),
    (_test_means, lambda history, results: count_blocks([results], "si_sdri_block") > 0),
)
