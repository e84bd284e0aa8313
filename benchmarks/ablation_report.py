"""Tables and figures of an ablation, from its three csv files alone.

    python benchmarks/ablation_report.py FOLDER

FOLDER holds results.csv and, as far as they are there, test_scores.csv and runs.csv, as benchmarks/ablation.py writes
them. Written into it are tables.md, learning_curves.png, label_switches.png, blocks.png and differences.png, of
whatever runs there are.
"""

import csv
import math
import sys
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import matplotlib
from ablation_figures import blocks, differences, label_switches, learning_curves
from ablation_plan import ARMS, DSD_LO, PLAIN_PIT, REGIMES, Run

from dsd_modules.report import epoch_series
from shared_modules.figures import STYLE, save_figure
from shared_modules.files import write_whole
from shared_modules.statistics import Interval, speaker_bootstrap, t_interval

_MAIN = REGIMES["main"].label
_BY_EPOCH = {
    "label_switch_rate": "Label switches in training, % of samples",
    "probe_label_switch_rate": "Label switches on the probe set, % of samples",
    "excluded_rate": "Excluded (dropped or reordered), % of samples",
    "train_si_sdr": "SI-SDR of the training samples, dB",
    "excluded_metric": "SI-SDR of the excluded ones, dB",
    "excluded_gap": "How much worse the excluded ones are than their best, median, dB",
    "valid_layer_decoupling_block1": "Layer-decoupling of block 1, % of dev samples",
    "valid_si_sdri": "Dev SI-SDRi, dB",
}


def read_rows(path, text=(), numbers=()):
    """Read one of the csv files: of each `Run` its rows. ``text`` and ``numbers`` are columns that must be there."""
    try:
        with open(path, encoding="utf-8", newline="") as stream:
            header, *lines = [line for line in csv.reader(stream) if line] or [None]
    except OSError as error:
        raise ValueError(f"{path} cannot be read: {error.strerror}.") from error
    except (UnicodeDecodeError, csv.Error) as error:
        raise ValueError(f"{path} is no CSV table: {error}.") from error
    if header is None:
        return {}
    if missing := [name for name in (*Run._fields, *text, *numbers) if name not in header]:
        raise ValueError(f"{path} lacks the column {missing[0]!r}.")
    rows = {}
    for number, line in enumerate(lines, 1):
        if len(line) != len(header):
            raise ValueError(f"{path} has {len(header)} columns, but row {number} has {len(line)}.")
        row = dict(zip(header, line, strict=True))
        try:
            run = Run(row.pop("regime"), row.pop("arm"), int(row.pop("seed")))
            row = {name: cell if name in text else float(cell or "nan") for name, cell in row.items()}
        except ValueError as error:
            raise ValueError(f"{path} has a cell that is no number in row {number}: {error}.") from None
        if run.regime not in REGIMES or run.arm not in ARMS:
            raise ValueError(f"{path} has a run in row {number} that no plan knows: {run.regime}, {run.arm}.")
        rows.setdefault(run, []).append(row)
    return rows


@dataclass
class Difference:
    """SI-SDRi minus plain PIT's, dB: of each seed, and its mean with two intervals (dev set: over seeds alone)."""

    by_seed: dict
    over_seeds: Interval
    over_speakers: Interval


class Ablation:
    """The runs in a folder of csv files; a file that is malformed, or results.csv without runs, is a ValueError."""

    def __init__(self, folder):
        path = Path(folder) / "results.csv"
        self.histories = read_rows(path, numbers=("epoch", "valid_si_sdri"))
        if not self.histories:
            raise ValueError(f"{path} has no run.")
        for run, history in self.histories.items():
            if not all(row["epoch"].is_integer() for row in history):
                raise ValueError(f"{path} has an epoch that is no whole number: {', '.join(map(str, run))}.")
            history.sort(key=lambda row: row["epoch"])
            self.histories[run] = [{**row, "epoch": int(row["epoch"])} for row in history]
        self.scores = self.about = {}
        if (path := Path(folder) / "test_scores.csv").exists():
            self.scores = read_rows(path, text=("id", "speakers"), numbers=("si_sdri", "sdri"))
        if (path := Path(folder) / "runs.csv").exists():
            self.about = read_rows(path, ("device", "threads", "jobs", "commit", "command"), numbers=("seconds",))

    def arms(self, regime):
        """The regime's arms that have runs, in the plan's order."""
        return [arm for arm in ARMS if self.seeds(regime, arm)]

    def seeds(self, regime, arm):
        """The seeds with which an arm was trained."""
        return sorted(run.seed for run in self.histories if (run.regime, run.arm) == (regime, arm))

    def scored_set(self, regime):
        """``test``, or ``dev`` as long as no run of the regime has test scores."""
        return "test" if any(run.regime == regime for run in self.scores) else "dev"

    def history(self, regime, arm, seeds=None):
        """The arm's history, averaged over seeds (None: all)."""
        rows = {}
        for seed in self.seeds(regime, arm) if seeds is None else seeds:
            for row in self.histories.get(Run(regime, arm, seed), ()):
                rows.setdefault(row["epoch"], []).append(row)
        return [
            {name: _mean(row[name] for row in of_seeds) for name in of_seeds[0]} | {"epoch": epoch}
            for epoch, of_seeds in sorted(rows.items())
        ]

    def score(self, regime, arm, column, scored_set, seeds=None):
        """A test score, or the dev score of the last epoch: the mean over seeds (None: all), NaN where missing."""
        runs = [Run(regime, arm, seed) for seed in (self.seeds(regime, arm) if seeds is None else seeds)]
        if scored_set == "dev":
            return _mean(_last(self.histories.get(run), f"valid_{column}") for run in runs)
        return _mean(_mean(row.get(column, math.nan) for row in self.scores.get(run, ())) for run in runs)

    def difference(self, regime, arm, seeds=None):
        """The `Difference` to plain PIT with the same seeds (None: all), on the regime's scored set."""
        by_seed, by_mixture, speakers = {}, {}, {}
        for seed in (self.seeds(regime, arm) if seeds is None else seeds) if arm != PLAIN_PIT else ():
            run, reference = Run(regime, arm, seed), Run(regime, PLAIN_PIT, seed)
            if self.scored_set(regime) == "dev":
                score, reference_score = (_last(self.histories.get(each), "valid_si_sdri") for each in (run, reference))
                by_seed[seed] = score - reference_score
                continue
            reference_scores = {row["id"]: row["si_sdri"] for row in self.scores.get(reference, ())}
            paired = [row for row in self.scores.get(run, ()) if row["id"] in reference_scores]
            by_seed[seed] = _mean(row["si_sdri"] - reference_scores[row["id"]] for row in paired)
            for row in paired:
                by_mixture.setdefault(row["id"], []).append(row["si_sdri"] - reference_scores[row["id"]])
                speakers[row["id"]] = row["speakers"].split()
        by_seed = {seed: value for seed, value in by_seed.items() if math.isfinite(value)}
        mixtures = sorted(by_mixture)
        over_speakers = speaker_bootstrap([_mean(by_mixture[id]) for id in mixtures], [speakers[id] for id in mixtures])
        return Difference(by_seed, t_interval(list(by_seed.values())), over_speakers)

    def relative_seconds(self, regime, arm):
        """The fastest epoch's seconds, which a busy machine moves least, as a multiple of plain PIT's."""
        common = set(self.seeds(regime, arm)) & set(self.seeds(regime, PLAIN_PIT))
        seconds, reference_seconds = (
            [value for seed in common for value in epoch_series(self.histories[Run(regime, name, seed)], "seconds")[1]]
            for name in (arm, PLAIN_PIT)
        )
        return min(seconds) / min(reference_seconds) if seconds and reference_seconds else math.nan


def _mean(values):
    values = [value for value in values if math.isfinite(value)]
    return sum(values) / len(values) if values else math.nan


def _last(history, column):
    return history[-1].get(column, math.nan) if history else math.nan


def _second_half(history, column):
    """The mean over the second half of the epochs, without the middle one of an odd number."""
    return _mean(row.get(column, math.nan) for row in history[math.ceil(len(history) / 2) :])


def _number(value, digits=2, unit="", sign=""):
    return f"{value:{sign}.{digits}f}{unit}" if math.isfinite(value) else "-"


_signed = partial(_number, sign="+")


def _percent(share):
    return _number(100 * share, 1, " %")


def _interval(interval):
    return f"[{_signed(interval.low)}, {_signed(interval.high)}]" if math.isfinite(interval.low) else "-"


def _table(title, how_to_read, columns, rows):
    """A section of markdown; none without rows. The columns are separated by bars."""
    columns = columns.split("|")
    lines = [columns, ["---"] + ["---:"] * (len(columns) - 1), *rows]
    return [f"## {title}\n\n{how_to_read}\n\n" + "".join(f"| {' | '.join(line)} |\n" for line in lines)] if rows else []


def tables(ablation):
    """All tables, in markdown."""
    sections = _quality(ablation) + _behaviour(ablation) + _every_seed(ablation)
    for column, title in _BY_EPOCH.items():
        sections += _by_epoch(ablation, "main", column, title)
    sections += _regimes(ablation) + _by_epoch(ablation, "search", "valid_si_sdri", "Search: dev SI-SDRi, dB")
    return "\n".join(sections + _runs(ablation))


def _quality(ablation):
    scored_set = ablation.scored_set("main")
    rows = []
    for arm in ablation.arms("main"):
        score, difference = partial(ablation.score, "main", arm), ablation.difference("main", arm)
        block1 = score("si_sdri_block1", scored_set)
        scores = score("si_sdri", "dev"), score("si_sdri", "test"), score("sdri", "test")
        rows.append(
            [
                *(ARMS[arm].label, str(len(ablation.seeds("main", arm))), *map(_number, scores)),
                *(_signed(difference.over_seeds.mean), _interval(difference.over_seeds)),
                *(_interval(difference.over_speakers), _number(block1)),
                _signed(score("si_sdri", scored_set) - block1),
            ]
        )
    return _table(
        f"Quality ({_MAIN})",
        "Means over seeds, dB. The difference is to plain PIT with the same seeds, with two 95 % intervals: over seeds "
        "(would other trainings agree?) and over test speakers (would other voices?). Dev is of the last epoch, test "
        f"of the weights that are best on dev. From the difference on, all is SI-SDRi on the {scored_set} set.",
        "arm|seeds|dev SI-SDRi|test SI-SDRi|test SDRi|difference|over seeds|over speakers|block 1|last block - block 1",
        rows,
    )


def _behaviour(ablation):
    rows = []
    for arm in ablation.arms("main"):
        history = ablation.history("main", arm)
        rates = ("label_switch_rate", "probe_label_switch_rate", "excluded_rate")
        rows.append(
            [
                *(ARMS[arm].label, *(_percent(_second_half(history, column)) for column in rates)),
                _percent(_last(history, "valid_layer_decoupling_block1")),
                _number(ablation.relative_seconds("main", arm), unit=" x"),
            ]
        )
    return _table(
        f"Behaviour ({_MAIN})",
        "Means over seeds: label switches and excluded samples in the second half of the epochs, the dev samples that "
        "block 1 assigns unlike the final block in the last epoch, and the time of the fastest epoch over plain PIT's "
        "(runs share the machine: bench_step.py measures it well). What cascaded PIT excludes is its fixed stage.",
        "arm|switches in training|switches, probe set|excluded|layer-decoupling|time of an epoch",
        rows,
    )


def _every_seed(ablation):
    rows = []
    for arm in ablation.arms("main"):
        for seed in (seed for seed in ablation.seeds("main", arm) if Run("main", arm, seed) in ablation.scores):
            scores = (ablation.score("main", arm, column, "test", [seed]) for column in ("si_sdri", "sdri"))
            rows.append([ARMS[arm].label, str(seed), *map(_number, scores)])
    return _table(f"Every seed ({_MAIN})", "Test means, dB; compare arms within a seed.", "arm|seed|SI-SDRi|SDRi", rows)


def _by_epoch(ablation, regime, column, title):
    histories = {arm: {row["epoch"]: row for row in ablation.history(regime, arm)} for arm in ablation.arms(regime)}
    epochs = sorted({epoch for history in histories.values() for epoch in history})
    scale, digits = (100, 1) if "%" in title else (1, 2)
    rows = []
    for arm, history in histories.items():
        values = [history.get(epoch, {}).get(column, math.nan) for epoch in epochs]
        rows.append([ARMS[arm].label, *(_number(scale * value, digits) for value in values)])
    how_to_read = f"By epoch, mean over seeds ({REGIMES[regime].label})."
    if column.endswith(("switch_rate", "excluded_rate")):
        how_to_read += " There is nothing to compare with in epoch 1."
    return _table(title, how_to_read, "|".join(["arm", *map(str, epochs)]), rows)


def _regimes(ablation):
    pair = [arm for arm in (PLAIN_PIT, DSD_LO) if arm in ablation.arms("main")]
    rows = [("main", arm, [1]) for arm in pair if 1 in ablation.seeds("main", arm)]
    rows += [("main", arm, seeds) for arm in pair if (seeds := ablation.seeds("main", arm)) != [1]]
    others = [regime for regime in REGIMES if regime not in ("search", "main")]
    rows += [(regime, arm, ablation.seeds(regime, arm)) for regime in others for arm in ablation.arms(regime)]
    return _table(
        "Regimes",
        "SI-SDRi in dB and the difference to plain PIT in the same regime with the same seeds, with its 95 % interval "
        "over test speakers (it knows nothing of other seeds); label switches in training and excluded samples in the "
        f"second half of the epochs. {_over_all_pairs(ablation)}",
        "regime|arm|seeds|scored on|SI-SDRi|difference|over speakers|block 1|switches|to plain PIT's|excluded",
        [_regime_row(ablation, *row) for row in rows],
    )


def _over_all_pairs(ablation):
    """DSD + LO against plain PIT in every regime and with every seed, in a sentence."""
    pairs = [value for regime in REGIMES for value in ablation.difference(regime, DSD_LO).by_seed.values()]
    return (
        f"{ARMS[DSD_LO].label} is ahead of plain PIT in {sum(value > 0 for value in pairs)} of {len(pairs)} pairs of "
        f"regime and seed, on average by {_signed(_mean(pairs), unit=' dB')}."
    )


def _regime_row(ablation, regime, arm, seeds):
    scored_set, difference = ablation.scored_set(regime), ablation.difference(regime, arm, seeds)
    si_sdri, block1 = (
        _number(ablation.score(regime, arm, column, scored_set, seeds)) for column in ("si_sdri", "si_sdri_block1")
    )
    history, reference = (ablation.history(regime, name, seeds) for name in (arm, PLAIN_PIT))
    switches, reference_switches = (_second_half(each, "label_switch_rate") for each in (history, reference))
    ratio = switches / reference_switches if reference_switches else math.nan
    return [
        *(REGIMES[regime].label, ARMS[arm].label, ", ".join(map(str, seeds)), scored_set, si_sdri),
        *(_signed(difference.over_seeds.mean), _interval(difference.over_speakers), block1),
        *(_percent(switches), _number(ratio, unit=" x"), _percent(_second_half(history, "excluded_rate"))),
    ]


def _runs(ablation):
    def about(runs):
        rows = [row for run in runs for row in ablation.about[run]]
        listed = (
            ", ".join(sorted({row[column] for row in rows})) for column in ("device", "threads", "jobs", "commit")
        )
        return len(rows), sum(row["seconds"] for row in rows), *listed

    rows = []
    for regime in REGIMES:
        if runs := [run for run in ablation.about if run.regime == regime]:
            number, seconds, *listed = about(runs)
            rows.append([REGIMES[regime].label, str(number), _number(seconds, 0), *listed])
    number, seconds, device, _, _, commit = about(ablation.about)
    return _table(
        "Runs",
        f"{number} runs took {seconds / 3600:.1f} hours, added up also where several ran at a time, "
        f"on {device}, commit {commit}.",
        "regime|runs|seconds|device|threads of a run|runs at a time|commit",
        rows,
    )


def write_report(folder):
    """Write tables.md and the figures beside the csv files; a ValueError tells what is wrong with these."""
    folder = Path(folder)
    ablation = Ablation(folder)
    with write_whole(folder / "tables.md") as stream:
        stream.write(tables(ablation))
    draw_all = (learning_curves, label_switches, blocks) if ablation.arms("main") else ()
    with matplotlib.rc_context(STYLE):
        for draw in (*draw_all, differences):
            if figure := draw(ablation):
                save_figure(figure, folder / f"{draw.__name__}.png")


def main(arguments):
    """The command; returns the exit status."""
    if len(arguments) != 1:
        print("usage: python benchmarks/ablation_report.py FOLDER", file=sys.stderr)
        return 2
    try:
        write_report(arguments[0])
    except (ValueError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
