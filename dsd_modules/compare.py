"""Compare two runs on the same test set: ``python -m dsd_modules.compare RUN_A RUN_B``.

A run's folder holds ``test_results.csv`` and ``history.csv``. Printed are the paired differences of the test
scores with 95 % intervals; the runs' curves are drawn into one picture.
"""

import argparse
import json
import math
import sys
from dataclasses import dataclass
from pathlib import Path

import matplotlib
import numpy as np
from matplotlib.figure import Figure

from dsd_modules.evaluation import read_results
from dsd_modules.report import (
    count_blocks,
    finish_epoch_axes,
    plot_by_epoch,
    read_history,
)
from shared_modules.figures import BLUE, ORANGE, STYLE, save_figure
from shared_modules.statistics import t_interval

_CAVEAT = (
    "The intervals are over the mixtures of this one test set, and each side is one training run: they say\n"
    "nothing about other seeds or other speakers."
)


@dataclass
class PairedDifference:
    """How much B's scores exceed A's on the same mixtures.

    ``mean_a``, ``mean_b`` and ``mean`` (of B - A) are over the ``num_pairs`` mixtures scored in both, ``low``
    and ``high`` are the ends of the 95 % t interval of ``mean``: all in the scores' unit, NaN where undefined.
    ``num_unscored`` mixtures lack a score on either side and are left out.
    """

    mean_a: float
    mean_b: float
    mean: float
    low: float
    high: float
    num_pairs: int
    num_unscored: int

    def in_words(self, unit=" dB"):
        """What the difference means, in one sentence without a full stop.

        Arguments
        ---------
        unit : str
            What stands behind the difference.

        Returns
        -------
        str

        Example
        -------
        >>> paired_difference([1.0, 2.0, 3.0], [2.0, 3.1, 3.9]).in_words()
        'B is better by 1.00 dB, 95 % interval [0.75, 1.25]: excludes zero'
        """
        if not self.num_pairs:
            return "no mixture has a score in both runs"
        leader = "B" if self.mean > 0 else "A"
        interval = f"95 % interval [{self.low:.2f}, {self.high:.2f}]"
        if self.num_pairs == 1:
            return f"B - A is {self.mean:.2f}{unit} on a single mixture: the interval is undefined"
        if self.mean == 0:
            return f"A and B have the same mean, {interval}"
        if self.low <= 0 <= self.high:
            return f"{leader} is ahead by {abs(self.mean):.2f}{unit}, but the {interval} includes zero"
        return f"{leader} is better by {abs(self.mean):.2f}{unit}, {interval}: excludes zero"


def paired_difference(a, b):
    """The mean difference of paired scores with its 95 % t interval.

    Arguments
    ---------
    a, b : sequence of float
        Scores of the same mixtures in the same order, dB. NaN where there is none.

    Returns
    -------
    PairedDifference

    Raises
    ------
    ValueError
        If the lengths differ.

    Example
    -------
    >>> difference = paired_difference([1.0, 2.0, 3.0], [2.0, 3.1, 3.9])
    >>> round(difference.mean, 3), difference.num_pairs
    (1.0, 3)
    """
    if len(a) != len(b):
        raise ValueError(f"Paired scores must be equally many, but got {len(a)} and {len(b)}.")
    a, b = np.asarray(a, dtype=float), np.asarray(b, dtype=float)
    scored = np.isfinite(a) & np.isfinite(b)
    a, b = a[scored], b[scored]
    mean_a, mean_b = (float(values.mean()) if len(values) else math.nan for values in (a, b))
    interval = t_interval(b - a)
    return PairedDifference(
        mean_a, mean_b, interval.mean, interval.low, interval.high, len(a), num_unscored=int((~scored).sum())
    )


def comparison_table(results_a, results_b, metric="si_sdri"):
    """The paired differences of the two runs' test scores.

    Arguments
    ---------
    results_a, results_b : dict
        Scores of each mixture by id, as ``read_results`` returns them.
    metric : str
        The column that comes first, before SI-SDRi, SDRi, PESQ, STOI and the SI-SDRi of the blocks, as far as both
        runs have them.

    Returns
    -------
    dict
        A `PairedDifference` for each column.

    Raises
    ------
    ValueError
        If the runs have no mixture in common, or one of them lacks the metric.

    Example
    -------
    >>> table = comparison_table({"x": {"si_sdri": 1.0}}, {"x": {"si_sdri": 1.5}, "y": {"si_sdri": 9.0}})
    >>> table["si_sdri"].mean
    0.5
    """
    ids = sorted(results_a.keys() & results_b.keys())
    if not ids:
        raise ValueError("The two runs have no test mixture in common.")
    columns = [column for column in results_a[ids[0]] if column in results_b[ids[0]]]
    if metric not in columns:
        raise ValueError(f"metric can only be one of {', '.join(columns) or 'nothing'}, but got {metric!r}.")
    blocks = [column for column in columns if column.startswith("si_sdri_block")]
    wanted = dict.fromkeys([metric, "si_sdri", "sdri", "pesq", "stoi", *blocks])  # each once, in this order
    return {
        column: paired_difference([results_a[name][column] for name in ids], [results_b[name][column] for name in ids])
        for column in wanted
        if column in columns
    }


def comparison_figure(histories):
    """Draw the curves of several runs, a colour for each.

    Arguments
    ---------
    histories : dict
        The history of each run (see :func:`dsd_modules.report.read_history`) by the name in the legends;
        at most two.

    Returns
    -------
    matplotlib.figure.Figure
        1600 pixels wide.

    Example
    -------
    >>> figure = comparison_figure({"A": [{"epoch": 1, "valid_si_sdri": 2.0}], "B": []})
    >>> [axes.get_title(loc="left") for axes in figure.axes][:2]
    ['SI-SDRi, validation', 'Label switches']
    """
    with matplotlib.rc_context(STYLE):
        figure = Figure(figsize=(16, 9), dpi=100, layout="constrained")
        figure.get_layout_engine().set(w_pad=0.12, h_pad=0.1)
        curves, switches, exclusions, blocks = figure.subplots(2, 2).flat
        for color, (name, history) in zip((BLUE, ORANGE), histories.items(), strict=False):
            plot_by_epoch(curves, history, "valid_si_sdri", name, color=color)
            plot_by_epoch(switches, history, "label_switch_rate", f"{name}, in training", scale=100, color=color)
            plot_by_epoch(
                switches, history, "probe_label_switch_rate", f"{name}, probe set", scale=100, color=color, ls="--"
            )
            excluded = [{"epoch": row["epoch"], "excluded": _num_excluded(row)} for row in history]
            plot_by_epoch(exclusions, excluded, "excluded", name, color=color)
            num_blocks = count_blocks(history, "valid_si_sdri_block")
            for block in range(1, num_blocks + 1):
                alpha = 0.35 + 0.65 * block / num_blocks
                column = f"valid_si_sdri_block{block}"
                dashes = "-" if block == num_blocks else (0, (block, 1.5))
                plot_by_epoch(blocks, history, column, f"{name}, block {block}", color=color, alpha=alpha, ls=dashes)
        finish_epoch_axes(curves, "SI-SDRi, validation", "SI-SDRi (dB)")
        finish_epoch_axes(switches, "Label switches", "share of samples (%)", from_zero=True)
        finish_epoch_axes(exclusions, "Excluded samples (dropped or reordered)", "samples", from_zero=True)
        finish_epoch_axes(blocks, "SI-SDRi of each block, validation", "SI-SDRi (dB)")
    return figure


def _num_excluded(row):
    counts = [row.get(column, math.nan) for column in ("dropped_samples", "reordered_samples")]
    return math.nan if np.isnan(counts).all() else float(np.nansum(counts))


def _format_table(lines):
    """Lines of cells as text, the first column to the left, the others to the right."""
    widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
    return "\n".join(
        "  ".join(
            cell.rjust(width) if index else cell.ljust(width)
            for index, (cell, width) in enumerate(zip(line, widths, strict=True))
        )
        for line in lines
    )


def _number(value, unit=""):
    return f"{value:.2f}{unit}" if math.isfinite(value) else "-"


def _last(history, column):
    """The column's value in the last epoch, NaN where it is missing."""
    return history[-1].get(column, math.nan) if history else math.nan


def describe(run_a, run_b, metric="si_sdri"):
    """The comparison in words and tables.

    Arguments
    ---------
    run_a, run_b : (dict, list of dict)
        The test results and the history of each run.
    metric : str
        The column of the headline.

    Returns
    -------
    str

    Raises
    ------
    ValueError
        See :func:`comparison_table`.

    Example
    -------
    >>> run = {"x": {"si_sdri": 1.0}, "y": {"si_sdri": 2.0}}, [{"epoch": 1, "label_switch_rate": 0.25}]
    >>> print(describe(run, run).splitlines()[0])
    si_sdri: A and B have the same mean, 95 % interval [0.00, 0.00]
    """
    (results_a, history_a), (results_b, history_b) = run_a, run_b
    table = comparison_table(results_a, results_b, metric)
    text = [
        f"{column}: {difference.in_words('' if column.startswith(('pesq', 'stoi')) else ' dB')}"
        for column, difference in table.items()
    ]
    scores = [("test score", "mean A", "mean B", "B - A", "95 % interval", "pairs")]
    for column, difference in table.items():
        interval = f"[{_number(difference.low)}, {_number(difference.high)}]"
        means = map(_number, (difference.mean_a, difference.mean_b, difference.mean))
        scores.append((column, *means, interval, str(difference.num_pairs)))
    switches = [("label switches, last epoch", "A", "B")]
    for column, name in (("label_switch_rate", "in training"), ("probe_label_switch_rate", "probe set")):
        rates = (_number(100 * _last(history, column), " %") for history in (history_a, history_b))
        switches.append((name, *rates))
    text += ["", _format_table(scores), "", _format_table(switches), ""]

    for name, own, other in (("A", results_a, results_b), ("B", results_b, results_a)):
        if num_alone := len(own.keys() - other.keys()):
            text.append(f"Left out, because only {name} has them: {num_alone} of {len(own)} mixtures.")
    for column, difference in table.items():
        if difference.num_unscored:
            text.append(f"Left out of {column}: {difference.num_unscored} mixtures without a score in A or B.")
    return "\n".join([*text, _CAVEAT])


def _read_run(folder):
    if not folder.is_dir():
        raise ValueError(f"The run's folder {folder} does not exist.")
    results, _ = read_results(folder / "test_results.csv")
    return results, read_history(folder / "history.csv")


def _different_data(run_a, run_b):
    """A sentence where the manifests of two runs tell that they are of other mixtures."""
    try:
        texts = [(run / "manifests" / "prepared.json").read_text(encoding="utf-8") for run in (run_a, run_b)]
        a, b = (json.loads(text)["settings"] for text in texts)
    except (OSError, ValueError, KeyError):
        return ""
    names = [name for name in ("num_spks", "sample_rate", "mode", "task") if a.get(name) != b.get(name)]
    differences = ", ".join(f"{name} {a.get(name)} and {b.get(name)}" for name in names)
    return f"\n\nBut A and B were tested on different mixtures: {differences}." if names else ""


def main(argv=None):
    """The command line.

    Arguments
    ---------
    argv : list of str, optional
        None: the arguments of the command.

    Returns
    -------
    int
        The exit code: 0, or 2 after an error, which is told in one sentence on stderr.

    Example
    -------
    >>> main(["no_such_run", "no_such_run"])
    2
    """
    parser = argparse.ArgumentParser(prog="python -m dsd_modules.compare", description=__doc__.splitlines()[0])
    parser.add_argument("run_a", type=Path, help="folder with test_results.csv and history.csv")
    parser.add_argument("run_b", type=Path, help="the same of the other run")
    parser.add_argument("--metric", default="si_sdri", help="test score that comes first (default: si_sdri)")
    parser.add_argument("--out", type=Path, default=Path("compare.png"), help="the picture (default: compare.png)")
    arguments = parser.parse_args(argv)
    try:
        run_a, run_b = _read_run(arguments.run_a), _read_run(arguments.run_b)
        text = describe(run_a, run_b, arguments.metric) + _different_data(arguments.run_a, arguments.run_b)
        figure = comparison_figure(
            {f"A: {arguments.run_a.resolve().name}": run_a[1], f"B: {arguments.run_b.resolve().name}": run_b[1]}
        )
        save_figure(figure, arguments.out)
    except (ValueError, OSError) as error:
        print(error, file=sys.stderr)
        return 2
    print(f"A: {arguments.run_a}\nB: {arguments.run_b}\n\n{text}\n\n{arguments.out}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
