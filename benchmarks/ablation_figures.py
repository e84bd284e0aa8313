"""The figures of an ablation: what ablation_report.py draws. Each function takes its `Ablation`, returns a figure."""

import math

from ablation_plan import ARMS, DSD_LO, MAIN_ARMS, PLAIN_PIT, REGIMES, Run
from matplotlib.lines import Line2D

from dsd_modules.report import (
    block_colors,
    count_blocks,
    epoch_series,
    finish_epoch_axes,
    plot_by_epoch,
)
from shared_modules.figures import AMBER, BLUE, GREEN, GREY, ORANGE, PURPLE, SKY_BLUE, new_figure

# The main arms are solid, the others dashed, in more of Okabe and Ito's colours.
_LINES = {
    PLAIN_PIT: {"color": GREY},
    "dsd_drop": {"color": BLUE},
    "lo": {"color": GREEN},
    DSD_LO: {"color": ORANGE},
    "cascaded_pit": {"color": PURPLE, "ls": (0, (4, 1.5))},
    "prob_pit": {"color": SKY_BLUE, "ls": (0, (4, 1.5))},
    "dsd_reorder": {"color": AMBER, "ls": (0, (2, 1))},
    "dsd_reorder_lo": {"color": "black", "ls": (0, (2, 1))},
}


def _line(arm):
    return _LINES.get(arm, {"color": "#F0E442", "ls": ":"})


def _plot_shares(axes, ablation, arms, column, title, ylabel, first_epoch=1):
    """A line for each arm, the mean over seeds of a share of samples; without legend."""
    for arm in arms:
        history = [row for row in ablation.history("main", arm) if row["epoch"] >= first_epoch]
        plot_by_epoch(axes, history, column, None, scale=100, **_line(arm))
    finish_epoch_axes(axes, title, ylabel, from_zero=True)


def _legend_of_arms(parent, arms, **options):
    handles = [Line2D([], [], label=ARMS[arm].label, marker="o", ms=4, **_line(arm)) for arm in arms]
    parent.legend(handles=handles, **options)


def learning_curves(ablation):
    """Dev SI-SDRi by epoch, as mean over seeds (thick) and for each seed: the main arms, and beside them the others."""
    arms = ablation.arms("main")
    panels = [("Dev SI-SDRi", [arm for arm in arms if arm in MAIN_ARMS], None)]
    if others := [arm for arm in arms if arm not in MAIN_ARMS]:
        seeds = sorted(set.intersection(*(set(ablation.seeds("main", arm)) for arm in others)))
        shown = [arm for arm in (PLAIN_PIT, DSD_LO) if arm in arms] + others
        panels.append((f"Controls and reordering, seed {', '.join(map(str, seeds))}", shown, seeds))
    figure = new_figure(5)
    for axes, (title, arms, of_seeds) in zip(
        figure.subplots(1, len(panels), sharey=True, squeeze=False)[0], panels, strict=True
    ):
        for arm in arms:
            history = ablation.history("main", arm, of_seeds)
            plot_by_epoch(axes, history, "valid_si_sdri", ARMS[arm].label, **_line(arm))
            seeds = [seed for seed in ablation.seeds("main", arm) if of_seeds is None or seed in of_seeds]
            for seed in seeds if len(seeds) > 1 else ():
                series = epoch_series(ablation.histories[Run("main", arm, seed)], "valid_si_sdri")
                axes.plot(*series, color=_line(arm)["color"], lw=0.7, alpha=0.5)
        finish_epoch_axes(axes, title, "SI-SDRi (dB)")
        axes.label_outer()
        axes.set_xlabel("epoch")
    return figure


def label_switches(ablation):
    """Label switches in training and on the probe set, and excluded samples, from epoch 2 on: epoch 1 has none."""
    figure = new_figure(8)
    *panels, legend = figure.subplots(2, 2).flat
    arms = ablation.arms("main")
    excluding = [arm for arm in arms if any(row.get("excluded_rate", 0) > 0 for row in ablation.history("main", arm))]
    for axes, column, drawn, title in (
        (panels[0], "label_switch_rate", arms, "Label switches in training"),
        (panels[1], "probe_label_switch_rate", arms, "Label switches on the probe set"),
        (panels[2], "excluded_rate", excluding or arms, "Excluded samples"),
    ):
        _plot_shares(axes, ablation, drawn, column, title, "share of samples (%)", first_epoch=2)
    legend.axis("off")
    _legend_of_arms(legend, arms, loc="center", fontsize=12)
    return figure


def blocks(ablation):
    """SI-SDRi of each block of each arm, and layer-decoupling by epoch."""
    figure = new_figure(5.4)
    scores, decoupling = figure.subplots(1, 2)
    arms, scored_set = ablation.arms("main"), ablation.scored_set("main")
    num_blocks = count_blocks([row for arm in arms for row in ablation.history("main", arm)], "valid_si_sdri_block")
    for block, color in enumerate(block_colors(num_blocks), 1):
        values = [ablation.score("main", arm, f"si_sdri_block{block}", scored_set) for arm in arms]
        scores.plot(values, range(len(arms)), ls="", marker="o", ms=8, color=color, label=f"block {block}")
    for height, line in enumerate(zip(*(line.get_xdata() for line in scores.lines), strict=True)):
        scores.plot(line, [height] * num_blocks, color=GREY, lw=1.2, zorder=1)
    numbers = [len(ablation.seeds("main", arm)) for arm in arms]
    labels = [f"{ARMS[arm].label} ({n} seed{'s' * (n > 1)})" for arm, n in zip(arms, numbers, strict=True)]
    scores.set_yticks(range(len(arms)), labels)
    scores.set(title=f"SI-SDRi of each block, {scored_set} set", xlabel="SI-SDRi (dB)", ylim=(len(arms) - 0.4, -0.6))
    scores.legend(loc="upper center", bbox_to_anchor=(0.5, -0.12), ncols=max(num_blocks, 1))
    column, title = "valid_layer_decoupling_block1", "Layer-decoupling of block 1, dev set"
    _plot_shares(decoupling, ablation, arms, column, title, "assigned unlike final block (%)")
    _legend_of_arms(figure, arms, loc="outside lower center", ncols=4)
    return figure


def differences(ablation):
    """What every arm gains over plain PIT, and what DSD drop + LO gains in every regime; None if there is neither."""
    by_arm = [(ARMS[arm].label, "main", arm) for arm in ablation.arms("main")]
    by_regime = [(regime.label, name, DSD_LO) for name, regime in REGIMES.items()]
    panels = {}
    for title, rows in (
        (f"Each arm minus plain PIT ({REGIMES['main'].label})", by_arm),
        (f"{ARMS[DSD_LO].label} minus plain PIT, in every regime", by_regime),
    ):
        found = [(label, regime, ablation.difference(regime, arm)) for label, regime, arm in rows]
        if found := [row for row in found if row[2].by_seed]:
            panels[title] = found
    if not panels:
        return None
    heights = [len(rows) for rows in panels.values()]
    figure = new_figure(0.45 * sum(heights) + 0.7 * len(panels) + 0.9)
    all_axes = figure.subplots(len(panels), 1, sharex=True, squeeze=False, height_ratios=heights)[:, 0]
    limits = _limits([difference for rows in panels.values() for _, _, difference in rows])
    for axes, (title, rows) in zip(all_axes, panels.items(), strict=True):
        labels = []
        for height, (label, regime, difference) in enumerate(rows):
            _draw_difference(axes, height, difference, limits)
            seeds = f"{len(difference.by_seed)} seed{'s' if len(difference.by_seed) > 1 else ''}"
            where = "" if ablation.scored_set(regime) == "test" else ", dev set"
            labels.append(f"{label}  ({seeds}{where})")
        axes.axvline(0, color="black", lw=1)
        axes.set_yticks(range(len(rows)), labels)
        axes.set(title=title, xlim=limits, ylim=(len(rows) - 0.4, -0.6))
        axes.grid(False, axis="y")
    all_axes[-1].set_xlabel("SI-SDRi minus plain PIT's of the same seeds (dB), test set unless marked")
    handles = [
        Line2D([], [], color=BLUE, marker="o", ls="", ms=9, label="mean"),
        Line2D([], [], color="black", marker="o", mfc="white", ls="", ms=5, label="a seed"),
        Line2D([], [], color=BLUE, lw=9, alpha=0.25, label="95 % over seeds (t)"),
        Line2D([], [], color=BLUE, lw=1.5, marker="|", ms=10, label="95 % over test speakers (bootstrap)"),
    ]
    figure.legend(handles=handles, loc="outside lower center", ncols=4)
    return figure


def _draw_difference(axes, height, difference, limits):
    """One row: both intervals, an arrow where one runs out, the mean, the seeds below it, the number on the right."""
    seeds, speakers = difference.over_seeds, difference.over_speakers
    axes.plot([seeds.low, seeds.high], [height] * 2, color=BLUE, lw=9, alpha=0.25, solid_capstyle="butt")
    for limit, runs_out, marker in (
        (limits[0], seeds.low < limits[0], "<"),
        (limits[1], seeds.high > limits[1], ">"),
    ):
        if runs_out:
            axes.plot(limit, height, color=BLUE, marker=marker, ms=8, clip_on=False, zorder=3)
    axes.plot([speakers.low, speakers.high], [height] * 2, color=BLUE, lw=1.5, marker="|", ms=10)
    axes.plot(seeds.mean, height, color=BLUE, marker="o", ms=9)
    if len(difference.by_seed) > 1:
        values = list(difference.by_seed.values())
        axes.plot(values, [height + 0.3] * len(values), color="black", marker="o", mfc="white", mew=0.9, ms=5, ls="")
    axes.text(1.02, height, f"{seeds.mean:+.2f}", transform=axes.get_yaxis_transform(), va="center")


def _limits(found):
    """Room for zero, seeds and speakers; an interval over seeds that is much wider runs out of the figure."""
    narrow = [0.0, *(value for each in found for value in each.by_seed.values())]
    narrow += [end for each in found for end in (each.over_speakers.low, each.over_speakers.high)]
    narrow = [value for value in narrow if math.isfinite(value)]
    ends = [end for each in found for end in (each.over_seeds.low, each.over_seeds.high) if math.isfinite(end)]
    room = max(max(narrow) - min(narrow), 0.1)
    low = max(min([*narrow, *ends]), min(narrow) - room / 2)
    high = min(max([*narrow, *ends]), max(narrow) + room / 2)
    return low - 0.05 * room, high + 0.05 * room
