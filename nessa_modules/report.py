"""Tables and figures of the experiment with two generations of a speaker model."""

import math
from pathlib import Path

import matplotlib
import numpy as np
import torch
from matplotlib.lines import Line2D
from matplotlib.ticker import FixedLocator, FuncFormatter, NullFormatter, NullLocator
from scipy.stats import norm
from sklearn.manifold import TSNE
from torch.nn.functional import normalize, pad

from nessa_modules.plan import NESSA_KINDS, NEW, OLD, PAIRS, SEXES, System
from nessa_modules.trials import det_points
from shared_modules.figures import AMBER, BLUE, GREEN, GREY, ORANGE, PURPLE, SKY_BLUE, STYLE, new_figure, save_figure
from shared_modules.files import write_table, write_whole

LABELS = {
    "none": "no alignment",
    "logit": "speaker logits",
    "procrustes": "Procrustes",
    "least_squares": "least squares",
    "nessa_start": "NESSA before training",
    "nessa_runtime": "NESSA, one-sided",
    "nessa": "NESSA",
}
# Shape and dashes tell the lines apart without the colours.
_LINES = {
    "none": {"color": PURPLE, "marker": "v", "ls": (0, (1, 1))},
    "logit": {"color": BLUE, "marker": "s", "ls": (0, (4, 1.5))},
    "procrustes": {"color": SKY_BLUE, "marker": "^", "ls": (0, (4, 1, 1, 1))},
    "least_squares": {"color": GREEN, "marker": "D", "ls": (0, (2, 1))},
    "nessa_start": {"color": "#8C564B", "marker": "X", "ls": (0, (1, 1, 3, 1))},  # brown
    "nessa_runtime": {"color": AMBER, "marker": "P", "ls": (0, (6, 1))},
    "nessa": {"color": ORANGE, "marker": "o", "ls": "-"},
}
_BOTH = {OLD: {"color": GREY, "ls": "-"}, NEW: {"color": "black", "ls": "-"}}
_SPEAKER_COLOURS = (BLUE, ORANGE, GREEN, PURPLE, AMBER, SKY_BLUE, "black", GREY)


def label_of(system):
    """What a reader calls a system.

    Example
    -------
    >>> label_of(System("v1", "v2", "nessa")), label_of(System("v1", "v1", "none"))
    ('v1->v2, NESSA', 'v1-v1')
    """
    if system in (OLD, NEW):
        return system.pair
    return f"{system.pair}, {LABELS[system.alignment]}"


def _plain(interval, digits=3, sign=False, scale=1):
    form = f"{'+' if sign else ''}.{digits}f"
    low, mean, high = (format(scale * value, form) for value in (interval.low, interval.mean, interval.high))
    return f"{mean} [{low}, {high}]"


def _per_cent(interval, digits=1, sign=False):
    return _plain(interval, digits, sign, scale=100)


def _gain(recovered):
    return f"{_per_cent(recovered.gain, 0)} %" if recovered.gain else "undefined"


# Tables


def write_tables(results, folder):
    """Write everything as csv files, and what matters as ``summary.md``.

    Arguments
    ---------
    results : nessa_modules.experiment.Results
    folder : str or Path

    Returns
    -------
    str
        The text of ``summary.md``.
    """
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    write_table(folder / "results.csv", _rows_by_seed(results))
    write_table(folder / "intervals.csv", _rows_with_intervals(results))
    write_table(folder / "differences.csv", _rows_of_differences(results))
    write_table(folder / "recovered_gain.csv", _rows_of_gains(results))
    write_table(folder / "costs.csv", results.costs)
    text = summary(results)
    with write_whole(folder / "summary.md") as stream:
        stream.write(text)
    return text


def _tables(results):
    """Each table of errors: its trials, enrolled utterances, alignment speakers, and the errors by system."""
    num_enroll, num_speakers = results.plan.num_enroll, results.counts["alignment"]["speakers"]
    yield "all", num_enroll, num_speakers, results.main
    for sex, errors in results.by_sex.items():
        yield SEXES[sex], num_enroll, num_speakers, errors
    for number, errors in results.by_enroll.items():
        if number != num_enroll:
            yield "all", number, num_speakers, errors
    for number, errors in results.by_speakers.items():
        if number != num_speakers:
            yield "all", num_enroll, number, errors


def _head(trials, num_enroll, num_speakers, system):
    return {
        "trials": trials,
        "num_enroll": num_enroll,
        "num_alignment_speakers": num_speakers,
        "enroll": system.enroll,
        "runtime": system.runtime,
        "alignment": system.alignment,
    }


def _rows_by_seed(results):
    return [
        {**_head(*head, system), "seed": seed, "eer": errors.eer_by_seed[i], "min_dcf": errors.min_dcf_by_seed[i]}
        for *head, table in _tables(results)
        for system, errors in table.items()
        for i, seed in enumerate(results.seeds)
    ]


def _ends(name, interval):
    return {name: interval.mean, f"{name}_low": interval.low, f"{name}_high": interval.high}


def _rows_with_intervals(results):
    return [
        {**_head(*head, system), **_ends("eer", errors.interval()), **_ends("min_dcf", errors.interval("min_dcf"))}
        for *head, table in _tables(results)
        for system, errors in table.items()
    ]


def _rows_of_differences(results):
    """NESSA minus each baseline, and NESSA on a symmetric pair minus that pair without."""
    rows = []
    for *head, table in _tables(results):
        for system, errors in table.items():
            if system.alignment not in NESSA_KINDS:
                continue
            baselines = [s for s in table if s[:2] == system[:2] and s.alignment not in NESSA_KINDS]
            if system.alignment == "nessa":
                baselines += [s for s in table if s == system._replace(alignment="nessa_runtime")]
            for baseline in baselines:
                rows.append(
                    {
                        **_head(*head, system),
                        "minus": baseline.alignment,
                        **_ends("eer", errors.minus(table[baseline])),
                        **_ends("min_dcf", errors.minus(table[baseline], "min_dcf")),
                    }
                )
    return rows


def _rows_of_gains(results):
    rows = []
    for system, gains in results.gains.items():
        for measure, recovered in gains.items():
            row = {"enroll": system.enroll, "runtime": system.runtime, "alignment": system.alignment}
            row |= {"measure": measure, **_ends("gap", recovered.gap)}
            if recovered.gain:
                row |= _ends("recovered_gain", recovered.gain)
            rows.append({**row, "reason": recovered.reason})
    return rows


def summary(results):
    """The tables that matter, in Markdown.

    Arguments
    ---------
    results : nessa_modules.experiment.Results

    Returns
    -------
    str
    """
    plan, main = results.plan, results.main
    num_targets = int(results.trials.labels.sum())
    seeds = len(results.seeds)
    counts = {split: f"{each['speakers']} ({each['utterances']})" for split, each in results.counts.items()}
    lines = [
        f"# NESSA: {plan.name}",
        "",
        f"Means over {seeds} seed{'s' * (seeds > 1)}, with 95 % intervals over the test speakers (paired bootstrap of "
        f"whole speakers). Extractors: {plan.loss} loss; v1 {plan.v1.hparams.split('.')[0]}, v2 "
        f"{plan.v2.hparams.split('.')[0]}. Speakers (utterances): "
        + ", ".join(f"{split} {count}" for split, count in counts.items())
        + f". Profiles of {plan.num_enroll} utterance{'s' * (plan.num_enroll > 1)}; {num_targets} target and "
        f"{len(results.trials) - num_targets} non-target trials.",
        "",
    ]
    for enroll, runtime in PAIRS:
        systems = [OLD, NEW, *(system for system in main if system[:2] == (enroll, runtime))]
        lines += [f"## Profiles of {enroll}, utterances of {runtime}", ""]
        rows = []
        nessa = main[System(enroll, runtime, "nessa")]
        for system in systems:
            gain = _gain(results.gains[system]["eer"]) if system in results.gains else ""
            is_baseline = system in results.gains and system.alignment != "nessa"
            rows.append(
                [
                    system.pair if system in _BOTH else LABELS[system.alignment],
                    _per_cent(main[system].interval()),
                    _plain(main[system].interval("min_dcf")),
                    gain,
                    _per_cent(nessa.minus(main[system]), 1, sign=True) if is_baseline else "",
                ]
            )
        head = ["", "EER, %", f"minDCF ({plan.p_target:g})", "recovered gain (EER)", "NESSA minus this, points of EER"]
        lines += [*_markdown(head, rows), ""]
    undefined = {gains["eer"].reason for gains in results.gains.values()} - {""}
    lines += [f"Recovered gain {reason}.\n" for reason in undefined]
    lines += ["## Control: NESSA where both sides are of one model", ""]
    rows = []
    for plain in (OLD, NEW):
        trained = plain._replace(alignment="nessa")
        difference = _per_cent(main[trained].minus(main[plain]), 1, sign=True)
        rows.append([plain.pair, *(_per_cent(main[each].interval()) for each in (plain, trained)), difference])
    lines += [*_markdown(["", "cosine, EER %", "with NESSA, EER %", "difference, points"], rows), ""]
    if results.by_sex:
        lines += ["## EER per sex, % (trials between speakers of the same sex)", ""]
        head = ["", *(SEXES[sex] for sex in results.by_sex)]
        rows = [
            [label_of(system), *(_per_cent(errors[system].interval()) for errors in results.by_sex.values())]
            for system in main
            if system.alignment in ("none", "nessa") and (system.is_symmetric or system.alignment == "nessa")
        ]
        lines += [*_markdown(head, rows), ""]
    if results.costs:
        lines += ["## Cost of an alignment, for an utterance of 3 s on one thread", ""]
        rows = [
            [
                f"{row['enroll']}->{row['runtime']}, {LABELS[row['alignment']]}",
                f"{row['parameters']:,}",
                f"{row['bytes'] / 1000:.0f}",
                f"{row['microseconds']:.0f}",
                f"{100 * row['share_of_model']:.2f}",
            ]
            for row in results.costs
        ]
        lines += _markdown(["", "parameters", "kB", "time, us", "of the runtime model's time, %"], rows)
    return "\n".join(lines).rstrip() + "\n"


def _markdown(head, rows):
    table = [head, ["---"] * len(head), *rows]
    return ["| " + " | ".join(row) + " |" for row in table]


# Figures


def write_figures(results, folder, spaces=None):
    """Draw all figures.

    Arguments
    ---------
    results : nessa_modules.experiment.Results
    folder : str or Path
    spaces : dict, optional
        As for :func:`spaces_figure`.

    Returns
    -------
    list of Path
    """
    figures = {"error_rates.png": error_figure(results), "det.png": det_figure(results)}
    if results.by_speakers or len(results.by_enroll) > 1:
        figures["dependence.png"] = dependence_figure(results)
    if spaces:
        figures["spaces.png"] = spaces_figure(**spaces)
    paths = []
    for name, figure in figures.items():
        paths.append(Path(folder) / name)
        save_figure(figure, paths[-1])
    return paths


def error_figure(results):
    """EER of every system with its interval, and the recovered gain as a number; a panel for each direction.

    Arguments
    ---------
    results : nessa_modules.experiment.Results

    Returns
    -------
    matplotlib.figure.Figure
    """
    main = results.main
    kinds = [kind for kind in LABELS if kind in results.plan.alignments]
    with matplotlib.rc_context(STYLE):
        figure = new_figure(0.42 * (len(kinds) + 2) + 1.9)
        all_axes = figure.subplots(1, 2, sharey=True)
        shown = [errors for system, errors in main.items() if system.is_symmetric or system.alignment != "none"]
        limit = 110 * max(end for errors in shown for end in (errors.interval().high, *errors.eer_by_seed))
        for axes, pair in zip(all_axes, PAIRS, strict=True):
            for error in (main[OLD].eer, main[NEW].eer):
                axes.axvline(100 * error, color="#BBBBBB", lw=1, zorder=0)
            rows = [OLD, *(System(*pair, kind) for kind in kinds), NEW]
            for height, system in enumerate(rows):
                if system not in main:
                    axes.text(0.02, height, "different dimensions", transform=axes.get_yaxis_transform(), color=GREY)
                    continue
                interval = main[system].interval()
                if 100 * interval.high > limit:  # no alignment: near 50 %, where all else would shrink to nothing
                    words = f"{_per_cent(interval)} %"
                    axes.text(0.97, height, words, transform=axes.get_yaxis_transform(), ha="right", va="center")
                    axes.plot(limit, height, color=_LINES["none"]["color"], marker=">", ms=8, clip_on=False, zorder=3)
                    continue
                color = _BOTH[system]["color"] if system in _BOTH else _LINES[system.alignment]["color"]
                axes.plot(
                    [100 * interval.low, 100 * interval.high], [height] * 2, color=color, lw=2.2, marker="|", ms=9
                )
                axes.plot(100 * interval.mean, height, color=color, marker="o", ms=8)
                by_seed = [100 * value for value in main[system].eer_by_seed]
                axes.plot(by_seed, [height + 0.27] * len(by_seed), "o", color="black", mfc="white", mew=0.9, ms=4)
                if system in results.gains:
                    recovered = results.gains[system]["eer"].gain
                    words = f"{100 * recovered.mean:.0f} %" if recovered else "-"
                    axes.text(1.02, height, words, transform=axes.get_yaxis_transform(), va="center")
            axes.text(1.0, -0.75, "gain\nrecovered", transform=axes.get_yaxis_transform(), va="bottom", fontsize=10)
            axes.set(title=f"Profiles of {pair[0]}, utterances of {pair[1]}", xlabel="EER (%)")
            axes.set_xlim(0, limit)
            axes.set_ylim(len(rows) - 0.4, -0.6)
            axes.set_yticks(range(len(rows)), ["v1-v1", *(LABELS[kind] for kind in kinds), "v2-v2"])
            axes.grid(False, axis="y")
        handles = [
            Line2D([], [], color=GREY, marker="o", ms=8, ls="", label="mean over seeds"),
            Line2D([], [], color=GREY, marker="|", ms=9, lw=2.2, label="95 % over test speakers"),
            Line2D([], [], color="black", marker="o", mfc="white", ms=4, ls="", label="a seed"),
        ]
        figure.legend(handles=handles, loc="outside lower center", ncols=3)
    return figure


_DET_TICKS = (0.001, 0.003, 0.01, 0.02, 0.05, 0.1, 0.2, 0.4, 0.6, 0.8, 0.9, 0.95, 0.98)


def det_figure(results):
    """Detection error tradeoff of both directions, the mean over seeds of false-reject rates.

    Arguments
    ---------
    results : nessa_modules.experiment.Results

    Returns
    -------
    matplotlib.figure.Figure
    """
    labels = results.trials.labels
    grid = _det_grid(labels)
    curves = {}
    for system, by_seed in results.scores.items():
        curves[system] = np.mean([_false_reject_at(grid, scores, labels) for scores in by_seed], axis=0)
    with matplotlib.rc_context(STYLE):
        figure = new_figure(6.4)
        for axes, pair in zip(figure.subplots(1, 2, sharex=True, sharey=True), PAIRS, strict=True):
            lines = [(OLD, _BOTH[OLD]), *((System(*pair, kind), _LINES[kind]) for kind in LABELS), (NEW, _BOTH[NEW])]
            for system, line in lines:
                if system in curves:
                    _plot_det(axes, grid, curves[system], **_without_marker(line))
            ends = norm.ppf(grid[[0, -1]])
            axes.plot(ends, ends, color="#BBBBBB", lw=0.8, zorder=0)
            _finish_det(axes, f"Profiles of {pair[0]}, utterances of {pair[1]}", grid, curves.values(), labels.sum())
            axes.label_outer()
            axes.set_xlabel("false-accept rate (%)")
        handles = [Line2D([], [], label=label_of(system), **line) for system, line in _BOTH.items()]
        for kind, line in _LINES.items():
            if any(system.alignment == kind and not system.is_symmetric for system in curves):
                handles.append(Line2D([], [], label=LABELS[kind], **_without_marker(line)))
        figure.legend(handles=handles, loc="outside lower center", ncols=4, handlelength=3)
    return figure


def _det_grid(labels):
    """False-accept rates, from that of one non-target trial, or 0.0001, to 0.8."""
    least = max(1 / (~labels).sum(), 1e-4)
    return norm.cdf(np.linspace(norm.ppf(least), norm.ppf(0.8), 200))


def _without_marker(line):
    return {name: value for name, value in line.items() if name != "marker"}


def _false_reject_at(grid, scores, labels):
    """The false-reject rate at false-accept rates: the least that does not accept more."""
    false_accept, false_reject = det_points(scores, labels)  # falling, rising
    first = np.searchsorted(-false_accept, -grid, side="left")
    return false_reject[np.minimum(first, len(false_reject) - 1)]


def _plot_det(axes, false_accept, false_reject, **line):
    with np.errstate(divide="ignore"):
        rejected = norm.ppf(false_reject)
    axes.plot(norm.ppf(false_accept), np.where(np.isfinite(rejected), rejected, np.nan), **line)


def _finish_det(axes, title, grid, curves, num_targets):
    least_reject = max(min(curve[curve > 0].min() for curve in curves if (curve > 0).any()), 1 / num_targets)
    for axis, least in ((axes.xaxis, grid[0]), (axes.yaxis, least_reject)):
        axis.set_major_locator(FixedLocator(norm.ppf([tick for tick in _DET_TICKS if tick >= min(least, 0.02)])))
        axis.set_major_formatter(FuncFormatter(lambda value, _: f"{100 * norm.cdf(value):.3g}"))
    axes.set_xlim(*norm.ppf(grid[[0, -1]]))
    axes.set_ylim(norm.ppf(min(least_reject, 0.02)), norm.ppf(0.99 if max(c.max() for c in curves) > 0.8 else 0.8))
    axes.set(title=title, ylabel="false-reject rate (%)")


def dependence_figure(results):
    """EER by the number of alignment speakers, and by the number of enrolled utterances; without "no alignment".

    Arguments
    ---------
    results : nessa_modules.experiment.Results

    Returns
    -------
    matplotlib.figure.Figure
    """
    columns = []
    if results.by_speakers:
        columns.append((dict(sorted(results.by_speakers.items())), "alignment speakers", True))
    if len(results.by_enroll) > 1:
        columns.append((dict(sorted(results.by_enroll.items())), "utterances in a profile", False))
    with matplotlib.rc_context(STYLE):
        figure = new_figure(8.6, 6 * len(columns))
        all_axes = figure.subplots(2, len(columns), squeeze=False, sharey=True)
        for row, pair in zip(all_axes, PAIRS, strict=True):
            for axes, (tables, xlabel, is_log) in zip(row, columns, strict=True):
                _plot_dependence(axes, results, tables, pair)
                if is_log:
                    axes.set_xscale("log")
                axes.xaxis.set_major_locator(FixedLocator(list(tables)))
                axes.xaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:.0f}"))
                axes.xaxis.set_minor_locator(NullLocator())
                axes.xaxis.set_minor_formatter(NullFormatter())
                axes.set(title=f"Profiles of {pair[0]}, utterances of {pair[1]}", xlabel=xlabel, ylabel="EER (%)")
        all_axes[0, 0].set_ylim(bottom=0)  # of all, once all is drawn
        handles = [Line2D([], [], label=label_of(system), **line) for system, line in _BOTH.items()]
        kinds = [kind for kind in _LINES if kind in results.plan.alignments and kind != "none"]
        handles += [Line2D([], [], ms=5, label=LABELS[kind], **_LINES[kind]) for kind in kinds]
        figure.legend(handles=handles, loc="outside lower center", ncols=2 * len(columns), handlelength=3)
    return figure


def _plot_dependence(axes, results, tables, pair):
    for system, line in _BOTH.items():
        errors = [table[system].eer if system in table else results.main[system].eer for table in tables.values()]
        axes.plot(list(tables), [100 * error for error in errors], **line)
    for kind, line in _LINES.items():
        system = System(*pair, kind)
        if kind == "none":  # near 50 %: the others would shrink to a line
            continue
        points = [(number, table[system].interval()) for number, table in tables.items() if system in table]
        if len(points) < 2:
            continue
        numbers = [number for number, _ in points]
        axes.plot(numbers, [100 * interval.mean for _, interval in points], ms=5, **line)
        if kind == "nessa":
            ends = [[100 * getattr(interval, end) for _, interval in points] for end in ("low", "high")]
            axes.fill_between(numbers, *ends, color=line["color"], alpha=0.15, lw=0)


def spaces_figure(enroll, runtime, speakers, alignment, title=""):
    """Both models' embeddings of the same utterances in two dimensions, before and after an alignment.

    Arguments
    ---------
    enroll, runtime : torch.Tensor
        ``[K, Dx]`` and ``[K, Dy]``, row by row the same utterances.
    speakers : list of str
        ``[K]``, of which the first eight are drawn.
    alignment : Alignment
    title : str

    Returns
    -------
    matplotlib.figure.Figure
    """
    names = list(dict.fromkeys(speakers))[: len(_SPEAKER_COLOURS)]
    rows = [row for row, name in enumerate(speakers) if name in names]
    drawn = [speakers[row] for row in rows]
    width = max(enroll.shape[1], runtime.shape[1])
    before = [normalize(pad(each[rows], (0, width - each.shape[1])), dim=-1) for each in (enroll, runtime)]
    after = [
        normalize(torch.as_tensor(each), dim=-1) for each in (alignment.enroll(enroll), alignment.runtime(runtime))
    ]
    after = [each[rows] for each in after]
    with matplotlib.rc_context(STYLE):
        figure = new_figure(6.3)
        for axes, name, sides in zip(
            figure.subplots(1, 2), ("Before the alignment", "After it"), (before, after), strict=True
        ):
            points = _in_two_dimensions(torch.cat(sides).double().numpy())
            for side, marker in enumerate(("o", "x")):
                own = points[side * len(rows) : (side + 1) * len(rows)]
                for speaker, colour in zip(names, _SPEAKER_COLOURS, strict=False):
                    is_own = np.array([each == speaker for each in drawn])
                    ink = {"edgecolors": colour, "facecolors": "none"} if marker == "o" else {"color": colour}
                    axes.scatter(*own[is_own].T, s=42, marker=marker, linewidths=1.4, **ink)
            axes.set(title=name, xticks=[], yticks=[])
            axes.set_xlabel("t-SNE of cosine distances (no unit)")
            axes.grid(False)
        handles = [
            Line2D([], [], color=GREY, marker="o", mfc="none", ls="", ms=7, label="enrollment model"),
            Line2D([], [], color=GREY, marker="x", ls="", ms=7, label="runtime model"),
            *(
                Line2D([], [], color=colour, marker="s", ls="", ms=7, label=f"speaker {speaker}")
                for speaker, colour in zip(names, _SPEAKER_COLOURS, strict=False)
            ),
        ]
        figure.legend(handles=handles, loc="outside lower center", ncols=5)
        if title:
            figure.suptitle(title, fontweight="bold")
    return figure


def _in_two_dimensions(vectors):
    """t-SNE, which keeps neighbours together; few enough points that it takes a second."""
    perplexity = max(min(15.0, (len(vectors) - 1) / 3), 1.0)
    tsne = TSNE(perplexity=perplexity, metric="cosine", init="random", random_state=0, n_jobs=1)
    return tsne.fit_transform(vectors)


def alignment_figure(curves, history=()):
    """The report of one alignment: DET curves, and what training minimised.

    Arguments
    ---------
    curves : dict
        From a system's name to its scores and the labels, both ``[T]``, of the same trials. Alignments are named as
        in :data:`LABELS`, the two systems before them are of one model.
    history : list of dict
        ``step`` and other numbers.

    Returns
    -------
    matplotlib.figure.Figure
    """
    labels = next(iter(curves.values()))[1]
    grid = _det_grid(labels)
    columns = [name for name in (history[0] if history else {}) if name != "step"]
    lines = {label: _without_marker(_LINES[kind]) for kind, label in LABELS.items()}
    others = iter(_BOTH.values())
    with matplotlib.rc_context(STYLE):
        figure = new_figure(6.4, 6.5 * (1 + bool(columns)))
        all_axes = figure.subplots(1, 1 + bool(columns), squeeze=False)[0]
        drawn = {name: _false_reject_at(grid, *each) for name, each in curves.items()}
        for name, rates in drawn.items():
            _plot_det(all_axes[0], grid, rates, label=name, **(lines.get(name) or next(others, {"ls": ":"})))
        _finish_det(all_axes[0], "Detection error tradeoff, test set", grid, drawn.values(), np.sum(labels))
        all_axes[0].set_xlabel("false-accept rate (%)")
        all_axes[0].legend(loc="upper center", bbox_to_anchor=(0.5, -0.12), ncols=2, handlelength=3)
        for axes in all_axes[1:]:
            for name, colour in zip(columns, (ORANGE, BLUE, GREEN), strict=False):
                points = [(row["step"], row[name]) for row in history if math.isfinite(row[name])]
                axes.plot(*zip(*points, strict=True), color=colour, label=name)
            axes.set(title="Training of NESSA", xlabel="step", ylabel="cost of held-out alignment speakers")
            axes.legend()
    return figure
